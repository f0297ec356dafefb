"""Damped multi-dimensional exponential moving average: the linear state-space backbone of SeqBoat."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from sma.checks import check_sizes
from sma.fused import with_gradient
from sma.init import truncated_normal_
from sma.kernels.chunks import chunk_of, decayed
from sma.kernels.ema import ema
from sma.modules.cache import Cache, empty_cache
from sma.modules.long_convolution import convolution_macs
from sma.modules.scan import kernel_macs
from sma.modules.state_space import Advanced, StateSpace
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
        chunk = chunk_of(tokens)
        slots = -(-tokens // chunk) * chunk
        between = width * slots * self.state_size if slots > chunk else 0
        passes = 2 if self.truncation is not None and self.truncation < tokens else 1
        return MACs(matmul=passes * (width * chunk * self.state_size + width * slots * chunk + between) + between)


class EMA(StateSpace):
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
        super().__init__(spec, width, EMAState, (width, spec.state_size))
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

    def recurrences(self, dtype: torch.dtype) -> "Recurrences":
        """The recurrences of all directions, forward first."""
        parts = _recurrences(self.delta, self.alpha, self.beta, self.gamma, dtype)
        return Recurrences(*(part.unflatten(0, (-1, self.width)) for part in parts))

    def _state(self, hidden: Tensor, recent: Cache | None) -> "EMAState":
        return EMAState(hidden, recent)

    def _no_inputs(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> Cache | None:
        taps = self.spec.truncation
        return None if taps is None else empty_cache(batch_size, taps, ((self.width,),), device, (dtype,))

    def _check_sizes(self, before: "EMAState") -> None:
        kept = None if before.recent is None else before.recent.size
        check_sizes(self, (*before.hidden.shape[1:], kept), (*self.hidden_shape, self.spec.truncation))

    def _run(self, x_BSD: Tensor) -> Tensor:
        wide = torch.promote_types(x_BSD.dtype, torch.float32)
        parts = ema_parameters(self.delta, self.alpha, self.beta, self.gamma, wide)
        log_decay, weight = (part.unflatten(0, (-1, self.width)) for part in parts)
        return ema(x_BSD, log_decay, weight, self.omega.to(wide), truncation=self.spec.truncation).out

    def _advance(self, x_BSD: Tensor, tokens: Ragged, before: "EMAState") -> Advanced:
        recurrence, hidden = self.recurrences(x_BSD.dtype), before.hidden.to(x_BSD.dtype)
        omega = self.omega.to(x_BSD.dtype)
        out, after = recurrence.advance(x_BSD, tokens, omega, hidden)
        if before.recent is None:
            return Advanced(out, after, None)
        # s_t = q s_{t-1} + p b (x_t - q^K x_{t-K}): a second recurrence subtracts the late inputs.
        late_BSD, recent = self._delayed(tokens, before.recent, x_BSD.dtype)
        leaving = torch.exp(recurrence.log_decay * before.recent.size)
        late = recurrence._replace(inward=recurrence.inward * leaving)
        late_out, late_after = late.advance(late_BSD, tokens, torch.zeros_like(omega), torch.zeros_like(hidden))
        return Advanced(out - late_out, after - late_after, recent)

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


def _recurrences(
    delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Log q, b and g."""
    step = torch.sigmoid(delta.to(dtype).squeeze(-1))
    # A decay that rounds to 0 has no logarithm, and its gradient would be 0 / 0: the rounding error is its minimum.
    damping = (step * torch.sigmoid(alpha.to(dtype).squeeze(-1))).clamp(max=1 - torch.finfo(dtype).eps / 2)
    inward = step * beta.to(dtype).squeeze(-1)
    return torch.log1p(-damping), inward, gamma.to(dtype) / math.sqrt(gamma.shape[1])


def _ema_parameters_backward(
    grad_log_decay: Tensor,
    grad_weight: Tensor,
    delta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    step, share = (torch.sigmoid(each.to(dtype).squeeze(-1)) for each in (delta, alpha))
    wide, outward = beta.to(dtype).squeeze(-1), gamma.to(dtype) / math.sqrt(gamma.shape[1])
    # Of log(1 - damping); 0 where the damping is at its maximum.
    most = 1 - torch.finfo(dtype).eps / 2
    grad_damping = (-grad_log_decay / (1 - (step * share).clamp(max=most))).where(step * share <= most, 0)
    grad_step = (grad_damping * share + grad_weight * wide * outward) * step * (1 - step)
    grad_alpha = grad_damping * step * share * (1 - share)
    grad_beta = grad_weight * step * outward
    grad_gamma = grad_weight * step * wide / math.sqrt(gamma.shape[1])
    return (
        grad_step.unsqueeze(-1).to(delta.dtype),
        grad_alpha.unsqueeze(-1).to(alpha.dtype),
        grad_beta.unsqueeze(-1).to(beta.dtype),
        grad_gamma.to(gamma.dtype),
    )


@with_gradient(_ema_parameters_backward)
def ema_parameters(
    delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log q and the weight of a state in the result, b g."""
    log_decay, inward, outward = _recurrences(delta, alpha, beta, gamma, dtype)
    return log_decay, inward * outward


class Recurrences(NamedTuple):
    r"""$s_t = q s_{t-1} + b x_t$, $y_t = \sum_n g_n s_{t,n}$ for every channel of S directions.

    Attributes:
        log_decay: log q, at most 0.
        inward: b.
        outward: g.
    """

    log_decay: Float[Tensor, "S D N"]
    inward: Float[Tensor, "S D N"]
    outward: Float[Tensor, "S D N"]

    def advance(
        self, x_BSD: Float[Tensor, "B S D"], tokens: Ragged, omega: Float[Tensor, "D"], before: Float[Tensor, "B D N"]
    ) -> tuple[Float[Tensor, "B S D"], Float[Tensor, "B D N"]]:
        """Results and states of a chunk of streams; a single token takes one step, with fewer operations."""
        (log_decay,), (inward,), (outward,) = self
        if x_BSD.shape[1] == 1:
            after = decayed(before, log_decay) + inward * x_BSD[:, 0, :, None]
            return (after * outward).sum(-1)[:, None] + omega * x_BSD, after
        lengths = tokens.lengths if tokens.holes or tokens.stride is None else None
        out, end = ema(
            x_BSD,
            self.log_decay,
            self.inward * self.outward,
            omega,
            carried_BDN=outward * decayed(before, log_decay),
            lengths_B=lengths,
        )
        passed = log_decay * (x_BSD.shape[1] if lengths is None else lengths[:, None, None])
        return out, torch.addcmul(decayed(before, passed), inward, end)


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
