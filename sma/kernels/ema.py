r"""The scan of a bank of exponential moving averages: one operator for both directions, streams and truncated kernels.

$r_t = q r_{t-1} + x_t$ and $y_t = \sum_n (w r_{t,n} + q^t h_n) + \omega x_t$. Run from the right it is its own adjoint:
the gradient of x is this operator on the gradients of y, with that of the last r as h.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from sma.kernels import ema_plain
from sma.kernels.chunks import chunk_of as plain_chunk_of
from sma.kernels.fourier import channel_groups, fast_length
from sma.kernels.operator import Name, choose, define, differentiate


class Averaged(NamedTuple):
    """Results of `ema`.

    Attributes:
        out: y.
        end: r after the last token of each row, without the carried states; empty where none are carried.
    """

    out: Float[Tensor, "B L D"]
    end: Float[Tensor, "B D N"] | Float[Tensor, "0"]


def ema(
    x_BLD: Float[Tensor, "B L D"],
    log_decay_SDN: Float[Tensor, "S D N"],
    weight_SDN: Float[Tensor, "S D N"],
    skip_D: Float[Tensor, "D"],
    *,
    truncation: int | None = None,
    carried_BDN: Float[Tensor, "B D N"] | None = None,
    lengths_B: Int[Tensor, "B"] | None = None,
) -> Averaged:
    r"""Run $y_t = \sum_n (w r_{t,n} + q^t h_n) + \omega x_t$ with $r_t = q r_{t-1} + x_t$ along every row.

    In a causal scan, later tokens change no bit of earlier results. No tensor of all tokens and states is kept.

    Args:
        x_BLD: rows; computed in the dtype of the other arguments, returned in that of x.
        log_decay_SDN: log q, at most 0; S is 1 for a causal scan, and 2 where the second one runs from the right.
        weight_SDN: w.
        skip_D: omega, counted once.
        truncation: length K of the kernels, in tokens: $r_t = q r_{t-1} + x_t - q^K x_{t-K}$; None for whole rows.
        carried_BDN: h, the part of earlier tokens in the first result; only for a causal scan without truncation.
        lengths_B: tokens of each row, after which it ends: x is not read there, and y is 0; None where all are L.
    """
    chosen = choose(x_BLD.device)
    arguments = (x_BLD, log_decay_SDN, weight_SDN, skip_D, carried_BDN, lengths_B, truncation, chosen)
    out, end, _ = _ema(*arguments)
    return Averaged(out, end)


def chunk_of(rows: int, length: int, channels: int) -> int:
    """Tokens per chunk of the Triton kernels: the more parallel work, the longer, because fewer states are stored."""
    warps = rows * -(-channels // 32)
    for chunk, least in ((128, 4096), (64, 2048), (32, 1024)):
        if warps * length >= chunk * least:
            return chunk
    return 16


def states_shape(rows: int, length: int, parameters: Sequence[int]) -> tuple[int, int, int, int, int]:
    """Shape of the states that enter each chunk of the Triton kernels, (S, B, J, N, D)."""
    directions, channels, states = parameters
    return directions, rows, -(-length // chunk_of(rows, length, channels)), states, channels


def _fake(
    x: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    skip: Tensor,
    carried: Tensor | None,
    lengths: Tensor | None,
    truncation: int | None,
    chosen: Name,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    (rows, length, channels), (directions, _, states) = x.shape, log_decay.shape
    end = log_decay.new_empty(0 if carried is None else carried.shape)
    if chosen == "triton":
        shape = states_shape(rows, length, log_decay.shape)
        kept = [log_decay.new_empty(shape if shape[2] > 1 or carried is not None else 0)]
        kept += [log_decay.new_empty(4, directions, states, channels)]
    elif directions == 1:
        chunk = plain_chunk_of(length)
        chunks = -(-length // chunk)
        between = (channels, rows, chunks + 1, states) if chunks > 1 or carried is not None else (0,)
        kept = [log_decay.new_empty(channels, rows, chunks, chunk), log_decay.new_empty(between)]
    else:
        taps = min(length, truncation or length)
        size = fast_length(length + taps - 1) // 2 + 1
        dtype = log_decay.dtype.to_complex()
        groups = (part.stop - part.start for part in channel_groups(channels, x.device))
        kept = [log_decay.new_empty(2 * channels, states, count) for count in ema_plain.Kernel.shape(taps)]
        kept += [log_decay.new_empty(channels, size, dtype=dtype)]
        kept += [log_decay.new_empty(rows, group, size, dtype=dtype) for group in groups]
    return x.new_empty(x.shape), end, kept


def _fake_backward(
    grad: Tensor,
    end_grad: Tensor,
    x: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    skip: Tensor,
    carried: Tensor | None,
    lengths: Tensor | None,
    truncation: int | None,
    saved: list[Tensor],
    chosen: Name,
) -> tuple[Tensor, ...]:
    carried_grad = log_decay.new_empty(0 if carried is None else carried.shape)
    parameters = (each.new_empty(each.shape) for each in (log_decay, weight, skip))
    return (x.new_empty(x.shape), *parameters, carried_grad)


def _save(ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    *tensors, ctx.truncation, ctx.implementation = arguments
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx: Any, grad: Tensor, end_grad: Tensor) -> tuple[Tensor | None, ...]:
    # Read once, because activation checkpointing returns saved tensors only once.
    saved = ctx.saved_tensors
    carried = saved[4]
    *gradients, carried_grad = _ema_backward(grad, end_grad, *saved[:6], ctx.truncation, saved[6:], ctx.implementation)
    return (*gradients, None if carried is None else carried_grad, None, None, None)


_ARGUMENTS = "Tensor x, Tensor log_decay, Tensor weight, Tensor skip, Tensor? carried, Tensor? lengths, int? truncation"
_ema = define("ema", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor[])", plain=ema_plain.forward, fake=_fake)
_ema_backward = define(
    "ema_backward",
    f"(Tensor grad, Tensor end_grad, {_ARGUMENTS}, Tensor[] saved) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    plain=ema_plain.backward,
    fake=_fake_backward,
)
differentiate(_ema, "the scan of an ema", save=_save, backward=_backward)
