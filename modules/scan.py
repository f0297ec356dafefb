"""Linear recurrences with constant decay: their kernels, and a causal chunked scan."""

import math
from typing import Any, NamedTuple, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 64


class ChunkWeights(NamedTuple):
    """What the inputs and states of a chunk of C tokens contribute.

    Attributes:
        kernel: the impulse response: of an input to the outputs of its chunk, its own first.
        arriving: of each input to the state at the end of the chunk.
        leaving: of the state before the chunk to each output.
    """

    kernel: Float[Tensor, "D C"]
    arriving: Float[Tensor, "D C N"]
    leaving: Float[Tensor, "D N C"]


class LinearRecurrence(Protocol):
    """What a scan needs to know of a recurrence with constant decay; `outward` `(D, N)` reads its states."""

    @property
    def outward(self) -> Tensor:
        """Factors of the states in the output."""

    def over(self, chunk: int) -> ChunkWeights:
        """The weights of a chunk of so many tokens."""

    def kernels(self, reverse: Self, taps: int) -> tuple[Float[Tensor, "D K"], Float[Tensor, "D K"]]:
        """The impulse responses of this recurrence and of one that runs from the right, for lags 0 … taps - 1."""

    def decayed(self, states: Float[Tensor, "D ... N"], tokens: int | Tensor) -> Float[Tensor, "D ... N"]:
        """The states so many tokens later, without inputs; a tensor of tokens is broadcast against all axes but the
        first.
        """

    def step(self, x_BD: Float[Tensor, "B D"], before_BDN: Float[Tensor, "B D N"]) -> Float[Tensor, "B D N"]:
        """The states after one more input of every row."""


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

        $q^{iC + j} = q^{iC} q^j$ with $C \approx \sqrt{taps}$ makes it one batched product, without a (D, N, taps)
        tensor.
        """
        inner = _near_root(taps)
        outer = -(-taps // inner)
        coarse = powers(self.log_decay, outer, step=inner) * (self.inward * self.outward)[..., None]
        return (coarse.transpose(1, 2) @ powers(self.log_decay, inner)).flatten(1)[:, :taps]

    def kernels(self, reverse: "Recurrence", taps: int) -> tuple[Float[Tensor, "D K"], Float[Tensor, "D K"]]:
        """See `LinearRecurrence`."""
        return self.kernel(taps), reverse.kernel(taps)

    def over(self, chunk: int) -> ChunkWeights:
        """See `LinearRecurrence`."""
        decays = powers(self.log_decay, chunk + 1)
        kernel = ((self.inward * self.outward)[:, None] @ decays[..., :chunk]).squeeze(1)
        arriving = (decays[..., :chunk].flip(-1) * self.inward[..., None]).transpose(1, 2)
        return ChunkWeights(kernel, arriving, decays[..., 1:] * self.outward[..., None])

    def decayed(self, states: Float[Tensor, "D ... N"], tokens: int | Tensor) -> Float[Tensor, "D ... N"]:
        """See `LinearRecurrence`. As a difference: a factor just below 1 would round alike in every step of a long
        stream, and add up.
        """
        return torch.addcmul(states, states, torch.expm1(along(self.log_decay, states) * tokens))

    def step(self, x_BD: Float[Tensor, "B D"], before_BDN: Float[Tensor, "B D N"]) -> Float[Tensor, "B D N"]:
        """See `LinearRecurrence`."""
        return torch.addcmul(before_BDN, before_BDN, torch.expm1(self.log_decay)) + self.inward * x_BD[..., None]


def _near_root(taps: int) -> int:
    if not torch.compiler.is_compiling():
        return max(1, math.isqrt(taps))
    inner = 1
    while 4 * inner * inner <= taps:  # only compared: a compiler then knows the result for a range of lengths
        inner *= 2
    return inner


def along(factors_DN: Float[Tensor, "D N"], states: Float[Tensor, "D ... N"]) -> Float[Tensor, "D ... N"]:
    """Lay factors out beside states."""
    return factors_DN.reshape(factors_DN.shape[0], *[1] * (states.ndim - 2), factors_DN.shape[1])


def powers(log_decay_DN: Float[Tensor, "D N"], count: int, *, step: int = 1) -> Float[Tensor, "D N C"]:
    """Return 1, q^step, q^(2 step), … for `count` exponents."""
    exponents = torch.arange(0, count * step, step, device=log_decay_DN.device, dtype=log_decay_DN.dtype)
    return torch.exp(log_decay_DN[..., None] * exponents)


class Scanned(NamedTuple):
    """What a scan gives: the outputs, and the states where the rows end."""

    out: Float[Tensor, "B L D"]
    final: Float[Tensor, "B D N"]


def causal_scan(
    x_BLD: Float[Tensor, "B L D"], recurrence: LinearRecurrence, initial_BDN: Float[Tensor, "B D N"] | None = None
) -> Float[Tensor, "B L D"]:
    """Run the recurrence: products inside chunks, states passed between them.

    No later input touches an earlier output, not even by rounding or by a NaN; a Fourier transform could not promise
    that.

    Args:
        x_BLD: inputs in the dtype of the recurrence.
        recurrence: decay, inward and outward factors.
        initial_BDN: states to go on from; None for zeros.
    """
    return _outputs(_scan(x_BLD, recurrence, initial_BDN), x_BLD)


def causal_scan_with_state(
    x_BLD: Float[Tensor, "B L D"],
    lengths_B: Int[Tensor, "B"],
    recurrence: LinearRecurrence,
    initial_BDN: Float[Tensor, "B D N"] | None,
) -> Scanned:
    """`causal_scan`, and the states after the first `lengths_B[b]` inputs of every row; the inputs after them are 0."""
    if initial_BDN is None:
        initial_BDN = x_BLD.new_zeros(x_BLD.shape[0], *recurrence.outward.shape)
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
    final = recurrence.decayed(before, rest[:, None]) + since @ scan.weights.arriving
    return Scanned(_outputs(scan, x_BLD), final.transpose(0, 1))


def advance(
    x_BLD: Float[Tensor, "B L D"],
    lengths_B: Int[Tensor, "B"],
    recurrence: LinearRecurrence,
    before_BDN: Float[Tensor, "B D N"],
) -> Scanned:
    """`causal_scan_with_state`; of a single token its step, with fewer operations."""
    if x_BLD.shape[1] != 1:
        return causal_scan_with_state(x_BLD, lengths_B, recurrence, before_BDN)
    after = recurrence.step(x_BLD[:, 0], before_BDN)
    return Scanned((after * recurrence.outward).sum(-1)[:, None], after)


def scan_macs(width: int, tokens: int, states: int) -> int:
    """MACs of the matrix products of a scan over one row, without the weights of its chunks."""
    chunk = min(CHUNK, tokens)
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
    chunk = min(CHUNK, max(1, length))
    padded = torch.nn.functional.pad(x_BLD, (0, 0, 0, -length % chunk))
    inputs = padded.permute(2, 0, 1).unflatten(2, (padded.shape[1] // chunk, chunk)).contiguous()
    channels, rows, chunks = inputs.shape[:3]
    flat = inputs.flatten(1, 2)
    finite = flat.where(flat.isfinite(), 0)
    weights = recurrence.over(chunk)
    out = finite @ _toeplitz(weights.kernel)
    # 0 x NaN is NaN, so a product would carry a NaN to earlier places too; it is cleared above and marks its own and
    # later ones here.
    out = out + (flat - finite).cumsum(-1)
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
    """The same tensor; its gradient, which arrives with channels innermost, is laid out once for the products that
    follow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _states(added_DBJN: Tensor, recurrence: LinearRecurrence, chunk: int) -> Float[Tensor, "D B J N"]:
    """S_j = q^chunk S_{j-1} + added_j by doubling: after step k every state holds the last 2^k additions."""
    states, reach = added_DBJN, 1
    while reach < added_DBJN.shape[2]:
        earlier = recurrence.decayed(states[:, :, :-reach], chunk * reach)
        states = states + torch.nn.functional.pad(earlier, (0, 0, reach, 0))
        reach *= 2
    return states


def _toeplitz(kernel_DC: Float[Tensor, "D C"]) -> Float[Tensor, "D C C"]:
    """Upper triangular matrices whose entry (j, i) is kernel[i - j]: what input j of a chunk adds to its output i.

    Rows of 2C numbers, the kernel and zeros, are written one after another and read as rows of 2C - 1: each begins one
    place later in its turn. Views and one copy, forward and backward, where indexing would gather and scatter.
    """
    channels, taps = kernel_DC.shape
    turns = torch.nn.functional.pad(kernel_DC, (0, taps))[:, None].expand(channels, taps, 2 * taps).flatten(1)
    return turns[:, : taps * (2 * taps - 1)].unflatten(1, (taps, 2 * taps - 1))[..., :taps]
