"""Reference of the registered kinds and their fields, as plain text generated from the spec classes."""

import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from sma.describe import align
from sma.errors import SpecError, did_you_mean, quote, with_article
from sma.layer import LayerSpec
from sma.mistakes import BOUNDS
from sma.repeat import RepeatSpec
from sma.spec import Spec, families, find_kind, kinds

COLUMNS = 100

# Parts of a spec that have no kind.
PARTS: dict[str, type[Spec]] = {"layer": LayerSpec, "repeat": RepeatSpec}

_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text"}


def list_kinds(family: str | None = None) -> str:
    """Every registered kind of a family, or of all, with one sentence each.

    Raises:
        SpecError: the family is unknown.
    """
    chosen = families() if family is None else (family,)
    known = {name: kinds(name) for name in chosen}
    wide = max(len(kind) for found in known.values() for kind in found) + 4
    blocks = []
    for name, found in known.items():
        entries = [
            textwrap.fill(summary(spec), COLUMNS, initial_indent=f"  {kind:{wide}}", subsequent_indent=" " * (wide + 2))
            for kind, spec in found.items()
        ]
        blocks.append("\n".join([name, *entries]))
    return "\n\n".join(blocks)


def find_kinds(kind: str, family: str | None = None) -> list[type[Spec]]:
    """The spec classes registered under a kind; `layer` and `repeat`, which have no kind, are found too.

    Raises:
        SpecError: the name is unknown; the message lists similar names.
    """
    if family is not None:
        return [find_kind(family, kind)]
    known = {name: kinds(name) for name in families()}
    found = [of_family[kind] for of_family in known.values() if kind in of_family]
    if not found and kind in PARTS:
        found = [PARTS[kind]]
    if not found:
        names = sorted({*PARTS, *(name for of_family in known.values() for name in of_family)})
        raise SpecError(f"unknown kind {quote(kind)}{did_you_mean(kind, names, 'known kinds')}")
    return found


def describe_kind(spec_class: type[Spec]) -> str:
    """Describe a kind, its notation, and its fields: name, type, default, allowed values and meaning."""
    fields = {name: field for name, field in spec_class.model_fields.items() if name != "kind"}
    kind = spec_class.model_fields["kind"].default if "kind" in spec_class.model_fields else None
    where = f"{spec_class.__name__} in {spec_class.__module__}"
    head = f"{kind}: {with_article(spec_class.family)} ({where})" if kind else where
    parts = [f"{head}\n{textwrap.fill(summary(spec_class), COLUMNS)}"]
    keys = [f"kind: {kind}"] * bool(kind) + [f"{name}: ..." for name, field in fields.items() if field.is_required()]
    if keys:
        parts.append(f"{{{', '.join(keys)}}}")
    if fields:
        parts.append("\n".join(_table(fields)))
    return "\n\n".join(parts)


def _table(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    rows = ([name, _type(field.annotation), _default(field), _allowed(field)] for name, field in fields.items())
    title, *lines = align([["field", "type", "default", "allowed"], *rows])
    yield title
    allowed = " " * title.index("allowed")
    for line, field in zip(lines, fields.values(), strict=True):
        yield from textwrap.wrap(line, COLUMNS, subsequent_indent=allowed)
        yield from textwrap.wrap(field.description or "", COLUMNS, initial_indent="    ", subsequent_indent="    ")


def summary(spec_class: type[Spec]) -> str:
    """The first sentence about a spec, from the class that it builds if its docstring is only "Spec of `Class`."."""
    text = inspect.cleandoc(spec_class.__doc__ or "")
    built = re.match(r"Spec of `(\w+)`", text)
    if built:
        built_class = getattr(sys.modules[spec_class.__module__], built.group(1), None)
        text = inspect.cleandoc(getattr(built_class, "__doc__", None) or text)
    first = " ".join(text.split("\n\n")[0].split())
    return _plain(re.split(r"(?<=[a-z0-9)$])\. (?=[A-Za-z])", first)[0].removesuffix("."))


def _plain(text: str) -> str:
    """Simplify the formulas of a docstring for a terminal."""
    text = re.sub(r"\\math\w+\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text)
    text = re.sub(r"\\l(floor|ceil) *(.*?) *\\r\1", r"\1(\2)", text)
    text = re.sub(r"\\[lc]?dots", "...", text)
    for word, plain in {
        r"\top": "T",
        r"\odot": "*",
        r"\cdot": "*",
        r"\epsilon": "eps",
        r"\,": "",
        r"\sqrt": "sqrt",
    }.items():
        text = text.replace(word, plain)
    text = re.sub(r"_\{([^{}]*)\}", r"_(\1)", text)
    return re.sub(r" +", " ", re.sub(r"[$`\\]", "", text))


def _type(annotation: Any) -> str:
    """A type in words: `integer or null`, `position`, `sub-module by name`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        words = [_type(choice) for choice in inner if choice is not type(None)]
        return " or ".join([*words, *["null"] * (type(None) in inner)])
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    if origin is Literal:
        return "word"
    if origin is tuple or origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"{_type(inner[1])} by name"
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        if "family" in annotation.__dict__:
            return annotation.family
        return next((name for name, part in PARTS.items() if part is annotation), annotation.__name__)
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Spec):
        return str(getattr(value, "kind", type(value).__name__))
    if isinstance(value, Mapping) and not value:
        return "none"
    return _number(value)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _allowed(field: FieldInfo) -> str:
    """Bounds in the words of the error messages, the choices of a word, the kinds of a family."""
    bounds = [
        f"{words} {_number(getattr(item, key))}"
        for item in field.metadata
        for key, words in BOUNDS.items()
        if hasattr(item, key)
    ]
    return ", ".join([*bounds, *dict.fromkeys(_choices(field.annotation))])


def _choices(annotation: Any) -> Iterator[str]:
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif isinstance(annotation, type) and issubclass(annotation, Spec) and "family" in annotation.__dict__:
        yield from kinds(annotation.family)
    else:
        for inner in get_args(annotation):
            yield from _choices(inner)
