"""Damped multi-dimensional exponential moving average: the linear state-space backbone of SeqBoat."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from sma.checks import check_sizes
from sma.init import truncated_normal_
from sma.modules.cache import Cache, empty_cache
from sma.modules.long_convolution import convolution_macs
from sma.modules.scan import CHUNK, Recurrence, Scanned, advance, causal_scan, kernel_macs, scan_macs
from sma.modules.state_space import StateSpace
from sma.padding import pack
from sma.pytree import register_output
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import MACs, State, SubModuleSpec


@register
class EMASpec(SubModuleSpec):
    """Spec of `EMA`."""

    kind: Literal["ema"] = "ema"
    state_size: int = Field(default=16, ge=1, le=1024, description="states per channel and direction, N")
    bidirectional: bool = Field(default=True, description="run a second recurrence from the right; false is causal")
    truncation: int | None = Field(
        default=None, ge=1, description="length of the kernel, in tokens; null for the whole sequence"
    )

    def build(self, width: int) -> "EMA":
        return EMA(self, width)

    @property
    def directions(self) -> int:
        """2 if bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    def num_parameters(self, width: int) -> int:
        return width * (self.directions * 4 * self.state_size + 1)

    def macs(self, width: int, tokens: int) -> MACs:
        if tokens == 0:
            return MACs()
        if self.bidirectional:
            taps = min(tokens, self.truncation or tokens)
            kernels = kernel_macs(width, self.state_size, taps)
            return MACs(matmul=kernels, fft=convolution_macs(width, tokens, taps))
        kernel = width * self.state_size * min(CHUNK, tokens)
        passes = 2 if self.truncation is not None and self.truncation < tokens else 1
        return MACs(matmul=passes * (kernel + scan_macs(width, tokens, self.state_size)))


class EMA(StateSpace[Recurrence]):
    r"""A bank of damped exponential moving averages per channel.

    $p = \sigma(\delta)$, $q = 1 - p\,\sigma(\alpha)$, $s_t = q s_{t-1} + p \beta x_t$, $y_t = \sum_n \gamma_n s_{t,n} /
    \sqrt N + \omega x_t$. A bidirectional one adds a second recurrence, with its own parameters, that runs from the
    right; both include the token itself.

    Args:
        spec: states per channel, direction and truncation.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `delta`, `alpha`, `beta` are `(D or 2D, N, 1)`, `gamma` `(D or 2D, N)`, the
        forward set first; `omega` `(D,)`. Computed in float32 or wider, returned in the dtype of the tokens.

    Reference:
        Ma et al., "Mega: Moving Average Equipped Gated Attention", arXiv 2209.10655.
    """

    spec: EMASpec

    def __init__(self, spec: EMASpec, width: int) -> None:
        super().__init__(spec, width, EMAState, (width, spec.state_size), spec.truncation)
        rows, states = spec.directions * width, spec.state_size
        self.delta = nn.Parameter(torch.empty(rows, states, 1))
        self.alpha = nn.Parameter(torch.empty(rows, states, 1))
        self.beta = nn.Parameter(torch.empty(rows, states, 1))
        self.gamma = nn.Parameter(torch.empty(rows, states))
        self.omega = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters from the authors' distributions."""
        truncated_normal_(self.delta, 0.2)
        truncated_normal_(self.alpha, 0.2)
        truncated_normal_(self.beta, 0.02)
        self.beta[:, 0::2] += 1.0
        self.beta[:, 1::2] -= 1.0
        truncated_normal_(self.gamma, 1.0)
        truncated_normal_(self.omega, 1.0)

    def recurrences(self, dtype: torch.dtype) -> list[Recurrence]:
        """The recurrence of each direction, forward first."""
        step = torch.sigmoid(self.delta.to(dtype).squeeze(-1))
        # A decay that rounds to 0 has no logarithm, and its gradient would be 0 / 0: the rounding error is its minimum.
        damping = (step * torch.sigmoid(self.alpha.to(dtype).squeeze(-1))).clamp(max=1 - torch.finfo(dtype).eps / 2)
        log_decay = torch.log1p(-damping)
        inward = step * self.beta.to(dtype).squeeze(-1)
        outward = self.gamma.to(dtype) / math.sqrt(self.spec.state_size)
        parts = zip(log_decay.split(self.width), inward.split(self.width), outward.split(self.width), strict=True)
        return [Recurrence(*part) for part in parts]

    @property
    def gain(self) -> Float[Tensor, "D"]:
        return self.omega

    def _state(self, hidden: Tensor, recent: Cache | None) -> "EMAState":
        return EMAState(hidden, recent)

    def _no_inputs(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Cache | None:
        taps = self.spec.truncation
        return None if taps is None else empty_cache(batch_size, taps, ((self.width,),), device, (dtype,))

    def _check_sizes(self, before: "EMAState") -> None:
        kept = None if before.recent is None else before.recent.size
        check_sizes(self, (*before.hidden.shape[1:], kept), (*self.hidden_shape, self.spec.truncation))

    def _scan(self, x_BSD: Tensor, ahead: Recurrence) -> Tensor:
        out, length, truncation = super()._scan(x_BSD, ahead), x_BSD.shape[1], self.spec.truncation
        if truncation is not None and truncation < length:
            late = nn.functional.pad(x_BSD, (0, 0, truncation, 0))[:, :length]
            out = out - causal_scan(late, self._leaving(ahead))
        return out

    def _leaving(self, ahead: Recurrence) -> Recurrence:
        """s_t = q s_{t-1} + p b (x_t - q^K x_{t-K}): a second recurrence subtracts the late inputs."""
        return ahead._replace(inward=ahead.inward * torch.exp(ahead.log_decay * (self.spec.truncation or 0)))

    def _advance(
        self, x_BSD: Tensor, tokens: Ragged, ahead: Recurrence, before: "EMAState"
    ) -> tuple[Scanned, Cache | None]:
        scanned, _ = super()._advance(x_BSD, tokens, ahead, before)
        if before.recent is None:
            return scanned, None
        late_BSD, recent = self._delayed(tokens, before.recent, x_BSD.dtype)
        none = torch.zeros_like(before.hidden, dtype=x_BSD.dtype)
        late = advance(late_BSD, tokens.lengths, self._leaving(ahead), none)
        return Scanned(scanned.out - late.out, scanned.final - late.final), recent

    def _delayed(self, tokens: Ragged, recent: Cache, dtype: torch.dtype) -> tuple[Tensor, Cache]:
        """The inputs `truncation` slots before those of a chunk, `(B, S, D)`, and the cache that includes the chunk."""
        real, _ = pack(tokens)
        if tokens.longest == 1:  # the token that the new one overwrites
            late = recent.entries[0].gather(1, (recent.seen % recent.size)[:, None, None].expand(-1, 1, self.width))
            return late.to(dtype), recent.append(real, real.values)
        joined = recent.join(real)
        values = joined.fill(recent.entries[0], real.values)
        back = joined.tokens.slots[joined.new] - recent.size
        late = values.index_select(0, (joined.new - recent.size).clamp(min=0)).where((back >= 0)[:, None], 0)
        return real.with_values(late.to(dtype)).to_padded(tokens.longest)[0], recent.append(real, real.values)


@register_output
@dataclass(frozen=True)
class EMAState(State):
    """State of the averages of every row.

    Attributes:
        hidden: s, in float32 or wider.
        recent: the last K inputs, which a truncated kernel subtracts later; None without truncation.
    """

    hidden: Float[Tensor, "B D N"]
    recent: Cache | None
