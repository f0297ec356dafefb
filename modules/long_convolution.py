"""Convolution as long as the sequence, in both directions at once, by Fourier transform."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@cache
def fast_length(least: int) -> int:
    """Return an even length of at least `least`, and little more, whose only prime factors are 2, 3 and 5."""
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


def _channel_slices(channels: int, rows: int, size: int, device: torch.device) -> list[slice]:
    """Groups of channels whose transforms stay in a CPU's cache; an accelerator takes all channels at once."""
    group = channels if device.type != "cpu" else max(1, 2**18 // max(1, rows * size))
    return [slice(start, start + group) for start in range(0, channels, group)]


class _LongConvolution(torch.autograd.Function):
    """Autograd of rfft goes through a full complex transform; written out, backward costs three half transforms."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, circular_DF: Tensor) -> Tensor:
        rows, length, channels = x_BLD.shape
        size = circular_DF.shape[1]
        kernel = torch.fft.rfft(circular_DF)
        slices = _channel_slices(channels, rows, size, x_BLD.device)
        spectra = []
        out = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
        for part in slices:
            spectrum = torch.fft.rfft(x_BLD[..., part].transpose(1, 2), n=size)
            out[..., part] = torch.fft.irfft(spectrum * kernel[part], n=size)[..., :length].transpose(1, 2)
            spectra.append(spectrum)
        ctx.save_for_backward(kernel, *spectra)
        ctx.slices, ctx.size = slices, size
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, Tensor]:
        kernel, *spectra = ctx.saved_tensors
        length, size = grad_BLD.shape[1], ctx.size
        x_grad = torch.empty_like(grad_BLD, memory_format=torch.contiguous_format)
        kernel_grad = grad_BLD.new_empty(grad_BLD.shape[2], size)
        for part, spectrum in zip(ctx.slices, spectra, strict=True):
            grad = torch.fft.rfft(grad_BLD[..., part].transpose(1, 2), n=size)
            # Everything is real, so a correlation is a product with the conjugate.
            back = torch.fft.irfft(grad * kernel[part].conj_physical(), n=size)
            x_grad[..., part] = back[..., :length].transpose(1, 2)
            kernel_grad[part] = torch.fft.irfft(grad.conj_physical_().mul_(spectrum).sum(0).conj_physical_(), n=size)
        return x_grad, kernel_grad
