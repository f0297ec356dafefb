"""Strict numbers and booleans: pydantic itself accepts `true` and `"1"` as the number 1, `"yes"` and 1 as `true`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

_LARGE = 2**63
_PARTS = ("schema", "items_schema", "keys_schema", "values_schema")
_NAMED = ("fields", "choices")
"""Parts of a schema that are a list, or a mapping by name: fields of a model, choices of a discriminated union."""


def strict(schema: Any) -> Any:
    """Make a schema of pydantic accept only numbers of at most 64 bits as numbers, and only booleans as booleans."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(strict, schema))
    if not isinstance(schema, dict) or schema.get("function") in _CHECKED:
        return schema
    check = _CHECKS.get(schema["type"])
    if check is not None:
        return core_schema.no_info_before_validator_function(check, cast(CoreSchema, schema))
    parts = {key: strict(schema[key]) for key in _PARTS if key in schema}
    named = {key: _each(schema[key]) for key in _NAMED if key in schema}
    strictly = {**schema, **parts, **named}
    if schema["type"] == "tuple":
        return core_schema.no_info_before_validator_function(_ordered, cast(CoreSchema, strictly))
    return strictly


def _each(parts: Any) -> Any:
    return {name: strict(part) for name, part in parts.items()} if isinstance(parts, dict) else strict(parts)


def _number(value: Any, problem: Literal["int_type", "float_type"], bounded: Any) -> Any:
    """Refuse words and booleans, and values of the `bounded` types beyond 64 bits, except infinities and NaN."""
    if _is_switch(value) or isinstance(value, str | bytes | bytearray):
        raise PydanticKnownError(problem)
    if isinstance(value, bounded) and (value < -_LARGE or value >= _LARGE) and abs(value) != math.inf:
        raise PydanticCustomError("too_large", "Input should be between -2^63 and 2^63")
    return value


def _switch(value: Any) -> Any:
    if not _is_switch(value):
        raise PydanticKnownError("bool_type")
    return value


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")  # also those of numpy


def _ordered(value: Any) -> Any:
    """Refuse sets in place of lists: they have no order, and drop repeated values."""
    if isinstance(value, set | frozenset):
        raise PydanticKnownError("tuple_type")
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "float": partial(_number, problem="float_type", bounded=int),
    "int": partial(_number, problem="int_type", bounded=int | float),
    "bool": _switch,
}
_CHECKED = [{"type": "no-info", "function": check} for check in (*_CHECKS.values(), _ordered)]
