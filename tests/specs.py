"""Random specs of every registered kind, generated from the declared fields."""

import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from sma.errors import SpecError
from sma.spec import Spec, families, kinds

NAMES = ("attention", "mlp", "conv_2")

# Every registered kind of the models, without those that tests register. Kinds of the recipes are excluded, because
# they are registered only if a test imports them.
KINDS = [
    (family, kind, spec_class)
    for family in families()
    for kind, spec_class in kinds(family).items()
    if spec_class.__module__.startswith("sma.") and not spec_class.__module__.startswith(("sma.recipes.", "sma.tune."))
]
every_kind = pytest.mark.parametrize(
    ("family", "kind"), [pytest.param(family, kind, id=f"{family}:{kind}") for family, kind, _ in KINDS]
)


# Strategies are cached, because tests request one per example. They are deferred, because hypothesis builds the repr of
# nested strategies, which takes longer than the examples.


@cache
def of_family(family: str, most: float = 1e4) -> st.SearchStrategy[Any]:
    """Specs of any kind of a family; `most` is the maximum of all numbers."""
    strategies = [of_class(spec_class, most) for name, _, spec_class in KINDS if name == family]
    return st.deferred(lambda: st.one_of(strategies))


@cache
def of_class(spec_class: type[Spec], most: float = 1e4) -> st.SearchStrategy[Any]:
    """Valid specs of one class; combinations of fields that its validators refuse are filtered out."""
    fields = {name: _values(field.annotation, field.metadata, most) for name, field in spec_class.model_fields.items()}
    # Some examples omit optional fields, which then have their defaults.
    optional = {name: values for name, values in fields.items() if not spec_class.model_fields[name].is_required()}
    required = {name: values for name, values in fields.items() if name not in optional}
    chosen = st.fixed_dictionaries(required, optional=optional)
    made = chosen.map(lambda fields: _made(spec_class, fields)).filter(lambda spec: spec is not None)
    return st.deferred(lambda: made)


def _made(spec_class: type[Spec], fields: dict[str, Any]) -> Spec | None:
    try:
        return spec_class(**fields)
    except SpecError:
        return None


def _values(annotation: Any, metadata: list[Any], most: float) -> st.SearchStrategy[Any]:
    """Values of one field."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _values(annotation.__origin__, [*metadata, *annotation.__metadata__], most)
    if origin in (Union, types.UnionType):
        return st.one_of([_values(choice, metadata, most) for choice in arguments])
    if annotation is type(None):
        return st.none()
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(_values(arguments[0], [], most), min_size=1, max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.sampled_from(NAMES), _values(arguments[1], [], most), max_size=2)
    if annotation is str:
        pattern = next((bound.pattern for bound in metadata if getattr(bound, "pattern", None)), "[a-z]{1,9}")
        return st.from_regex(pattern, fullmatch=True)
    if annotation is bool:
        return st.booleans()
    if annotation in (int, float):
        return _numbers(annotation, metadata, most)
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return of_family(annotation.family, most) if "family" in annotation.__dict__ else of_class(annotation, most)
    raise TypeError(f"no strategy for a field of type {annotation!r}; add one here")


def _numbers(kind: type, metadata: list[Any], most: float) -> st.SearchStrategy[Any]:
    low, high, open_low, open_high = -most, most, False, False
    for bound in metadata:
        if isinstance(bound, Gt | Ge):
            low, open_low = float(bound.gt if isinstance(bound, Gt) else bound.ge), isinstance(bound, Gt)  # type: ignore[arg-type]
        if isinstance(bound, Lt | Le):
            limit = float(bound.lt if isinstance(bound, Lt) else bound.le)  # type: ignore[arg-type]
            high, open_high = (limit, isinstance(bound, Lt)) if limit <= most else (most, False)
    if kind is int:
        return st.integers(int(low) + open_low, int(high) - open_high)
    return st.floats(low, max(high, low + 1), exclude_min=open_low, exclude_max=open_high)


def constraint(field: FieldInfo, kind: type) -> float | None:
    """The bound of one kind on a field, if it has one."""
    return next(
        (float(getattr(bound, kind.__name__.lower())) for bound in field.metadata if isinstance(bound, kind)), None
    )
