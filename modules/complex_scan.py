"""Linear recurrences with constant complex decay and real inputs and outputs: their kernels, and a causal chunked scan.

All products are real: a state is kept as [Re s | Im s], N = 2P real numbers for P complex ones.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.modules.scan import CHUNK, Scanned, _GradientInRows, _toeplitz


class ComplexRecurrence(NamedTuple):
    r"""$s_t = q s_{t-1} + x_t$, $y_t = 2\,\mathrm{Re} \sum_p w_p s_{t,p}$ with $q = e^{a + i\theta}$, for every channel.

    The factor 2 Re stands for the conjugate of every state, which is never computed.

    Attributes:
        log_decay: a, at most 0, in float64.
        angle: theta, turned per token, in radians, in float64: its multiple after a thousand tokens must still be an angle.
        outward: [2 Re w | -2 Im w], in the dtype of the inputs.
    """

    log_decay: Float[Tensor, "D P"]
    angle: Float[Tensor, "D P"]
    outward: Float[Tensor, "D N"]


def kernels(recurrence: ComplexRecurrence, outward_SDN: Float[Tensor, "S D N"], taps: int) -> Float[Tensor, "S D K"]:
    r"""$k_l = 2\,\mathrm{Re} \sum_p w_p q_p^l$ for l = 0 … taps - 1, for several sets of outward factors.

    $q^{iC + j} = q^{iC} q^j$ with $C \approx \sqrt{taps}$ makes it one batched real product, without a (D, P, taps) tensor.
    """
    inner = max(1, math.isqrt(taps))
    outer = -(-taps // inner)
    coarse = powers(recurrence, outer, outward_SDN.dtype, step=inner)
    coarse_SDNI = torch.stack([_turned_weights(outward, *coarse) for outward in outward_SDN])
    fine_DNC = torch.cat(powers(recurrence, inner, outward_SDN.dtype), dim=1)
    together = coarse_SDNI.permute(1, 0, 3, 2).flatten(1, 2) @ fine_DNC
    return together.unflatten(1, (len(outward_SDN), outer)).flatten(2)[..., :taps].transpose(0, 1)


def powers(
    recurrence: ComplexRecurrence, count: int, dtype: torch.dtype, *, step: int = 1
) -> tuple[Float[Tensor, "D P C"], Float[Tensor, "D P C"]]:
    """Real and imaginary parts of 1, q^step, q^(2 step), … for `count` exponents."""
    exponents = torch.arange(0, count * step, step, device=recurrence.angle.device, dtype=recurrence.angle.dtype)
    radius = torch.exp((recurrence.log_decay[..., None] * exponents).to(dtype))
    # Full turns are taken off in float64; sine and cosine of what is left are as exact in float32, and twice as fast.
    angle = torch.remainder(recurrence.angle[..., None] * exponents, 2 * math.pi).to(dtype)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _turned_weights(outward_DN: Tensor, cosine_DPC: Tensor, sine_DPC: Tensor) -> Float[Tensor, "D N C"]:
    """The outward factors of w times powers of q: what is read of a state that many tokens later."""
    real, imaginary = outward_DN[..., None].chunk(2, dim=1)
    return torch.cat([real * cosine_DPC + imaginary * sine_DPC, imaginary * cosine_DPC - real * sine_DPC], dim=1)


def complex_scan(
    x_BLD: Float[Tensor, "B L D"], recurrence: ComplexRecurrence, initial_BDN: Float[Tensor, "B D N"] | None = None
) -> Float[Tensor, "B L D"]:
    """Run the recurrence: products inside chunks, states passed between them.

    No later input touches an earlier output, not even by rounding or by a NaN; a Fourier transform could not promise that.

    Args:
        x_BLD: inputs in the dtype of the outward factors.
        recurrence: decay, angle and outward factors.
        initial_BDN: states to go on from; None for zeros.
    """
    return _outputs(_scan(x_BLD, recurrence, initial_BDN), x_BLD)


def complex_scan_with_state(
    x_BLD: Float[Tensor, "B L D"], lengths_B: Int[Tensor, "B"], recurrence: ComplexRecurrence, initial_BDN: Float[Tensor, "B D N"]
) -> Scanned:
    """`complex_scan`, and the states after the first `lengths_B[b]` inputs of every row; the inputs after them are 0."""
    if x_BLD.shape[1] == 0:
        return Scanned(x_BLD, initial_BDN)
    scan = _scan(x_BLD, recurrence, initial_BDN)
    chunk, size = scan.inputs.shape[3], recurrence.outward.shape[1]
    whole, rest = lengths_B // chunk, lengths_B % chunk
    before = scan.states.gather(2, whole[:, None, None].expand(scan.states.shape[0], -1, 1, size)).squeeze(2)
    # The inputs since the last whole chunk, on the right of a chunk of their own.
    at = lengths_B[:, None] - chunk + torch.arange(chunk, device=x_BLD.device)
    flat = scan.inputs.flatten(2)
    since = flat.gather(2, at.clamp(min=0).expand(flat.shape[0], -1, chunk)).where(at >= (whole * chunk)[:, None], 0)
    turned = _turned(before.chunk(2, dim=-1), recurrence.log_decay[:, None] * rest[:, None], recurrence.angle[:, None] * rest[:, None])
    final = torch.cat(turned, dim=-1) + since @ scan.arriving
    return Scanned(_outputs(scan, x_BLD), final.transpose(0, 1))


def complex_step(x_BD: Float[Tensor, "B D"], recurrence: ComplexRecurrence, before_BDN: Float[Tensor, "B D N"]) -> Float[Tensor, "B D N"]:
    """The states after one more input of every row."""
    real, imaginary = _turned(before_BDN.chunk(2, dim=-1), recurrence.log_decay, recurrence.angle)
    return torch.cat([real + x_BD[..., None], imaginary], dim=-1)


def minus_one(log_decay: Float[Tensor, "..."], angle: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Real and imaginary parts of exp(log_decay + i angle) - 1, exact to rounding near 0, with gradients that fade as the decay does."""
    radius = torch.exp(log_decay)
    return torch.expm1(log_decay) - 2 * radius * torch.sin(angle / 2) ** 2, radius * torch.sin(angle)


class _Scan(NamedTuple):
    """Inputs and outputs in chunks of C, the states before every chunk and after the last, and what an input adds to the next of them."""

    inputs: Float[Tensor, "D B J C"]
    out: Float[Tensor, "D B J C"]
    states: Float[Tensor, "D B J1 N"]
    arriving: Float[Tensor, "D C N"]


def _outputs(scan: _Scan, x_BLD: Tensor) -> Tensor:
    return scan.out.flatten(2)[..., : x_BLD.shape[1]].permute(1, 2, 0)


def _scan(x_BLD: Tensor, recurrence: ComplexRecurrence, initial_BDN: Tensor | None) -> _Scan:
    length = x_BLD.shape[1]
    chunk = min(CHUNK, max(1, length))
    padded = torch.nn.functional.pad(x_BLD, (0, 0, 0, -length % chunk))
    inputs = padded.permute(2, 0, 1).unflatten(2, (padded.shape[1] // chunk, chunk)).contiguous()
    channels, rows, chunks = inputs.shape[:3]
    flat = inputs.flatten(1, 2)
    finite = flat.where(flat.isfinite(), 0)
    cosine, sine = powers(recurrence, chunk + 1, recurrence.outward.dtype)
    leaving = _turned_weights(recurrence.outward, cosine, sine)
    arriving = torch.cat([cosine, sine], dim=1)[..., :chunk].flip(-1).transpose(1, 2)
    # An input enters the real part of a state with the factor 1, so the kernel is what leaves the real parts.
    kernel = leaving.chunk(2, dim=1)[0].sum(1)[:, :chunk]
    out = finite @ _toeplitz(kernel)
    # 0 x NaN is NaN, so a product would carry a NaN to earlier places too; it is cleared above and marks its own and later ones here.
    out = out + (flat - finite).cumsum(-1)
    if initial_BDN is None:
        initial = inputs.new_zeros(channels, rows, 1, recurrence.outward.shape[1])
    else:
        initial = initial_BDN.transpose(0, 1)[:, :, None]
    if initial_BDN is None and chunks <= 1:
        states = initial
    else:
        added = (flat @ arriving).unflatten(1, (rows, chunks))
        states = _states(torch.cat([initial, added], dim=2), recurrence, chunk)
        out = out + states[:, :, :-1].flatten(1, 2) @ leaving[..., 1:]
    return _Scan(inputs, _GradientInRows.apply(out).unflatten(1, (rows, chunks)), states, arriving)


def _turned(parts: Sequence[Tensor], log_decay: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts times exp(log_decay + i angle).

    Added up as a difference: a factor near 1 would round alike in every step of a long stream.
    """
    (real, imaginary), (by_real, by_imaginary) = parts, (part.to(parts[0].dtype) for part in minus_one(log_decay, angle))
    turned_real = torch.addcmul(torch.addcmul(real, real, by_real), imaginary, by_imaginary, value=-1)
    return turned_real, torch.addcmul(torch.addcmul(imaginary, imaginary, by_real), real, by_imaginary)


def _states(added_DBJN: Tensor, recurrence: ComplexRecurrence, chunk: int) -> Float[Tensor, "D B J N"]:
    """S_j = q^chunk S_{j-1} + added_j by doubling: after step k every state holds the last 2^k additions."""
    parts, reach = added_DBJN.chunk(2, dim=-1), 1
    while reach < added_DBJN.shape[2]:
        log_decay, angle = ((part * (chunk * reach))[:, None, None] for part in recurrence[:2])
        earlier = _turned([part[:, :, :-reach] for part in parts], log_decay, angle)
        parts = tuple(part + torch.nn.functional.pad(late, (0, 0, reach, 0)) for part, late in zip(parts, earlier, strict=True))
        reach *= 2
    return torch.cat(parts, dim=-1)
