"""Fields of a spec, with their ranges and descriptions, as arguments of its class."""

import inspect
import re
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "at least {} items"}

SHORTENED = re.compile(r"~([\w]+\.)*")
"""What Sphinx marks as a path to be left out, such as that of `~sma.norms.NormSpec`."""


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    return "..." if field.default_factory and default else repr(default)  # a factory's may depend on the machine


def _facts(field: FieldInfo) -> str:
    """Return type, range and default of a field in one line."""
    annotation = stringify_annotation(field.annotation, "smart")
    facts = [f"`{SHORTENED.sub('', annotation)}`"]
    for rule in field.metadata:
        facts += [
            text.format(getattr(rule, name)) for name, text in BOUNDS.items() if getattr(rule, name, None) is not None
        ]
    if not field.is_required():
        facts.append(f"default `{_default(field)}`")
    return ", ".join(fact for fact in facts if fact)


def _describe(app: Sphinx, what: str, name: str, obj: Any, options: object, lines: list[str]) -> None:
    if what != "class" or not (inspect.isclass(obj) and issubclass(obj, BaseModel)):
        return
    fields = {key: field for key, field in obj.model_fields.items() if key != "kind"}
    if fields and not any(re.match(r"(Args|Attributes):", line) for line in lines):
        lines += ["", "Args:"]
        lines += [f"    {key}: {field.description or ''} ({_facts(field)})" for key, field in fields.items()]
        lines.append("")


def _sign(
    app: Sphinx, what: str, name: str, obj: Any, options: object, signature: str | None, returned: str | None
) -> tuple[str, None] | None:
    """Return names and defaults of the fields: types and ranges stand among the arguments."""
    if what != "class" or not (inspect.isclass(obj) and issubclass(obj, BaseModel)):
        return None
    fields = [(key, field) for key, field in obj.model_fields.items() if key != "kind"]
    required = [key for key, field in fields if field.is_required()]
    others = [f"{key}={_default(field)}" for key, field in fields if not field.is_required()]
    words = ", ".join([*required, *others])
    return (f"(*, {words})" if words else "()"), None


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the fields before the Markdown of docstrings is converted."""
    app.connect("autodoc-process-docstring", _describe, priority=300)
    app.connect("autodoc-process-signature", _sign)
    return {"parallel_read_safe": True}
