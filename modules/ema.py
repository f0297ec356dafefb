"""Damped multi-dimensional exponential moving average: the linear state-space backbone of SeqBoat."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from sma.initial import truncated_normal_
from sma.modules.long_convolution import fast_length, long_convolution
from sma.modules.scan import CHUNK, Recurrence, causal_scan
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import Operations, State, SubModule, SubModuleSpec


@register
class EMASpec(SubModuleSpec):
    """Spec of `EMA`."""

    kind: Literal["ema"] = "ema"
    state_size: int = Field(default=16, ge=1, le=1024, description="states per channel and direction, N")
    bidirectional: bool = Field(default=True, description="run a second recurrence from the right; false is causal")
    truncation: int | None = Field(default=None, ge=1, description="length of the kernel, in tokens; null for the whole sequence")

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
    inner = math.isqrt(chunk)
    passes = 2 if spec.truncation is not None and spec.truncation < tokens else 1
    kernel = width * spec.state_size * inner * -(-chunk // inner)
    between = 2 * width * chunks * chunk * spec.state_size if chunks > 1 else 0
    return Operations(passes * (kernel + width * chunks * chunk * chunk + between))


class EMA(SubModule):
    r"""A bank of damped exponential moving averages per channel.

    $p = \sigma(\delta)$, $q = 1 - p\,\sigma(\alpha)$, $s_t = q s_{t-1} + p \beta x_t$,
    $y_t = \sum_n \gamma_n s_{t,n} / \sqrt N + \omega x_t$. Bidirectional adds a second recurrence, with parameters of its own, that
    runs from the right; both include the token itself.

    Args:
        spec: states per channel, direction and truncation.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `delta`, `alpha`, `beta` are `(D or 2D, N, 1)`, `gamma` `(D or 2D, N)`, the forward set
        first; `omega` `(D,)`. Computed in float32 or wider, returned in the dtype of the tokens.

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
        # A decay that rounds to 0 has no logarithm, and the gradient there would be 0 / 0: keep it at the rounding error instead.
        damping = (step * torch.sigmoid(self.alpha.to(dtype).squeeze(-1))).clamp(max=1 - torch.finfo(dtype).eps / 2)
        log_decay = torch.log1p(-damping)
        inward = step * self.beta.to(dtype).squeeze(-1)
        outward = self.gamma.to(dtype) / math.sqrt(self.spec.state_size)
        parts = zip(log_decay.split(self.width), inward.split(self.width), outward.split(self.width), strict=True)
        return [Recurrence(*part) for part in parts]

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Average along every row; see `SubModule.forward`."""
        self._refuse(state)
        values = tokens.values
        if values.shape[0] == 0:
            # Every parameter takes part, with zero gradients, so that no rank waits for another.
            nothing = sum(parameter.sum() for parameter in self.parameters()) * 0
            return values + torch.as_tensor(nothing).to(values.dtype), None
        wide = torch.promote_types(values.dtype, torch.float32)
        with torch.autocast(values.device.type, enabled=False):
            x_BSD = tokens.with_values(values.to(wide)).to_padded()[0]
            out = self._along_rows(x_BSD)
        return tokens.from_padded(out).to(values.dtype), None

    def _along_rows(self, x_BSD: Tensor) -> Tensor:
        length = x_BSD.shape[1]
        ahead, *reverse = self.recurrences(x_BSD.dtype)
        omega = self.omega.to(x_BSD.dtype)
        if not reverse:
            return causal_scan(x_BSD, ahead, self.spec.truncation) + omega * x_BSD
        taps = min(length, self.spec.truncation or length)
        return long_convolution(x_BSD, ahead.kernel(taps), reverse[0].kernel(taps), omega)
