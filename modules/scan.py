"""Linear recurrences with constant decay: their kernels, and a causal chunked scan."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
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


def causal_scan(x_BLD: Float[Tensor, "B L D"], recurrence: Recurrence, truncation: int | None = None) -> Float[Tensor, "B L D"]:
    """Run the recurrence from a zero state: products inside chunks, states passed between them.

    No later input touches an earlier output, not even by rounding or by a NaN; a Fourier transform could not promise that.

    Args:
        x_BLD: inputs in the dtype of the recurrence.
        recurrence: decay, inward and outward factors.
        truncation: an input acts on this many outputs only, its own included; None for all.
    """
    length = x_BLD.shape[1]
    chunk = min(CHUNK, max(1, length))
    inputs = _chunked(x_BLD, chunk)
    out = _scan_chunks(inputs, recurrence, chunk)
    if truncation is not None and truncation < length:
        # s_t = q s_{t-1} + b (x_t - q^K x_{t-K}): the late inputs leave by a recurrence of their own.
        leaving = recurrence._replace(inward=recurrence.inward * torch.exp(recurrence.log_decay * truncation))
        late = torch.nn.functional.pad(x_BLD, (0, 0, truncation, 0))[:, :length]
        out = out - _scan_chunks(_chunked(late, chunk), leaving, chunk)
    return out.flatten(2)[..., :length].permute(1, 2, 0)


def _chunked(x_BLD: Tensor, chunk: int) -> Float[Tensor, "D B J C"]:
    x_BLD = torch.nn.functional.pad(x_BLD, (0, 0, 0, -x_BLD.shape[1] % chunk))
    return x_BLD.permute(2, 0, 1).unflatten(2, (x_BLD.shape[1] // chunk, chunk)).contiguous()


def _scan_chunks(inputs_DBJC: Tensor, recurrence: Recurrence, chunk: int) -> Float[Tensor, "D B J C"]:
    channels, rows, chunks = inputs_DBJC.shape[:3]
    flat = inputs_DBJC.flatten(1, 2)
    finite = flat.where(flat.isfinite(), 0)
    out = finite @ _toeplitz(recurrence.kernel(chunk)).transpose(1, 2)
    # 0 x NaN is NaN, so a product would carry a NaN to earlier places too; it is cleared above and marks its own and later ones here.
    out = out + (flat - finite).cumsum(-1)
    if chunks > 1:
        arriving = (powers(recurrence.log_decay, chunk).flip(-1) * recurrence.inward[..., None]).transpose(1, 2)
        added = (flat @ arriving).unflatten(1, (rows, chunks))
        before = torch.nn.functional.pad(_states(added, recurrence.log_decay * chunk)[:, :, :-1], (0, 0, 1, 0))
        leaving = powers(recurrence.log_decay, chunk, start=1) * recurrence.outward[..., None]
        out = out + before.flatten(1, 2) @ leaving
    return out.unflatten(1, (rows, chunks))


def _states(added_DBJN: Tensor, log_decay_DN: Tensor) -> Float[Tensor, "D B J N"]:
    """S_j = q S_{j-1} + added_j by doubling: after step k every state holds the last 2^k additions."""
    states, reach = added_DBJN, 1
    while reach < added_DBJN.shape[2]:
        decay = torch.exp(log_decay_DN * reach)[:, None, None]
        states = states + torch.nn.functional.pad(states[:, :, :-reach] * decay, (0, 0, reach, 0))
        reach *= 2
    return states


def _toeplitz(kernel_DC: Float[Tensor, "D C"]) -> Float[Tensor, "D C C"]:
    """Lower triangular matrices whose entry (i, j) is kernel[i - j]."""
    taps = kernel_DC.shape[1]
    lag = torch.arange(taps, device=kernel_DC.device)[:, None] - torch.arange(taps, device=kernel_DC.device)
    return kernel_DC[:, lag.clamp(min=0)].where(lag >= 0, 0)
