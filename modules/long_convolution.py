"""Convolution as long as the sequence, in both directions at once, by Fourier transform."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@cache
def fast_length(least: int) -> int:
    """Return the smallest even length of at least `least` whose only prime factors are 2, 3 and 5."""
    best = 2 ** max(1, (least - 1).bit_length())
    for power3 in (1, 3, 9, 27):
        for factor in (power3, power3 * 5, power3 * 25):
            twos = max(1, (-(-least // factor) - 1).bit_length())
            best = min(best, factor * 2**twos)
    return best


def circular_kernel(
    ahead_DK: Float[Tensor, "D K"], reverse_DK: Float[Tensor, "D K"] | None, skip_D: Float[Tensor, "D"], length: int
) -> Float[Tensor, "D F"]:
    """Lay out the kernels of both directions for one circular convolution over sequences of `length`.

    Lag l of the forward kernel stands at place l, lag -l of the reverse kernel at place F - l, and `skip_D` is added at lag 0.
    F is at least length + K - 1, so nothing wraps around onto a place that is read.
    """
    channels, taps = ahead_DK.shape
    size = fast_length(length + taps - 1)
    now = ahead_DK[:, :1] + skip_D[:, None]
    if reverse_DK is None:
        return torch.cat([now, ahead_DK[:, 1:], ahead_DK.new_zeros(channels, size - taps)], dim=1)
    gap = ahead_DK.new_zeros(channels, size - 2 * taps + 1)
    return torch.cat([now + reverse_DK[:, :1], ahead_DK[:, 1:], gap, reverse_DK[:, 1:].flip(1)], dim=1)


def long_convolution(x_BLD: Float[Tensor, "B L D"], circular_DF: Float[Tensor, "D F"]) -> Float[Tensor, "B L D"]:
    """Convolve every channel of a sequence with its kernel, as `circular_kernel` lays it out."""
    result: Tensor = _LongConvolution.apply(x_BLD, circular_DF)
    return result


class _LongConvolution(torch.autograd.Function):
    """Autograd of rfft goes through a full complex transform; written out, backward costs three half transforms."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, circular_DF: Tensor) -> Tensor:
        size, length = circular_DF.shape[1], x_BLD.shape[1]
        x_spectrum = torch.fft.rfft(x_BLD.transpose(1, 2), n=size)
        kernel_spectrum = torch.fft.rfft(circular_DF)
        ctx.save_for_backward(x_spectrum, kernel_spectrum)
        ctx.sizes = size, length
        out = torch.fft.irfft(x_spectrum * kernel_spectrum, n=size)
        return out[..., :length].transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, Tensor]:
        x_spectrum, kernel_spectrum = ctx.saved_tensors
        size, length = ctx.sizes
        grad_spectrum = torch.fft.rfft(grad_BLD.transpose(1, 2), n=size)
        # x and the gradient are real, so a correlation is a product with the conjugate.
        kernel_grad = torch.fft.irfft((grad_spectrum * x_spectrum.conj()).sum(0), n=size)
        x_grad = torch.fft.irfft(grad_spectrum.mul_(kernel_spectrum.conj()), n=size)
        return x_grad[..., :length].transpose(1, 2).contiguous(), kernel_grad
