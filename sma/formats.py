"""Versions of the files of weights, and the names that have changed from one to the next."""

import re
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from typing import Any

from sma.errors import CheckpointError

FORMAT = 2
"""Version of the files that are written now. Files without a version are those of version 0."""

# The weights of a linear map, parametrised by torch.nn.utils.parametrizations or not.
_OF_A_MAP = r"(?=\.(parametrizations\.)?(weight|bias)(\.\w+)?$)"

RENAMED = (
    # Since version 1.
    (re.compile(r"(^|\.)router\.offset$"), r"\1router.score_bias"),
    # Since version 2.
    (re.compile(r"(^|\.)fused" + _OF_A_MAP), r"\1in_proj"),
    (re.compile(r"(^|\.)out" + _OF_A_MAP), r"\1out_proj"),
)
"""Patterns of names of weights, and what stands in their place."""


def renamed(names: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """The present names of weights under former names.

    Args:
        names: of a file.
        wanted: what the model has. A name that it has is not a former one.
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
    """Give weights under former names their present ones, in place.

    Args:
        weights: by name.
        wanted: names of the model.
        prefix: of the names of this model in `weights`.
    """
    own = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    for former, present in renamed(own, wanted).items():
        weights[prefix + present] = weights.pop(prefix + former)


def check_format(metadata: Mapping[str, Any], what: str) -> None:
    """Check the version of a file.

    Raises:
        CheckpointError: it is newer than this version of the project, or none.
    """
    found = str(metadata.get("format_version", 0))
    if not found.isascii() or not found.isdigit() or int(found) > FORMAT:
        raise CheckpointError(
            f"{what} has the format version {found!r}, and this version of sma reads up to {FORMAT}; upgrade sma"
        )
