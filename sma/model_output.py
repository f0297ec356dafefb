"""Output and state of a model."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from sma.decision import Decision
from sma.layer import LayerState
from sma.pytree import register_output
from sma.submodule import State


@register_output
@dataclass(frozen=True)
class ModelState(State):
    """State of a model for B streams.

    Attributes:
        seen: number of valid tokens of each row so far.
        total: sum of the hidden states of those tokens, in float64.
        layers: states of the layers.
    """

    seen: Int[Tensor, "B"]
    total: Float[Tensor, "B D"]
    layers: tuple[LayerState, ...]


@register_output
@dataclass(frozen=True)
class ModelOutput:
    """Output of a model.

    Attributes:
        hidden: the tokens after the last layer and the final norm; zeros at padding.
        pooled: mean over the valid tokens of each row, with those of earlier chunks; zeros for a row without any.
        logits: scores of every row, of every pair of rows, or in a language model of the next token at every position;
            None in a model without a head.
        decisions: one per routing layer, in order.
        state: state of the streams after this call; None unless one was given.
    """

    hidden: Float[Tensor, "B L D"]
    pooled: Float[Tensor, "B D"]
    logits: Float[Tensor, "B C"] | Float[Tensor, "B//2 C"] | Float[Tensor, "B L V"] | None
    decisions: tuple[Decision, ...]
    state: ModelState | None = None
