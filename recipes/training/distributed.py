"""Distributed training: the rank of this process, its shard of every batch, and what is gathered from all ranks."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sma.errors import SpecError

Items = TypeVar("Items", list[Any], Tensor)


class DistributedContext(NamedTuple):
    """The processes that train one model, seen from one of them. All of them compute; rank 0 writes the run folder.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        strategy: Lightning's strategy, which averages the gradients.
        plugins: Lightning's plugins that connect the processes.
    """

    rank: int = 0
    world_size: int = 1
    strategy: Any = "auto"
    plugins: tuple[Any, ...] = ()

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def shard(self, items: Items) -> Items:
        """The items of a list, or the rows of a tensor, that belong to this rank: `items[rank::world_size]`."""
        return items[self.rank :: self.world_size]

    def check_batch_size(self, batch_size: int) -> None:
        """Check that all ranks get equally many samples, so that the mean over ranks is the mean over the batch.

        Args:
            batch_size: samples of an update, over all ranks.

        Raises:
            SpecError: the number of ranks does not divide it.
        """
        if batch_size % self.world_size:
            nearest = -(-batch_size // self.world_size) * self.world_size
            raise SpecError(
                f"a batch of {batch_size} samples cannot be shared evenly by {self.world_size} workers; set "
                f"training.batch_size to a multiple of {self.world_size}, "
                f"such as {nearest}, or change the number of workers"
            )


SINGLE_PROCESS = DistributedContext()


def unshard(shards: Sequence[Tensor]) -> Tensor:
    """The rows of all ranks in their original order: the inverse of `DistributedContext.shard`.

    Args:
        shards: one tensor per rank, in the order of the ranks, with equally many rows. Other dimensions may differ,
            such as the length of a cache; smaller shards are padded with zeros.
    """
    sizes = [max(size) for size in zip(*(shard.shape for shard in shards), strict=True)]
    padded = [shards[0].new_zeros(sizes) for _ in shards]
    for target, shard in zip(padded, shards, strict=True):
        target[tuple(map(slice, shard.shape))] = shard
    return torch.stack(padded, 1).flatten(0, 1)


def is_distributed() -> bool:
    """Whether this is one of several processes that train one model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_rank_zero() -> bool:
    """Whether this is the only process, or rank 0 of several."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in their order; all of them must call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
