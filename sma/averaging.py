"""Running statistics of batch norms for averaged weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from einops import pack, unpack
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sma.batches import batch_of, batches_of, check_takes, takes
from sma.budget import over_all_ranks
from sma.checks import check_module
from sma.errors import InputError
from sma.pytree import map_tensors
from sma.submodule import device_and_dtype
from sma.weights import evaluating

_END = object()


@torch.no_grad()
def update_statistics(model: nn.Module, batches: Iterable[Any]) -> int:
    """Recompute the running statistics of every batch norm as the mean over batches, from valid tokens only.

    Averaged weights (`torch.optim.swa_utils.AveragedModel`, an exponential average) need it, because their batch norms
    hold statistics from other weights. `torch.optim.swa_utils.update_bn` does the same without masks, so padding
    counts. Only batch norms are in training mode, so nothing else changes, without dropout and sampling.

    In a distributed process group every rank calls it with its own batches, the same number on all ranks; all ranks get
    the same statistics.

    Args:
        model: a model or any module with batch norms, ours or torch's, wrapped or not. Its modes are restored.
        batches: iterated over once: inputs, pairs of inputs and valid mask, objects with these attributes, or mappings
            of the keyword arguments of the model. Tensors are moved to the device of the model.

    Returns:
        the number of batch norms; with 0 the model was not run.

    Raises:
        InputError: a batch has another form, there is no batch, the ranks have different numbers of batches, or a norm
            got no batch with two valid tokens or got non-finite values. The old statistics are then restored.
    """
    model = check_module(model, "sma.update_statistics")
    model = model.module if isinstance(model, DistributedDataParallel) else model
    norms = {
        name: part for name, part in model.named_modules() if isinstance(part, _BatchNorm) and part.track_running_stats
    }
    if not norms:
        return 0
    device, _ = device_and_dtype(model, None, None)
    momenta = {name: norm.momentum for name, norm in norms.items()}
    before = {name: [buffer.clone() for buffer in norm.buffers()] for name, norm in norms.items()}
    with evaluating(model):
        try:
            for norm in norms.values():
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches
            count = 0
            for item in _in_step(batches, device):
                _call(model, item, device)
                count += 1
            if not count:
                raise InputError("update_statistics got no batch; give it part of the training data")
            for name, norm in norms.items():
                _settle(name, norm)
        except BaseException:
            for name, norm in norms.items():
                for buffer, old in zip(norm.buffers(), before[name], strict=True):
                    buffer.copy_(old)
            raise
        finally:
            for name, norm in norms.items():
                norm.momentum = momenta[name]
    return len(norms)


def _in_step(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Yield the batches while all ranks have one: synchronized norms and sharded parts wait for every rank."""
    source = batches_of(batches, "update_statistics")
    while True:
        item = next(source, _END)
        if distributed.is_available() and distributed.is_initialized():
            having = int(over_all_ranks(torch.tensor([item is not _END], dtype=torch.int64, device=device)))
            if 0 < having < distributed.get_world_size():
                raise InputError(
                    "update_statistics got different numbers of batches on the ranks; give every rank the same number"
                )
        if item is _END:
            return
        yield item


def _call(model: nn.Module, item: Any, device: torch.device) -> None:
    name = type(model).__name__
    if isinstance(item, Mapping):
        named = {str(key): map_tensors(lambda tensor: tensor.to(device), value) for key, value in item.items()}
        if not takes(model, **named):
            raise InputError(
                f"the forward of {name} cannot be called with {sorted(named)}, the keys of a batch; rename or drop some"
            )
        model(**named)
        return
    batch = batch_of(item, "update_statistics")
    check_takes(model, batch, "give inputs alone, or a mapping of its arguments")
    model(*(tensor.to(device) for tensor in batch if tensor is not None))


def _settle(name: str, norm: _BatchNorm) -> None:
    """Average over the ranks, weighted by their batches, and check the result."""
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or count is None:  # not the case for these norms
        return
    total, shapes = pack([mean.double() * count, var.double() * count, count.double()], "*")
    mean_sum, var_sum, batches = unpack(over_all_ranks(total), shapes, "*")
    if not batches > 0:
        raise InputError(
            f"the batch norm {name!r} got no batch with at least two valid tokens, so it has no statistics; "
            "give it larger ones"
        )
    if not total.isfinite().all():
        raise InputError(
            f"the batch norm {name!r} got values that are not finite; "
            "look for NaN and infinity in the batches and weights"
        )
    mean.copy_(mean_sum / batches)
    var.copy_(var_sum / batches)
