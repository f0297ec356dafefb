"""Devices: what the user named, checked before anything is put there; and whether autocast is on there."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sma.errors import InputError, SmaError, quote, reason


def usable_device(device: torch.device | str | int | None, error: type[SmaError] = InputError) -> torch.device:
    """Return the device of a name, with which a tensor can be made here; None is the one on which torch makes tensors
    now.

    Raises:
        SmaError: `error`: torch has none of this name, or not here; says which there are.
    """
    try:
        found = torch.get_default_device() if device is None else torch.device(device)
        torch.empty(1, device=found)
    except Exception as cause:  # every kind of device refuses in its own way
        raise error(
            f"the device {quote(device)} cannot be used: {reason(cause)}; there are {', '.join(devices())}"
        ) from cause
    return found


def autocasts(device: torch.device) -> bool:
    """Whether autocast converts what is computed on a device now; on `meta`, about which torch cannot be asked, it
    converts nothing.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "full_tensor")  # the import of its class would slow every import of this package


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the dtypes that stand there, whatever autocast says."""
    # Entering the context costs a step of a stream more than a router's scores do.
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def devices() -> list[str]:
    """The devices on which tensors can be made here."""
    found = ["'cpu'"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        found += (
            [f"'{kind.type}:{number}'" for number in range(torch.accelerator.device_count())]
            if kind is not None
            else []
        )
    return [*found, "'meta' (sizes without values)"]
