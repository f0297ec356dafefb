"""The YAML files that come with the recipes: model specs in `specs`, experiments in `presets`."""

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from sma.errors import SpecError, did_you_mean, quote
from sma.spec import read_spec_file
from sma.yaml_text import read_fields


def shipped(folder: str) -> list[str]:
    """The names of the files in `specs` or `presets`."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("sma.recipes").joinpath(folder).iterdir())


def read_shipped(source: str | Path, folder: str) -> dict[str, Any]:
    """Read a shipped file by its name, or any YAML or JSON file by its path, without validating it.

    Raises:
        SpecError: there is no such name or file, or it holds no mapping.
    """
    if not isinstance(source, str | Path):
        raise SpecError(
            f"{quote(source)} must be a mapping, or a word: "
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
