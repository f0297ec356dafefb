"""Run a reader on malformed inputs in a separate process with limits on memory and time, and count the outcomes.

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
"""Bytes that a process may map in addition to those mapped after its imports."""

SECONDS = 10
"""Limit of processor time for one input, in seconds."""


@dataclass(frozen=True)
class Target:
    """A reader and the malformed inputs it is given.

    Attributes:
        make: writes a random input into the folder and returns the argument of `read`. The input depends only on the
            random generator.
        read: reads the input; it must return or raise one of the project's errors.
    """

    make: Callable[[random.Random, Path], Any]
    read: Callable[[Any], object]


@dataclass(frozen=True)
class Counts:
    """Outcomes of a reader on malformed inputs.

    Attributes:
        tried: number of inputs.
        named: number of inputs refused with an error of the project of at most 4000 characters.
        accepted: number of inputs read without an error: the damage had no effect or made another valid input.
        others: other outcomes by input number: other exceptions, exceeded limits, longer error messages.
    """

    tried: int
    named: int
    accepted: int
    others: dict[str, str]


def fuzz(target: str, cases: int, seed: int = 0) -> Counts:
    """Run the target `module:NAME` on `cases` inputs in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        done = run_fork("tests.test_fuzz.harness", target, cases, seed, folder=Path(folder), timeout=900)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return Counts(0, 0, 0, {"process": f"ended with {done.returncode}: {done.stderr[-2000:]}"})
    return Counts(**json.loads(lines[-1]))


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Apply one to four random edits: truncate, delete, insert, overwrite, flip a bit, or write an extreme integer."""
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
    """Time limit of one input exceeded. It derives from BaseException so that `except Exception` does not catch it."""


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
