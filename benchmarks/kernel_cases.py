"""Launches of every operator at the shapes of the presets, on tensors without values."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sma.kernels.launch import Launch
from sma.layer import LayerSpec
from sma.modules.ema import EMASpec
from sma.modules.gau import GAUSpec
from sma.recipes.experiment import load_experiment
from sma.recipes.io.presets import shipped

DTYPES = {"tf32": torch.float32, "ieee": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 4096


class Case(NamedTuple):
    """One forward and backward pass of an operator.

    Attributes:
        preset: name of a preset with these sizes.
        dtype: `tf32`, `ieee`, `bf16` or `fp16`.
        run: launches every kernel on tensors of the device `meta`.
    """

    preset: str
    dtype: str
    run: Callable[[], object]


def layers() -> Iterator[tuple[str, LayerSpec, int]]:
    """Every layer of every preset, with the name of the preset and the width."""
    for preset in shipped("presets"):
        model = load_experiment(preset).model
        for layer in model.layer_specs:
            yield preset, layer, model.width


@contextmanager
def _products_in(dtype: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def windowed_attention(dtypes: Sequence[str]) -> Iterator[Case]:
    """Every distinct gated attention unit with a window."""
    seen = set()
    for preset, layer, _ in layers():
        for spec in layer.modules.values():
            if not isinstance(spec, GAUSpec) or spec.window is None:
                continue
            table = spec.position.table_size(spec.window)
            key = (spec.query_size, spec.hidden_size, spec.window, spec.bidirectional, spec.attention, table)
            if (*key, spec.attention_dropout) in seen:
                continue
            seen.add((*key, spec.attention_dropout))
            for dtype in dtypes:
                yield Case(preset, dtype, partial(_attend, spec, table, dtype))


def _attend(spec: GAUSpec, entries: int, dtype: str) -> None:
    from sma.kernels.gpu import windowed_attention

    def numbers(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    q, k = (numbers(TOKENS, spec.query_size, kind=DTYPES[dtype]) for _ in range(2))
    v = numbers(TOKENS, spec.hidden_size, kind=DTYPES[dtype])
    table = numbers(entries, kind=torch.float32) if entries else None
    seed = numbers(1) if spec.attention_dropout else None
    middle = spec.position.table_center(spec.window) if entries else 0
    over_slots = bool(entries) and spec.position.over_slots
    settings: tuple[Any, ...] = (
        spec.window,
        not spec.bidirectional,
        spec.attention,
        middle,
        over_slots,
        spec.attention_dropout,
        [],
    )
    with _products_in(dtype):
        rows, positions = numbers(TOKENS), numbers(TOKENS)
        out, kept = windowed_attention.forward(q, k, v, table, rows, positions, numbers(2), None, seed, *settings)
        windowed_attention.backward(out, out, [q, k, v, *kept], table, seed, *settings)


# Constants of the launches of attention: the widths of the products of a pair.
_PRODUCTS = {
    "attend": ("Z", "BH"),
    "grad_queries": ("Z", "H", "Z"),
    "grad_keys": ("Z", "H", "Z"),
    "grad_values": ("Z", "BH"),
}


def products(launch: Launch) -> int:
    """Floating-point operations of the products of a launch, from its grid; 0 for kernels without products."""
    widths, sizes = _PRODUCTS.get(launch.kernel.__name__), launch.constants
    if widths is None:
        return 0
    queries_first = launch.kernel.__name__ in ("attend", "grad_queries")
    own, other = ("BM", "BN") if queries_first else ("BN", "BM")
    reach = sizes["W"] * (1 if sizes["CAUSAL"] else 2)
    tiles = -(-(sizes[own] + reach) // sizes[other])
    pairs = math.prod(launch.grid) * tiles * sizes["BM"] * sizes["BN"]
    return 2 * pairs * sum(sizes[width] for width in widths)


def ema(dtypes: Sequence[str]) -> Iterator[Case]:
    """Every distinct moving average; a causal one also with the states of streams."""
    seen = set()
    for preset, layer, width in layers():
        spec = layer.backbone
        if not isinstance(spec, EMASpec):
            continue
        for dtype in dtypes:
            key = (spec.state_size, spec.directions, spec.truncation is None, DTYPES[dtype])
            if key not in seen:
                seen.add(key)
                for streams in (False,) if spec.bidirectional else (False, True):
                    yield Case(preset, dtype, partial(_average, spec, width, dtype, streams))


def _average(spec: EMASpec, width: int, dtype: str, streams: bool) -> None:
    from sma.kernels.gpu import ema as programs

    def numbers(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    rows = 8
    x = numbers(rows, TOKENS, width, kind=DTYPES[dtype])
    log_decay, weight = (numbers(spec.directions, width, spec.state_size) for _ in range(2))
    carried = numbers(rows, width, spec.state_size) if streams else None
    lengths = numbers(rows, kind=torch.int64) if streams else None
    arguments = x, log_decay, weight, numbers(width), carried, lengths, None if streams else spec.truncation
    out, end, kept = programs.forward(*arguments)
    programs.backward(out, end, *arguments, kept)


def placing(dtypes: Sequence[str]) -> Iterator[Case]:
    """The operator that places active tokens, with and without positions of a stream; independent of the dtype."""

    def run() -> None:
        from sma.kernels.gpu.placing import forward

        active = torch.empty(8, TOKENS, dtype=torch.bool, device="meta")
        ranks = torch.empty(active.numel(), dtype=torch.int32, device="meta")
        for positions in (None, torch.empty(8, TOKENS, dtype=torch.int64, device="meta")):
            forward(active, ranks, positions, TOKENS)

    yield Case("text_paper", dtypes[0], run)


# Cases by operator; the argument is the list of dtypes.
CASES: dict[str, Callable[[Sequence[str]], Iterator[Case]]] = {
    "ema": ema,
    "windowed_attention": windowed_attention,
    "placing": placing,
}
