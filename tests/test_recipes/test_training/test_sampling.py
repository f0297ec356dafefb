"""The order of the samples is a function of the seed and the update index."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sma.recipes.training.sampling import UpdateSampler
from tests.cases import generator


def _lengths(samples, seed=0, longest=50):
    return torch.randint(1, longest, (samples,), generator=generator(seed))


@st.composite
def _settings(draw):
    return {
        "lengths": _lengths(draw(st.integers(1, 40)), draw(st.integers(0, 9))),
        "batch_size": draw(st.integers(1, 12)),
        "updates": draw(st.integers(1, 60)),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "bucket": draw(st.integers(1, 6)),
    }


@given(settings=_settings(), start=st.integers(0, 60))
def test_starting_at_an_update_gives_the_rest_of_the_whole_order(settings, start):
    assert list(UpdateSampler(**settings, start=start)) == list(UpdateSampler(**settings))[start:]


@given(settings=_settings())
def test_every_epoch_uses_every_sample_at_most_once(settings):
    sampler = UpdateSampler(**settings)
    batches, samples = list(sampler), len(settings["lengths"])
    size = min(settings["batch_size"], samples)
    per_epoch = samples // size
    assert len(batches) == settings["updates"]
    assert {len(batch) for batch in batches} == {size}
    for first in range(0, len(batches), per_epoch):
        used = [sample for batch in batches[first : first + per_epoch] for sample in batch]
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(samples))
        if first + per_epoch <= len(batches):  # a complete epoch: all samples but the last incomplete batch
            assert len(used) == samples - samples % size


@given(settings=_settings(), start=st.integers(0, 60))
def test_length_is_the_total_whatever_the_start(settings, start):
    assert len(UpdateSampler(**settings, start=start)) == settings["updates"]


def test_the_same_sampler_can_be_read_twice():
    sampler = UpdateSampler(_lengths(20), 3, 30, seed=1)
    assert list(sampler) == list(sampler)


def test_order_does_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    list(UpdateSampler(_lengths(20), 3, 30, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_another_order():
    first, second = (list(UpdateSampler(_lengths(64), 8, 8, seed=seed)) for seed in (0, 1))
    assert first != second


def test_every_epoch_has_another_order_and_omits_other_samples():
    batches = list(UpdateSampler(_lengths(22), 4, 50, seed=0))
    epochs = [batches[first : first + 5] for first in range(0, 50, 5)]
    assert len({str(epoch) for epoch in epochs}) == 10
    assert len({frozenset(sample for batch in epoch for sample in batch) for epoch in epochs}) > 1


def test_every_sample_is_seen_in_the_long_run():
    seen = {sample for batch in UpdateSampler(_lengths(22), 4, 100, seed=0) for sample in batch}
    assert seen == set(range(22))


@pytest.mark.parametrize("samples", [1, 5])
def test_batch_larger_than_the_data_holds_all_samples(samples):
    batches = list(UpdateSampler(_lengths(samples), 100, 3, seed=0))
    assert [sorted(batch) for batch in batches] == [list(range(samples))] * 3


def _padding(lengths, bucket):
    batches = list(UpdateSampler(lengths, 16, 60, seed=0, bucket=bucket))
    return sum(int((lengths[batch].max() - lengths[batch]).sum()) for batch in batches) / sum(
        int(lengths[batch].sum()) for batch in batches
    )


def test_sorting_more_batches_together_leaves_less_padding():
    lengths = _lengths(960, longest=100)
    alone, some, many = (_padding(lengths, bucket) for bucket in (1, 5, 60))
    assert many < some / 2 < alone / 4


def test_batches_of_an_epoch_are_not_sorted_by_length():
    lengths = _lengths(960, longest=100)
    means = [float(lengths[batch].double().mean()) for batch in UpdateSampler(lengths, 16, 60, seed=0, bucket=60)]
    rises = sum(second > first for first, second in pairwise(means))
    assert 15 < rises < 44  # 29.5 on average over random orders


def test_data_loader_uses_the_batches_and_length_of_the_sampler():
    lengths = _lengths(20)
    loader = DataLoader(list(range(20)), batch_sampler=UpdateSampler(lengths, 4, 9, seed=0, start=6), collate_fn=list)
    assert len(loader) == 9
    assert list(loader) == list(UpdateSampler(lengths, 4, 9, seed=0))[6:]
