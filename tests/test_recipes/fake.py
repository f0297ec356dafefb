"""Fake trainer that returns immediately, for tests of grids and studies."""

import json
from pathlib import Path
from typing import Any

from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY, write_text
from sma.recipes.tasks.contract import TaskData
from sma.spec import dump_yaml

BROKEN = "broken"
"""A file of this name makes the run in its folder fail."""

TRAININGS = "trainings.txt"
"""File with one line per training in its folder."""


def summary_of(spec: ExperimentSpec, **changes: Any) -> dict[str, Any]:
    """A summary whose numbers depend only on the experiment."""
    layers = [layer for layer in spec.model.layer_specs if layer.modules]
    rates = [
        dict.fromkeys(layer.modules, layer.router.expected_rate if layer.router.fixed_rate else 0.25 + 0.01 * number)
        for number, layer in enumerate(layers)
    ]
    means = [sum(layer.values()) / len(layer) for layer in rates]
    return {
        "task": spec.task.kind,
        "test_accuracy": 0.5 + 0.01 * spec.seed + 0.1 * sum(means),
        "activation_rate": means,
        "activation_rates": rates,
        "chance": 0.1,
        "majority": 0.2,
        "data": {"train": "a hash"},
        "parameters": spec.model.num_parameters(),
        "updates": spec.training.updates,
        "seconds": 2.0 + spec.seed,
        "tokens_per_second": 1000 * (1 + spec.seed),
        "seed": spec.seed,
        "commit": "c",
        "hardware": "a GPU",
        "device": "cuda",
        "date": "d",
        **changes,
    }


def train(
    spec: ExperimentSpec, folder: Path, data: TaskData, *, accelerator: str, progress: bool, title: str | None
) -> None:
    """Write the files of a finished run: the experiment and the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TRAININGS).open("a") as file:
        file.write(f"{spec.seed}\n")
    write_text(folder / EXPERIMENT, dump_yaml(spec))
    if (folder / BROKEN).exists():
        raise RuntimeError("the power\nwent out")
    write_text(folder / SUMMARY, json.dumps(summary_of(spec)))


def trainings(folder: Path) -> int:
    """Number of trainings in a folder."""
    return len((folder / TRAININGS).read_text().splitlines()) if (folder / TRAININGS).exists() else 0
