"""Recipes as scripts: whatever Python runs them, they work or say what to activate."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = (
    "seqboat_lra",
    "seqboat_lm",
    "seqboat_speech",
    "routed_mlp",
    "routed_conv",
    "recall",
    "compare",
    "router_table",
)
SCRIPTS = [f"{name}.py" for name in NAMES]


def _run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_the_package_is_told_what_to_activate(script, tmp_path):
    done = _run("-S", str(RECIPES / script), "--help", folder=tmp_path)  # without the folder of installed packages
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: this Python \(.+\) does not have the package sma; activate its environment first: .+activate\n",
        done.stderr,
    )


def test_a_python_without_what_recipes_need_is_told_how_to_install_it(tmp_path):
    (tmp_path / "sma").mkdir()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(RECIPES)!r}]; import environment"
    done = _run("-S", "-c", code, folder=tmp_path)
    assert done.returncode == 1
    assert "has no pydantic_settings, which recipes need; install it with: python -m pip install -e" in done.stderr
