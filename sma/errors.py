"""Errors of the project. A message contains the given value, the requirement and the remedy."""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

QUOTED = 120
"""Maximum number of characters that an error quotes of a value."""
LISTED, LONGEST = 50, 60
"""Maximum number of known words in an error, and of characters of each."""


class SmaError(Exception):
    """Base of all errors of this project."""


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


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most similar to an unknown one; None where none is similar."""
    if len(word) > QUOTED:  # the time of the search grows with both lengths
        return None
    found = difflib.get_close_matches(word, [other for other in known if len(other) <= QUOTED], n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], listed: str = "") -> str:
    """Return the hint that ends an error about an unknown word.

    Args:
        word: the unknown word.
        known: known words.
        listed: plural noun for the known words, such as `fields`; empty leaves the list out.

    Returns:
        `; did you mean 'x'? fields: x, y`, without the question where no known word is similar.
    """
    words = list(known)
    near = nearest(word, words)
    question = f"; did you mean {near!r}?" if near is not None else ""
    if not listed:
        return question
    names = [other if len(other) <= LONGEST else f"{other[:LONGEST]}…" for other in words[:LISTED]]
    more = f", … ({len(words):,} in all)" if len(words) > LISTED else ""
    return f"{question}{' ' if near is not None else '; '}{listed}: {', '.join(names) or 'none'}{more}"


class _Quotes(reprlib.Repr):
    """A `repr` of bounded time and length: shared references can make that of a small value take hours."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = (
            self.maxarray
        ) = 8
        self.maxstring = self.maxlong = self.maxother = QUOTED

    def repr1(self, x: object, level: int) -> str:
        # By base class: reprlib selects by the class name, and prints subclasses without a bound.
        writers: dict[type, Callable[[Any, int], str]] = {
            str: self.repr_str,
            dict: self.repr_dict,
            list: self.repr_list,
            tuple: self.repr_tuple,
        }
        for base, write in writers.items():
            if isinstance(x, base):
                return write(x, level)
        if isinstance(x, Mapping):
            return f"<{type(x).__name__} of {len(x)}>"
        try:
            return str(super().repr1(x, level))
        except Exception:  # such as an integer of 5,000 digits
            return f"<{type(x).__name__}>"


def with_article(noun: str) -> str:
    """Return a noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def quote(value: object, limit: int = QUOTED) -> str:
    """Return the `repr` of a value in one line, cut where it is long, deep or wide, for a message.

    Args:
        value: any value; the full `repr` of a container or a text is never made.
        limit: maximum number of characters.
    """
    text = " ".join(_Quotes().repr(value).split("\n"))
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"


@contextmanager
def parsing(source: object, error: type[SmaError] = DataError, hint: str = "") -> Iterator[None]:
    """Turn every exception of a third-party parser into an error that names the file.

    Args:
        source: the file, as named in the message.
        error: class of the error; the exception is chained as its cause.
        hint: what to do about it, such as `get it again`.

    Raises:
        SmaError: `error`, with the file and the first line of the reason. Errors of this project are not changed.
    """
    try:
        yield
    except (SmaError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as cause:  # not only Exception, because panics of Rust are not
        raise error(f"{source} cannot be read: {reason(cause)}{f'; {hint}' if hint else ''}") from cause


def reason(error: BaseException) -> str:
    """Return the reason of a failure in one line of bounded length."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    text = text if len(text) <= 2 * QUOTED else f"{text[: 2 * QUOTED - 3]}..."
    return (
        text
        if text and not isinstance(error, KeyError | RecursionError)
        else f"{type(error).__name__}{f': {text}' if text else ''}"
    )
