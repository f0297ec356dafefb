"""Sweeps in real Ray processes."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from sma.checkpoint import load
from sma.recipes.experiment import load_experiment
from sma.recipes.io.run_folder import EXPERIMENT, LAST, SUMMARY
from sma.tune.cluster import ResourceSpec
from sma.tune.driver import run_sweep
from sma.tune.records import TrialRecord, load_records
from sma.tune.search import Search
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec, make_sweep, read_sweep, shipped_sweeps
from sma.tune.sweep_folder import start_sweep
from sma.tune.trial import TrialReporter, train_trial
from tests.test_recipes.tiny import MODEL, checkpoint, same, tiny, tiny_data, train
from tests.test_tune.faulty import FaultySpec
from tests.test_tune.sweeps import few, small_sweep

pytestmark = pytest.mark.slow

FAULT = "layers.layer.modules.attention.fault"
SIZE = "layers.layer.modules.attention.hidden_size"


def run(
    sweep: SweepSpec, folder: Path | str, data_folder: Path, **resources: Any
) -> tuple[dict[str, Any], Storage, list[TrialRecord]]:
    """Run a sweep to its end; returns its summary, folder and records."""
    storage = Storage(folder)
    if not storage.names():
        start_sweep(sweep, storage)
    summary = run_sweep(
        sweep, storage, ResourceSpec(accelerator="cpu", **resources), data_folder=data_folder, progress=False
    )
    return summary, storage, load_records(storage)


@pytest.fixture(scope="module")
def finished(
    two_slots: None, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Storage, list[TrialRecord]]:
    return run(small_sweep(samples=4, stopping=None), tmp_path_factory.mktemp("sweep") / "s", data_folder)


def test_every_trial_is_trained_and_its_run_folder_is_stored(
    finished: tuple[dict[str, Any], Storage, list[TrialRecord]],
) -> None:
    summary, storage, records = finished
    assert (summary["finished"], summary["failed"], summary["slots"]) == (4, 0, 2)
    assert [record.number for record in records] == [0, 1, 2, 3]
    sweep = small_sweep(samples=4, stopping=None)
    for record in records:
        assert [entry["update"] for entry in record.history] == [10, 20, 30]
        assert record.seconds > 0
        folder = Path(storage.address(record.checkpoint or ""))
        assert load_experiment(folder / EXPERIMENT) == sweep.trial(record.values)
        assert load(folder / "model").spec == sweep.trial(record.values).model
        assert (folder / SUMMARY).is_file()


def test_trial_0_equals_the_training_by_the_recipe(
    finished: tuple[dict[str, Any], Storage, list[TrialRecord]], tmp_path: Path
) -> None:
    _, storage, records = finished
    own = train(tiny(threads=1), tmp_path / "run", tiny_data(tmp_path / "data"))
    kept = Path(storage.address(records[0].checkpoint or ""))
    assert same(checkpoint(kept, LAST)["state_dict"], checkpoint(tmp_path / "run", LAST)["state_dict"])
    assert records[0].metrics["test_accuracy"] == own.summary["test_accuracy"]


def test_failed_trials_are_recorded_and_the_sweep_continues(two_slots: None, data_folder: Path, tmp_path: Path) -> None:
    layer = {**MODEL["layers"]["layer"], "modules": {"attention": FaultySpec().model_dump()}}  # type: ignore[index]
    space = {FAULT: {"kind": "choice", "values": ["none", "crash", "memory", "nan", "exit"]}}
    sweep = small_sweep({"layers.layer": layer}, space=space, samples=6, stopping=None, restarts=1)
    start_sweep(sweep, Storage(tmp_path / "s"))
    # Unfinished trials of an earlier driver run first, with the values of their records.
    for number, fault in enumerate(("crash", "memory", "nan", "exit", "none"), start=1):
        TrialRecord(number, {FAULT: fault}, 0).save(Storage(tmp_path / "s"))
    summary, storage, records = run(sweep, tmp_path / "s", data_folder)
    # Trial 0 has no record and runs too.
    assert (summary["finished"], summary["failed"]) == (2, 4)
    reasons = {record.values[FAULT]: record.reason for record in records if record.status == "failed"}
    assert reasons["crash"] == "RuntimeError: broken on purpose"
    assert reasons["memory"].startswith("out of memory: tried to allocate 80 GiB; lower training.batch_size")
    assert reasons["nan"].startswith("the loss of update 15 is nan")
    assert reasons["exit"].startswith("its process died 2 times")
    assert [record.restarts for record in records if record.values.get(FAULT) == "exit"] == [1]
    assert [
        entry["update"] for entry in next(record for record in records if record.values.get(FAULT) == "nan").history
    ] == [10]
    assert storage.names("best") == ["trial_0000.yaml", "trial_0005.yaml"]


def test_low_ranked_trials_of_a_sweep_at_a_uri_are_stopped_early(
    two_slots: None, data_folder: Path, tmp_path: Path
) -> None:
    layer = {**MODEL["layers"]["layer"], "router": {"kind": "always"}}  # type: ignore[index]
    space = {SIZE: {"kind": "choice", "values": [4, 8, 16]}}
    # All tokens are active, so the MACs of each trial follow from its size. Trial 0 has size 8.
    sweep = small_sweep({"layers.layer": layer}, space=space, samples=3, objectives=("macs",), stopping={"grace": 10})
    folder = f"file://{tmp_path}/s"
    start_sweep(sweep, Storage(folder))
    for number, values in enumerate(({}, {SIZE: 16}, {SIZE: 4})):
        TrialRecord(number, values, 0).save(Storage(folder))
    summary, storage, records = run(sweep, folder, data_folder, concurrent=1)
    statuses = {
        record.values.get(SIZE, 8): (record.status, [entry["update"] for entry in record.history]) for record in records
    }
    assert statuses == {8: ("finished", [10, 20, 30]), 16: ("stopped", [10]), 4: ("finished", [10, 20, 30])}
    assert (summary["finished"], summary["failed"]) == (2, 0)
    assert {
        "best",
        "clock.json",
        "drivers.json",
        "pareto.md",
        "pareto.png",
        "records",
        "summary.json",
        "trials.csv",
    } <= {*storage.names()}
    for record in records:
        kept = tmp_path / "s" / (record.checkpoint or "")
        assert load_experiment(kept / EXPERIMENT) == sweep.trial(record.values)
        assert (kept / SUMMARY).is_file() is (record.status == "finished")
        if record.status == "finished":
            assert load(kept / "model").spec == sweep.trial(record.values).model


@pytest.mark.parametrize("name", shipped_sweeps())
def test_trials_of_every_shipped_sweep_train(
    name: str, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"training.updates": 4, "training.warmup": 1, "training.evaluate_every": 4}
    if name.startswith(("listops", "path")):  # these generate every sample
        settings |= {"task.data.train": 100, "task.data.validation": 10, "task.data.test": 10}
    fixed = [path for path, distribution in read_sweep(name)["space"].items() if distribution["kind"] == "fixed"]
    if load_experiment(name).training.budget is not None:
        fixed = ["training.budget.hold", "training.budget.anneal"]
    settings |= dict.fromkeys(fixed, 1)
    sweep = make_sweep(name, settings=[f"{path}={value}" for path, value in settings.items()], samples=2)
    data = few(sweep.experiment.task.prepare(data_folder, progress=False))
    # Trained in this process, because a Ray process takes longer to start than these trials to train.
    reports: list[tuple[str, dict[str, float], str]] = []
    monkeypatch.setattr(TrialReporter, "report", lambda self, *arguments: reports.append((*arguments, "")[:3]))
    search = Search(sweep, Storage(tmp_path / "s"))
    for number in range(2):
        config = search.suggest(str(number))
        assert config is not None
        assert config["number"] == number
        (tmp_path / str(number)).mkdir()
        train_trial(config, sweep, data, tmp_path / str(number), "cpu", time.time(), Callback(), "")  # type: ignore[arg-type]
    assert [(status, reason) for status, _, reason in reports] == [("running", ""), ("finished", "")] * 2
    for _, measured, _ in reports:
        assert {sweep.quality.name, "rate", "macs_per_token"} <= measured.keys()
        assert all(map(math.isfinite, measured.values()))


def test_trials_use_one_thread_and_their_time_fits_into_the_slots(
    finished: tuple[dict[str, Any], Storage, list[TrialRecord]],
) -> None:
    summary, _, records = finished
    assert torch.get_num_threads() == 1
    assert summary["busy_slot_seconds"] == pytest.approx(sum(record.seconds for record in records), abs=0.1)
    assert summary["busy_slot_seconds"] <= summary["slots"] * summary["seconds"]
