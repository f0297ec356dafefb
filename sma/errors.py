"""The errors of the project: what was given, what is required, what to do about it."""

import difflib
from collections.abc import Iterable


class SmaError(Exception):
    """Base of every error raised on purpose by this project."""


class SpecError(SmaError, ValueError):
    """A spec that cannot be built: an unknown kind or field, or an impossible value."""


class InputError(SmaError, ValueError):
    """A tensor given to `forward` with a shape, dtype or value that does not fit."""


class StateError(SmaError, ValueError):
    """A state that does not belong to the part it was given to, or a part that cannot stream."""


class DataError(SmaError, ValueError):
    """A file or a batch whose content is not what its format requires."""


class CheckpointError(SmaError, RuntimeError):
    """A saved model or run that cannot be written, found or read back."""


def did_you_mean(word: str, known: Iterable[str], listed: str = "") -> str:
    """Return the hint that ends an error about an unknown word.

    Args:
        word: what was given.
        known: what there is.
        listed: what the known words are, such as `fields`; empty leaves the list out.

    Returns:
        `; did you mean 'x'? fields: x, y`, without the question when no known word is near.
    """
    words = list(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    question = f"; did you mean {near[0]!r}?" if near else ""
    if not listed:
        return question
    return f"{question}{' ' if near else '; '}{listed}: {', '.join(words) or 'none'}"
