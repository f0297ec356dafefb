"""Strict fields accept only numbers as numbers, and only true and false as booleans."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from sma import LayerSpec, load_spec
from sma.errors import SpecError
from sma.recipes.tasks.language.corpus import TextSettings
from sma.spec import FrozenMapping, Spec
from tests.specs import KINDS


class _Fields(Spec):
    kind: ClassVar[str] = "fields"
    whole: int = 1
    number: float = 1.0
    switch: bool = False
    perhaps: int | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    several: tuple[int, ...] = ()
    named: FrozenMapping[float] = {}  # noqa: RUF012


WORDS = [True, False, "1", "yes", "1e3", "", b"1", np.True_]


def _of(kind: type) -> list[Any]:
    return [
        pytest.param(family, name, field, id=f"{name}.{field}")
        for family, name, spec_class in KINDS
        for field, info in spec_class.model_fields.items()
        if info.annotation is kind or info.annotation == (kind | None)
    ]


@pytest.mark.parametrize(("family", "kind", "field"), [*_of(int), *_of(float)])
def test_text_is_refused_as_a_number_in_every_kind(family, kind, field):
    for value in (True, "7", "yes"):
        with pytest.raises(
            SpecError,
            match=rf"{field}={value!r}: input should be a valid (integer|number), not text, true or false",
        ):
            load_spec({"kind": kind, field: value}, family)


@pytest.mark.parametrize(("family", "kind", "field"), _of(bool))
def test_text_and_numbers_are_refused_as_booleans_in_every_kind(family, kind, field):
    for value in ("yes", "true", 1, 0):
        with pytest.raises(SpecError, match=rf"{field}={value!r}: input should be a valid boolean"):
            load_spec({"kind": kind, field: value}, family)


@pytest.mark.parametrize("value", WORDS)
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(lambda value: {"whole": value}, id="integer"),
        pytest.param(lambda value: {"number": value}, id="number"),
        pytest.param(lambda value: {"perhaps": value}, id="integer or null"),
        pytest.param(lambda value: {"pair": (0.5, value)}, id="in a pair"),
        pytest.param(lambda value: {"several": [1, value]}, id="in a list"),
        pytest.param(lambda value: {"named": {"a": value}}, id="in a mapping"),
    ],
)
def test_text_is_refused_as_a_number_at_any_depth(fields, value):
    with pytest.raises(SpecError, match=r"input should be a valid (integer|number)"):
        _Fields(**fields(value))


@pytest.mark.parametrize(
    ("field", "value", "made"),
    [
        ("whole", 4, 4),
        ("whole", 1e3, 1000),
        ("whole", np.int64(4), 4),
        ("whole", 2**63 - 1, 2**63 - 1),
        ("number", 3, 3.0),
        ("number", 1e300, 1e300),
        ("number", np.float32(0.5), 0.5),
        ("perhaps", None, None),
        ("switch", True, True),
        ("switch", np.True_, True),
    ],
)
def test_numbers_of_every_type_are_accepted(field, value, made):
    found = getattr(_Fields(**{field: value}), field)
    assert (found, type(found)) == (made, type(made))


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in ("whole", "number") for value in (2**63, -(2**63) - 1, 10**400)]
)
def test_a_number_beyond_64_bits_gives_a_short_message(field, value):
    with pytest.raises(SpecError, match=rf"_Fields: {field}=.*: input should be between -2\^63 and 2\^63") as caught:
        _Fields(**{field: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [1e20, -1e300])
def test_a_large_float_is_refused_as_an_integer(value):
    with pytest.raises(SpecError, match=r"whole=.*: input should be between -2\^63 and 2\^63"):
        _Fields(whole=value)


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param({True: {"kind": "conv"}}, id="true"),
        pytest.param({1: {"kind": "conv"}}, id="1"),
        pytest.param({None: {}}, id="None"),
    ],
)
def test_a_name_that_is_not_text_is_refused(modules: Mapping[Any, Any]):
    with pytest.raises(
        SpecError, match=r"LayerSpec in modules: the name (True|1|None) must be a text; modules: the routed sub-modules"
    ):
        LayerSpec(modules=modules)


class _One(BaseModel):
    sort: Literal["one"] = "one"
    number: int = 1


class _Other(BaseModel):
    sort: Literal["other"] = "other"


class _Union(Spec):
    kind: ClassVar[str] = "union"
    part: Annotated[_One | _Other, Field(discriminator="sort")] = _One()
    choice: int | Literal["auto"] = "auto"


def test_a_spec_may_have_a_union_with_a_discriminator():
    assert _Union(part={"sort": "one", "number": 3}, choice=2).part == _One(number=3)
    with pytest.raises(SpecError, match=r"choice='2': input should be a valid integer, not text, true or false"):
        _Union(choice="2")


@pytest.mark.parametrize("value", [2024, 1e-3, True])
def test_a_number_in_place_of_text_gives_a_hint_about_quotes(value):
    with pytest.raises(
        SpecError,
        match=rf"^TextSettings: file={value!r}: input should be a valid string; "
        r"put it in quotes, which in a shell are two: .*; file: ",
    ):
        TextSettings(file=value)
