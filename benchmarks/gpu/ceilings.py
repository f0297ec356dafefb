"""Ceilings of the GPU: bandwidth of a copy and speed of products. Other figures are relative to them."""

from functools import partial

import torch

from benchmarks.gpu.measure import PRECISIONS, Bench, products_in
from benchmarks.gpu.results import Record


def run(bench: Bench) -> None:
    """Measure the ceilings."""
    bench.attempt("copy", partial(_copy, bench))
    for precision in PRECISIONS:
        bench.attempt(f"product {precision}", partial(_product, bench, precision))


def _copy(bench: Bench) -> Record:
    source = bench.random(2**16 if bench.toy else 2**28)
    target = torch.empty_like(source)
    milliseconds = bench.milliseconds(lambda: target.copy_(source))
    return {"gigabytes_per_second": 2 * source.nbytes / milliseconds / 1e6}


def _product(bench: Bench, precision: str) -> Record:
    size = 128 if bench.toy else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (bench.random(size, size, dtype=dtype) for _ in range(2))
    with products_in(precision):
        milliseconds = bench.milliseconds(lambda: left @ right)
    return {"teraflops": 2 * size**3 / milliseconds / 1e9}
