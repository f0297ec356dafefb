"""Time of the kernels of windowed attention with other tile sizes than the defaults of `tiles`.

    python -m benchmarks.tiles --out FILE --deadline 120
    python -m benchmarks.tiles --out FILE --table

The inputs are those of `python -m benchmarks.gpu`: layers of Text, enwik8, Image and Path-X on random active tokens.
Candidates are first compiled in parallel processes. Each is appended to FILE as soon as it is timed. The table has the
fastest first, and marks the present choice. A candidate is rejected if it changes results, spills registers or does not
fit. With `--device cpu` the sizes are small and kernels are interpreted, to test this program.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.count import Shape
from benchmarks.gpu.measure import Bench, products_in
from benchmarks.gpu.operators import Attended, attention_of, pairs_in_reach
from benchmarks.gpu.processes import fork, in_parallel, wait
from benchmarks.gpu.results import Record, Results
from sma.kernels import use
from sma.streams import run_command

# In the order of the measurements.
GROUPS = [
    (shape, dtype)
    for shapes in (("text", "enwik8"), ("image", "pathx"))
    for dtype in ("tf32", "bf16")
    for shape in shapes
]
DTYPES = {"tf32": torch.float32, "bf16": torch.bfloat16}
# For each kernel: the index of its result among those of a run, and its products of Z and of H channels per pair.
KERNELS = {"attend": (0, 1, 1), "grad_queries": (1, 2, 1), "grad_keys": (2, 2, 1), "grad_values": (3, 1, 1)}
# Maximum difference by rounding between the results of two tilings; a larger one is an error.
TOLERANCES = {"tf32": 2e-3, "bf16": 2e-2}
# Tokens per program, tokens per step, channels per slice, warps, stages. A group of 4 warps multiplies 64 rows.
WHOLE = [
    (64, 32, 256, 4, 2), (64, 32, 256, 4, 3), (128, 32, 256, 8, 3), (128, 32, 256, 8, 2), (128, 64, 256, 8, 2),
    (64, 64, 256, 4, 2), (64, 32, 128, 4, 2), (128, 64, 128, 8, 2), (128, 32, 128, 8, 3), (64, 64, 128, 4, 2),
]  # fmt: skip
SLICED = [
    (64, 32, 256, 4, 2), (64, 16, 256, 4, 2), (64, 64, 256, 4, 2), (128, 32, 256, 8, 2), (128, 64, 256, 8, 2),
    (64, 64, 64, 4, 3), (128, 64, 64, 8, 2), (128, 64, 64, 8, 3), (128, 64, 32, 8, 3), (128, 32, 64, 8, 3),
    (64, 64, 32, 4, 3), (64, 32, 64, 4, 3), (64, 64, 128, 4, 2), (64, 32, 128, 4, 3),
]  # fmt: skip


class Task(NamedTuple):
    """A kernel at a shape with tile sizes; None for the defaults."""

    shape: str
    dtype: str
    kernel: str
    tile: Any


class Ran(NamedTuple):
    """Results and gradients, the launch of the measured kernel, and its compiled form."""

    results: list[Tensor]
    call: Callable[[], Any]
    built: Any


def candidates(kernel: str, hidden_size: int) -> Iterator[Any]:
    """The default tile sizes, as None, and others."""
    from sma.kernels.gpu import windowed_attention as programs

    yield None
    rows = SLICED if kernel in ("grad_queries", "grad_keys") else WHOLE
    queries_first = kernel in ("attend", "grad_queries")
    for own, other, width, warps, stages in rows:
        sides = (own, other) if queries_first else (other, own)
        if width <= programs.power(hidden_size):
            yield programs.Tiles(*sides, width, warps, stages)


def run(given: Attended, kernel: str, tile: Any, compile_only: bool = False) -> Ran | None:
    """Run forward and backward with tile sizes for one kernel; returns None if it was only compiled."""
    from sma.kernels.gpu import windowed_attention as programs

    choose, found = programs.tiles, []

    def chosen(name: str, *sizes: Any) -> Any:
        return tile if tile is not None and name == kernel else choose(name, *sizes)

    def launch(program: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        wanted = program.__name__ == kernel
        if not compile_only:
            call = partial(program[grid], *arguments, **options)
            built = call()
            if wanted:
                found.append((call, built))
        elif wanted or program.__name__.startswith("lay_out"):
            program.warmup(*arguments, grid=grid, **options)

    with mock.patch.object(programs, "tiles", chosen), mock.patch.object(programs, "launch", launch), use("triton"):
        out = given.forward()
        results = [out.detach(), *torch.autograd.grad(out, given.leaves, torch.ones_like(out).copysign_(out))]
    return Ran(results, *found[0]) if found else None


def compile_some(bench: Bench, tasks: Sequence[Task]) -> None:
    """Compile tasks at a small size; the compiled kernels do not depend on the lengths."""
    for task in tasks:
        if time.monotonic() > bench.until:
            return
        shape = Shape(bench.shapes[task.shape].model, 1, 256)
        try:
            with products_in(task.dtype):
                run(attention_of(bench, shape, DTYPES[task.dtype]), task.kernel, task.tile, compile_only=True)
        except Exception as error:  # these tile sizes cannot be compiled; the measurement reports it
            bench.results.fail(error, task=task[:3], tile=task.tile)


def measure(bench: Bench, tasks: Sequence[Task]) -> None:
    """Time tasks and record them."""
    groups = list(dict.fromkeys((task.shape, task.dtype) for task in tasks))
    for shape, dtype in groups:
        torch.manual_seed(0)
        with products_in(dtype):
            given = attention_of(bench, bench.shapes[shape], DTYPES[dtype])
            wanted: dict[str, Tensor] = {}
            for task in tasks:
                if (task.shape, task.dtype) != (shape, dtype):
                    continue
                if time.monotonic() > bench.until:
                    return
                names = {"shape": shape, "dtype": dtype, "kernel": task.kernel}
                try:
                    bench.results.add("tile", **names, **_timed(bench, given, task, wanted))
                except Exception as error:  # of a compiler or a launch; the next tile sizes may work
                    bench.results.fail(error, **names, tile=task.tile)
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def _timed(bench: Bench, given: Attended, task: Task, wanted: dict[str, Tensor]) -> Record:
    from sma.kernels.gpu import windowed_attention as programs
    from sma.kernels.launch import shared_memory

    spec, values = given.spec, given.leaves[2]
    ran = run(given, task.kernel, task.tile)
    if ran is None:
        raise RuntimeError(f"{task.kernel} was not launched")
    place, over_z, over_h = KERNELS[task.kernel]
    found = ran.results[place].float()
    wide = wanted.setdefault(task.kernel, found)
    error = float((found - wide).norm() / wide.norm().clamp(min=1e-30))
    spills = getattr(ran.built, "n_spills", 0)
    room = shared_memory(values.device)
    now = programs.tiles(task.kernel, spec.query_size, spec.hidden_size, values.dtype, room, len(given.leaves) > 3)
    fine = error <= TOLERANCES[task.dtype] and (not spills or task.tile is None)
    milliseconds = _milliseconds(bench, ran.call) if fine else None
    pairs = pairs_in_reach(given.lengths, spec.window or 0, not spec.bidirectional)
    operations = 2.0 * pairs * (over_z * spec.query_size + over_h * spec.hidden_size)
    return {
        "tile": list(task.tile or now),
        "present": task.tile is None,
        "milliseconds": milliseconds,
        "teraflops": operations / milliseconds / 1e9 if milliseconds else None,
        "difference": error,
        "registers": getattr(ran.built, "n_regs", None),
        "spills": spills,
        "tokens": sum(given.lengths),
    }


def _milliseconds(bench: Bench, call: Callable[[], Any], seconds: float = 0.015) -> float:
    """Time of a launch on the device, without the host: consecutive launches in a CUDA graph."""
    if bench.toy:
        since = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - since)
    once = bench.milliseconds(call, 0.0)
    count = max(2, min(30, math.ceil(1e3 * seconds / once)))
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph would collect garbage first, which takes longer than the measurement.
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        for _ in range(count):
            call()
        graph.capture_end()
    torch.cuda.synchronize()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return min(times)


def table(records: Sequence[Record]) -> Iterator[str]:
    """Return a line per candidate: the fastest of every kernel first, failed ones last."""
    yield "| shape | dtype | kernel | BM, BN, BH, warps, stages | ms | TFLOP/s | registers | |"
    yield "|---|---|---|---|---|---|---|---|"
    done = [each for each in records if each["kind"] == "tile"]
    for names in dict.fromkeys((each["shape"], each["dtype"], each["kernel"]) for each in done):
        same = [each for each in done if (each["shape"], each["dtype"], each["kernel"]) == names]
        for each in sorted(same, key=lambda each: each["milliseconds"] or math.inf):
            notes = ["now"] * each["present"] + [f"{each['spills']} spills"] * bool(each["spills"])
            if each["milliseconds"] is None and not each["spills"]:
                notes.append(f"differs by {each['difference']:.1e}")
            timed = [f"{each[name]:.3g}" if each[name] else "" for name in ("milliseconds", "teraflops")]
            tile = ", ".join(map(str, each["tile"]))
            yield f"| {' | '.join([*names, tile, *timed, str(each['registers']), ', '.join(notes)])} |"


def main() -> None:
    """Compile, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file for the measurements")
    parser.add_argument("--table", action="store_true", help="only print the table of FILE")
    parser.add_argument("--deadline", type=float, default=120.0, help="time limit in seconds (default: 120)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu runs small sizes")
    parser.add_argument(
        "--shape", action="append", choices=["text", "enwik8", "image", "pathx"], help="may be repeated"
    )
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="may be repeated")
    parser.add_argument("--first", type=int, help="maximum number of candidates per kernel")
    options = parser.parse_args()
    results = Results(options.out.parent)
    results.path = options.out
    if not options.table:
        _measure_all(results, options)
    print("\n".join(table(results.read())))


def _measure_all(results: Results, options: argparse.Namespace) -> None:
    until = time.monotonic() + options.deadline
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    bench = Bench(results, "tiles", options.device, until - 3)
    tasks = []
    for shape, dtype in GROUPS:
        if shape in (options.shape or [shape]) and dtype in (options.dtype or [dtype]):
            hidden = _hidden_size(bench.shapes[shape])
            for kernel in options.kernel or KERNELS:
                tasks += [Task(shape, dtype, kernel, tile) for tile in [*candidates(kernel, hidden)][: options.first]]
    if bench.toy:
        measure(bench, tasks)
        return
    torch.set_num_threads(1)  # of the processes that are forked from this one
    since = time.monotonic()
    early = since + 0.5 * options.deadline
    builder = Bench(results, "compiled", options.device, early)
    # Many short lists balance the load of the processes.
    count = min(os.cpu_count() or 1, 12)
    in_parallel(results, "compiled", early + 5, [partial(compile_some, builder, tasks[i::count]) for i in range(count)])
    results.add("compiled", tasks=len(tasks), took=time.monotonic() - since)
    wait(results, [fork(results, "tiles", until, partial(measure, bench, tasks))], until)


def _hidden_size(shape: Shape) -> int:
    from benchmarks.count import layer_spec

    sizes: Any = next(iter(layer_spec(shape.model)[1].modules.values()))
    return int(sizes.hidden_size)


if __name__ == "__main__":
    sys.exit(run_command(main))
