import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sma.errors import CheckpointError
from sma.recipes.tasks.contract import ClassificationTask, Metric
from sma.recipes.tasks.language.task import LanguageTask
from sma.tune.trial import HISTORY, TrialReporter, Unwritable, _check_writable
from tests.test_recipes.tiny import tiny


def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric, **measured: float) -> dict[str, float]:
    """The measures that a new reporter stores for an evaluation."""
    return evaluate_at_10(TrialReporter(tiny(), folder, metric, 8, 0.0), monkeypatch, **measured)


def evaluate_at_10(reporter: TrialReporter, monkeypatch: pytest.MonkeyPatch, **measured: float) -> dict[str, float]:
    """The last entry of the history of a reporter after an evaluation at update 10."""
    monkeypatch.setattr(reporter, "report", lambda status, metrics: None)
    rates = {f"val_rate/layer{layer}/attention": 0.5 for layer in range(2)}
    metrics = {name: torch.tensor(value) for name, value in ({"val_rate": 0.5} | rates | measured).items()}
    trainer: Any = SimpleNamespace(callback_metrics=metrics, global_step=10, callbacks=[])
    reporter.on_validation_end(trainer, torch.nn.Identity())  # type: ignore[arg-type]
    return reporter.history[-1]


def test_a_missing_measure_is_omitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "loss" not in evaluated(tmp_path, monkeypatch, LanguageTask.metric, val_bits_per_character=2.0)
    assert evaluated(tmp_path, monkeypatch, ClassificationTask.metric, val_accuracy=0.5, val_loss=0.75)["loss"] == 0.75


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_a_non_finite_measure_fails_the_trial(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"val_accuracy": 0.5, "val_loss": 0.5, f"val_{name}": float("nan")}
    with pytest.raises(FloatingPointError, match=f"the {name} at update 10 is nan"):
        evaluated(tmp_path, monkeypatch, ClassificationTask.metric, **measured)


def test_a_full_disk_stops_the_sweep_and_not_the_trial(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "last.ckpt")
    for error in (full, chained(CheckpointError("cannot write"), full)):
        with pytest.raises(Unwritable, match=r"cannot write: .*No space left on device.*; make room.*--resume"):
            _check_writable(error)
    _check_writable(chained(ValueError("of the trial's own"), FileNotFoundError(errno.ENOENT, "no such file")))


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_the_history_of_an_earlier_version_gets_the_present_names(tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text('[{"update": 3, "operations_per_token": 2.5}]')
    reporter = TrialReporter(tiny(), tmp_path, ClassificationTask.metric, 8, 0.0)
    reporter.restore()
    assert reporter.history == [{"update": 3, "macs_per_token": 2.5}]


@pytest.mark.parametrize("content", ["{", "[1]", '[{"rate": 1}]', '[{"update": null}]', '{"update": 1}'])
def test_the_error_names_a_damaged_history(content: str, tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_text(content)
    with pytest.raises(CheckpointError, match=r"history.json' (cannot be read|is damaged)"):
        TrialReporter(tiny(), tmp_path, ClassificationTask.metric, 8, 0.0).restore()


def test_a_restarted_trial_keeps_each_evaluation_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [{"update": update, "accuracy": 0.25} for update in (5, 10, 15)]
    (tmp_path / HISTORY).write_text(json.dumps(before))
    reporter = TrialReporter(tiny(), tmp_path, ClassificationTask.metric, 8, 0.0)
    reporter.restore()
    reported = evaluate_at_10(reporter, monkeypatch, val_accuracy=0.5)
    assert [entry["update"] for entry in reporter.history] == [5, 10]
    assert reporter.history[-1] == reported
    assert reported["accuracy"] == 0.5
    assert json.loads((tmp_path / HISTORY).read_text()) == reporter.history
