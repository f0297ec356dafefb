"""Linear recurrences with constant decay, and a causal chunked scan."""

import math
from typing import Any, NamedTuple, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.kernels.chunks import chunk_of, inside


class ChunkWeights(NamedTuple):
    """Weights of the inputs and states of a chunk of C tokens.

    Attributes:
        kernel: impulse response from an input to the outputs of its chunk, its own first.
        arriving: weights of each input in the state at the end of the chunk.
        leaving: weights of the state before the chunk in each output.
    """

    kernel: Float[Tensor, "D C"]
    arriving: Float[Tensor, "D C N"]
    leaving: Float[Tensor, "D N C"]


class LinearRecurrence(Protocol):
    """Interface of a recurrence with constant decay that a scan runs."""

    @property
    def outward(self) -> Tensor:
        """Factors of the states in the output, shape (D, N)."""

    def over(self, chunk: int) -> ChunkWeights:
        """Weights of a chunk of `chunk` tokens."""

    def kernels(self, reverse: Self, taps: int) -> tuple[Float[Tensor, "D K"], Float[Tensor, "D K"]]:
        """Impulse responses of this recurrence and of one that runs from the right, for lags 0 … taps - 1."""

    def decayed(self, states: Float[Tensor, "D ... N"], tokens: int | Tensor) -> Float[Tensor, "D ... N"]:
        """The states after `tokens` more tokens without inputs; a tensor is broadcast to all axes but the first."""

    def step(self, x_BD: Float[Tensor, "B D"], before_BDN: Float[Tensor, "B D N"]) -> Float[Tensor, "B D N"]:
        """The states after one more input of every row."""


class Scanned(NamedTuple):
    """Outputs of a scan, and the states at the ends of the rows."""

    out: Float[Tensor, "B L D"]
    final: Float[Tensor, "B D N"]


def causal_scan(x_BLD: Float[Tensor, "B L D"], recurrence: LinearRecurrence) -> Float[Tensor, "B L D"]:
    """Run the recurrence from states of 0: products inside chunks, states passed between them.

    A later input never changes an earlier output, not even by rounding or by a NaN, as it would in a Fourier transform.

    Args:
        x_BLD: inputs in the dtype of the recurrence.
        recurrence: decay, inward and outward factors.
    """
    return _outputs(_scan(x_BLD, recurrence, None), x_BLD)


def advance(
    x_BLD: Float[Tensor, "B L D"],
    lengths_B: Int[Tensor, "B"],
    recurrence: LinearRecurrence,
    before_BDN: Float[Tensor, "B D N"],
) -> Scanned:
    """`causal_scan` that continues from states; a single token takes one step, with fewer operations.

    Args:
        x_BLD: inputs in the dtype of the recurrence; those after the first `lengths_B[b]` of a row are 0.
        lengths_B: number of inputs after which the states of each row are returned; 1 in every row of a single token.
        recurrence: decay, inward and outward factors.
        before_BDN: states before the first inputs.
    """
    if x_BLD.shape[1] == 0:
        return Scanned(x_BLD, before_BDN)
    if x_BLD.shape[1] == 1:
        after = recurrence.step(x_BLD[:, 0], before_BDN)
        return Scanned((after * recurrence.outward).sum(-1)[:, None], after)
    scan = _scan(x_BLD, recurrence, before_BDN)
    chunk, size = scan.inputs.shape[3], recurrence.outward.shape[1]
    whole, rest = lengths_B // chunk, lengths_B % chunk
    before = scan.states.gather(2, whole[:, None, None].expand(scan.states.shape[0], -1, 1, size)).squeeze(2)
    # The inputs since the last whole chunk, right-aligned in a chunk of their own.
    at = lengths_B[:, None] - chunk + torch.arange(chunk, device=x_BLD.device)
    flat = scan.inputs.flatten(2)
    since = flat.gather(2, at.clamp(min=0).expand(flat.shape[0], -1, chunk)).where(at >= (whole * chunk)[:, None], 0)
    final = recurrence.decayed(before, rest[:, None]) + since @ scan.weights.arriving
    return Scanned(_outputs(scan, x_BLD), final.transpose(0, 1))


def kernel_macs(width: int, states: int, taps: int) -> int:
    """MACs of the kernels of two directions, products of powers of the decays."""
    inner = max(1, math.isqrt(taps))
    return 2 * width * states * inner * -(-taps // inner)


def scan_macs(width: int, tokens: int, states: int) -> int:
    """MACs of the matrix products of a scan over one row, without the weights of its chunks."""
    chunk = chunk_of(tokens)
    chunks = -(-tokens // chunk)
    between = 2 * width * chunks * chunk * states if chunks > 1 else 0
    return width * chunks * chunk * chunk + between


class _Scan(NamedTuple):
    """Inputs and outputs in chunks of C, the states before every chunk and after the last, and the weights of a
    chunk.
    """

    inputs: Float[Tensor, "D B J C"]
    out: Float[Tensor, "D B J C"]
    states: Float[Tensor, "D B J1 N"]
    weights: ChunkWeights


def _outputs(scan: _Scan, x_BLD: Tensor) -> Tensor:
    return scan.out.flatten(2)[..., : x_BLD.shape[1]].permute(1, 2, 0)


def _scan(x_BLD: Tensor, recurrence: LinearRecurrence, initial_BDN: Tensor | None) -> _Scan:
    length = x_BLD.shape[1]
    chunk = chunk_of(length)
    padded = torch.nn.functional.pad(x_BLD, (0, 0, 0, -length % chunk))
    inputs = padded.permute(2, 0, 1).unflatten(2, (padded.shape[1] // chunk, chunk)).contiguous()
    channels, rows, chunks = inputs.shape[:3]
    flat = inputs.flatten(1, 2)
    weights = recurrence.over(chunk)
    out = inside(flat, weights.kernel)
    if initial_BDN is None:
        initial = inputs.new_zeros(channels, rows, 1, recurrence.outward.shape[1])
    else:
        initial = initial_BDN.transpose(0, 1)[:, :, None]
    if initial_BDN is None and chunks <= 1:
        states = initial
    else:
        added = (flat @ weights.arriving).unflatten(1, (rows, chunks))
        states = _states(torch.cat([initial, added], dim=2), recurrence, chunk)
        out = out + states[:, :, :-1].flatten(1, 2) @ weights.leaving
    return _Scan(inputs, _GradientInRows.apply(out).unflatten(1, (rows, chunks)), states, weights)


class _GradientInRows(torch.autograd.Function):
    """Identity whose gradient, which arrives with channels innermost, is made contiguous once for the next products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _states(added_DBJN: Tensor, recurrence: LinearRecurrence, chunk: int) -> Float[Tensor, "D B J N"]:
    """S_j = q^chunk S_{j-1} + added_j by doubling: after step k every state is the sum of the last 2^k additions."""
    states, reach = added_DBJN, 1
    while reach < added_DBJN.shape[2]:
        earlier = recurrence.decayed(states[:, :, :-reach], chunk * reach)
        states = states + torch.nn.functional.pad(earlier, (0, 0, reach, 0))
        reach *= 2
    return states
