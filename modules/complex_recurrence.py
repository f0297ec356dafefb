"""Linear recurrences with constant complex decay and real inputs and outputs, and their kernels.

All products are real: a state is stored as [Re s | Im s], N = 2P real numbers for P complex ones.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sma.kernels.chunks import along
from sma.modules.scan import ChunkWeights


class ComplexRecurrence(NamedTuple):
    r"""$s_t = q s_{t-1} + x_t$, $y_t = 2\,\mathrm{Re} \sum_p w_p s_{t,p}$ with $q = e^{a + i\theta}$, for every
    channel.

    The factor 2 Re stands for the conjugate of every state, which is never computed.

    Attributes:
        log_decay: a, at most 0, in float64.
        angle: theta, the rotation per token in radians, in float64, so that multiples of it stay exact angles.
        outward: [2 Re w | -2 Im w], in the dtype of the inputs.
    """

    log_decay: Float[Tensor, "D P"]
    angle: Float[Tensor, "D P"]
    outward: Float[Tensor, "D N"]

    def kernels(self, reverse: "ComplexRecurrence", taps: int) -> tuple[Float[Tensor, "D K"], Float[Tensor, "D K"]]:
        """See `LinearRecurrence`; the directions differ only in their outward factors."""
        ahead, back = kernels(self, torch.stack([self.outward, reverse.outward]), taps)
        return ahead, back

    def over(self, chunk: int) -> ChunkWeights:
        """See `LinearRecurrence.over`."""
        cosine, sine = powers(self, chunk + 1, self.outward.dtype)
        read = _turned_weights(self.outward, cosine, sine)
        arriving = torch.cat([cosine, sine], dim=1)[..., :chunk].flip(-1).transpose(1, 2)
        # An input enters the real part of a state with the factor 1, so the kernel is the readout of the real parts.
        return ChunkWeights(read.chunk(2, dim=1)[0].sum(1)[:, :chunk], arriving, read[..., 1:])

    def decayed(self, states: Float[Tensor, "D ... N"], tokens: int | Tensor) -> Float[Tensor, "D ... N"]:
        """See `LinearRecurrence.decayed`."""
        parts = states.chunk(2, dim=-1)
        log_decay, angle = (along(part, parts[0]) * tokens for part in (self.log_decay, self.angle))
        return torch.cat(_turned(parts, log_decay, angle), dim=-1)

    def step(self, x_BD: Float[Tensor, "B D"], before_BDN: Float[Tensor, "B D N"]) -> Float[Tensor, "B D N"]:
        """See `LinearRecurrence.step`."""
        real, imaginary = _turned(before_BDN.chunk(2, dim=-1), self.log_decay, self.angle)
        return torch.cat([real + x_BD[..., None], imaginary], dim=-1)


def kernels(recurrence: ComplexRecurrence, outward_SDN: Float[Tensor, "S D N"], taps: int) -> Float[Tensor, "S D K"]:
    r"""$k_l = 2\,\mathrm{Re} \sum_p w_p q_p^l$ for l = 0 … taps - 1, for several sets of outward factors.

    $q^{iC + j} = q^{iC} q^j$ with $C \approx \sqrt{taps}$ makes it one batched real product, without a (D, P, taps)
    tensor.
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
    # Full turns are removed in float64; sine and cosine of the rest are as exact in float32, and twice as fast.
    angle = torch.remainder(recurrence.angle[..., None] * exponents, 2 * math.pi).to(dtype)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _turned_weights(outward_DN: Tensor, cosine_DPC: Tensor, sine_DPC: Tensor) -> Float[Tensor, "D N C"]:
    """The outward factors of w times powers of q: the readout of a state that many tokens later."""
    real, imaginary = outward_DN[..., None].chunk(2, dim=1)
    return torch.cat([real * cosine_DPC + imaginary * sine_DPC, imaginary * cosine_DPC - real * sine_DPC], dim=1)


def minus_one(
    log_decay: Float[Tensor, "..."], angle: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Real and imaginary parts of exp(log_decay + i angle) - 1, exact to rounding near 0.

    The gradients vanish with exp(log_decay).
    """
    radius = torch.exp(log_decay)
    return torch.expm1(log_decay) - 2 * radius * torch.sin(angle / 2) ** 2, radius * torch.sin(angle)


def _turned(parts: Sequence[Tensor], log_decay: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts times exp(log_decay + i angle).

    Computed as a difference: a factor near 1 would round equally in every step of a long stream.
    """
    real, imaginary = parts
    by_real, by_imaginary = (part.to(real.dtype) for part in minus_one(log_decay, angle))
    turned_real = torch.addcmul(torch.addcmul(real, real, by_real), imaginary, by_imaginary, value=-1)
    return turned_real, torch.addcmul(torch.addcmul(imaginary, imaginary, by_real), real, by_imaginary)
