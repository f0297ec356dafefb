"""The order of the samples: a function of the seed and the number of the update, so that a run can resume anywhere."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Sampler

from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext


class UpdateSampler(Sampler[list[int]]):
    """The batches of a whole training, one per update, from update `start` on.

    Every epoch is a new permutation. The samples of `bucket` consecutive batches are sorted by length, so that a batch
    has little padding, and the batches of an epoch are shuffled. An epoch omits the samples that do not fill a batch.

    Args:
        lengths: length of every sample.
        batch_size: samples per batch; a smaller data set gives batches of all its samples.
        updates: number of batches of the whole training.
        seed: seed of the permutations.
        start: number of updates already made.
        bucket: number of batches that are sorted together.
        distributed: the processes that share every batch; each gets its own shard.

    Raises:
        SpecError: the processes cannot share the batches evenly.
    """

    def __init__(
        self,
        lengths: Int64[Tensor, "N"],
        batch_size: int,
        updates: int,
        seed: int,
        start: int = 0,
        bucket: int = 50,
        distributed: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        self.lengths, self.updates, self.seed, self.start, self.bucket, self.distributed = (
            lengths,
            updates,
            seed,
            start,
            bucket,
            distributed,
        )
        self.batch_size = min(batch_size, len(lengths))
        distributed.check_batch_size(self.batch_size)
        self.per_epoch = len(lengths) // self.batch_size
        self._epoch = lru_cache(maxsize=1)(self._draw)

    def __len__(self) -> int:
        """Number of updates of the whole training, as Lightning counts them."""
        return self.updates

    def __iter__(self) -> Iterator[list[int]]:
        """The remaining batches."""
        for update in range(self.start, self.updates):
            epoch, index = divmod(update, self.per_epoch)
            yield self.distributed.shard(self._epoch(epoch)[index].tolist())

    def _draw(self, epoch: int) -> Int64[Tensor, "E B"]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator)[: self.per_epoch * self.batch_size]
        parts = [part[self.lengths[part].argsort(stable=True)] for part in order.split(self.bucket * self.batch_size)]
        batches = torch.cat(parts).unflatten(0, (self.per_epoch, self.batch_size))
        return batches[torch.randperm(self.per_epoch, generator=generator)]
