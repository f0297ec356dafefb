"""Format versions of weights files, and renamed weights between them."""

import re
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from typing import Any

from sma.errors import CheckpointError

FORMAT = 2
"""Version of new files. Files without a version have version 0."""

# The weights of a linear map, parametrised by torch.nn.utils.parametrizations or not.
_OF_A_MAP = r"(?=\.(parametrizations\.)?(weight|bias)(\.\w+)?$)"

RENAMED = (
    # Since version 1.
    (re.compile(r"(^|\.)router\.offset$"), r"\1router.score_bias"),
    # Since version 2.
    (re.compile(r"(^|\.)fused" + _OF_A_MAP), r"\1in_proj"),
    (re.compile(r"(^|\.)out" + _OF_A_MAP), r"\1out_proj"),
)
"""Patterns of former names of weights, and their replacements."""


def renamed(names: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """The present names of weights under former names.

    Args:
        names: names in a file.
        wanted: names in the model, which are not former names.
    """
    found = {}
    for name in names:
        present = name
        for pattern, replacement in RENAMED:
            present = pattern.sub(replacement, present)
        if present != name and name not in wanted and present in wanted:
            found[name] = present
    return found


def rename(weights: MutableMapping[str, Any], wanted: Collection[str], prefix: str = "") -> None:
    """Rename weights with former names to their present names, in place.

    Args:
        weights: weights by name.
        wanted: names in the model.
        prefix: prefix of the names of this model in `weights`.
    """
    own = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    for former, present in renamed(own, wanted).items():
        weights[prefix + present] = weights.pop(prefix + former)


def check_format(metadata: Mapping[str, Any], what: str) -> None:
    """Check the version of a file.

    Raises:
        CheckpointError: it is invalid, or newer than this version of the project supports.
    """
    found = str(metadata.get("format_version", 0))
    if not found.isascii() or not found.isdigit() or int(found) > FORMAT:
        raise CheckpointError(
            f"{what} has the format version {found!r}, and this version of sma reads up to {FORMAT}; upgrade sma"
        )
