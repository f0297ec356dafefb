"""Building blocks of scans in chunks: powers of decays, and the products inside a chunk."""

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 64


def chunk_of(length: int) -> int:
    """Tokens of a chunk of rows of this length."""
    return min(CHUNK, max(1, length))


def along(factors_DN: Float[Tensor, "D N"], states: Float[Tensor, "D ... N"]) -> Float[Tensor, "D ... N"]:
    """Factors with the axes of states."""
    return factors_DN.reshape(factors_DN.shape[0], *[1] * (states.ndim - 2), factors_DN.shape[1])


def exponents(like: Tensor, count: int, step: int = 1) -> Float[Tensor, "C"]:
    """0, step, 2 step, … of the device and dtype of a tensor."""
    return torch.arange(0, count * step, step, device=like.device, dtype=like.dtype)


def powers(log_decay_DN: Float[Tensor, "D N"], count: int, step: int = 1) -> Float[Tensor, "D N C"]:
    """Return 1, q^step, q^(2 step), … for `count` exponents."""
    return torch.exp(log_decay_DN[..., None] * exponents(log_decay_DN, count, step))


def decayed(states: Float[Tensor, "*S"], log_decay: Float[Tensor, "..."]) -> Float[Tensor, "*S"]:
    """States times the exponential of log_decay, which is broadcast."""
    # As a difference: a factor just below 1 would round equally in every step of a long stream, and the errors would
    # add up.
    return torch.addcmul(states, states, torch.expm1(log_decay))


def inside(x_DMC: Float[Tensor, "D M C"], kernel_DC: Float[Tensor, "D C"]) -> Float[Tensor, "D M C"]:
    """Contribution of the inputs of each chunk to its outputs, by the impulse response.

    A later input never changes an earlier output, not even by rounding or by a NaN.
    """
    weights = toeplitz(kernel_DC)
    if x_DMC.device.type == "cpu" and not torch.compiler.is_compiling() and bool(x_DMC.detach().sum().isfinite()):
        return x_DMC @ weights
    # 0 x NaN is NaN, so a product would carry a NaN to earlier outputs too. It is zeroed, and makes its own and later
    # outputs NaN by the sum.
    finite = x_DMC.where(x_DMC.isfinite(), 0)
    return finite @ weights + (x_DMC - finite).cumsum(-1)


def toeplitz(kernel_DC: Float[Tensor, "D C"]) -> Float[Tensor, "D C C"]:
    """Upper triangular matrices whose entry (j, i) is kernel[i - j], the weight of a chunk's input j in its output i.

    Rows of 2C numbers, the kernel and zeros, are written one after another and read as rows of 2C - 1, so that each is
    shifted by one. Forward and backward are views and one copy, where indexing would gather and scatter.
    """
    channels, taps = kernel_DC.shape
    turns = torch.nn.functional.pad(kernel_DC, (0, taps))[:, None].expand(channels, taps, 2 * taps).flatten(1)
    return turns[:, : taps * (2 * taps - 1)].unflatten(1, (taps, 2 * taps - 1))[..., :taps]


def diagonal_sums(matrices_DCC: Float[Tensor, "D C C"]) -> Float[Tensor, "D C"]:
    """Sums over the main diagonal and each one above it: the gradient of `toeplitz`."""
    taps = matrices_DCC.shape[1]
    turns = torch.nn.functional.pad(matrices_DCC, (0, taps - 1)).flatten(1)
    return torch.nn.functional.pad(turns, (0, taps)).unflatten(1, (taps, 2 * taps)).sum(1)[:, :taps]
