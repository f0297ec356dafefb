"""Names from earlier documentation lead to the present ones."""

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sma.recipes.data.documents", "sma.recipes.data has moved to sma.recipes.tasks and sma.recipes.io"),
        ("sma.recipes.baselines", "sma.recipes.baselines has moved to sma.recipes.studies.baselines"),
        ("sma.recipes.signals", "sma.recipes.signals has moved to sma.recipes.io.signals"),
        ("sma.tune.results", "sma.tune.results has moved to sma.tune.sweep_results"),
        ("sma.modules.whole", "sma.modules.whole has moved to sma.modules.full_attention"),
        ("sma.modules.windowed", "sma.modules.windowed has moved to sma.modules.sliding_window"),
    ],
)
def test_import_of_a_former_module_names_its_successor(old, new):
    with pytest.raises(ModuleNotFoundError, match=new):
        importlib.import_module(old)


@pytest.mark.parametrize("name", ["TaskData", "DigitsTask", "ImageTask", "LanguageTask", "ListOpsTask", "PathXTask"])
def test_former_import_of_a_task_names_the_present_one(name):
    tasks = importlib.import_module("sma.recipes.tasks")
    with pytest.raises(ImportError, match=f"{name} has moved to ") as raised:
        exec(f"from sma.recipes.tasks import {name}", {})
    assert hasattr(importlib.import_module(raised.value.name), name)
    assert not hasattr(tasks, "NoTask")


def test_a_former_command_names_its_successor():
    command = [sys.executable, "-m", "sma.recipes.data.pathfinder", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "python -m sma.recipes.tasks.pathfinder.sheet" in done.stderr
