"""The errors of the project: what was given, what is required, what to do about it."""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Never

QUOTED = 120
"""Characters of what was given that an error quotes at most."""
LISTED, LONGEST = 50, 60
"""Known words that an error lists at most, and characters of each."""


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


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that an unknown one is probably meant to be; None where no known word is near."""
    if len(word) > QUOTED:  # the time of the search grows with the lengths of both
        return None
    found = difflib.get_close_matches(word, [other for other in known if len(other) <= QUOTED], n=1, cutoff=0.6)
    return found[0] if found else None


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
    near = nearest(word, words)
    question = f"; did you mean {near!r}?" if near is not None else ""
    if not listed:
        return question
    names = [other if len(other) <= LONGEST else f"{other[:LONGEST]}…" for other in words[:LISTED]]
    more = f", … ({len(words):,} in all)" if len(words) > LISTED else ""
    return f"{question}{' ' if near is not None else '; '}{listed}: {', '.join(names) or 'none'}{more}"


class _Quotes(reprlib.Repr):
    """A `repr` whose work and length are bounded: shared references can make a small value print for hours."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = (
            self.maxarray
        ) = 8
        self.maxstring = self.maxlong = self.maxother = QUOTED

    def repr1(self, x: object, level: int) -> str:
        # By the base class: reprlib goes by the name of the class, and prints subclasses whole.
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


def quote(value: object, limit: int = QUOTED) -> str:
    """Return what was given as an error quotes it: its `repr` in one line, cut where it is long, deep or wide.

    Args:
        value: anything; its `repr` is never made whole where it is a container or a text.
        limit: characters at most.
    """
    text = " ".join(_Quotes().repr(value).split("\n"))
    return text if len(text) <= limit else f"{text[: limit - 4]}...{text[-1]}"


def former_names(module: str, **present: str) -> Callable[[str], Never]:
    """Make the `__getattr__` of a module that answers an import of a former name with its present one.

    Args:
        module: name of the module.
        **present: the present name by the former one.
    """

    def __getattr__(name: str) -> Never:
        if name in present:
            raise ImportError(f"{module}.{name} is now {present[name]}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


@contextmanager
def parsing(source: object, error: type[SmaError] = DataError, hint: str = "") -> Iterator[None]:
    """Name the file where a parser that is not ours raises, whatever it raises: no list of its exceptions is complete.

    Args:
        source: the file, as the sentence names it.
        error: class of the error that is raised instead; the cause is chained.
        hint: what to do about it, such as `get it again`.

    Raises:
        SmaError: `error`, with the file and the first line of the reason. Errors of this project pass as they are.
    """
    try:
        yield
    except (SmaError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as cause:  # also panics of Rust, which are no Exception
        raise error(f"{source} cannot be read: {reason(cause)}{f'; {hint}' if hint else ''}") from cause


def reason(error: BaseException) -> str:
    """Why something failed, in one line of bounded length."""
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
