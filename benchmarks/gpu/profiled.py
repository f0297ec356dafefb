"""Profile of one step: kernels, launches, synchronisations with the host, idle share of the device."""

import cProfile
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.results import Record

STEPS = 3
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class Event(NamedTuple):
    """A kernel, a copy, or a call of the host, in microseconds."""

    name: str
    on_device: bool
    start: float
    end: float


def record(bench: Bench, step: Callable[[], object]) -> list[Event]:
    """Events of a few steps after warm-up steps."""
    activities = [ProfilerActivity.CPU] + ([] if bench.toy else [ProfilerActivity.CUDA])
    for _ in range(1 if bench.toy else 3):
        step()
    synchronise(bench)
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        synchronise(bench)
    return [_event(each) for each in found.events() or []]


def device_milliseconds(bench: Bench, step: Callable[[], object]) -> float | None:
    """Time of a step in which the device is busy; None on a CPU."""
    if bench.toy:
        return None
    return busy(_own(record(bench, step), host_only=False)) / STEPS / 1e3


def host_functions(bench: Bench, step: Callable[[], object]) -> Record:
    """The 25 Python functions with the longest own time on the host in a step, in milliseconds."""
    for _ in range(1 if bench.toy else 10):
        step()
    synchronise(bench)
    found = cProfile.Profile()
    with found:
        for _ in range(STEPS):
            step()
    synchronise(bench)
    entries = [each for each in found.getstats() if each.inlinetime > 0]
    longest = sorted(entries, key=lambda each: -each.inlinetime)[:25]
    whole = sum(each.inlinetime for each in entries)
    top = [[_function_name(each.code), round(1e3 * each.inlinetime / STEPS, 4)] for each in longest]
    return {"host_milliseconds": 1e3 * whole / STEPS, "top": top}


def _function_name(code: Any) -> str:
    if isinstance(code, str):
        return code[:100]
    return f"{'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_name}"


def synchronise(bench: Bench) -> None:
    """Wait for the device."""
    if not bench.toy:
        torch.cuda.synchronize()


def _event(each: Any) -> Event:
    return Event(each.name, each.device_type.name == "CUDA", each.time_range.start, each.time_range.end)


def figures(events: Sequence[Event], steps: int, host_only: bool) -> Record:
    """Figures of one step; on a CPU only its operators."""
    own = _own(events, host_only)
    times: dict[str, float] = {}
    for event in own:
        times[event.name] = times.get(event.name, 0.0) + event.end - event.start
    longest = sorted(times.items(), key=lambda item: -item[1])[:20]
    top = [[name[:120], round(time / steps / 1e3, 4)] for name, time in longest]
    if host_only:
        return {"top": top, "launches": None, "synchronisations": None, "idle": None}
    kernels = [event for event in own if not event.name.startswith(("Memcpy", "Memset"))]
    calls = Counter(event.name for event in events if not event.on_device)
    return {
        "top": top,
        "kernels": len(kernels) / steps,
        "launches": sum(number for name, number in calls.items() if name.startswith(LAUNCHES)) / steps,
        "synchronisations": sum(calls[name] for name in SYNCHRONISATIONS) / steps,
        "idle": idle_share(own),
        "busy_milliseconds": sum(times.values()) / steps / 1e3,
    }


def _own(events: Sequence[Event], host_only: bool) -> list[Event]:
    """Events of the device; on a CPU its operators."""
    # A name of the host on the device is an annotation, during which the device may be idle.
    host = set() if host_only else {event.name for event in events if not event.on_device}
    return [event for event in events if event.on_device != host_only and event.name not in host]


def idle_share(events: Sequence[Event]) -> float | None:
    """Share of the time between the first and the last event without a running event; None without events."""
    if not events:
        return None
    return 1 - busy(events) / (max(event.end for event in events) - min(event.start for event in events))


def busy(events: Sequence[Event]) -> float:
    """Microseconds with at least one running event."""
    total, reached = 0.0, -math.inf
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.end - max(event.start, reached))
        reached = max(reached, event.end)
    return total
