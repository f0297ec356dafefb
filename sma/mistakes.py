"""Mistakes in specs: the errors of pydantic in the format of all other errors."""

from types import UnionType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from sma.errors import SpecError, did_you_mean, quote

SENTENCES = 10
"""Maximum number of mistakes in one error."""


def custom(head: str, tail: str) -> PydanticCustomError:
    """Make an error of two halves, between which the path of the field is inserted later."""
    return PydanticCustomError("sma", "{head}{tail}", {"head": head, "tail": tail})


BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


_TYPE_HINTS: dict[str, tuple[type | UnionType, str]] = {
    "int_type": (str | bool, ", not text, true or false"),
    "float_type": (str | bool, ", not text, true or false"),
    "bool_type": (str | int | float, ", true or false"),
    "string_type": (int | float, "; put it in quotes, which in a shell are two: '\"…\"'"),
}
"""Hints after pydantic's message, by type of error, for values of these types."""


def explained(cls: type[BaseModel], item: Any) -> InitErrorDetails:
    """Convert an error of pydantic to one with class, field, given value, requirement and meaning of the field."""
    loc, given = item["loc"], item["input"]
    if item["type"] == "sma":
        problem = custom(item["ctx"]["head"], item["ctx"]["tail"])
        return InitErrorDetails(type=problem, loc=loc, input=given)
    name = str(loc[0]) if loc else ""
    field = cls.model_fields.get(name)
    meaning = f"; {name}: {field.description}" if field is not None and field.description else ""
    context = item.get("ctx", {})
    bound = next((f"must be {words} {context[key]}" for key, words in BOUNDS.items() if key in context), None)
    if item["type"] == "missing":
        sentence = f"{name!r} is required{meaning}"
    elif item["type"] == "value_error":
        sentence = item["msg"].removeprefix("Value error, ")
    elif bound and len(loc) == 1:
        sentence = f"{name}={quote(given)} {bound}{meaning}"
    elif item["type"] == "literal_error":
        near = did_you_mean(
            given if isinstance(given, str) else "",
            [option.strip("'") for option in context["expected"].replace(" or ", ", ").split(", ")],
        )
        sentence = f"{name}={quote(given)} must be {context['expected']}{near}{meaning}"
    elif loc and loc[-1] == "[key]":
        # Without the key, which may not fit into a path.
        sentence, loc = f"the name {quote(given)} must be a text{meaning}", (*loc[:-2], "")
    else:
        types, words = _TYPE_HINTS.get(item["type"], (object, ""))
        hint = words if isinstance(given, types) else ""
        sentence = (
            f"{f'{name}=' if name else ''}{quote(given)}: {item['msg'][0].lower()}{item['msg'][1:]}{hint}{meaning}"
        )
    # The sentence names the field, so the path ends at its part of the spec.
    return InitErrorDetails(
        type=custom(cls.__name__, f": {sentence}"), loc=() if len(loc) <= 1 else loc[:-1], input=given
    )


def spec_error(error: ValidationError | RecursionError) -> SpecError:
    """Convert the mistakes of a validation to one error, with a sentence and a path for each of the first ones."""
    if isinstance(error, RecursionError):
        return SpecError("the spec contains itself, or its parts are nested too deep; reduce the nesting")
    sentences: list[str] = []
    for item in error.errors():
        where = field_path(item["loc"])
        context = item.get("ctx", {"head": item["msg"], "tail": ""})
        sentences.append(f"{context['head']}{f' in {where}' if where else ''}{context['tail']}")
    different = list(dict.fromkeys(sentences))
    more = [f"and {len(different) - SENTENCES:,} more mistakes"] if len(different) > SENTENCES else []
    return SpecError("\n".join([*different[:SENTENCES], *more]))


def field_path(parts: tuple[int | str, ...]) -> str:
    """Write a location as a path: `("layers", 2, "modules")` is `layers[2].modules`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
