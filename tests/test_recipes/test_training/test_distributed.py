"""Distributed training: the shards of all ranks make up the batch, and a single process takes all of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sma.errors import SpecError
from sma.recipes.tasks.contract import TaskData
from sma.recipes.tasks.listops.task import ListOpsTask
from sma.recipes.training.classification import EVALUATION_BATCH, Classification
from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext, unshard
from sma.recipes.training.sampling import UpdateSampler
from tests.test_recipes.tiny import tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return tiny_data(tmp_path_factory.mktemp("data"))


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_shards_of_all_ranks_make_up_the_list(items: list[int], size: int) -> None:
    parts = [DistributedContext(rank, size).shard(items) for rank in range(size)]
    assert [parts[place % size][place // size] for place in range(len(items))] == items
    assert sum(map(len, parts)) == len(items)


@given(share=st.integers(1, 4), size=st.integers(1, 5), shape=st.lists(st.integers(0, 3), max_size=2))
def test_unshard_undoes_shard(share: int, size: int, shape: list[int]) -> None:
    rows = torch.randn(share * size, *shape, dtype=torch.float64)
    assert torch.equal(unshard([DistributedContext(rank, size).shard(rows) for rank in range(size)]), rows)


def test_unshard_pads_smaller_shards_with_zeros() -> None:
    assert unshard([torch.tensor([[1], [3]]), torch.tensor([[2, 5], [4, 6]])]).tolist() == [
        [1, 0],
        [2, 5],
        [3, 0],
        [4, 6],
    ]


def test_a_single_process_takes_all_and_is_rank_zero() -> None:
    assert SINGLE_PROCESS.shard([3, 1, 2]) == [3, 1, 2]
    assert SINGLE_PROCESS.is_rank_zero
    assert [DistributedContext(rank, 3).is_rank_zero for rank in range(3)] == [True, False, False]


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_share_the_samples_of_one_process(size: int, start: int) -> None:
    lengths = torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(1))
    whole = list(UpdateSampler(lengths, 6, 12, 7, start, 2))
    parts = [list(UpdateSampler(lengths, 6, 12, 7, start, 2, DistributedContext(rank, size))) for rank in range(size)]
    for update, batch in enumerate(whole):
        shares = [part[update] for part in parts]
        assert {len(share) for share in shares} == {6 // size}
        assert sorted(sample for share in shares for sample in share) == sorted(batch)


@pytest.mark.parametrize(
    ("samples", "batch_size", "size", "message"),
    [
        pytest.param(
            40, 8, 3, r"a batch of 8 samples cannot be shared evenly by 3 workers; .* such as 9", id="batch-size"
        ),
        pytest.param(5, 8, 2, r"a batch of 5 samples cannot be shared evenly by 2 workers", id="all-there-is"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(samples: int, batch_size: int, size: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        UpdateSampler(torch.ones(samples, dtype=torch.int64), batch_size, 3, 0, distributed=DistributedContext(0, size))


class Lengths:
    """A split with the given lengths and placeholder contents."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((int(self.lengths[index]),), index + 1), index


@pytest.mark.parametrize("samples", [4, 5, EVALUATION_BATCH, 2 * EVALUATION_BATCH + 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_uses_every_sample_once_in_equally_many_batches_per_rank(
    samples: int, size: int, data: TaskData
) -> None:
    split = Lengths(torch.randint(1, 9, (samples,), generator=torch.Generator().manual_seed(samples)))
    objective = Classification(ListOpsTask(), data._replace(test=split))
    loaders = [objective.evaluation_batches("test", DistributedContext(rank, size)) for rank in range(size)]
    batches = [list(loader) for loader in loaders]
    assert len({len(found) for found in batches}) == 1  # the other ranks would wait for one with fewer batches
    assert sorted(int(target) for found in batches for batch in found for target in batch.targets) == list(
        range(samples)
    )
    assert all(1 <= len(batch.targets) <= EVALUATION_BATCH for found in batches for batch in found)
