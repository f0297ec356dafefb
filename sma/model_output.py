"""What a model returns, and where its streams stand."""

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
    """Where the streams of a model stand.

    Attributes:
        seen: valid tokens of each row so far.
        total: sum of the hidden states of those tokens, in float64.
        layers: of every layer.
    """

    seen: Int[Tensor, "B"]
    total: Float[Tensor, "B D"]
    layers: tuple[LayerState, ...]


@register_output
@dataclass(frozen=True)
class ModelOutput:
    """What a model returns.

    Attributes:
        hidden: the tokens after the last layer and the final norm; zeros at padding.
        pooled: mean over the valid tokens of each row, those seen before included; zeros for a row without one.
        logits: scores: of every row, of every pair of rows, or in a language model of the next token at every position;
            None in a model without a head.
        decisions: one per layer that routes, in order.
        state: where the stream stands; None unless one was given.
    """

    hidden: Float[Tensor, "B L D"]
    pooled: Float[Tensor, "B D"]
    logits: Float[Tensor, "B C"] | Float[Tensor, "B//2 C"] | Float[Tensor, "B L V"] | None
    decisions: tuple[Decision, ...]
    state: ModelState | None = None
