"""Linear recurrences with constant decay: their kernels, and a causal chunked scan."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 64


class Recurrence(NamedTuple):
    r"""$s_t = q s_{t-1} + b x_t$, $y_t = \sum_n g_n s_{t,n}$, for every channel.

    Attributes:
        log_decay: log q, at most 0.
        inward: b.
        outward: g.
    """

    log_decay: Float[Tensor, "D N"]
    inward: Float[Tensor, "D N"]
    outward: Float[Tensor, "D N"]

    def kernel(self, taps: int) -> Float[Tensor, "D K"]:
        r"""The impulse response $k_l = \sum_n g b q^l$ for l = 0 … taps - 1.

        $q^{iC + j} = q^{iC} q^j$ with $C \approx \sqrt{taps}$ makes it one batched product, without a (D, N, taps) tensor.
        """
        inner = max(1, math.isqrt(taps))
        outer = -(-taps // inner)
        coarse = powers(self.log_decay, outer, step=inner) * (self.inward * self.outward)[..., None]
        return (coarse.transpose(1, 2) @ powers(self.log_decay, inner)).flatten(1)[:, :taps]


def powers(log_decay_DN: Float[Tensor, "D N"], count: int, *, start: int = 0, step: int = 1) -> Float[Tensor, "D N C"]:
    """Return q^start, q^(start + step), … for `count` exponents."""
    exponents = torch.arange(start, start + count * step, step, device=log_decay_DN.device, dtype=log_decay_DN.dtype)
    return torch.exp(log_decay_DN[..., None] * exponents)


class Scanned(NamedTuple):
    """What a scan gives: the outputs, and the states where the rows end."""

    out: Float[Tensor, "B L D"]
    final: Float[Tensor, "B D N"]


def causal_scan(
    x_BLD: Float[Tensor, "B L D"], recurrence: Recurrence, initial_BDN: Float[Tensor, "B D N"] | None = None
) -> Float[Tensor, "B L D"]:
    """Run the recurrence: products inside chunks, states passed between them.

    No later input touches an earlier output, not even by rounding or by a NaN; a Fourier transform could not promise that.

    Args:
        x_BLD: inputs in the dtype of the recurrence.
        recurrence: decay, inward and outward factors.
        initial_BDN: states to go on from; None for zeros.
    """
    return _outputs(_scan(x_BLD, recurrence, initial_BDN), x_BLD)


def causal_scan_with_state(
    x_BLD: Float[Tensor, "B L D"], lengths_B: Int[Tensor, "B"], recurrence: Recurrence, initial_BDN: Float[Tensor, "B D N"] | None
) -> Scanned:
    """`causal_scan`, and the states after the first `lengths_B[b]` inputs of every row; the inputs after them are 0."""
    if initial_BDN is None:
        initial_BDN = x_BLD.new_zeros(x_BLD.shape[0], *recurrence.log_decay.shape)
    if x_BLD.shape[1] == 0:
        return Scanned(x_BLD, initial_BDN)
    scan = _scan(x_BLD, recurrence, initial_BDN)
    chunk, size = scan.inputs.shape[3], recurrence.log_decay.shape[1]
    whole, rest = lengths_B // chunk, lengths_B % chunk
    before = scan.states.gather(2, whole[:, None, None].expand(scan.states.shape[0], -1, 1, size)).squeeze(2)
    # The inputs since the last whole chunk, on the right of a chunk of their own.
    at = lengths_B[:, None] - chunk + torch.arange(chunk, device=x_BLD.device)
    flat = scan.inputs.flatten(2)
    since = flat.gather(2, at.clamp(min=0).expand(flat.shape[0], -1, chunk)).where(at >= (whole * chunk)[:, None], 0)
    final = _decayed(before, recurrence.log_decay[:, None] * rest[:, None]) + since @ _arriving(recurrence, chunk)
    return Scanned(_outputs(scan, x_BLD), final.transpose(0, 1))


class _Scan(NamedTuple):
    """Inputs and outputs in chunks of C, and the states before every chunk and after the last."""

    inputs: Float[Tensor, "D B J C"]
    out: Float[Tensor, "D B J C"]
    states: Float[Tensor, "D B J1 N"]


def _outputs(scan: _Scan, x_BLD: Tensor) -> Tensor:
    return scan.out.flatten(2)[..., : x_BLD.shape[1]].permute(1, 2, 0)


def _scan(x_BLD: Tensor, recurrence: Recurrence, initial_BDN: Tensor | None) -> _Scan:
    length = x_BLD.shape[1]
    chunk = min(CHUNK, max(1, length))
    padded = torch.nn.functional.pad(x_BLD, (0, 0, 0, -length % chunk))
    inputs = padded.permute(2, 0, 1).unflatten(2, (padded.shape[1] // chunk, chunk)).contiguous()
    channels, rows, chunks = inputs.shape[:3]
    flat = inputs.flatten(1, 2)
    finite = flat.where(flat.isfinite(), 0)
    out = finite @ _toeplitz(recurrence.kernel(chunk))
    # 0 x NaN is NaN, so a product would carry a NaN to earlier places too; it is cleared above and marks its own and later ones here.
    out = out + (flat - finite).cumsum(-1)
    if initial_BDN is None:
        initial = inputs.new_zeros(channels, rows, 1, recurrence.log_decay.shape[1])
    else:
        initial = initial_BDN.transpose(0, 1)[:, :, None]
    if initial_BDN is None and chunks <= 1:
        states = initial
    else:
        added = (flat @ _arriving(recurrence, chunk)).unflatten(1, (rows, chunks))
        states = _states(torch.cat([initial, added], dim=2), recurrence.log_decay * chunk)
        leaving = powers(recurrence.log_decay, chunk, start=1) * recurrence.outward[..., None]
        out = out + states[:, :, :-1].flatten(1, 2) @ leaving
    return _Scan(inputs, _GradientInRows.apply(out).unflatten(1, (rows, chunks)), states)


class _GradientInRows(torch.autograd.Function):
    """The same tensor; its gradient, which arrives with channels innermost, is laid out once for the products that follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def step(x_BD: Float[Tensor, "B D"], recurrence: Recurrence, before_BDN: Float[Tensor, "B D N"]) -> Float[Tensor, "B D N"]:
    """The states after one more input of every row."""
    return _decayed(before_BDN, recurrence.log_decay) + recurrence.inward * x_BD[..., None]


def _arriving(recurrence: Recurrence, chunk: int) -> Float[Tensor, "D C N"]:
    """What each input of a chunk adds to the state at its end."""
    return (powers(recurrence.log_decay, chunk).flip(-1) * recurrence.inward[..., None]).transpose(1, 2)


def _decayed(states: Tensor, exponent: Tensor) -> Tensor:
    """States times exp(exponent), as a difference: a factor just below 1 would round alike in every step of a long stream, and add up."""
    return torch.addcmul(states, states, torch.expm1(exponent))


def _states(added_DBJN: Tensor, log_decay_DN: Tensor) -> Float[Tensor, "D B J N"]:
    """S_j = q S_{j-1} + added_j by doubling: after step k every state holds the last 2^k additions."""
    states, reach = added_DBJN, 1
    while reach < added_DBJN.shape[2]:
        earlier = _decayed(states[:, :, :-reach], (log_decay_DN * reach)[:, None, None])
        states = states + torch.nn.functional.pad(earlier, (0, 0, reach, 0))
        reach *= 2
    return states


def _toeplitz(kernel_DC: Float[Tensor, "D C"]) -> Float[Tensor, "D C C"]:
    """Upper triangular matrices whose entry (j, i) is kernel[i - j]: what input j of a chunk adds to its output i.

    Rows of 2C numbers, the kernel and zeros, are written one after another and read as rows of 2C - 1: each begins one place
    later in its turn. Views and one copy, forward and backward, where indexing would gather and scatter.
    """
    channels, taps = kernel_DC.shape
    turns = torch.nn.functional.pad(kernel_DC, (0, taps))[:, None].expand(channels, taps, 2 * taps).flatten(1)
    return turns[:, : taps * (2 * taps - 1)].unflatten(1, (taps, 2 * taps - 1))[..., :taps]
