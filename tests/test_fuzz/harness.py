"""Runs a reader on malformed inputs in a process of its own, with bounds on memory and time, and counts what it did
with them.

`python -m tests.test_fuzz.harness tests.test_fuzz.test_archives:TAR 500 0` prints the counts of one target as JSON.
"""

import importlib
import json
import random
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tests.forks import run_fork

MEMORY = 2 << 30
"""Bytes that a process may map beyond what it had after its imports."""

SECONDS = 10
"""Seconds of processor time for one input."""


@dataclass(frozen=True)
class Target:
    """A reader and the malformed inputs it is given.

    Attributes:
        make: writes an input into the folder and returns what `read` gets, from random numbers alone.
        read: reads it: returns, or raises one of the project's errors.
    """

    make: Callable[[random.Random, Path], Any]
    read: Callable[[Any], object]


@dataclass(frozen=True)
class Counts:
    """What a reader did with malformed inputs.

    Attributes:
        tried: inputs.
        named: of them refused with an error of the project, of one short line or a few.
        accepted: of them read: the damage fell where it does not matter, or makes another valid input.
        others: what else happened, by the number of the input: tracebacks, limits, errors too long to be read.
    """

    tried: int
    named: int
    accepted: int
    others: dict[str, str]


def fuzz(target: str, cases: int, seed: int = 0) -> Counts:
    """Run the target `module:NAME` on `cases` inputs, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_fork("tests.test_fuzz.harness", target, cases, seed, folder=Path(folder), timeout=900)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return Counts(0, 0, 0, {"process": f"ended with {done.returncode}: {done.stderr[-2000:]}"})
    return Counts(**json.loads(lines[-1]))


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Damage bytes in one to four of the ways in which files are damaged or forged."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 512)))
        way = rng.randrange(8)
        if way == 0:
            del data[at:]
        elif way == 1:
            del data[at:end]
        elif way == 2:
            data[at:end] = rng.randbytes(end - at)
        elif way == 3:
            data[at:at] = data[at:end] * rng.choice((1, 2, 100))
        elif way == 4:
            data[at:end] = bytes(end - at)
        elif way == 5:
            data[at:end] = b"\xff" * (end - at)
        elif way == 6 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        else:
            width, sign = rng.choice(((2, "<H"), (4, "<I"), (8, "<Q"), (4, ">I")))
            data[at : at + width] = struct.pack(
                sign, rng.choice((0, 1, 0x7F, 1 << (8 * width - 1), (1 << 8 * width) - 1))
            )
    return bytes(data)


class _TooSlow(BaseException):
    """The time for one input is over; no handler of errors may catch it."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _TooSlow


def _run(target: Target, cases: int, seed: int) -> Counts:
    from sma.errors import SmaError

    named, accepted, others = 0, 0, {}
    signal.signal(signal.SIGPROF, _interrupt)
    for case in range(cases):
        rng = random.Random(f"{seed}:{case}")
        with tempfile.TemporaryDirectory() as folder:
            given = target.make(rng, Path(folder))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            began = time.process_time()
            try:
                target.read(given)
                accepted += 1
            except SmaError as error:
                if len(str(error)) > 4000:
                    others[str(case)] = f"an error of {len(str(error)):,} characters: {str(error)[:200]}"
                else:
                    named += 1
            except _TooSlow:
                others[str(case)] = f"more than {SECONDS} s"
            except BaseException as error:
                others[str(case)] = f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            if time.process_time() - began > SECONDS:
                others[str(case)] = f"more than {SECONDS} s"
    return Counts(cases, named, accepted, others)


def _limit_memory() -> None:
    import resource

    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


def main() -> None:
    """Run one target and print its counts."""
    name, cases, seed = sys.argv[1:]
    module, _, attribute = name.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        _limit_memory()
    print(json.dumps(_run(target, int(cases), int(seed)).__dict__))


if __name__ == "__main__":
    main()
