"""Repeated layers, each with its own parameters."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from sma.layer import LayerSpec
from sma.spec import Spec

LAYERS = 10_000
"""Maximum number of layers of a model."""

_LAYERS = TypeAdapter(tuple[LayerSpec, ...])


def one_or_many(value: Any) -> Any:
    """Validate a layer or a list of layers; the form is chosen first, so that errors refer to it."""
    if isinstance(value, list | tuple):
        return _LAYERS.validate_python(tuple(value))
    return value if isinstance(value, Spec) else LayerSpec.__pydantic_validator__.validate_python(value)


class RepeatSpec(Spec):
    """A layer, or a list of layers, repeated with separate parameters."""

    repeat: int = Field(ge=1, le=LAYERS, description="number of repetitions")
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

    @property
    def expanded(self) -> tuple[LayerSpec, ...]:
        """All layers, one after another."""
        return (self.layer if isinstance(self.layer, tuple) else (self.layer,)) * self.repeat


def _repeated_or_listed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return RepeatSpec.__pydantic_validator__.validate_python(value)
    return one_or_many(value)


Layers = Annotated[RepeatSpec | tuple[LayerSpec, ...], BeforeValidator(_repeated_or_listed)]
"""The layers of a model: a list of them, or `{repeat: …, layer: …}`."""
