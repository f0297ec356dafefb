"""Recipes as programs: they work in any Python, or an error states what to activate or to install."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import run_without

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
    "rates",
    "reach",
)
SCRIPTS = [f"{name}.py" for name in NAMES]


def _run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_error_in_a_python_without_the_package_names_the_environment_to_activate(script, tmp_path):
    done = _run("-S", str(RECIPES / script), "--help", folder=tmp_path)  # without the folder of installed packages
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: this Python \(.+\) does not have the package sma; activate its environment first: .+activate\n",
        done.stderr,
    )


@pytest.mark.slow
def test_missing_extra_gives_one_message(tmp_path):
    cases = [
        *((f"sma.recipes.{name}", "pydantic_settings", "recipes") for name in NAMES),
        ("sma.recipes.seqboat_lra", "lightning", "recipes"),
        ("sma.tune", "pydantic_settings", "tune"),  # with the core only
        ("sma.tune", "ray", "tune"),  # with the extra recipes
    ]
    done = [run_without([package], module, folder=tmp_path) for module, package, _ in cases]
    assert done == [
        (
            2,
            "",
            f"error: python -m {module} needs the extra {extra!r}, but its package {package} is not installed; "
            f"run: pip install 'sparse-modular-activation[{extra}]'\n",
        )
        for module, package, extra in cases
    ]
