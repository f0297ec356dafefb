"""Formatting of user-given names, such as those of files and classes, for lines, commands and Markdown."""

import os
import shlex
from collections.abc import Sequence

SHOWN = 100
"""Maximum number of characters of a name in a line, a cell or a figure."""


def plain(text: object, limit: int | None = None) -> str:
    r"""Return a text on one line, with escapes such as `\n` for unprintable characters.

    Args:
        text: text, such as a path.
        limit: maximum number of characters; the middle of a longer text is cut out. None: no limit.
    """
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(text))
    if limit is None or len(shown) <= limit:
        return shown
    kept = limit - 1
    return f"{shown[: kept - kept // 2]}…{shown[len(shown) - kept // 2 :]}"


def shell_word(text: object) -> str:
    r"""Return a text as one word of a shell command: quoted by `shlex.quote`, or as `$'...'` with escapes."""
    if (word := str(text)).isprintable():
        return shlex.quote(word)
    signs = {"\\": r"\\", "'": r"\'"}
    return "$'" + "".join(signs.get(sign, sign) if sign.isprintable() else _bytes_in_words(sign) for sign in word) + "'"


def _bytes_in_words(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(sign))


def markdown_table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table. The first column is aligned to the left, the others to the right; cells are escaped."""
    lines = [head, *rows]
    first, *others = (f"| {' | '.join(map(markdown_cell, line))} |" for line in lines)
    return "\n".join([first, f"| {' | '.join(['---'] + ['---:'] * (len(head) - 1))} |", *others])


def markdown_cell(value: object) -> str:
    """Return a value as a cell of a Markdown table: on one line, with `|` escaped."""
    return plain(value).replace("|", "\\|")
