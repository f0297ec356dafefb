"""Check of the Python that runs a recipe, before any other import: `python recipes/seqboat_lra.py` or
`python -m sma.recipes.seqboat_lra`.

Importing this file ends the program with one message if the package or its extra `recipes` is not installed. Until the
package is found, the file uses only the standard library and syntax of older versions of Python.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ACTIVATE = ROOT / ".venv" / ("Scripts" if sys.platform == "win32" else "bin") / "activate"


def complaint() -> str:
    """The error message with the remedy; empty if nothing is missing."""
    here = f"this Python ({sys.executable}, {sys.version_info[0]}.{sys.version_info[1]})"
    advice = f". {ACTIVATE}" if ACTIVATE.exists() else f"make setup && . {ACTIVATE}"
    if sys.version_info < (3, 11):  # noqa: UP036 (pip refuses older versions, a script does not)
        return f"{here} is too old: 3.11 or newer is required; run first: {advice}"
    if importlib.util.find_spec("sma") is None:
        return f"{here} does not have the package sma; activate its environment first: {advice}"
    return ""


_found = complaint()
if _found:
    sys.exit(f"error: {_found}")

from sma.commands.extras import require_extra  # noqa: E402 (the package is known to exist only here)

require_extra("recipes")
