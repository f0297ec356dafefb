"""Damped multi-dimensional exponential moving average: the linear state-space backbone of SeqBoat."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from sma.devices import without_autocast
from sma.initial import truncated_normal_
from sma.inputs import check_count
from sma.memory import zeros
from sma.modules.cache import Cache, empty_cache
from sma.modules.long_convolution import fast_length, long_convolution
from sma.modules.scan import CHUNK, Recurrence, Scanned, causal_scan, causal_scan_with_state
from sma.padding import pack
from sma.pytree import register_output
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import Operations, State, SubModule, SubModuleSpec, check_sizes, placement


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

    def operations(self, width: int, tokens: int) -> Operations:
        if tokens == 0:
            return Operations()
        if self.bidirectional:
            taps = min(tokens, self.truncation or tokens)
            inner = max(1, math.isqrt(taps))
            kernel = 2 * width * self.state_size * inner * -(-taps // inner)
            size = fast_length(tokens + taps - 1)
            return Operations(kernel, round(3 * width * 1.25 * size * math.log2(size)))
        return _scan_operations(self, width, tokens)


def _scan_operations(spec: EMASpec, width: int, tokens: int) -> Operations:
    chunk = min(CHUNK, tokens)
    chunks = -(-tokens // chunk)
    passes = 2 if spec.truncation is not None and spec.truncation < tokens else 1
    kernel = width * spec.state_size * chunk
    between = 2 * width * chunks * chunk * spec.state_size if chunks > 1 else 0
    return Operations(passes * (kernel + width * chunks * chunk * chunk + between))


class EMA(SubModule):
    r"""A bank of damped exponential moving averages per channel.

    $p = \sigma(\delta)$, $q = 1 - p\,\sigma(\alpha)$, $s_t = q s_{t-1} + p \beta x_t$, $y_t = \sum_n \gamma_n s_{t,n} /
    \sqrt N + \omega x_t$. Bidirectional adds a second recurrence, with parameters of its own, that runs from the right;
    both include the token itself.

    Args:
        spec: states per channel, direction and truncation.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `delta`, `alpha`, `beta` are `(D or 2D, N, 1)`, `gamma` `(D or 2D, N)`, the
        forward set first; `omega` `(D,)`. Computed in float32 or wider, returned in the dtype of the tokens.

    Reference:
        Ma et al., "Mega: Moving Average Equipped Gated Attention", arXiv 2209.10655.
    """

    def __init__(self, spec: EMASpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.width = width
        self.causal = not spec.bidirectional
        rows, states = spec.directions * width, spec.state_size
        self.delta = nn.Parameter(torch.empty(rows, states, 1))
        self.alpha = nn.Parameter(torch.empty(rows, states, 1))
        self.beta = nn.Parameter(torch.empty(rows, states, 1))
        self.gamma = nn.Parameter(torch.empty(rows, states))
        self.omega = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters, as the authors do."""
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
        # A decay that rounds to 0 has no logarithm, and the gradient there would be 0 / 0: keep it at the rounding
        # error instead.
        damping = (step * torch.sigmoid(self.alpha.to(dtype).squeeze(-1))).clamp(max=1 - torch.finfo(dtype).eps / 2)
        log_decay = torch.log1p(-damping)
        inward = step * self.beta.to(dtype).squeeze(-1)
        outward = self.gamma.to(dtype) / math.sqrt(self.spec.state_size)
        parts = zip(log_decay.split(self.width), inward.split(self.width), outward.split(self.width), strict=True)
        return [Recurrence(*part) for part in parts]

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "EMAState":
        """Make the state of streams that have seen nothing; see `SubModule.init_state`."""
        self._refuse_unless_causal()
        device, dtype = placement(self, device, dtype)
        check_count(batch_size, "batch_size")
        wide = torch.promote_types(dtype, torch.float32)
        hidden = zeros((batch_size, self.width, self.spec.state_size), "the state of EMA", device=device, dtype=wide)
        taps = self.spec.truncation
        return EMAState(
            hidden, None if taps is None else empty_cache(batch_size, taps, ((self.width,),), device, (dtype,))
        )

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Average along every row; see `SubModule.forward`."""
        before = self._continue(state, EMAState, tokens)
        if before is not None:
            kept = None if before.recent is None else before.recent.size
            check_sizes(
                self, (*before.hidden.shape[1:], kept), (self.width, self.spec.state_size, self.spec.truncation)
            )
        values = tokens.values
        if not torch.compiler.is_compiling() and values.shape[0] == 0:
            # Every parameter takes part, with zero gradients, so that no rank waits for another.
            nothing = sum(parameter.sum() for parameter in self.parameters()) * 0
            return values + torch.as_tensor(nothing).to(values.dtype), state
        wide = torch.promote_types(values.dtype, torch.float32)
        with without_autocast(values.device):
            x_BSD = tokens.with_values(values.to(wide)).to_padded()[0]
            if before is None:
                out, after = self._whole(x_BSD), None
            else:
                out, after = self._onward(x_BSD, tokens, before)
        return tokens.from_padded(out).to(values.dtype), after

    def _whole(self, x_BSD: Tensor) -> Tensor:
        length, truncation = x_BSD.shape[1], self.spec.truncation
        ahead, *reverse = self.recurrences(x_BSD.dtype)
        omega = self.omega.to(x_BSD.dtype)
        if reverse:
            taps = min(length, truncation or length)
            return long_convolution(x_BSD, ahead.kernel(taps), reverse[0].kernel(taps), omega)
        out = causal_scan(x_BSD, ahead)
        if truncation is not None and truncation < length:
            late = nn.functional.pad(x_BSD, (0, 0, truncation, 0))[:, :length]
            out = out - causal_scan(late, self._leaving(ahead))
        return out + omega * x_BSD

    def _leaving(self, ahead: Recurrence) -> Recurrence:
        """s_t = q s_{t-1} + p b (x_t - q^K x_{t-K}): the late inputs leave by a recurrence of their own."""
        return ahead._replace(inward=ahead.inward * torch.exp(ahead.log_decay * (self.spec.truncation or 0)))

    def _onward(self, x_BSD: Tensor, tokens: Ragged, before: "EMAState") -> tuple[Tensor, "EMAState"]:
        (ahead,), omega = self.recurrences(x_BSD.dtype), self.omega.to(x_BSD.dtype)
        hidden = before.hidden.to(x_BSD.dtype)
        advance = _step if x_BSD.shape[1] == 1 else causal_scan_with_state
        out, after = advance(x_BSD, tokens.lengths, ahead, hidden)
        recent = before.recent
        if recent is not None:
            late_BSD, recent = self._delayed(tokens, recent, x_BSD.dtype)
            late = advance(late_BSD, tokens.lengths, self._leaving(ahead), torch.zeros_like(hidden))
            out, after = out - late.out, after - late.final
        after = after.to(before.hidden.dtype)
        if tokens.holes or tokens.stride is None:  # a row without a token keeps its state to the last bit
            after = after.where((tokens.lengths > 0)[:, None, None], before.hidden)
        return out + omega * x_BSD, EMAState(after, recent)

    def _delayed(self, tokens: Ragged, recent: Cache, dtype: torch.dtype) -> tuple[Tensor, Cache]:
        """The inputs `truncation` slots before those of a chunk, `(B, S, D)`, and the cache with the chunk in it."""
        real, _ = pack(tokens)
        if tokens.longest == 1:  # the token that the new one displaces
            late = recent.entries[0].gather(1, (recent.seen % recent.size)[:, None, None].expand(-1, 1, self.width))
            return late.to(dtype), recent.append(real, real.values)
        joined = recent.join(real)
        values = joined.fill(recent.entries[0], real.values)
        back = joined.tokens.slots[joined.new] - recent.size
        late = values.index_select(0, (joined.new - recent.size).clamp(min=0)).where((back >= 0)[:, None], 0)
        return real.with_values(late.to(dtype)).to_padded(tokens.longest)[0], recent.append(real, real.values)


def _step(x_B1D: Tensor, lengths_B: Tensor, recurrence: Recurrence, before_BDN: Tensor) -> Scanned:
    after = recurrence.step(x_B1D[:, 0], before_BDN)
    return Scanned((after * recurrence.outward).sum(-1)[:, None], after)


@register_output
@dataclass(frozen=True)
class EMAState(State):
    """Where the averages of every row stand.

    Attributes:
        hidden: s, in float32 or wider.
        recent: the last K inputs, which a truncated kernel must forget one day; None without truncation.
    """

    hidden: Float[Tensor, "B D N"]
    recent: Cache | None
