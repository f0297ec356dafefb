"""Docstrings of the project are Markdown in Google's sections: code spans and formulas as reStructuredText."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
FORMULA = re.compile(r"(?<![\\\w$])\$(?=\S)([^$]+?)(?<=\S)\$(?![\w$])")
ANY = re.compile(rf"{CODE.pattern}|{FORMULA.pattern}")
LITERAL = re.compile(r"[_|]|\*(?![\w-]+\*)(?<!\w\*)")


def markdown_to_rst(text: str) -> str:
    """Return a docstring with code spans and formulas as roles, and all other marks as plain text."""
    parts, end = [], 0
    for match in ANY.finditer(text):
        parts.append(LITERAL.sub(r"\\\g<0>", text[end : match.start()]))
        code, formula = match.groups()
        inner = re.sub(r"\s*\n\s*", " ", code or formula)
        parts.append(f"``{inner}``\\ " if code else f":math:`{inner}`\\ ")
        end = match.end()
    return "".join([*parts, LITERAL.sub(r"\\\g<0>", text[end:])])


def without_hanging_indents(lines: list[str]) -> list[str]:
    """Return a docstring whose paragraphs on shapes and references are flush, or reStructuredText reads definitions."""
    found, inside = [], False
    for line in lines:
        if line and not line.startswith(" "):
            inside = line in ("Shape:", "Reference:", "References:")
        found.append("    " + line.lstrip() if inside and line.startswith(" ") else line)
    return found


def _convert(app: "Sphinx", what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = markdown_to_rst("\n".join(without_hanging_indents(lines))).split("\n")
    if what in ("attribute", "data", "property"):
        lines.insert(0, "\\ ")  # nothing, or napoleon reads what stands before a colon in the first line as a type


def _escape_types(app: "Sphinx", what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace("*", "\\*") if line.startswith(":vartype") else line for line in lines]


def setup(app: "Sphinx") -> dict[str, bool]:
    """Convert docstrings before napoleon reads their sections, and escape what napoleon writes."""
    app.connect("autodoc-process-docstring", _convert, priority=400)
    app.connect("autodoc-process-docstring", _escape_types, priority=900)  # a shape such as 'T *D'
    return {"parallel_read_safe": True}
