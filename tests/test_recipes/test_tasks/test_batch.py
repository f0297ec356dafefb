"""Batches of samples of different lengths."""

import math

import pytest
import torch
from torch import Tensor

from sma.errors import DataError
from sma.recipes.tasks.batch import UNSCORED, collate, scored_losses


@pytest.mark.parametrize(
    "lengths", [pytest.param([3, 1, 5, 0], id="mixed"), pytest.param([4, 4], id="equal"), pytest.param([0], id="empty")]
)
def test_batch_pads_on_the_right_to_its_longest_sample(lengths):
    items = [(torch.arange(1, length + 1), number) for number, length in enumerate(lengths)]
    batch = collate(items)
    assert batch.inputs.shape == batch.valid.shape == (len(lengths), max(lengths))
    for row, (ids, target) in enumerate(items):
        assert torch.equal(batch.inputs[row][batch.valid[row]], ids)
        assert batch.valid[row].tolist() == [True] * len(ids) + [False] * (max(lengths) - len(ids))
        assert batch.inputs[row, len(ids) :].count_nonzero() == 0
        assert batch.targets[row] == target
    assert (batch.inputs.dtype, batch.valid.dtype, batch.targets.dtype) == (torch.int64, torch.bool, torch.int64)


def test_real_numbers_keep_their_dtype_in_a_batch():
    batch = collate([(torch.ones(2), 1), (torch.ones(3), 0)])
    assert batch.inputs.tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


def test_batch_is_shown_in_one_line():
    batch = collate([(torch.ones(2), 1), (torch.ones(3), 0)])
    shown = "Batch(inputs=float32[2, 3], valid=bool[2, 3], targets=int64[2], device='cpu')"
    assert (repr(batch), repr(batch.to("meta"))) == (shown, shown.replace("cpu", "meta"))


def test_all_parts_of_a_batch_move_to_a_device():
    batch = collate([(torch.ones(2), 1)]).to("meta")
    assert {part.device.type for part in batch} == {"meta"}


@pytest.mark.parametrize(
    ("items", "complaint"),
    [
        pytest.param([], "a batch of no samples; give collate at least one", id="none"),
        pytest.param(
            [(torch.ones(2), 1), (torch.ones(2, 3), 0)],
            r"sample 1 of the batch has shape \(2, 3\); collate takes 1-D",
            id="2-d",
        ),
    ],
)
def test_invalid_batches_are_refused(items, complaint):
    with pytest.raises(DataError, match=complaint):
        collate(items)


@pytest.mark.parametrize("targets", [torch.tensor([3, 1]), torch.tensor([[UNSCORED, 2, UNSCORED], [1, UNSCORED, 0]])])
def test_losses_are_cross_entropies_of_the_scored_answers_and_0_elsewhere(targets: Tensor) -> None:
    logits = torch.randn(*targets.shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    losses, scored = scored_losses(logits, targets)
    wanted = torch.zeros(targets.shape, dtype=torch.float64)
    for index in (targets != UNSCORED).nonzero():
        answer = logits[tuple(index)]
        wanted[tuple(index)] = answer.logsumexp(0) - answer[targets[tuple(index)]]
    torch.testing.assert_close(losses, wanted)
    assert torch.equal(scored, targets != UNSCORED)
    torch.testing.assert_close(
        *(torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (losses, wanted))
    )


def test_unscored_logits_may_be_nan() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, 1] = torch.nan
    logits.requires_grad_()
    losses, _ = scored_losses(logits, torch.tensor([[2, UNSCORED]]))
    assert losses.tolist() == [[pytest.approx(math.log(4)), 0.0]]
    assert torch.autograd.grad(losses.sum(), logits)[0].isfinite().all()
