"""The recipe on ListOps as a command in a separate process, for tests that run or kill it."""

import subprocess
import sys
from pathlib import Path

import yaml

from tests.test_recipes.tiny import EXPERIMENT

ROOT = Path(__file__).resolve().parents[2]
MODULE = [sys.executable, "-m", "sma.recipes.seqboat_lra"]
SCRIPT = [sys.executable, "recipes/seqboat_lra.py"]
RESUME = "python -m sma.recipes.seqboat_lra --resume"


def write_spec(folder):
    """Write the experiment to a file in the folder; return its path."""
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT), encoding="utf-8")
    return path


def run(command, timeout=280):
    """Run a command in the repository root and capture its output."""
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
