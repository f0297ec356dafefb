"""Encoders: from token ids or real numbers to vectors."""

from typing import ClassVar, Literal, Self, cast

import torch
from jaxtyping import Float, Integer
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.checks import check_floats, check_integers
from sma.devices import autocasts
from sma.errors import InputError
from sma.spec import Spec, register
from sma.submodule import device_and_dtype, floating_dtype
from sma.summary import settings


class EncoderSpec(Spec):
    """Root of the encoder kinds.

    Attributes:
        reads: input of a position: the id of a token, one number, or a vector of numbers; None for other inputs, which
            tasks do not check.
        scores_tokens: whether `forward(hidden, scores=True)` scores tokens, as the tied output of a language model.
    """

    family: ClassVar[str] = "encoder"
    kind: str
    reads: ClassVar[Literal["tokens", "numbers", "vectors"] | None] = None
    scores_tokens: ClassVar[bool] = False

    def build(self, width: int) -> "Encoder":
        """Make the encoder to vectors of `width` channels."""
        raise TypeError(f"{type(self).__name__} must define build(self, width)")

    def num_parameters(self, width: int) -> int:
        """Predict the number of parameters of the encoder."""
        raise TypeError(f"{type(self).__name__} must define num_parameters(self, width)")


class Encoder(nn.Module):
    """From the inputs of a task to vectors.

    Attributes:
        input_dtype: dtype of the conversion proposed for inputs that are not tensors; None for any.
    """

    input_dtype: torch.dtype | None = torch.float32

    def check(self, inputs: Tensor) -> None:
        """Check shape and dtype of a batch of inputs.

        Raises:
            InputError: they do not fit; the message contains the requirement.
        """

    def random_inputs(self, rows: int, length: int) -> Tensor:
        """Draw a batch of inputs from torch's random state, for tests and benchmarks."""
        raise TypeError(f"{type(self).__name__} must define random_inputs(self, rows, length)")

    def extra_repr(self) -> str:
        return settings(self)

    def forward(self, inputs: Tensor) -> Float[Tensor, "B L D"]:
        """Encode a batch of inputs whose first axes are (B, L)."""
        raise TypeError(f"{type(self).__name__} must define forward(self, inputs)")


@register
class TokenEmbeddingSpec(EncoderSpec):
    """Spec of `TokenEmbedding`."""

    kind: Literal["token_embedding"] = "token_embedding"
    reads: ClassVar[Literal["tokens"]] = "tokens"
    scores_tokens: ClassVar[bool] = True
    vocabulary: int = Field(ge=1, description="number of different token ids, padding included")
    padding: int | None = Field(default=None, ge=0, description="id whose vector is zero and stays zero; null for none")
    scaled: bool = Field(
        default=False, description="multiply the vectors by sqrt(width), as language models with a tied output do"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.padding is not None and self.padding >= self.vocabulary:
            raise ValueError(
                f"padding={self.padding} must be one of the {self.vocabulary} ids, 0 … {self.vocabulary - 1}"
            )
        return self

    def build(self, width: int) -> "TokenEmbedding":
        return TokenEmbedding(self, width)

    def num_parameters(self, width: int) -> int:
        return self.vocabulary * width


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # for which torch has few operators


class TokenEmbedding(Encoder):
    """A learned vector per token id, from a normal distribution of standard deviation D^-1/2; scaled, of standard
    deviation 1.

    Shape:
        ids `(B, L)`, integers of any dtype from 0 to vocabulary - 1, in; `(B, L, D)` out.
    """

    input_dtype = torch.int64

    def __init__(self, spec: TokenEmbeddingSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.vocabulary, width))
        nn.init.normal_(self.weight, std=width**-0.5)
        if spec.padding is not None:
            nn.init.zeros_(self.weight[spec.padding])

    def check(self, inputs: Tensor) -> None:
        check_integers(inputs, "token ids are", {"B": None, "L": None})
        # An accelerator would have to wait for the range check, and a compiled graph cannot raise; there the embedding
        # itself reports ids out of range.
        if not torch.compiler.is_compiling() and inputs.device.type == "cpu" and inputs.numel():
            low, high = (int(bound) for bound in _signed(inputs).aminmax())
            if low < 0 or high >= self.spec.vocabulary:
                wrong = low if low < 0 else high
                if low < 0 and inputs.dtype is torch.uint64:
                    wrong = low + 2**64
                raise InputError(
                    f"token id {wrong} is out of range; the vocabulary has ids 0 … {self.spec.vocabulary - 1}, "
                    "also required at padding"
                )

    def random_inputs(self, rows: int, length: int) -> Integer[Tensor, "B L"]:
        """Draw ids uniformly; see `Encoder.random_inputs`."""
        return torch.randint(self.spec.vocabulary, (rows, length), device=self.weight.device)

    def forward(
        self, inputs: Integer[Tensor, "B L"] | Float[Tensor, "*N D"], *, scores: bool = False
    ) -> Float[Tensor, "*N E"]:
        """Look up the vectors; with `scores`, score every id.

        Args:
            inputs: ids; with `scores`, hidden states.
            scores: return the inner products with the vectors of all ids, the tied output of a language model. It is
                part of `forward` so that hooks run and sharded weights are gathered.
        """
        if scores:
            return nn.functional.linear(inputs, self.weight.to(inputs.dtype))
        ids = _signed(inputs)
        if ids.dtype is not torch.int64:
            ids = ids.int()  # torch looks up no narrower integers
        vectors = nn.functional.embedding(ids, self.weight, padding_idx=self.spec.padding)
        return vectors * self.weight.shape[1] ** 0.5 if self.spec.scaled else vectors

    def scores(self, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """Return `self(hidden, scores=True)`, the inner products with the vectors of all ids."""
        return cast(Tensor, self(hidden, scores=True))


def _signed(ids: Tensor) -> Tensor:
    """Convert ids to a dtype that torch computes with; uint64 ids from 2^63 on become negative."""
    return ids.long() if ids.dtype in _UNSIGNED else ids


@register
class RealNumberSpec(EncoderSpec):
    """Spec of `RealNumber`."""

    kind: Literal["real_number"] = "real_number"
    reads: ClassVar[Literal["numbers"]] = "numbers"

    def build(self, width: int) -> "RealNumber":
        return RealNumber(width)

    def num_parameters(self, width: int) -> int:
        return 2 * width


class RealNumber(Encoder):
    """x w + b for a sequence of single numbers, such as pixels or audio samples. w ~ N(0, 1), b ~ N(0, 0.1).

    Shape:
        numbers `(B, L)` in, `(B, L, D)` out.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias, std=0.1)

    def check(self, inputs: Tensor) -> None:
        check_floats(inputs, "numbers are", {"B": None, "L": None})

    def random_inputs(self, rows: int, length: int) -> Float[Tensor, "B L"]:
        """Draw normal numbers; see `Encoder.random_inputs`."""
        return torch.randn(rows, length, device=self.weight.device, dtype=self.weight.dtype)

    def forward(self, inputs: Float[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        return inputs[..., None] * self.weight + self.bias


@register
class LinearEncoderSpec(EncoderSpec):
    """Spec of `LinearEncoder`."""

    kind: Literal["linear"] = "linear"
    reads: ClassVar[Literal["vectors"]] = "vectors"
    features: int = Field(ge=1, description="numbers per position")

    def build(self, width: int) -> "LinearEncoder":
        return LinearEncoder(self, width)

    def num_parameters(self, width: int) -> int:
        return (self.features + 1) * width


class LinearEncoder(Encoder):
    """A linear map of the features of every position, initialised as `torch.nn.Linear`.

    Shape:
        features `(B, L, F)` in, `(B, L, D)` out.
    """

    def __init__(self, spec: LinearEncoderSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.linear = nn.Linear(spec.features, width)

    def check(self, inputs: Tensor) -> None:
        check_floats(inputs, "features are", {"B": None, "L": None, "F": self.spec.features})

    def random_inputs(self, rows: int, length: int) -> Float[Tensor, "B L F"]:
        """Draw normal numbers; see `Encoder.random_inputs`."""
        device, dtype = device_and_dtype(self, None, None)
        return torch.randn(rows, length, self.spec.features, device=device, dtype=dtype)

    def forward(self, inputs: Float[Tensor, "B L F"]) -> Float[Tensor, "B L D"]:
        out: Tensor = self.linear(inputs)
        if autocasts(inputs.device):
            # Autocast must not narrow the residual stream, which starts here. A replaced map may have a packed weight.
            return out.to(floating_dtype(self.linear) or out.dtype)
        return out
