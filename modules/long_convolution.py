"""Convolution with kernels as long as the sequence, in both directions at once, by Fourier transform."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sma.autograd import first_derivative
from sma.kernels.fourier import circular_kernel, convolve, convolve_backward, fast_length


def long_convolution(
    x_BLD: Float[Tensor, "B L D"],
    ahead_DK: Float[Tensor, "D K"],
    reverse_DK: Float[Tensor, "D K"],
    skip_D: Float[Tensor, "D"],
) -> Float[Tensor, "B L D"]:
    r"""$y_t = \sum_{l<K} a_l x_{t-l} + \sum_{l<K} r_l x_{t+l} + s x_t$ for every channel; beyond its ends a sequence
    is 0.

    Args:
        x_BLD: sequences, in float32 or float64.
        ahead_DK: a, the kernel towards later positions; K at most L.
        reverse_DK: r, the kernel towards earlier positions.
        skip_D: s.
    """
    if torch.compiler.is_compiling():  # a compiler differentiates transforms itself
        circular = circular_kernel(ahead_DK, reverse_DK, skip_D, x_BLD.shape[1])
        size = circular.shape[1]
        product = torch.fft.rfft(x_BLD.transpose(1, 2), n=size) * torch.fft.rfft(circular)
        return torch.fft.irfft(product, n=size)[..., : x_BLD.shape[1]].transpose(1, 2)
    result: Tensor = _LongConvolution.apply(x_BLD, ahead_DK, reverse_DK, skip_D)
    return result


def convolution_macs(width: int, length: int, taps: int) -> int:
    """Estimated MACs of the Fourier transforms of one row, 1.25 n log2 n each."""
    size = fast_length(length + taps - 1)
    return round(3 * width * 1.25 * size * math.log2(size))


class _LongConvolution(torch.autograd.Function):
    """Backward by three half transforms, where autograd of rfft takes a full complex one."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, ahead_DK: Tensor, reverse_DK: Tensor, skip_D: Tensor) -> Tensor:
        circular = circular_kernel(ahead_DK, reverse_DK, skip_D, x_BLD.shape[1])
        out, spectra = convolve(x_BLD, circular)
        ctx.save_for_backward(*spectra)
        ctx.size, ctx.taps = circular.shape[1], ahead_DK.shape[1]
        return out

    @staticmethod
    @first_derivative("the long convolution of an s4d")
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, ...]:
        x_grad, kernels_grad, skip_grad = convolve_backward(grad_BLD, list(ctx.saved_tensors), ctx.size, ctx.taps)
        return x_grad, kernels_grad[0], kernels_grad[1], skip_grad
