"""Short depthwise convolution over neighbouring tokens."""

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.modules.cache import CachedSubModule
from sma.padding import unpack
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import MACs, State, SubModuleSpec


@register
class ConvSpec(SubModuleSpec):
    """Spec of `Conv`."""

    kind: Literal["conv"] = "conv"
    kernel_size: int = Field(
        default=4, ge=1, le=256, description="tokens that one result depends on, including its own"
    )
    bidirectional: bool = Field(default=False, description="centre the kernel on the token; false looks back only")
    activation: Literal["silu", "none"] = Field(default="silu", description="applied to the result")

    @model_validator(mode="after")
    def _centred(self) -> Self:
        if self.bidirectional and self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={self.kernel_size} must be odd when bidirectional=true, so that it has a middle"
            )
        return self

    def build(self, width: int) -> "Conv":
        return Conv(self, width)

    def num_parameters(self, width: int) -> int:
        return width * (self.kernel_size + 1)

    def macs(self, width: int, tokens: int) -> MACs:
        # Depthwise taps multiply channel by channel, without a matrix product.
        return MACs(elementwise=tokens * width * self.kernel_size)


class Conv(CachedSubModule):
    r"""$y_t = \mathrm{silu}(\sum_j w_j \odot x_{t+j} + b)$ over slots: routed, it convolves neighbouring *active*
    tokens.

    Args:
        spec: kernel size and direction.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `weight` is `(D, K)`, the last tap on the newest token. A stream keeps the
            last K - 1 tokens of each row.

    Reference:
        the short convolution of Mamba; Gu and Dao, arXiv 2312.00752.
    """

    def __init__(self, spec: ConvSpec, width: int) -> None:
        super().__init__(spec.kernel_size - 1, (width,))
        self.spec = spec
        self.causal = not spec.bidirectional
        self.weight = nn.Parameter(torch.empty(width, spec.kernel_size))
        self.bias = nn.Parameter(torch.zeros(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters: uniform within 1 / sqrt(K), as torch.nn.Conv1d does."""
        bound = self.spec.kernel_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Convolve along every row; see `SubModule.forward`."""
        cache, fresh, real = self._resume(state, tokens)
        if cache is None:
            return self._convolve(tokens), None
        joined = cache.join(fresh)
        along = joined.tokens.with_values(joined.fill(cache.entries[0], fresh.values))
        out = self._convolve(along).index_select(0, joined.new)
        return unpack(out, real, tokens), cache.append(fresh, fresh.values)

    def _convolve(self, tokens: Ragged) -> Tensor:
        values, taps = tokens.values, self.spec.kernel_size
        ahead = taps // 2 if self.spec.bidirectional else 0
        out = self.bias.to(values.dtype).expand_as(values)
        for tap in range(taps):
            out = out + self.weight[:, tap].to(values.dtype) * _shifted(tokens, tap - (taps - 1) + ahead)
        return nn.functional.silu(out) if self.spec.activation == "silu" else out


def _shifted(tokens: Ragged, by: int) -> Tensor:
    """The values `by` slots later in the same row; zeros beyond its ends."""
    values = tokens.values
    if by == 0:
        return values
    slot = tokens.slots + by
    inside = (slot >= 0) & (slot < tokens.lengths[tokens.rows])
    source = torch.arange(values.shape[0], device=values.device) + by
    return values.index_select(0, source.where(inside, 0)).where(inside[:, None], 0)
