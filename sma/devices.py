"""Checks of devices, and their autocast state."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sma.errors import InputError, SmaError, quote, reason


def usable_device(device: torch.device | str | int | None, error: type[SmaError] = InputError) -> torch.device:
    """Return a device by name, after a check that it works; None is torch's default device.

    Raises:
        SmaError: `error`: the device does not exist; the message lists those that do.
    """
    try:
        found = torch.get_default_device() if device is None else torch.device(device)
        torch.empty(1, device=found)
    except Exception as cause:  # the exception depends on the kind of device
        raise error(
            f"the device {quote(device)} cannot be used: {reason(cause)}; there are {', '.join(devices())}"
        ) from cause
    return found


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled on a device; False on `meta`, where torch has no autocast."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def on_host(device: torch.device) -> bool:
    """Whether the host can read the values of a device without waiting."""
    return device.type == "cpu"


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, so that this rank holds a shard of it."""
    return hasattr(tensor, "full_tensor")  # the import of its class would slow every import of this package


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast temporarily."""
    # Conditional, because in a step of a stream the context costs more than the scores of a router.
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def devices() -> list[str]:
    """The devices on which tensors can be made here."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if kind is None else torch.accelerator.device_count()
    return ["'cpu'", *(f"'{kind}:{index}'" for index in range(count)), "'meta' (sizes without values)"]


class Answer:
    """Numbers that are copied from a device to the host asynchronously; only `read` waits for them.

    Args:
        numbers: a tensor of integers.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
        self._copied = None
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[int]:
        """Wait for the values."""
        if self._copied is not None:
            self._copied.synchronize()
        numbers: list[int] = self._numbers.tolist()
        return numbers


def running_sum(x: torch.Tensor) -> torch.Tensor:
    """Cumulative sum over the last axis; with `torch.use_deterministic_algorithms` always in the same order, where
    torch has no such sum of floating-point numbers for accelerators.
    """
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    return _sum_by_doubling(x)


def _sum_by_doubling(x: torch.Tensor) -> torch.Tensor:
    reach = 1
    while reach < x.shape[-1]:
        x = x + torch.nn.functional.pad(x[..., :-reach], (reach, 0))
        reach *= 2
    return x
