"""Lines of text files, read one by one with a maximum length."""

from collections.abc import Iterator
from pathlib import Path

from sma.errors import DataError, parsing
from sma.files import open_file

LONGEST = 1 << 26
"""Maximum length of a line, in bytes."""


def lines_of(path: str | Path, longest: int = LONGEST) -> Iterator[tuple[int, bytes]]:
    """Yield the number of every line, from 1, and its bytes with the line end.

    Raises:
        DataError: the file cannot be read, or a line is longer than `longest` bytes.
    """
    with open_file(path) as file, parsing(path):
        number = 0
        while line := file.readline(longest + 1):
            number += 1
            if len(line) > longest:
                raise DataError(
                    f"{path}, line {number} has more than {longest:,} bytes, which no line here has; "
                    "the file is damaged"
                )
            yield number, line
