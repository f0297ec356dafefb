"""The shipped YAML files of the recipes: model specs in `specs`, experiments in `presets`."""

import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from sma.errors import SpecError, did_you_mean, quote
from sma.spec import read_spec_file
from sma.yaml_text import read_fields


def shipped(folder: str) -> list[str]:
    """The names of the files in `specs` or `presets`."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("sma.recipes").joinpath(folder).iterdir())


def tasks(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the tasks of shipped experiments or sweeps, and the presets of each, the smallest first.

    Args:
        names: names such as `listops_tiny`. Longer names, such as `listops_router_table_tiny`, belong to studies.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        task, *others = name.split("_")
        if len(others) == 1:
            found.setdefault(task, []).append(others[0])
    return {task: sorted(presets, key=lambda preset: (preset != "tiny", preset)) for task, presets in found.items()}


def check_preset(name: str, names: Sequence[str] | None = None, what: str = "preset") -> None:
    """Check that a preset exists.

    Args:
        name: name of the preset, such as `listops_tiny`.
        names: existing names; None: the experiments in `presets`.
        what: noun for a preset in error messages.

    Raises:
        SpecError: the task or its preset does not exist.
    """
    names = shipped("presets") if names is None else names
    if name in names:
        return
    task, _, preset = name.rpartition("_")
    known = tasks(names)
    # Studies have their own presets, such as those of `listops_router_table`.
    others = known.get(task) or [each.removeprefix(f"{task}_") for each in names if each.startswith(f"{task}_")]
    if not others:
        raise SpecError(f"unknown task {quote(task)}{did_you_mean(task, known, 'tasks')}")
    there = f"its only {what} is {others[0]!r}" if len(others) == 1 else f"its {what}s are {', '.join(others)}"
    raise SpecError(f"the task {task!r} has no {what} {quote(preset)}; {there}")


def read_shipped(source: str | Path, folder: str) -> dict[str, Any]:
    """Read a shipped file by its name, or any YAML or JSON file by its path, without validating it.

    Raises:
        SpecError: the name or file does not exist, or is not a mapping.
    """
    if not isinstance(source, str | Path):
        raise SpecError(
            f"{quote(source)} must be a mapping or a string: "
            f"the name of one of the shipped {folder} or the path of a file"
        )
    names, path = shipped(folder), Path(source)
    if str(source) in names:
        return read_fields(files("sma.recipes").joinpath(folder, f"{source}.yaml").read_bytes(), str(source))
    if os.path.isdir(path) or not os.path.exists(path):
        what = folder.removesuffix("s")
        raise SpecError(
            f"there is no file and no shipped {what} "
            f"{quote(str(source))}{did_you_mean(str(source), names, f'shipped {folder}')}"
        )
    return read_spec_file(path)
