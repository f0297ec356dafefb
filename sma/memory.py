"""Free memory, and checks of memory requirements before allocation."""

import os
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import suppress
from functools import wraps
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sma.errors import InputError, SmaError, SpecError

ALWAYS_FITS = 1 << 26
"""Size in bytes below which free memory is not checked, so that the check costs small models and states nothing."""

ADDRESSABLE = (1 << 63) - 1
"""Maximum size of a tensor in bytes on any device."""

FEWER = "take fewer streams or a shorter window"
"""Advice for a state that does not fit."""


def free_memory(device: torch.device | str | None = None) -> int | None:
    """Return the number of bytes that can be allocated on a device; None where it is unknown.

    For main memory this is the minimum of the available memory of the system (with reclaimable page cache and swap) and
    of the remainders of the control groups (containers, batch schedulers) and resource limits of the process. For an
    accelerator it is the free memory of the driver and of torch's allocator.

    Args:
        device: the device; default torch's default device.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "cpu":
        return min(_main_memory(Path("/")), default=None)
    driver = getattr(torch, device.type, None)
    with suppress(Exception):  # without a driver, or without its information
        free = int(driver.mem_get_info(device)[0])  # type: ignore[union-attr]
        return free + int(driver.memory_reserved(device)) - int(driver.memory_allocated(device))  # type: ignore[union-attr]
    return None


def check_memory(
    needed: int,
    what: str,
    *,
    device: torch.device | str | None = None,
    error: type[SmaError] = SpecError,
    hint: str = "make it smaller",
) -> None:
    """Check that `needed` bytes can be allocated; on the meta device only that a tensor can have this size.

    Args:
        needed: lower bound of the required bytes.
        what: subject of the message, in the singular.
        device: the device; default torch's default device.
        error: class of the error.
        hint: advice at the end of the message.

    Raises:
        SmaError: `error`; the message gives the required and the free bytes.
    """
    if needed <= ALWAYS_FITS:
        return
    if needed > ADDRESSABLE:
        raise error(f"{what} needs {format_bytes(needed)}, more than any machine can address; {hint}")
    probe = torch.empty(0, device=device)
    if probe.is_meta or type(probe) is not Tensor:  # torch traces with fake tensors
        return
    free = free_memory(device)
    if free is not None and needed > free:
        where = "" if device is None or torch.device(device).type == "cpu" else f" on {device}"
        raise error(f"{what} needs {format_bytes(needed)}, and {format_bytes(free)} are free{where}; {hint}")


def format_bytes(count: int) -> str:
    """Format a number of bytes: exactly, with GiB for large ones."""
    if count > ADDRESSABLE:
        return f"about 10^{int((count.bit_length() - 1) * 0.30103)} bytes"
    return f"{count:,} bytes ({count / 2**30:,.1f} GiB)" if count >= 1 << 28 else f"{count:,} bytes"


def zeros(
    shape: Sequence[int], what: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Make a tensor of zeros for a state.

    Raises:
        InputError: it does not fit into memory, or a size is negative; `what` names it in the message.
    """
    if min(shape, default=0) < 0:
        raise InputError(f"{what} has the sizes {tuple(shape)}; none may be negative")
    size = (dtype or torch.get_default_dtype()).itemsize
    check_memory(max(prod(shape) * size, *shape), what, device=device, error=InputError, hint=FEWER)
    return torch.zeros(*shape, device=device, dtype=dtype)


def within_memory(build: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the method `build` of a spec: check the memory for its parameters before they are made.

    Their number is that of `num_parameters` with the same arguments, and lengths in place of lists. A spec without a
    working prediction is built unchecked.

    Raises:
        SpecError: the parameters do not fit into the free memory of torch's default device.
    """

    @wraps(build)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        sizes = [len(value) if isinstance(value, Sized) else value for value in (*args, *options.values())]
        try:
            needed = int(self.num_parameters(*sizes)) * torch.get_default_dtype().itemsize
        except Exception:  # `build` reports the error in the arguments
            needed = 0
        check_memory(
            needed,
            type(self).__name__,
            hint="reduce its sizes, such as the width or the vocabulary, or build it on 'meta'",
        )
        return build(self, *args, **options)

    return checked


def _main_memory(root: Path) -> Iterator[int]:
    """Yield all upper bounds of the main memory that this process can allocate."""
    numbers = _numbers(root / "proc/meminfo")
    swap = 1024 * numbers.get("SwapFree", 0)
    if "MemAvailable" in numbers:
        yield 1024 * numbers["MemAvailable"] + swap
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _control_groups(root):
        yield from _left_in_group(folder, swap)
    yield from _left_by_limits(root)


def _control_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups, of both versions, that limit the memory of this process."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = top / path.strip("/")
        # In a container the path may be that of the host, and the group of the container may be at the top.
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top) and folder.is_dir())


def _left_in_group(folder: Path, swap: int) -> Iterator[int]:
    """Yield the memory that a control group leaves, with page cache, which counts as used there but is reclaimable."""
    pages = _numbers(folder / "memory.stat")
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is not None and used is not None:  # version 2, in which swap has a separate limit
        allowed, taken = _number(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
        more = swap if allowed is None else min(swap, max(allowed - (taken or 0), 0))
        yield max(limit - used + pages.get("active_file", 0) + pages.get("inactive_file", 0) + more, 0)
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    if limit is not None and used is not None:  # version 1
        yield max(limit - used + pages.get("total_active_file", 0) + pages.get("total_inactive_file", 0) + swap, 0)


def _left_by_limits(root: Path) -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    status = _numbers(root / "proc/self/status")
    for name, taken in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit = resource.getrlimit(getattr(resource, name))[0]
        if limit != resource.RLIM_INFINITY and taken in status:
            yield max(limit - 1024 * status[taken], 0)


def _numbers(path: Path) -> dict[str, int]:
    """The numbers in a file of the kernel, by the preceding words."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None for other text, such as `max`."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
