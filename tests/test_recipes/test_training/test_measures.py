"""Measures of updates: the average of a split, and losses that the host checks later."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import DataError
from sma.recipes.io.run_folder import LAST
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.classification import Classifier
from sma.recipes.training.measures import Average, UnseenLosses
from sma.recipes.training.module import TrainingModule
from tests.test_recipes.tiny import checkpoint, same, tiny, train


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_average_is_the_sum_over_the_count(dtype: torch.dtype) -> None:
    metric = Average(dtype)
    assert metric.compute() == 0
    metric.reset()
    for total, count in ((3, 4), (0, 0), (2, 5)):
        metric.update(torch.tensor(total), torch.tensor(count))
    assert float(metric.compute()) == pytest.approx(5 / 9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_first_non_finite_loss_is_found_and_all_are_cleared(bad: float) -> None:
    losses, shared = UnseenLosses(), torch.tensor(1.0)
    for update, value in enumerate((0.5, 2.0, bad, 1.0, float("nan"))):
        losses.add(update, shared.fill_(value))  # a tensor that the next update overwrites
    found = losses.first_bad()
    assert found is not None
    assert found[0] == 2
    assert found[1] == pytest.approx(bad, nan_ok=True)
    assert losses.first_bad() is None


def _as_on_an_accelerator(module: TrainingModule, loss: Tensor) -> None:
    module.unseen_losses.add(module.global_step, loss)


def _diverging(patch: pytest.MonkeyPatch, update: int) -> None:
    """Make the loss, and hence all weights, NaN from an update on."""
    original = Classifier.compute

    def compute(self: Classifier, batch: Any, capacity: Any) -> Any:
        loss, measures = original(self, batch, capacity)
        bad = torch.nan if self.global_step >= update else 1.0
        return loss * bad, measures._replace(loss=measures.loss * bad)

    patch.setattr(Classifier, "compute", compute)


@pytest.mark.parametrize("update", [0, 3, 9, 12, 29])
def test_diverged_weights_are_never_written(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    monkeypatch.setattr(TrainingModule, "check_loss", _as_on_an_accelerator)
    _diverging(monkeypatch, update)
    with pytest.raises(DataError, match=f"the loss of update {update} is nan; the last checkpoint is still good"):
        train(tiny(), tmp_path, data)
    saved = update - update % 10
    assert (tmp_path / LAST).exists() == (saved > 0)
    if saved:
        assert checkpoint(tmp_path)["global_step"] == saved
        assert all(value.isfinite().all() for value in checkpoint(tmp_path)["state_dict"].values())


def test_a_signal_saves_no_diverged_weights(data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingModule, "check_loss", _as_on_an_accelerator)
    _diverging(monkeypatch, 12)
    original = TrainingModule.on_before_batch_transfer

    def transfer(self: TrainingModule, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training and self.global_step == 14:
            self.trainer.save_checkpoint(tmp_path / LAST)  # as after a signal
        return original(self, batch, dataloader_idx)

    monkeypatch.setattr(TrainingModule, "on_before_batch_transfer", transfer)
    with pytest.raises(DataError, match="the loss of update 12 is nan"):
        train(tiny(), tmp_path, data)
    assert checkpoint(tmp_path)["global_step"] == 10


def test_delayed_loss_checks_do_not_change_the_run(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(), tmp_path / "at once", data)
    monkeypatch.setattr(TrainingModule, "check_loss", _as_on_an_accelerator)
    train(tiny(), tmp_path / "later", data)
    first, second = (checkpoint(tmp_path / name) for name in ("at once", "later"))
    assert all(same(first[part], second[part]) for part in ("state_dict", "optimizer_states", "fit_scores"))
