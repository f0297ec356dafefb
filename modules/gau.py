"""Gated attention unit: the sub-module that SeqBoat routes."""

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.initial import reset_linear_, truncated_normal_
from sma.modules.windowed import Bias, Weighting, attend, block_shape
from sma.positions import PositionSpec, RelativeBiasSpec, RotarySpec, rotate
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import Operations, State, SubModule, SubModuleSpec


@register
class GAUSpec(SubModuleSpec):
    """Spec of `GatedAttentionUnit`."""

    kind: Literal["gau"] = "gau"
    query_size: int = Field(ge=1, description="channels of a query and a key, Z")
    hidden_size: int = Field(ge=1, description="channels of a value and of the gate, H")
    window: int | None = Field(default=None, ge=1, description="active tokens in reach on each side, W; use window=null to attend to all")
    bidirectional: bool = Field(default=True, description="attend to later tokens too; false is causal")
    attention: Weighting = Field(default="softmax", description="what turns scores into weights")
    position: PositionSpec = Field(default=RelativeBiasSpec(), description="how attention knows positions")
    value_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="probability of dropping a channel of a value")
    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="probability of dropping an attention weight")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.position, RelativeBiasSpec) and self.position.distance == "slot_distance" and self.window is None:
            raise ValueError("distance='slot_distance' needs a window, which sizes its table; set window, or use distance='true_distance'")
        if isinstance(self.position, RotarySpec) and self.query_size % 2:
            raise ValueError(f"query_size={self.query_size} must be even: rotary positions turn pairs of channels")
        return self

    def build(self, width: int) -> "GatedAttentionUnit":
        return GatedAttentionUnit(self, width)

    def num_parameters(self, width: int) -> int:
        fused = self.query_size + 2 * self.hidden_size
        table = self.position.table_size(self.window)
        return (width + 1) * fused + 4 * self.query_size + (self.hidden_size + 1) * width + table

    def operations(self, width: int, tokens: int) -> Operations:
        dense = width * (self.query_size + 3 * self.hidden_size)
        shape = block_shape(tokens, self.window, not self.bidirectional)
        pairs = -(-tokens // shape.queries) * shape.queries * shape.keys
        return Operations(tokens * dense + pairs * (self.query_size + self.hidden_size))


class GatedAttentionUnit(SubModule):
    r"""One-head attention with a gate, over the tokens it is given.

    $(z, r, v) = \mathrm{silu}(W x + b)$; $q = g_0 z + b_0$, $k = g_1 z + b_1$; $y = W_o (\mathrm{attend}(q, k, v) \odot r) + b_o$.
    Scores: `softmax` $q \cdot k / \sqrt Z$ plus bias; `relu2` and `laplace` $q \cdot k / n$ plus bias, n = 2W (causal: W), without
    a window the row's number of tokens (causal: so far).

    Args:
        spec: sizes, window, weighting, positions.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out; reach |slot distance| <= W, causal: only back.

    Reference:
        Hua et al., "Transformer Quality in Linear Time", arXiv 2202.10447; Ma et al., arXiv 2209.10655.
    """

    def __init__(self, spec: GAUSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.causal = not spec.bidirectional
        self.fused = nn.Linear(width, spec.query_size + 2 * spec.hidden_size)
        self.out = nn.Linear(spec.hidden_size, width)
        self.gain = nn.Parameter(torch.empty(2, spec.query_size))
        self.offset = nn.Parameter(torch.zeros(2, spec.query_size))
        size = spec.position.table_size(spec.window)
        self.bias_table = nn.Parameter(torch.empty(size)) if size else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters, as the authors do."""
        for linear in (self.fused, self.out):
            reset_linear_(linear)
        truncated_normal_(self.gain)
        nn.init.zeros_(self.offset)
        if self.bias_table is not None:
            truncated_normal_(self.bias_table)

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Attend along every row; see `SubModule.forward`."""
        self._refuse(state)
        spec = self.spec
        hidden = nn.functional.silu(self.fused(tokens.values))
        z, gate, v = hidden.split([spec.query_size, spec.hidden_size, spec.hidden_size], dim=-1)
        gain, offset = self.gain.to(z.dtype), self.offset.to(z.dtype)
        q, k = z * gain[0] + offset[0], z * gain[1] + offset[1]
        if isinstance(spec.position, RotarySpec):
            q, k = (rotate(x, tokens.positions, spec.position.base) for x in (q, k))
        attended = attend(
            self._scaled(q, tokens),
            k,
            nn.functional.dropout(v, spec.value_dropout, self.training),
            tokens,
            window=spec.window,
            causal=self.causal,
            weighting=spec.attention,
            bias=self._bias(),
            dropout=spec.attention_dropout if self.training else 0.0,
        )
        return self.out(attended * gate), None

    def _scaled(self, q: Tensor, tokens: Ragged) -> Tensor:
        spec = self.spec
        if spec.attention == "softmax":
            return q * spec.query_size**-0.5
        if spec.window is not None:
            return q / (spec.window if self.causal else 2 * spec.window)
        count = tokens.slots + 1 if self.causal else tokens.lengths[tokens.rows]
        return q / count.clamp(min=1).to(q.dtype)[:, None]

    def _bias(self) -> Bias | None:
        position = self.spec.position
        if self.bias_table is None or not isinstance(position, RelativeBiasSpec):
            return None
        if position.distance == "slot_distance" and self.spec.window is not None:
            return Bias(self.bias_table, 4 * self.spec.window - 1, over_slots=True)
        return Bias(self.bias_table, position.max_positions - 1, over_slots=False)
