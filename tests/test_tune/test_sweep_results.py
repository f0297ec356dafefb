import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sma.errors import CheckpointError
from sma.recipes.experiment import load_experiment
from sma.tune.cluster import Slots
from sma.tune.records import TrialRecord
from sma.tune.storage import Storage
from sma.tune.sweep_folder import add_driver, load_drivers, start_sweep
from sma.tune.sweep_results import best_trial, front_table, pareto_front, sparsest_as_good, write_results
from tests.test_tune.sweeps import done_trial, small_sweep

pytestmark = pytest.mark.slow  # real trainings

WINDOW, TARGET = "layers.layer.modules.attention.window", "training.budget.target"

TRIALS = [
    done_trial(0, 0.5, 0.6),
    done_trial(1, 0.55, 0.3, **{WINDOW: 4, TARGET: 0.3}),
    done_trial(2, 0.5, 0.2, **{WINDOW: None, TARGET: 0.2}),
    done_trial(3, 0.9, 0.01, status="stopped", updates=10, **{WINDOW: 8, TARGET: 0.1}),
    done_trial(4, 0.4, 0.1, **{WINDOW: 8, TARGET: 0.1}),
    done_trial(5, 0.45, 0.4, **{WINDOW: 8, TARGET: 0.4}),
    TrialRecord(6, {WINDOW: 4, TARGET: 0.25}, 0, status="failed", reason="out of memory: simulated"),
    TrialRecord(7, {WINDOW: 4, TARGET: 0.15}, 0),
]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(tmp_path / "sweep")
    start_sweep(small_sweep(samples=8), storage)
    for record in TRIALS:
        record.save(storage)
    storage.write_json("clock.json", {"1.0": 20.0, "100.0": 20.0})
    made = {"commit": "abc", "hardware": "a machine of then", "date": "2001-02-03"}
    storage.write_json("drivers.json", [{"concurrent": 1, **made}, {"concurrent": 2, "cpus": 1, "gpus": 0.0, **made}])
    return storage


def test_the_idle_share_counts_the_slots_of_every_driver(storage: Storage) -> None:
    storage.write_json("drivers.json", [{"concurrent": 1, "began": "1.0"}, {"concurrent": 4, "began": "100.0"}])
    assert write_results(small_sweep(samples=8), storage)["idle_share"] == pytest.approx(1 - 72 / (20 + 4 * 20))


def test_the_front_has_only_finished_trials() -> None:
    sweep = small_sweep()
    assert [record.number for record in pareto_front(TRIALS, sweep)] == [1, 2, 4]
    assert [record.number for record in pareto_front(TRIALS, sweep.replace(objectives=("rate",)))] == [4]
    assert [record.number for record in pareto_front(TRIALS, sweep.replace(objectives=("quality", "time")))] == [1, 0]


def test_the_sparsest_trial_as_good_as_trial_0_is_found() -> None:
    sweep = small_sweep()
    best, sparsest = best_trial(TRIALS, sweep), sparsest_as_good(TRIALS, sweep)
    assert best is not None
    assert sparsest is not None
    assert (best.number, sparsest.number) == (1, 2)
    assert sparsest_as_good([record for record in TRIALS if record.number in (0, 4, 5)], sweep) is None
    assert sparsest_as_good(TRIALS[1:], sweep) is None
    assert best_trial(TRIALS[6:], sweep) is None


def test_the_summary_has_the_counts_and_the_best_trials(storage: Storage) -> None:
    summary = write_results(small_sweep(samples=8), storage)
    assert json.loads(storage.read("summary.json") or b"") == summary
    counts = {name: summary[name] for name in ("trials", "samples", "finished", "stopped", "failed", "running")}
    assert counts == {"trials": 8, "samples": 8, "finished": 5, "stopped": 1, "failed": 1, "running": 1}
    assert summary["failures"] == [{"trial": 6, "reason": "out of memory: simulated"}]
    assert summary["baseline"]["values"][TARGET] is None
    assert summary["best"]["trial"] == 1
    assert summary["best"]["values"][WINDOW] == 4
    assert summary["sparsest_as_good_as_baseline"]["trial"] == 2
    assert summary["rate_ratio"] == pytest.approx(0.2 / 0.6, abs=1e-4)
    assert [point["trial"] for point in summary["pareto"]] == [1, 2, 4]
    assert (summary["busy_slot_seconds"], summary["slots"], summary["seconds"]) == (72.0, 2, 40.0)
    assert summary["idle_share"] == pytest.approx(1 - 72 / 80)
    # Those of the trainings, not of this report.
    assert (summary["commit"], summary["hardware"], summary["date"]) == ("abc", "a machine of then", "2001-02-03")


def test_csv_and_parquet_hold_the_same_trials(storage: Storage) -> None:
    write_results(small_sweep(samples=8), storage)
    rows = list(csv.DictReader(io.StringIO((storage.read("trials.csv") or b"").decode())))
    table = pq.read_table(f"{storage.location}/trials.parquet").to_pylist()
    assert [row["trial"] for row in rows] == [str(number) for number in range(8)]
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in table] == rows
    assert table[0][WINDOW] == 8
    assert table[0][TARGET] is None
    assert table[2][WINDOW] is None
    assert table[6]["reason"] == "out of memory: simulated"


def test_the_best_specs_load_as_experiments(storage: Storage) -> None:
    sweep = small_sweep(samples=8)
    summary = write_results(sweep, storage)
    assert storage.names("best") == ["trial_0001.yaml", "trial_0002.yaml", "trial_0004.yaml"]
    for point in summary["pareto"]:
        assert load_experiment(storage.address(point["spec"])) == sweep.trial(TRIALS[point["trial"]].values)


def test_results_depend_on_the_records_only(storage: Storage) -> None:
    sweep = small_sweep(samples=8)
    first = write_results(sweep, storage)
    for name in ("summary.json", "trials.csv", "trials.parquet", "pareto.md", "pareto.png"):
        assert storage.read(name)
        Path(storage.address(name)).unlink()
    storage.write("best/trial_0099.yaml", "of before")
    assert write_results(sweep, storage) == first
    assert (storage.read("pareto.png") or b"").startswith(b"\x89PNG")
    assert "trial_0099.yaml" not in storage.names("best")


def test_records_of_an_earlier_version_give_the_same_results(storage: Storage) -> None:
    sweep = small_sweep(samples=8, objectives=["quality", "macs"])
    expected = write_results(sweep, storage)
    for record in Path(storage.address("records")).iterdir():
        record.write_text(record.read_text().replace("macs_per_token", "operations_per_token"))
    assert write_results(sweep, storage) == expected


def test_a_failed_trial_with_invalid_values_does_not_affect_the_results_of_others(storage: Storage) -> None:
    wrong = TrialRecord(
        6, {WINDOW: 23.7, TARGET: 0.25}, 0, status="failed", reason="window=23.7: input should be a valid integer"
    )
    wrong.metrics = {**TRIALS[4].metrics}
    wrong.save(storage)
    summary = write_results(small_sweep(samples=8), storage)
    assert (summary["finished"], summary["failed"]) == (5, 1)
    row = list(csv.DictReader(io.StringIO((storage.read("trials.csv") or b"").decode())))[6]
    assert (row[WINDOW], row[TARGET], row["training.learning_rate"]) == ("23.7", "0.25", "0.003")


def test_every_driver_is_recorded_once(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert [add_driver(storage, Slots(concurrent=number, cpus=3, gpus=0.0)) for number in (1, 2)] == [0, 1]
    assert [driver["concurrent"] for driver in load_drivers(storage)] == [1, 2]
    assert {"commit", "hardware", "date"} <= load_drivers(storage)[0].keys()
    assert load_drivers(storage)[0]["hardware"].endswith(", 3 threads")


def test_the_table_has_trial_0_even_if_others_dominate_it() -> None:
    lines = front_table(TRIALS, small_sweep()).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["0 (not on the front)", "1", "2", "4"]
    assert lines[3].split("|")[2].strip() == "0.55"


@pytest.mark.parametrize("kept", [[6], [7], [3]], ids=["failed", "running", "stopped"])
def test_a_sweep_without_a_finished_trial_has_results(tmp_path: Path, kept: list[int]) -> None:
    storage = Storage(tmp_path)
    for number in kept:
        TRIALS[number].save(storage)
    summary = write_results(small_sweep(), storage)
    assert (summary["best"], summary["pareto"], summary["baseline"], summary["rate_ratio"]) == (None, [], None, None)


def test_a_sweep_without_records_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no records yet; resume it with: sma sweep --resume"):
        write_results(small_sweep(), Storage(tmp_path))


def test_of_equally_good_trials_the_sparsest_is_the_best() -> None:
    records = [done_trial(0, 0.7, 0.1), done_trial(1, 0.8, 0.5), done_trial(2, 0.8, 0.2), done_trial(3, 0.8, 0.4)]
    best = best_trial(records, small_sweep())
    assert best is not None
    assert best.number == 2
