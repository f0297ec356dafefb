"""The files of a run folder: their names, and how they are written whole, and read with bounds and checked."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sma.errors import CheckpointError, parsing, quote
from sma.files import read_file, write_atomically
from sma.spec import Spec, dump_spec

# The files of a run folder.
EXPERIMENT, DATA, VERSIONS, SUMMARY, EVALUATION = (
    "experiment.yaml",
    "data.json",
    "versions.json",
    "summary.json",
    "evaluation.json",
)
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"

LIMIT = 1 << 24
"""Bytes that no JSON file of a run comes near."""

Number = float | int


class _Summary(BaseModel):
    """What the values of `summary.json` are, where they are there; others are not looked at."""

    model_config = ConfigDict(extra="allow", strict=True)

    task: str = ""
    test_accuracy: Number = 0
    test_loss: Number = 0
    bits_per_character: Number = 0
    activation_rate: list[Number] = []
    activation_rates: list[dict[str, Number]] = []
    chance: Number = 0
    majority: Number = 0
    data: dict[str, str] = {}
    parameters: int = 0
    updates: int = 0
    best_update: int = 0
    seconds: Number = 0
    tokens_per_second: Number | None = None
    seed: int = 0
    commit: str | None = None
    hardware: str = ""
    device: str = ""
    date: str = ""


def write_text(path: Path, text: str) -> None:
    """Write a file of a run folder, whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {str(path)!r}: {error.strerror}; the run folder must be writable and have space"
        ) from error


def read_json(path: Path, hint: str = "the run must be repeated") -> Any:
    """Read a JSON file of a folder that recipes write.

    Args:
        path: the file.
        hint: what to do where it is damaged.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
    """
    content = read_file(path, LIMIT, CheckpointError)
    with parsing(repr(str(path)), CheckpointError, hint):
        return json.loads(content)


def read_checked(path: Path, is_right: Callable[[Any], bool], what: str, hint: str = "the run must be repeated") -> Any:
    """Read a JSON file of which it is known what it holds.

    Args:
        path: the file.
        is_right: whether a value is of this kind.
        what: the kind, in words.
        hint: what to do where it is another.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    found = read_json(path, hint)
    if not is_right(found):
        raise CheckpointError(f"{str(path)!r} does not hold {what}; {hint}")
    return found


def read_summary(folder: Path, *needed: str) -> dict[str, Any]:
    """Read the summary of a finished run.

    Args:
        folder: the run folder.
        needed: what it must have.

    Raises:
        CheckpointError: there is none, it is damaged, or something is missing in it.
    """
    path = folder / SUMMARY
    found: dict[str, Any] = read_checked(path, lambda value: isinstance(value, dict), "the summary of a run")
    with parsing(repr(str(path)), CheckpointError, "the run must be repeated"):
        _Summary.model_validate(found)
    missing = [name for name in needed if name not in found]
    if missing:
        raise CheckpointError(
            f"{str(path)!r} has no {', '.join(missing)}: it is damaged, or that of another task; "
            "the run must be repeated"
        )
    return found


def is_words(value: Any) -> bool:
    """Whether a value maps names to words, as `data.json` does."""
    return isinstance(value, dict) and all(isinstance(word, str) for word in value.values())


def is_list_of(value: Any, known: Collection[str]) -> bool:
    """Whether a value is a list of known names, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name in known for name in value)


def is_parts(value: Any) -> bool:
    """Whether a value is what `versions.json` holds: an object, as older versions wrote it, or one for every part of a
    run.
    """
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(part, dict) for part in value))


def difference(one: Any, other: Any, path: str = "") -> str:
    """The first field in which two dumped specs differ, with both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in [*one, *(name for name in other if name not in one)]:
            if one.get(name) != other.get(name):
                return difference(one.get(name), other.get(name), f"{path}.{name}" if path else str(name))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            if left != right:
                return difference(left, right, f"{path}[{place}]")
    return f"{path} is {quote(one)} there, and {quote(other)} is asked for"


def refuse_another(
    there: Spec, asked: Spec, path: Path, hint: str = "give another folder, or resume it as it was"
) -> None:
    """Refuse to go on with another experiment than the one that is asked for.

    Args:
        there: what a folder or a checkpoint has.
        asked: what it should be.
        path: the file that says so.
        hint: what to do about it.

    Raises:
        CheckpointError: they differ; names the first field.
    """
    if there != asked:
        what = difference(dump_spec(there), dump_spec(asked))
        raise CheckpointError(f"{str(path)!r} belongs to another experiment: {what}; {hint}")
