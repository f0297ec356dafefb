"""The phases of a run, each in a separate process with a deadline."""

import datetime
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, takewhile
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from benchmarks.gpu import ceilings, correctness, layers, ncu, peers, steps, warm_up
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.processes import Child, end, fork, wait
from benchmarks.gpu.results import Results
from sma.errors import did_you_mean, quote
from sma.recipes.training.provenance import commit as commit_of_checkout


class Phase(NamedTuple):
    """A phase of the run.

    Attributes:
        name: its name.
        seconds: its share of a run of 560 s; it also gets the unused time of earlier phases.
        run: measures its points.
    """

    name: str
    seconds: float
    run: Callable[[Bench], None]


PHASES = (
    Phase("ceilings", 20, ceilings.run),
    Phase("correctness", 110, correctness.run),
    Phase("profile", 25, steps.profile_of_a_step),
    Phase("plain", 85, layers.plain),
    Phase("kernels", 140, layers.kernels),
    Phase("peers", 100, peers.run),
    Phase("steps", 50, steps.run),
    Phase("counters", 30, ncu.run),
)
UNTIMED = ("ceilings", "correctness")


class _StoppedError(Exception):
    pass


def measure(
    folder: Path, device: str, deadline: float, command: str, commit: str | None = None, names: Sequence[str] = ()
) -> int:
    """Run phases.

    Args:
        folder: folder of the points; it must have none.
        device: `cuda` or `cpu`.
        deadline: seconds after which the run ends.
        command: the command line, for the record.
        commit: commit of the program; None: that of the checkout.
        names: names of the phases to run, which share the time; default all.

    Returns:
        the exit status: 0, 143 after SIGTERM, 130 after an interrupt.

    Raises:
        SystemExit: a phase is unknown, the folder has points, or there is no such device.
    """
    known = [phase.name for phase in PHASES]
    for name in names:
        if name not in known:
            raise SystemExit(f"{quote(name)} is no phase{did_you_mean(name, known, 'phases')}")
    phases = [phase for phase in PHASES if not names or phase.name in names]
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
            _run(results, device, phases, start, deadline, warming, running)
        except (_StoppedError, KeyboardInterrupt) as why:
            end(warming)
            end(running)
            stopped = isinstance(why, _StoppedError)
            by, took = "SIGTERM" if stopped else "an interrupt", time.monotonic() - start
            results.add("stopped", reason=f"the run was ended by {by} after {took:.0f} s")
            return 143 if stopped else 130
    return 0


def _run(
    results: Results,
    device: str,
    phases: Sequence[Phase],
    start: float,
    deadline: float,
    warming: list[Child],
    running: list[Child],
) -> None:
    ends = _ends(phases, start, deadline)
    # Compilation in the background does not disturb phases without times, or with times of single kernels of torch.
    untimed = list(takewhile(lambda phase: phase.name in UNTIMED, phases))
    if device == "cuda" and untimed and len(untimed) < len(phases):
        # As many processes as processors.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        until = ends[len(untimed) - 1]
        for task in warm_up.tasks(Bench(results, "warm-up", device, until)):
            warming.append(fork(results, f"warm-up {task.name}", until, partial(_compile, task)))
    for place, (phase, until) in enumerate(zip(phases, ends, strict=True)):
        if place == len(untimed):
            wait(results, warming, ends[place - 1] if place else start)
        since = time.monotonic()
        bench = Bench(results, phase.name, device, until - min(2.0, 0.02 * deadline))
        running.append(fork(results, phase.name, until, partial(_phase, phase, bench)))
        wait(results, running, until)
        results.add("phase", phase=phase.name, seconds=round(time.monotonic() - since, 1))


def _ends(phases: Sequence[Phase], start: float, deadline: float) -> list[float]:
    """When each phase ends at the latest."""
    reached = list(accumulate(phase.seconds for phase in phases))
    return [start + deadline * seconds / reached[-1] for seconds in reached]


def _compile(task: warm_up.Task) -> None:
    torch.set_num_threads(1)
    _let_layers_share()
    task.run()


def _let_layers_share() -> None:
    from torch._dynamo import config

    # Layers of several presets and precisions share one compiled function.
    config.recompile_limit = 64


def _phase(phase: Phase, bench: Bench) -> None:
    if bench.toy:
        torch.set_num_threads(1)
    else:
        _let_layers_share()
    phase.run(bench)


def _describe(results: Results, device: str, until: float) -> None:
    """Record the device and the versions of the software.

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

    # In a separate process, because this one is forked later and must not use the device.
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
