"""Recipes as programs: whatever Python runs them, they work, or a message states what to activate or to install."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_sma.test_main_training import run_without

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
    "reach",
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


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        *(pytest.param(f"sma.recipes.{name}", "pydantic_settings", "recipes", id=name) for name in NAMES),
        pytest.param("sma.recipes.seqboat_lra", "lightning", "recipes", id="seqboat_lra without lightning"),
        pytest.param("sma.tune", "pydantic_settings", "tune", id="tune in the core"),
        pytest.param("sma.tune", "ray", "tune", id="tune with the recipes"),
    ],
)
def test_an_extra_that_is_missing_is_one_message(module, package, extra, tmp_path):
    done = run_without([package], module, [], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: python -m {module} needs the extra {extra!r}, but its package {package} is not installed; "
        f"run: pip install 'sparse-modular-activation[{extra}]'\n"
    )
    assert list(tmp_path.iterdir()) == []
