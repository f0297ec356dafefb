from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sma.tune.trial import Reporter
from tests.test_recipes.tiny import tiny


def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch, quality: str, **measured: float) -> dict[str, float]:
    """What a reporter says of an evaluation."""
    reporter = Reporter(tiny(), folder, quality, 8, 0.0)
    monkeypatch.setattr(reporter, "report", lambda status, metrics: None)
    rates = {f"val_rate/layer{layer}/attention": 0.5 for layer in range(2)}
    metrics = {name: torch.tensor(value) for name, value in ({"val_rate": 0.5} | rates | measured).items()}
    trainer: Any = SimpleNamespace(callback_metrics=metrics, global_step=10, callbacks=[])
    reporter.on_validation_end(trainer, torch.nn.Identity())  # type: ignore[arg-type]
    return reporter.history[-1]


def test_a_measure_that_there_is_not_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "loss" not in evaluated(tmp_path, monkeypatch, "bits_per_character", val_bits_per_character=2.0)
    assert evaluated(tmp_path, monkeypatch, "accuracy", val_accuracy=0.5, val_loss=0.75)["loss"] == 0.75


@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_a_measure_that_is_no_number_fails_the_trial(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"val_accuracy": 0.5, "val_loss": 0.5, f"val_{name}": float("nan")}
    with pytest.raises(FloatingPointError, match=f"the {name} at update 10 is nan"):
        evaluated(tmp_path, monkeypatch, "accuracy", **measured)
