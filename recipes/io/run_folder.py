"""The files of a run folder: their names, atomic writes, and reads with limits and checks."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sma.errors import CheckpointError, parsing, quote
from sma.files import read_file, write_atomically
from sma.spec import Spec, dump_spec

EXPERIMENT, DATA, VERSIONS, SUMMARY, EVALUATION = (
    "experiment.yaml",
    "data.json",
    "versions.json",
    "summary.json",
    "evaluation.json",
)
LAST, BEST = "checkpoints/last.ckpt", "checkpoints/best.ckpt"

LIMIT = 1 << 24
"""Maximum bytes of a JSON file of a run."""

Number = float | int


class _Summary(BaseModel):
    """Types of the optional values of `summary.json`; other values are not checked."""

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
    """Write a file of a run folder atomically.

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
    """Read a JSON file of a run folder.

    Args:
        path: the file.
        hint: end of the error message: advice for a damaged file.

    Raises:
        CheckpointError: the file cannot be read, or is damaged.
    """
    content = read_file(path, LIMIT, CheckpointError)
    with parsing(repr(str(path)), CheckpointError, hint):
        return json.loads(content)


def read_checked(path: Path, is_right: Callable[[Any], bool], what: str, hint: str = "the run must be repeated") -> Any:
    """Read a JSON file, and check its value.

    Args:
        path: the file.
        is_right: whether a value is valid.
        what: noun for a valid value, for the error message.
        hint: end of the error message: advice for another value.

    Raises:
        CheckpointError: the file cannot be read, or holds another value.
    """
    found = read_json(path, hint)
    if not is_right(found):
        raise CheckpointError(f"{str(path)!r} does not hold {what}; {hint}")
    return found


def read_summary(folder: Path, *needed: str) -> dict[str, Any]:
    """Read the summary of a finished run.

    Args:
        folder: the run folder.
        needed: required keys.

    Raises:
        CheckpointError: the summary is missing or damaged, or lacks a key.
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
    """Whether a value is a mapping to strings, as in `data.json`."""
    return isinstance(value, dict) and all(isinstance(word, str) for word in value.values())


def is_list_of(value: Any, known: Collection[str]) -> bool:
    """Whether a value is a non-empty list of known names."""
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name in known for name in value)


def is_parts(value: Any) -> bool:
    """Whether a value is that of `versions.json`: a mapping per part of a run, or one mapping (older versions)."""
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(part, dict) for part in value))


def difference(one: Any, other: Any, path: str = "") -> str:
    """The first field in which two dumped specs differ, with both values."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in [*one, *(name for name in other if name not in one)]:
            if one.get(name) != other.get(name):
                return difference(one.get(name), other.get(name), f"{path}.{name}" if path else str(name))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            if left != right:
                return difference(left, right, f"{path}[{index}]")
    return f"{path} is {quote(one)} there, and {quote(other)} is requested"


def refuse_another(
    there: Spec, asked: Spec, path: Path, hint: str = "give another folder, or resume it with its own experiment"
) -> None:
    """Check that a folder or a checkpoint belongs to the requested experiment.

    Args:
        there: its spec.
        asked: the requested spec.
        path: the file of its spec.
        hint: end of the error message: advice for the user.

    Raises:
        CheckpointError: the specs differ; the message has the first field.
    """
    if there != asked:
        what = difference(dump_spec(there), dump_spec(asked))
        raise CheckpointError(f"{str(path)!r} belongs to another experiment: {what}; {hint}")
