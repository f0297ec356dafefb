"""A sweep whose trials take a second each, and helpers that read its results."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from sma.recipes.tasks.contract import Samples, TaskData
from sma.recipes.tasks.language.corpus import Corpus
from sma.spec import dump_spec
from sma.tune.records import TrialRecord
from sma.tune.sweep import SweepSpec, make_sweep
from tests.test_recipes.tiny import tiny

SPACE: dict[str, Any] = {
    "layers.layer.router.temperature_scale": {"kind": "loguniform", "low": 0.1, "high": 1.0},
    "layers.layer.modules.attention.window": {"kind": "choice", "values": [4, 8, None]},
    "training.budget.target": {"kind": "uniform", "low": 0.05, "high": 0.5},
    "training.learning_rate": {"kind": "loguniform", "low": 0.002, "high": 0.01},
}


def small_sweep(settings: dict[str, Any] | None = None, **fields: Any) -> SweepSpec:
    """A sweep of the tiny experiment; `settings` by field path."""
    return make_sweep({"experiment": tiny(threads=1), "space": SPACE, **fields, "settings": settings or {}})


def write_sweep(folder: Path, settings: dict[str, Any] | None = None) -> Path:
    """Write the small sweep and its experiment as files; returns the path of the sweep."""
    (folder / "experiment.yaml").write_text(yaml.safe_dump(dump_spec(tiny(threads=1))))
    path = folder / "space.yaml"
    path.write_text(
        yaml.safe_dump({"experiment": str(folder / "experiment.yaml"), "settings": settings or {}, "space": SPACE})
    )
    return path


def done_trial(
    number: int, accuracy: float, rate: float, *, status: str = "finished", updates: int = 30, **values: Any
) -> TrialRecord:
    """The record of a trial that a driver has written."""
    metrics = {
        "update": updates,
        "accuracy": accuracy,
        "rate": rate,
        "microseconds_per_token": 10.0 + number,
        "macs_per_token": 1e3 * rate,
    }
    history = [{**metrics, "update": update} for update in range(10, updates + 1, 10)]
    test = {"test_accuracy": accuracy - 0.01} if status == "finished" else {}
    record = TrialRecord(number, values, 0, status=status, metrics={**metrics, **test}, history=history)  # type: ignore[arg-type]
    record.busy = {"100.000 7": 12.0}
    return record


@dataclass
class Few:
    """The first samples of a split."""

    samples: Samples
    count: int

    @property
    def lengths(self) -> Tensor:
        return self.samples.lengths[: self.count]

    def __len__(self) -> int:
        return min(self.count, len(self.samples))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.samples[index]


def few(data: TaskData | Corpus) -> TaskData | Corpus:
    """The data of a task with few samples per split."""
    if isinstance(data, Corpus):
        return data._replace(validation=data.validation[:600], test=data.test[:600])
    return data._replace(train=Few(data.train, 64), validation=Few(data.validation, 8), test=Few(data.test, 8))


def wait_for(found: Callable[[], Any], seconds: float, what: str) -> Any:
    """Call `found` until it returns a true value; returns this value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen in {seconds} s")
