"""Checks the Python that runs a recipe as a script, `python recipes/seqboat_lra.py`, before anything of the project is
imported.

Importing this file ends the program with one message where the package, or what the recipes need, is not installed. It
uses the standard library alone, and syntax that older versions of Python read too.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ACTIVATE = ROOT / ".venv" / ("Scripts" if sys.platform == "win32" else "bin") / "activate"
NEEDED = ("pydantic_settings", "lightning", "matplotlib", "torchmetrics")


def complaint() -> str:
    """What is missing and what to do; an empty text where nothing is."""
    here = f"this Python ({sys.executable}, {sys.version_info[0]}.{sys.version_info[1]})"
    advice = f". {ACTIVATE}" if ACTIVATE.exists() else f"make setup && . {ACTIVATE}"
    if sys.version_info < (3, 11):  # noqa: UP036 (pip refuses older versions, a script does not)
        return f"{here} is too old: 3.11 or newer is required; run first: {advice}"
    if importlib.util.find_spec("sma") is None:
        return f"{here} does not have the package sma; activate its environment first: {advice}"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            f"{here} has no {missing[0]}, which recipes need; install it with: "
            f"python -m pip install -e '{ROOT}[recipes]'"
        )
    return ""


_found = complaint()
if _found:
    sys.exit(f"error: {_found}")
