"""Memory: what there is, and a refusal of what cannot fit before anything is allocated."""

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
"""Bytes that are allocated without asking whether they are free, so that small models and states pay nothing for the
check.
"""

ADDRESSABLE = (1 << 63) - 1
"""Bytes that a tensor can have at most, wherever it lies."""


FEWER = "take fewer streams or a shorter window"
"""What to do about a state that does not fit."""


def free_memory(device: torch.device | str | None = None) -> int | None:
    """Return the bytes that can still be allocated on a device; None where the system does not say.

    Of the main memory this is the least of what the system has available (page cache that it would give up and swap
    included), what the control groups of the process leave (containers, batch schedulers) and what its resource limits
    leave. Of an accelerator it is what the driver has, and what torch's allocator keeps for reuse.

    Args:
        device: default the device on which torch makes tensors now.
    """
    place = torch.get_default_device() if device is None else torch.device(device)
    if place.type == "cpu":
        return min(_main_memory(Path("/")), default=None)
    driver = getattr(torch, place.type, None)
    with suppress(Exception):  # a driver that is not there, or cannot say
        free = int(driver.mem_get_info(place)[0])  # type: ignore[union-attr]
        return free + int(driver.memory_reserved(place)) - int(driver.memory_allocated(place))  # type: ignore[union-attr]
    return None


def check_memory(
    needed: int,
    what: str,
    *,
    device: torch.device | str | None = None,
    error: type[SmaError] = SpecError,
    hint: str = "make it smaller",
) -> None:
    """Check that `needed` bytes can be allocated; on the meta device, where nothing is, only that a tensor can be that
    large.

    Args:
        needed: bytes, an estimate from below.
        what: is to be allocated; the subject of the sentence, in the singular.
        device: default the device on which torch makes tensors now.
        error: class of the error.
        hint: what to do about it.

    Raises:
        SmaError: `error`; says how many bytes are needed and how many are free.
    """
    if needed <= ALWAYS_FITS:
        return
    if needed > ADDRESSABLE:
        raise error(f"{what} needs {format_bytes(needed)}, more than any machine can address; {hint}")
    if _allocates_nothing(device):
        return
    free = free_memory(device)
    if free is not None and needed > free:
        where = "" if device is None or torch.device(device).type == "cpu" else f" on {device}"
        raise error(f"{what} needs {format_bytes(needed)}, and {format_bytes(free)} are free{where}; {hint}")


def _allocates_nothing(device: torch.device | str | None) -> bool:
    """Whether tensors have no memory now: on the meta device, or as torch traces with fake ones."""
    probe = torch.empty(0, device=device)
    return probe.is_meta or type(probe) is not Tensor


def format_bytes(count: int) -> str:
    """Write a number of bytes for a sentence: exactly, and in GiB where that is easier to read."""
    if count > ADDRESSABLE:
        return f"about 10^{int((count.bit_length() - 1) * 0.30103)} bytes"
    return f"{count:,} bytes ({count / 2**30:,.1f} GiB)" if count >= 1 << 28 else f"{count:,} bytes"


def zeros(
    shape: Sequence[int], what: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Make a tensor of zeros for a state, where it fits.

    Raises:
        InputError: it does not, or a size is negative; `what` names it in the sentence.
    """
    if min(shape, default=0) < 0:
        raise InputError(f"{what} has the sizes {tuple(shape)}; none may be negative")
    size = (dtype or torch.get_default_dtype()).itemsize
    check_memory(max(prod(shape) * size, *shape), what, device=device, error=InputError, hint=FEWER)
    return torch.zeros(*shape, device=device, dtype=dtype)


def within_memory(build: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the method `build` of a spec: refuse parameters that cannot fit before any of them is made.

    They are what the spec predicts: `num_parameters` of the same arguments, of a list its length. A spec that predicts
    nothing, or fails to, is built unchecked.

    Raises:
        SpecError: the parameters do not fit into what is free where torch makes tensors now.
    """

    @wraps(build)
    def checked(self: Any, *args: Any, **options: Any) -> Any:
        sizes = [len(value) if isinstance(value, Sized) else value for value in (*args, *options.values())]
        try:
            needed = int(self.num_parameters(*sizes)) * torch.get_default_dtype().itemsize
        except Exception:  # no method, or no arithmetic for these arguments: `build` says what is wrong with them
            needed = 0
        check_memory(
            needed,
            type(self).__name__,
            hint="reduce its sizes, such as the width or the vocabulary, or build it on 'meta'",
        )
        return build(self, *args, **options)

    return checked


def _main_memory(root: Path) -> Iterator[int]:
    """Every bound on the main memory that this process can still take."""
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
    """The folders of the control groups that bound the memory of this process, innermost first, of either version."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = top / path.strip("/")
        # In a container the path may be that of the host, and its own group stand at the top.
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top) and folder.is_dir())


def _left_in_group(folder: Path, swap: int) -> Iterator[int]:
    """What a control group leaves; page cache counts as used there, and is given up when memory runs short."""
    pages = _numbers(folder / "memory.stat")
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is not None and used is not None:  # version 2, in which swap has a limit of its own
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
    """The numbers of a file of the kernel, by the words in front of them."""
    rows = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number that a file of the kernel holds; None where it holds none, such as `max`, which is no limit."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
