"""Several processes that train one model together: who this one is, and its part of every batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sma.errors import SpecError

Items = TypeVar("Items", list[Any], Tensor)


class Team(NamedTuple):
    """The processes that train one model, as one of them sees it. All of them compute; the first one writes the run
    folder.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        strategy: Lightning's, which averages the gradients.
        plugins: of Lightning, by which the processes find each other.
    """

    rank: int = 0
    size: int = 1
    strategy: Any = "auto"
    plugins: tuple[Any, ...] = ()

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def part(self, items: Items) -> Items:
        """What this process takes of a list, or of the rows of a tensor: every `size`-th one from number `rank` on."""
        return items[self.rank :: self.size]

    def check_batch(self, batch_size: int) -> None:
        """Refuse batches of which some would get more than others: the mean of their means would not be the mean of the
        batch.

        Args:
            batch_size: samples of an update, over all processes.

        Raises:
            SpecError: the processes cannot share them evenly.
        """
        if batch_size % self.size:
            nearest = -(-batch_size // self.size) * self.size
            raise SpecError(
                f"a batch of {batch_size} samples cannot be shared evenly by {self.size} workers; set "
                f"training.batch_size to a multiple of {self.size}, "
                f"such as {nearest}, or take another number of workers"
            )


ALONE = Team()


def whole(parts: Sequence[Tensor]) -> Tensor:
    """The rows that the processes took by `Team.part`, in the order in which they were.

    Args:
        parts: of every process, in the order of the ranks, with as many rows each. Where one has grown longer than the
            others, as the caches of streams do, zeros fill the others up.
    """
    sizes = [max(size) for size in zip(*(part.shape for part in parts), strict=True)]
    filled = [parts[0].new_zeros(sizes) for _ in parts]
    for room, part in zip(filled, parts, strict=True):
        room[tuple(map(slice, part.shape))] = part
    return torch.stack(filled, 1).flatten(0, 1)


def together() -> bool:
    """Whether this is one of several processes that train one model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def first_of_all() -> bool:
    """Whether this process is alone, or the first one of those that train the model."""
    return not together() or torch.distributed.get_rank() == 0


def of_all(value: Any) -> list[Any]:
    """What every process that trains the model has."""
    if not together():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
