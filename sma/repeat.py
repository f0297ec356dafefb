"""The same layers several times, each with parameters of its own."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from sma.layer import LayerSpec
from sma.spec import Spec

LAYERS = 10_000
"""Layers of a model at most."""

_LAYERS = TypeAdapter(tuple[LayerSpec, ...])


def one_or_many(value: Any) -> Any:
    """Validate a layer or a list of layers; the form is chosen before validation, so that an error speaks of the one
    that was written.
    """
    if isinstance(value, list | tuple):
        return _LAYERS.validate_python(tuple(value))
    return value if isinstance(value, Spec) else LayerSpec.__pydantic_validator__.validate_python(value)


class RepeatSpec(Spec):
    """The same layer, or the same few layers, several times, each with parameters of its own."""

    repeat: int = Field(ge=1, le=LAYERS, description="how often")
    layer: Annotated[LayerSpec | tuple[LayerSpec, ...], BeforeValidator(one_or_many)] = Field(
        description="what to repeat: a layer, or a list of layers"
    )

    @model_validator(mode="after")
    def _are_not_too_many(self) -> Self:
        block = len(self.layer) if isinstance(self.layer, tuple) else 1
        if self.repeat * block > LAYERS:
            raise ValueError(
                f"repeat={self.repeat} of {block:,} layers makes {self.repeat * block:,}; "
                f"a model has {LAYERS:,} at most"
            )
        return self
