"""A team: its parts of the batches make the batches, and whoever stands alone takes all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sma.errors import SpecError
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.classification import EVALUATION_BATCH, evaluation_loader
from sma.recipes.training.distributed import ALONE, Team, whole
from sma.recipes.training.sampling import UpdateSampler
from tests.test_recipes.tiny import tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return tiny_data(tmp_path_factory.mktemp("data"))


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_parts_make_the_whole(items: list[int], size: int) -> None:
    parts = [Team(rank, size).part(items) for rank in range(size)]
    assert [parts[place % size][place // size] for place in range(len(items))] == items
    assert sum(map(len, parts)) == len(items)


@given(share=st.integers(1, 4), size=st.integers(1, 5), shape=st.lists(st.integers(0, 3), max_size=2))
def test_the_parts_of_a_tensor_make_the_whole(share: int, size: int, shape: list[int]) -> None:
    rows = torch.randn(share * size, *shape, dtype=torch.float64)
    assert torch.equal(whole([Team(rank, size).part(rows) for rank in range(size)]), rows)


def test_where_a_part_is_longer_zeros_fill_up_the_others() -> None:
    assert whole([torch.tensor([[1], [3]]), torch.tensor([[2, 5], [4, 6]])]).tolist() == [
        [1, 0],
        [2, 5],
        [3, 0],
        [4, 6],
    ]


def test_who_stands_alone_takes_all_and_writes() -> None:
    assert ALONE.part([3, 1, 2]) == [3, 1, 2]
    assert ALONE.writes
    assert [Team(rank, 3).writes for rank in range(3)] == [True, False, False]


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_samples_of_an_update_are_those_of_one_process(size: int, start: int) -> None:
    lengths = torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(1))
    whole = list(UpdateSampler(lengths, 6, 12, 7, start, 2))
    parts = [list(UpdateSampler(lengths, 6, 12, 7, start, 2, Team(rank, size))) for rank in range(size)]
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
        UpdateSampler(torch.ones(samples, dtype=torch.int64), batch_size, 3, 0, team=Team(0, size))


class Lengths:
    """A split of which only the lengths are real."""

    def __init__(self, lengths: torch.Tensor) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((int(self.lengths[index]),), index + 1), index


@pytest.mark.parametrize("samples", [4, 5, EVALUATION_BATCH, 2 * EVALUATION_BATCH + 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_evaluation_looks_at_every_sample_once_in_as_many_batches_everywhere(
    samples: int, size: int, data: TaskData
) -> None:
    split = Lengths(torch.randint(1, 9, (samples,), generator=torch.Generator().manual_seed(samples)))
    loaders = [evaluation_loader(split, data, Team(rank, size)) for rank in range(size)]
    batches = [list(loader) for loader in loaders]
    assert len({len(found) for found in batches}) == 1  # those who have fewer would leave the others waiting
    assert sorted(int(target) for found in batches for batch in found for target in batch.targets) == list(
        range(samples)
    )
    assert all(1 <= len(batch.targets) <= EVALUATION_BATCH for found in batches for batch in found)
