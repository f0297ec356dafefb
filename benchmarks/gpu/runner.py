"""The phases of a run, each in a process of its own with a deadline."""

import datetime
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from benchmarks.gpu import ceilings, correctness, layers, ncu, peers, steps, warm_up
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.processes import Child, end, fork, wait
from benchmarks.gpu.results import Results
from sma.recipes.training.provenance import commit as commit_of_checkout


class Phase(NamedTuple):
    """A phase of the run.

    Attributes:
        name: its name.
        end: seconds after the start of a run of 560 s at which it ends; what earlier phases leave is its own.
        run: measures its points.
    """

    name: str
    end: float
    run: Callable[[Bench], None]


PHASES = (
    Phase("ceilings", 30, ceilings.run),
    Phase("correctness", 90, correctness.run),
    Phase("profile", 130, steps.profile_of_a_step),
    Phase("plain", 260, layers.plain),
    Phase("kernels", 390, layers.kernels),
    Phase("peers", 490, peers.run),
    Phase("steps", 540, steps.run),
    Phase("counters", 560, ncu.run),
)
WHOLE = PHASES[-1].end


class _StoppedError(Exception):
    pass


def measure(folder: Path, device: str, deadline: float, command: str, commit: str | None = None) -> int:
    """Run all phases.

    Args:
        folder: where the points go; it must have none.
        device: `cuda` or `cpu`.
        deadline: seconds after which the run ends.
        command: what was typed, for the record.
        commit: of the program; None: that of the checkout.

    Returns:
        the exit status: 0, 143 after SIGTERM, 130 after an interrupt.

    Raises:
        SystemExit: the folder has points, or there is no such device.
    """
    start, results = time.monotonic(), Results(folder)
    if results.read():
        raise SystemExit(f"{str(results.path)!r} has the points of another run; give --out a folder without them")
    warming: list[Child] = []
    running: list[Child] = []
    _describe(results, device, start + deadline)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    results.add("run", command=command, commit=commit or commit_of_checkout(), date=date, deadline=deadline)
    with _stoppable():
        try:
            _run(results, device, start, deadline, warming, running)
        except (_StoppedError, KeyboardInterrupt) as why:
            end(warming)
            end(running)
            stopped = isinstance(why, _StoppedError)
            by, took = "SIGTERM" if stopped else "an interrupt", time.monotonic() - start
            results.add("stopped", reason=f"the run was ended by {by} after {took:.0f} s")
            return 143 if stopped else 130
    return 0


def _run(
    results: Results, device: str, start: float, deadline: float, warming: list[Child], running: list[Child]
) -> None:
    ends = {phase.name: start + deadline * phase.end / WHOLE for phase in PHASES}
    if device == "cuda":
        # There are as many processes as processors.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        until = ends["correctness"]
        for task in warm_up.tasks(Bench(results, "warm-up", device, until)):
            warming.append(fork(results, f"warm-up {task.name}", until, task.run))
    for phase in PHASES:
        if phase.name == "profile":  # the phases before it are not timed, or time single kernels of torch
            wait(results, warming, ends["correctness"])
        until = ends[phase.name]
        since = time.monotonic()
        bench = Bench(results, phase.name, device, until - min(2.0, 0.02 * deadline))
        running.append(fork(results, phase.name, until, partial(_phase, phase, bench)))
        wait(results, running, until)
        results.add("phase", phase=phase.name, seconds=round(time.monotonic() - since, 1))


def _phase(phase: Phase, bench: Bench) -> None:
    if bench.toy:
        torch.set_num_threads(1)
    else:
        from torch._dynamo import config

        # Layers of several presets and precisions share one compiled function.
        config.recompile_limit = 64
    phase.run(bench)


def _describe(results: Results, device: str, until: float) -> None:
    """Record what is measured.

    Raises:
        SystemExit: there is no such device.
    """

    def describe() -> None:
        card = platform.processor() or platform.machine()
        more = {}
        if device == "cuda":
            if not torch.cuda.is_available():
                raise SystemExit(1)
            found = torch.cuda.get_device_properties(0)
            card = found.name
            more = {"capability": f"{found.major}.{found.minor}", "gigabytes": round(found.total_memory / 1e9, 1)}
        versions = {name: _version(name) for name in ("torch", "triton")}
        results.add("device", device=device, card=card, **versions, python=platform.python_version(), **more)

    # In a process of its own, so that this one, which is forked, does not touch the device.
    if not wait(results, [fork(results, "device", until, describe)], until):
        raise SystemExit(
            "torch finds no CUDA device here; run this on a machine with an NVIDIA GPU, or write --device cpu for a "
            "run at toy sizes"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise an exception at SIGTERM inside the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _StoppedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
