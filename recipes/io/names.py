"""Names that users gave, to files, folders and classes, made fit for where they are shown: lines, commands and
Markdown.
"""

import os
import shlex
from collections.abc import Sequence

SHOWN = 100
"""Characters of a name that a line, a cell or a figure shows at most."""


def plain(text: object, limit: int | None = None) -> str:
    r"""Return a text on one line without control characters: those, lone surrogates and signs without width become
    escapes such as `\n`.

    Args:
        text: what is shown, such as a path.
        limit: characters at most; a longer text loses its middle. None: as long as it is.
    """
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in str(text))
    if limit is None or len(shown) <= limit:
        return shown
    kept = limit - 1
    return f"{shown[: kept - kept // 2]}…{shown[len(shown) - kept // 2 :]}"


def shell_word(text: object) -> str:
    r"""Return a text as one word of a command that can be copied from a terminal: as `shlex.quote`, or as `$'...'` with
    escapes.
    """
    if (word := str(text)).isprintable():
        return shlex.quote(word)
    signs = {"\\": r"\\", "'": r"\'"}
    return "$'" + "".join(signs.get(sign, sign) if sign.isprintable() else _bytes_in_words(sign) for sign in word) + "'"


def _bytes_in_words(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(sign))


def markdown_table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown, its first column to the left and the others to the right; nothing in a cell can end
    it.
    """
    lines = [head, *rows]
    first, *others = (f"| {' | '.join(map(markdown_cell, line))} |" for line in lines)
    return "\n".join([first, f"| {' | '.join(['---'] + ['---:'] * (len(head) - 1))} |", *others])


def markdown_cell(value: object) -> str:
    """Return a value as a cell of a Markdown table: on one line, with `|` escaped."""
    return plain(value).replace("|", "\\|")
