"""An experiment that takes a second: short expressions, two layers of width 8, dropout in every place; and ways to stop
it midway.
"""

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.run_folder import BEST, LAST
from sma.recipes.tasks.contract import TaskData
from sma.recipes.tasks.listops.expressions import prepare_listops
from sma.recipes.training.classification import Classifier
from sma.recipes.training.module import TrainingModule
from sma.recipes.training.run import Finished, run_experiment

DATA = {"min_length": 3, "max_length": 30, "max_depth": 4, "max_arity": 4, "train": 120, "validation": 40, "test": 60}
MODEL = {
    "kind": "sequence_classifier",
    "width": 8,
    "encoder": {"kind": "token_embedding", "vocabulary": 16, "padding": 0},
    "embedding_dropout": 0.1,
    "layers": {
        "repeat": 2,
        "layer": {
            "backbone": {"kind": "ema", "state_size": 4},
            "modules": {
                "attention": {
                    "kind": "gau",
                    "query_size": 4,
                    "hidden_size": 8,
                    "window": 8,
                    "position": {"kind": "relative_bias", "max_positions": 30},
                }
            },
            "norm": {"kind": "layer_norm", "place": "post"},
            "dropout": 0.1,
        },
    },
    "head": {"kind": "mean_pool_mlp", "hidden": 8, "classes": 10, "dropout": 0.1},
}
# 120 samples in batches of 8: the 30 updates are two epochs, and the interruptions below fall into both.
TRAINING = {
    "updates": 30,
    "batch_size": 8,
    "learning_rate": 0.003,
    "weight_decay": 0.01,
    "warmup": 5,
    "evaluate_every": 10,
    "bucket": 3,
}
EXPERIMENT = {"task": {"kind": "listops", "data": DATA}, "model": MODEL, "training": TRAINING}


def tiny(**settings: Any) -> ExperimentSpec:
    """The experiment with some values changed, by paths with `__` for the dots."""
    return load_experiment(EXPERIMENT, [f"{path.replace('__', '.')}={value}" for path, value in settings.items()])


def tiny_data(folder: Path) -> TaskData:
    """The data of the experiment, made by this process alone."""
    return prepare_listops(tiny().task.data, folder, workers=1, progress=False)  # type: ignore[attr-defined]


def train(spec: ExperimentSpec, out: Path, data: TaskData, accelerator: str = "cpu", resume: bool = False) -> Finished:
    """Run the experiment without a bar."""
    return run_experiment(spec, out, data, accelerator=accelerator, progress=False, resume=resume)


def before_update(
    patch: pytest.MonkeyPatch, update: int, act: Callable[[Any], object], module: type[TrainingModule] = Classifier
) -> None:
    """Call `act`, which may raise, before update number `update`, counted from 0."""
    original = module.training_step

    def step(self: TrainingModule, *batch: Any) -> Any:
        if self.global_step == update:
            act(self)
        return original(self, *batch)

    patch.setattr(module, "training_step", step)


def fail(_: Any) -> None:
    """Simulate a power failure."""
    raise RuntimeError("the power went out")


@contextmanager
def power_failure(update: int, module: type[TrainingModule] = Classifier) -> Iterator[None]:
    """Assert that the training inside the block fails, which it does in an update."""
    with pytest.MonkeyPatch.context() as patch:
        before_update(patch, update, fail, module)
        with pytest.raises(RuntimeError, match="the power went out"):
            yield


def checkpoint(out: Path, name: str = LAST) -> dict[str, Any]:
    """Read a checkpoint of a run as anybody would, without running code in it."""
    loaded: dict[str, Any] = torch.load(out / name, weights_only=True)
    return loaded


def same(left: Any, right: Any) -> bool:
    """Whether two nested structures are equal to the last bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return (
            isinstance(right, dict) and left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def metrics_of(out: Path) -> dict[tuple[int, str], dict[str, str]]:
    """The logged lines of all parts of a run, by update: the later part counts."""
    lines: dict[tuple[int, str], dict[str, str]] = {}
    for path in sorted((out / "metrics").glob("version_*/metrics.csv")):
        for row in csv.DictReader(path.open(encoding="utf-8")):
            kind = "val" if row.get("val_accuracy") else "test" if row.get("test_accuracy") else "fit"
            step = int(row.pop("step")) + 1
            # Lightning counts a test as one more update, unless it comes without a training.
            lines[30 if kind == "test" else step, kind] = {
                name: value for name, value in row.items() if value and name != "epoch"
            }
    return lines


def assert_same_run(out: Path, reference: Path) -> None:
    """Whether a run that was interrupted came to what the uninterrupted one came to, to the last bit."""
    for name in (LAST, BEST):
        mine, theirs = checkpoint(out, name), checkpoint(reference, name)
        assert mine["global_step"] == theirs["global_step"]
        for part in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert same(mine[part], theirs[part]), f"{part} of {name}"
        assert same(mine["callbacks"]["RandomStates"], theirs["callbacks"]["RandomStates"])
    assert metrics_of(out) == metrics_of(reference)
    read = [json.loads((folder / "summary.json").read_text()) for folder in (out, reference)]
    for name in ("test_accuracy", "test_loss", "activation_rate", "best_update", "seed", "data"):
        assert read[0][name] == read[1][name], name
