"""Fill the caches of the compilers in parallel processes, so that the phases need not compile."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu.measure import PRECISIONS, Bench, build_layer, products_in, step_of
from sma.capacity import Capacity
from sma.kernels import use


class Task(NamedTuple):
    """The work of one process."""

    name: str
    run: Callable[[], None]


def tasks(bench: Bench) -> Iterator[Task]:
    """One step of every layer in TF32 and bfloat16, and of the compiled peer."""
    for precision in PRECISIONS[1:]:  # float32 comes last in every phase
        for name in bench.shapes:
            yield Task(f"{name} {precision}", partial(_steps, bench, name, precision))
    yield Task("compiled static", partial(_steps, bench, "text", "tf32", 0.375, compiled=True))


def _steps(bench: Bench, name: str, precision: str, capacity: Capacity | None = None, compiled: bool = False) -> None:
    with use("triton"), products_in(precision):
        for rate in (0.3,) if compiled or name != "text" else (0.3, 1.0):
            layer, inputs, _ = build_layer(bench, bench.shapes[name], rate)
            step_of(bench, torch.compile(layer) if compiled else layer, inputs, precision, capacity=capacity)()
    torch.cuda.synchronize()
