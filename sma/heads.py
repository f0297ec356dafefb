"""Heads: from pooled hidden states to the scores of a task."""

from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from sma.spec import Spec, register
from sma.summary import settings


class HeadSpec(Spec):
    """Root of the head kinds."""

    family: ClassVar[str] = "head"
    kind: str

    def build(self, width: int) -> "Head":
        """Make the head over vectors of `width` channels."""
        raise TypeError(f"{type(self).__name__} must define build(self, width)")

    def num_parameters(self, width: int) -> int:
        """Predict the number of parameters of the head."""
        raise TypeError(f"{type(self).__name__} must define num_parameters(self, width)")


class Head(nn.Module):
    """From the mean of a row's tokens to scores."""

    def extra_repr(self) -> str:
        return settings(self)

    def forward(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        """Score every row."""
        raise TypeError(f"{type(self).__name__} must define forward(self, pooled)")


@register
class MeanPoolMLPSpec(HeadSpec):
    """Spec of `MeanPoolMLP`."""

    kind: Literal["mean_pool_mlp"] = "mean_pool_mlp"
    hidden: int = Field(ge=1, description="channels between the two linear maps")
    classes: int = Field(ge=2, description="number of classes, C")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="probability of dropping a hidden channel")

    def build(self, width: int) -> "MeanPoolMLP":
        return MeanPoolMLP(self, width)

    def num_parameters(self, width: int) -> int:
        return (width + 1) * self.hidden + self.hidden * self.classes


class MeanPoolMLP(Head):
    """Linear, dropout, GELU, linear without bias; weights Xavier uniform.

    Shape:
        mean of a row's tokens `(B, D)` in, scores `(B, C)` out.
    """

    def __init__(self, spec: MeanPoolMLPSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.inner = nn.Linear(width, spec.hidden)
        self.outer = nn.Linear(spec.hidden, spec.classes, bias=False)
        nn.init.xavier_uniform_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)
        nn.init.xavier_uniform_(self.outer.weight)

    def forward(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        hidden = nn.functional.dropout(self.inner(pooled), self.spec.dropout, self.training)
        return self.outer(nn.functional.gelu(hidden))


@register
class MeanPoolLinearSpec(HeadSpec):
    """Spec of `MeanPoolLinear`."""

    kind: Literal["mean_pool_linear"] = "mean_pool_linear"
    classes: int = Field(ge=1, description="number of scores, C")

    def build(self, width: int) -> "MeanPoolLinear":
        return MeanPoolLinear(self, width)

    def num_parameters(self, width: int) -> int:
        return (width + 1) * self.classes


class MeanPoolLinear(Head):
    """One linear map, initialised as `torch.nn.Linear`.

    Shape:
        mean of a row's tokens `(B, D)` in, scores `(B, C)` out.
    """

    def __init__(self, spec: MeanPoolLinearSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(width, spec.classes)

    def forward(self, pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        return self.linear(pooled)
