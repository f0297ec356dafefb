"""Gated feed-forward sub-module."""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from sma.init import reset_linear_
from sma.ragged import Ragged
from sma.spec import register
from sma.submodule import MACs, NoState, State, SubModule, SubModuleSpec


@register
class GatedMLPSpec(SubModuleSpec):
    """Spec of `GatedMLP`."""

    kind: Literal["gated_mlp"] = "gated_mlp"
    hidden_size: int = Field(ge=1, description="channels of the hidden layer, H")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="probability of dropping a hidden channel")

    def build(self, width: int) -> "GatedMLP":
        return GatedMLP(self, width)

    def num_parameters(self, width: int) -> int:
        return 3 * width * self.hidden_size

    def macs(self, width: int, tokens: int) -> MACs:
        return MACs(matmul=3 * tokens * width * self.hidden_size)


class GatedMLP(SubModule):
    r"""Token-wise $W_3(\mathrm{silu}(W_1 x) \odot W_2 x)$.

    Args:
        spec: hidden size and dropout.
        width: channels of every token, D.

    Shape:
        tokens `(T, D)` in, `(T, D)` out. `in_proj` holds W_1 above W_2. Weights start truncated normal, standard
            deviation 0.02.

    Reference:
        Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
    """

    causal = True

    def __init__(self, spec: GatedMLPSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.in_proj = nn.Linear(width, 2 * spec.hidden_size, bias=False)
        self.out_proj = nn.Linear(spec.hidden_size, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from a truncated normal distribution, standard deviation 0.02, and set the biases to 0."""
        for linear in (self.in_proj, self.out_proj):
            reset_linear_(linear)

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Float[Tensor, "T D"], State | None]:
        """Transform every token on its own; see `SubModule.forward`."""
        self._continue(state, NoState, tokens)
        gate, value = self.in_proj(tokens.values).chunk(2, dim=-1)
        hidden = nn.functional.dropout(nn.functional.silu(gate) * value, self.spec.dropout, self.training)
        return self.out_proj(hidden), state
