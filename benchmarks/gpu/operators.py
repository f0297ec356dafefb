"""Times of single operators: moving average, attention, fused functions."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from benchmarks.count import Shape, layer_spec
from benchmarks.gpu.measure import Bench, products_in
from benchmarks.gpu.results import Record
from benchmarks.work import nbytes
from sma import glue
from sma.fused import Fused
from sma.kernels.ema import ema
from sma.modules.ema import EMASpec
from sma.modules.gau import GAUSpec
from sma.modules.sliding_window import Bias, attend
from sma.ragged import compress

RATE = 0.3


def _shapes(bench: Bench) -> list[tuple[str, Shape]]:
    """The shapes; only one of the small ones, because the interpreter is slow."""
    return list(bench.shapes.items())[: 1 if bench.toy else None]


def averages(bench: Bench) -> None:
    """Time the moving averages, forward and forward + backward."""
    for name, shape in _shapes(bench):
        bench.attempt(f"ema {name}", partial(_average, bench, shape))


def _average(bench: Bench, shape: Shape) -> Record:
    width, spec = layer_spec(shape.model)
    if not isinstance(spec.backbone, EMASpec):
        raise TypeError(f"the layer of {shape.model} has no moving average")
    x = bench.random(shape.batch, shape.length, width).requires_grad_()
    part = spec.backbone.build(width).to(bench.device)
    recurrences = part.recurrences(torch.float32)
    log_decay, weight, skip = (
        each.detach().requires_grad_()
        for each in (recurrences.log_decay, recurrences.inward * recurrences.outward, part.omega)
    )
    leaves = [x, log_decay, weight, skip]

    def forward() -> Tensor:
        return ema(x, log_decay, weight, skip, truncation=cast(EMASpec, spec.backbone).truncation).out

    return {**_both(bench, forward, leaves), "gigabytes": x.nbytes / 1e9}


def attentions(bench: Bench) -> None:
    """Time the windowed attentions at one activation rate, forward and forward + backward."""
    for name, shape in _shapes(bench):
        for precision in ("tf32",) if bench.toy else ("tf32", "bf16"):
            bench.attempt(f"attention {name} {precision}", partial(_attention, bench, shape, precision))


class Attended(NamedTuple):
    """Inputs of a windowed attention, its call, and the number of tokens of each row."""

    leaves: list[Tensor]
    forward: Callable[[], Tensor]
    spec: GAUSpec
    lengths: list[int]


def attention_of(bench: Bench, shape: Shape, dtype: torch.dtype, biased: bool = True) -> Attended:
    """The attention of a preset's layer on random active tokens."""
    _, layer = layer_spec(shape.model)
    spec = next(iter(layer.modules.values()))
    if not isinstance(spec, GAUSpec) or spec.window is None:
        raise TypeError(f"the layer of {shape.model} has no gated attention unit with a window")
    window = spec.window
    active = torch.rand(shape.batch, shape.length, device=bench.device) < RATE
    tokens = compress(bench.random(shape.batch, shape.length, 1), active)
    count = tokens.index.shape[0]
    sizes = (spec.query_size, spec.query_size, spec.hidden_size)
    q, k, v = (bench.random(count, size, scale=size**-0.25, dtype=dtype).requires_grad_() for size in sizes)
    entries = spec.position.table_size(window) if biased else 0
    bias = None
    if entries:
        table = bench.random(entries, scale=0.02).requires_grad_()
        bias = Bias(table, spec.position.table_center(window), spec.position.over_slots)

    def forward() -> Tensor:
        return attend(
            q, k, v, tokens, window=window, causal=not spec.bidirectional, weighting=spec.attention, bias=bias
        )

    leaves = [q, k, v] + ([] if bias is None else [bias.table])
    return Attended(leaves, forward, spec, cast("list[int]", tokens.lengths.tolist()))


def attention_flops(given: Attended) -> tuple[float, float]:
    """Operations of the products of the pairs inside the window, forward and backward.

    Forward has the products of scores and of values; backward those of the gradients of weights, values, queries and
    keys, and the scores once more.
    """
    spec, window = given.spec, cast(int, given.spec.window)
    pairs = pairs_in_reach(given.lengths, window, not spec.bidirectional)
    z, h = spec.query_size, spec.hidden_size
    return 2.0 * pairs * (z + h), 2.0 * pairs * (3 * z + 2 * h)


def pairs_in_reach(lengths: list[int], window: int, causal: bool) -> int:
    """Pairs of a query and a key that attend, over rows of these lengths."""
    back = sum(
        length * window - window * (window + 1) // 2 if length > window else length * (length - 1) // 2
        for length in lengths
    )
    return sum(lengths) + back * (1 if causal else 2)


def _attention(bench: Bench, shape: Shape, precision: str) -> Record:
    given = attention_of(bench, shape, torch.bfloat16 if precision == "bf16" else torch.float32)
    with products_in(precision):
        times = _both(bench, given.forward, given.leaves)
    forward, backward = attention_flops(given)
    return {
        **times,
        "tokens": sum(given.lengths),
        "forward_teraflops": forward / times["forward"] / 1e9,
        "backward_teraflops": backward / max(times["step"] - times["forward"], 1e-6) / 1e9,
    }


def _both(bench: Bench, forward: Callable[[], Tensor], leaves: list[Tensor]) -> Record:
    """Time of forward in training and of forward + backward, on the device and including the host."""
    weight = torch.randn_like(forward().detach())

    def step() -> None:
        torch.autograd.grad(forward(), leaves, weight)

    return {
        "forward": bench.device_milliseconds(forward),
        "step": bench.device_milliseconds(step),
        "step_with_host": bench.milliseconds(step, 0.2),
        "peak_gigabytes": bench.peak_gigabytes(step),
    }


def fused_functions(bench: Bench) -> None:
    """Bytes per second of the fused functions of a layer, each tensor read or written once."""
    shape = bench.shapes["text"]
    width, _ = layer_spec(shape.model)
    # Larger than the batch, so that a call takes longer than its launch.
    x, grad, passed = (bench.random((1 if bench.toy else 4) * shape.batch * shape.length, width) for _ in range(3))
    routed = bench.random(round(RATE * x.shape[0]), width)
    index = torch.randperm(x.shape[0], device=bench.device)[: routed.shape[0]].sort().values
    slots = glue.slots_of(index, None, x.shape[0])
    weight = bench.random(1)
    keep, confidence = bench.random(*x.shape) > 0, bench.random(x.shape[0])
    calls: dict[str, tuple[Fused, tuple[object, ...]]] = {
        "silu_dropout": (glue.silu_dropout, (x, 0.1)),
        "silu_dropout_backward": (glue.silu_dropout_backward, (grad, x, keep, 0.1)),
        "join_parts": (glue.join_parts, (x, passed, routed, confidence, slots, 0.1, False, True)),
        "join_parts_backward": (
            glue.join_parts_backward,
            (grad, x, keep, routed, confidence, slots, index, None, 0.1, False, True),
        ),
        "add_at": (glue.add_at, (x, routed, slots)),
        "rms_norm": (glue.rms_norm, (x, weight, 1e-5)),
        "rms_norm_backward": (glue.rms_norm_backward, (grad, x, weight, bench.random(x.shape[0], 1).abs())),
    }
    for name, (function, arguments) in calls.items():
        bench.attempt(f"glue {name}", partial(_glue, bench, function, arguments))


def _glue(bench: Bench, function: Fused, arguments: tuple[object, ...]) -> Record:
    bench.require_gpu("functions are compiled for CUDA")
    with torch.no_grad():
        moved = nbytes([arguments, function(*arguments)])
        milliseconds = bench.device_milliseconds(lambda: function(*arguments), 0.2, calls=4)
        host = bench.milliseconds(lambda: function(*arguments), 0.1)
    return {"milliseconds": milliseconds, "with_host": host, "gigabytes_per_second": moved / milliseconds / 1e6}
