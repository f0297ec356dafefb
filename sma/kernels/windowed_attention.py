"""Windowed attention of ragged tokens: one operator with its implementations, shapes and gradient."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sma.kernels import blocked_attention
from sma.kernels.blocks import count_blocks, whole_tiles
from sma.kernels.operator import choose, define, differentiate
from sma.kernels.weighting import Weighting
from sma.ragged import Ragged


def windowed_attention(
    q: Float[Tensor, "T Z"],
    k: Float[Tensor, "T Z"],
    v: Float[Tensor, "T H"],
    table: Float[Tensor, "P"] | None,
    tokens: Ragged,
    *,
    window: int,
    causal: bool,
    weighting: Weighting,
    middle: int,
    over_slots: bool,
    dropout: float,
) -> Float[Tensor, "T H"]:
    """See `sma.modules.sliding_window.attend`.

    Args:
        q, k, v: queries, keys and values of one dtype.
        table: biases by distance.
        tokens: rows and positions of the tokens.
        window, causal, weighting, dropout: as there.
        middle: index of distance 0 in the table.
        over_slots: whether distances count active tokens.
    """
    chosen = choose(q.device)
    random, sizes = None, []
    if chosen == "plain":
        shape, count = count_blocks(tokens, window, causal)
        sizes = [*shape, count]
        if dropout:
            wide = torch.promote_types(v.dtype, torch.float32)
            random = torch.rand(count, shape.queries, shape.keys, device=v.device, dtype=wide) >= dropout
    elif dropout:
        random = torch.randint(2**62, (1,), device=v.device)
    lengths = tokens.lengths if tokens.holes else None
    settings = window, causal, weighting, middle, over_slots, dropout, sizes
    out: Tensor = _forward(
        q, k, v, table, tokens.rows, tokens.positions, tokens.offsets, lengths, random, *settings, chosen
    )[0]
    return out


_SETTINGS = "int window, bool causal, str weighting, int middle, bool over_slots, float dropout, SymInt[] blocks"


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    *_, weighting, _, over_slots, _, sizes, chosen = rest
    out = v.new_empty(v.shape)
    if chosen == "plain":
        return out, blocked_attention.fake_kept(q, k, v, table, over_slots, sizes)
    wide = torch.promote_types(v.dtype, torch.float32)
    tokens = v.shape[0]
    sums = v.new_empty(whole_tiles(tokens) if weighting == "softmax" else 0, dtype=wide)
    places = v.new_empty(0 if table is None or over_slots else tokens, dtype=torch.int32)
    return out, [sums, v.new_empty(tokens, dtype=torch.int8), v.new_empty(2, tokens, dtype=torch.int32), places]


def _fake_backward(
    grad: Tensor, out: Tensor, kept: Sequence[Tensor], table: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (x.new_empty(out.shape[0], x.shape[1]) for x in kept[:3])
    return grad_q, grad_k, grad_v, out.new_empty(0) if table is None else torch.empty_like(table)


def _pairs(tokens: int, settings: Sequence[Any]) -> int:
    """Pairs of a query and a key that are multiplied, including those out of reach."""
    window, causal, *_, sizes, chosen = settings
    if chosen == "plain":
        queries, before, after, count = sizes
        return int(count * queries * (before + queries + after))
    return tokens * (1 + window * (1 if causal else 2))


def _forward_macs(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    return _pairs(v.shape[0], rest[6:]) * (q.shape[1] + v.shape[1])


def _backward_macs(grad: Tensor, out: Tensor, kept: Sequence[Tensor], table: Any, random: Any, *settings: Any) -> int:
    # Gradients of weights and values have H channels, those of queries and keys Z; kernels compute scores again.
    products = 2 if settings[-1] == "plain" else 4
    return _pairs(out.shape[0], settings) * (2 * out.shape[1] + products * kept[0].shape[1])


_forward = define(
    "windowed_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? table, Tensor rows, Tensor positions, Tensor offsets, Tensor? lengths, "
    f"Tensor? random, {_SETTINGS}) -> (Tensor, Tensor[])",
    plain=blocked_attention.forward,
    fake=_fake_forward,
    macs=_forward_macs,
)
_backward = define(
    "windowed_attention_backward",
    f"(Tensor grad, Tensor out, Tensor[] kept, Tensor? table, Tensor? random, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    plain=blocked_attention.backward,
    fake=_fake_backward,
    macs=_backward_macs,
)


def _save(ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    q, k, v, table, _, _, _, _, random, *ctx.settings = arguments
    # Activation checkpointing cannot free what is not in save_for_backward, so the rest is sizes alone.
    inputs = () if ctx.settings[-1] == "plain" else (q, k, v)
    ctx.save_for_backward(*results, table, random, *inputs, *kept)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, table, random, *kept = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_table = _backward(grad.to(out.dtype), out, kept, table, random, *ctx.settings)
    return grad_q, grad_k, grad_v, None if table is None else grad_table, *[None] * 13


differentiate(_forward, "sliding-window attention", save=_save, backward=_gradient)
