"""Models that score pairs of rows, such as two documents."""

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sma.capacity import Capacity
from sma.checks import check_tensor
from sma.decision import Decision
from sma.errors import InputError
from sma.heads import Head, HeadSpec
from sma.model import ModelSpec, SequenceModel
from sma.model_output import ModelOutput, ModelState
from sma.spec import register

_FEATURES = 4


@register
class PairClassifierSpec(ModelSpec):
    """Spec of `PairClassifier`."""

    kind: Literal["pair_classifier"] = "pair_classifier"
    head: HeadSpec = Field(description="from the features of a pair, 4 D channels, to scores")

    rows_per_sample: ClassVar[int] = 2

    @property
    def head_spec(self) -> HeadSpec | None:
        return self.head

    @property
    def head_width(self) -> int:
        return _FEATURES * self.width

    def build(self) -> "PairClassifier":
        return PairClassifier(self)


class PairClassifier(SequenceModel):
    r"""A `SequenceModel` that reads rows 2i and 2i + 1 of its inputs as the two documents of sample i.

    One encoder reads both independently. With a and b the means of their tokens, the head scores
    $[b, a, a \odot b, a - b]$.

    Shape:
        inputs `(2 B, L)` in; a `ModelOutput` with hidden `(2 B, L, D)`, pooled `(2 B, D)` and logits `(B, C)` out.

    Reference:
        Mou et al., "Natural Language Inference by Tree-Based Convolution and Heuristic Matching", arXiv 1512.08422; the
        order is that of SeqBoat's authors.
    """

    def forward(
        self,
        inputs: Tensor,
        valid: Bool[Tensor, "B L"] | None = None,
        state: ModelState | None = None,
        capacity: Capacity | None = None,
        decisions: Sequence[Decision | Tensor] | None = None,
    ) -> ModelOutput:
        """Run the model on pairs of rows; otherwise as `SequenceModel.forward`.

        Raises:
            InputError: also if the number of rows is odd.
        """
        check_tensor(inputs, "the inputs are", self.encoder.input_dtype)
        if inputs.ndim and inputs.shape[0] % 2:
            raise InputError(
                f"inputs have {inputs.shape[0]} rows, which is odd; a pair_classifier takes an even number: rows "
                "2i and 2i + 1 are the documents of sample i"
            )
        return super().forward(inputs, valid, state, capacity, decisions)

    def _logits(self, hidden: Float[Tensor, "B L D"], pooled: Float[Tensor, "B D"]) -> Tensor:
        a, b = rearrange(pooled, "(B pair) D -> pair B D", pair=2)
        return cast(Head, self.head)(torch.cat((b, a, a * b, a - b), -1))
