"""Grids of runs: selection, order, failed runs, and the contents of rows."""

import json
import signal

import pytest

from sma.errors import CheckpointError, SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY, write_text
from sma.recipes.studies.grid import ERROR, LOG, Run, run_grid
from sma.recipes.studies.variants import with_routers
from sma.routers import AlwaysRouterSpec, RandomRouterSpec
from sma.spec import dump_yaml
from sma.stats import count_macs
from tests.test_recipes import fake
from tests.test_recipes.tiny import tiny

pytestmark = pytest.mark.slow  # real trainings


def _random(seed):
    def make(rows):
        rates = [layer["attention"] for layer in rows[f"routed-{seed}"]["rates"]]
        return with_routers(tiny(seed=seed), [RandomRouterSpec(rate=rate) for rate in rates])

    return make


def _runs(seeds=(0, 1)):
    """Runs of two routers, and of one that needs the rates of the first, with two seeds."""
    runs = []
    for seed in seeds:
        runs.append(Run(f"routed-{seed}", "routed", seed, tiny(seed=seed)))
        runs.append(Run(f"always-{seed}", "always", seed, with_routers(tiny(seed=seed), AlwaysRouterSpec())))
        runs.append(Run(f"random-{seed}", "random", seed, _random(seed), needs=(f"routed-{seed}",)))
    return runs


def _grid(runs, out, data, **options):
    cache = options.pop("cache", out.parent / "cache")
    return run_grid(runs, out, data, cache=cache, trainer=options.pop("trainer", fake.train), **options)


def _break(out, name):
    (out / name).mkdir(parents=True, exist_ok=True)
    (out / name / fake.BROKEN).touch()


def _count(runs, out):
    return {run.name: fake.trainings(out / run.name) for run in runs}


def test_rows_hold_the_measurements_of_the_runs(data, tmp_path):
    runs = _runs()
    results = _grid(runs, tmp_path, data)
    assert [row["name"] for row in results.rows] == [run.name for run in runs]
    length = max(1, round(float(sum(data.test.lengths)) / len(data.test)))
    for run, row in zip(runs, results.rows, strict=True):
        spec = load_experiment(tmp_path / run.name / EXPERIMENT)
        own = json.loads((tmp_path / run.name / SUMMARY).read_text())
        assert row == {
            "name": run.name,
            "variant": run.variant,
            "seed": run.seed,
            "accuracy": own["test_accuracy"],
            "activation_rate": sum(own["activation_rate"]) / 2,
            "rates": own["activation_rates"],
            "macs_per_token": count_macs(spec.model, length, own["activation_rates"]).per_token,
            **{key: own[key] for key in ("tokens_per_second", "seconds", "parameters", "updates")},
        }
    assert results.facts == {
        "task": "listops",
        "chance": 0.1,
        "majority": 0.2,
        "data": {"train": "a hash"},
        "updates": 30,
        "commit": "c",
        "hardware": "a GPU",
        "date": "d",
        "test_samples": len(data.test),
        "length": length,
        "seeds": [0, 1],
        "metric": {"name": "accuracy", "mode": "max", "key": "test_accuracy", "percent": True},
    }


def test_parallel_runs_give_the_rows_of_sequential_runs(data, tmp_path):
    alone = _grid(_runs(), tmp_path / "alone", data)
    together = _grid(_runs(), tmp_path / "together", data, jobs=2)
    assert together == alone
    assert [run["name"] for run in together.failed] == []


def test_a_run_is_built_from_the_rows_that_it_needs(data, tmp_path):
    results = _grid(_runs(), tmp_path, data)
    rates = {row["name"]: row["rates"] for row in results.rows}
    assert (rates["random-0"], rates["random-1"]) == (rates["routed-0"], rates["routed-1"])


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_stops_only_those_that_need_it(data, tmp_path, jobs):
    out = tmp_path / "out"
    _break(out, "routed-0")
    results = _grid(_runs(), out, data, jobs=jobs)
    assert [row["name"] for row in results.rows] == ["always-0", "routed-1", "always-1", "random-1"]
    assert results.failures == ["routed-0", "random-0"]
    assert [run["error"] for run in results.failed] == [
        "RuntimeError: the power went out",
        "SpecError: the run needs the results of 'routed-0', which failed",
    ]
    assert results.failed[0] == {
        "name": "routed-0",
        "variant": "routed",
        "seed": 0,
        "error": (out / "routed-0" / ERROR).read_text(),
    }
    assert "Traceback (most recent call last)" in (out / "routed-0" / LOG).read_text()


def test_error_names_a_needed_run_that_was_not_trained(data, tmp_path):
    results = _grid(_runs(), tmp_path, data, only=["random-0", "always-1"])
    assert [row["name"] for row in results.rows] == ["always-1"]
    assert [(run["name"], run["error"]) for run in results.failed] == [
        (
            "random-0",
            "SpecError: the run needs the results of 'routed-0', which was not trained; train 'routed-0' too",
        )
    ]


def test_resuming_trains_only_the_missing_runs(data, tmp_path):
    runs = _runs()
    whole = _grid(runs, tmp_path / "whole", data)
    out = tmp_path / "out"
    _break(out, "routed-1")
    _grid(runs, out, data, only=["routed-0", "routed-1", "random-1"])
    assert _count(runs, out) == {**dict.fromkeys(_count(runs, out), 0), "routed-0": 1, "routed-1": 1}
    (out / "routed-1" / fake.BROKEN).unlink()
    results = _grid(runs, out, data)
    assert results._replace(tried=[]) == whole._replace(tried=[])
    assert results.tried == ["always-0", "random-0", "routed-1", "always-1", "random-1"]
    assert _count(runs, out) == {**dict.fromkeys(_count(runs, out), 1), "routed-1": 2}
    assert not (out / "routed-1" / ERROR).exists()
    _grid(runs, out, data)
    assert sum(_count(runs, out).values()) == 7


def test_finished_runs_are_listed_even_if_not_requested(data, tmp_path):
    _grid(_runs(), tmp_path, data, only=["routed-0"])
    results = _grid(_runs(), tmp_path, data, only=["always-1"])
    assert [row["name"] for row in results.rows] == ["routed-0", "always-1"]
    assert results.tried == ["always-1"]


def test_results_are_written_at_the_start_and_after_every_run(data, tmp_path):
    seen = []
    _break(tmp_path, "always-0")
    results = _grid(
        _runs((0,)), tmp_path, data, write=lambda results: seen.append((len(results.rows), len(results.failed)))
    )
    assert seen == [(0, 0), (1, 0), (1, 1), (2, 1)]
    assert (len(results.rows), len(results.failed)) == seen[-1]


def test_folder_of_another_experiment_is_refused_before_anything_is_trained(data, tmp_path):
    write_text(tmp_path / "always-1" / EXPERIMENT, dump_yaml(tiny(seed=1)))
    complaint = (
        r"always-1/experiment\.yaml' belongs to another experiment: model\.layers.* give another --out, or delete"
    )
    with pytest.raises(CheckpointError, match=complaint):
        _grid(_runs(), tmp_path, data)
    assert not (tmp_path / "routed-0").exists()


def test_folder_that_differs_from_the_experiment_built_from_rows_is_a_failure(data, tmp_path):
    write_text(tmp_path / "random-0" / EXPERIMENT, dump_yaml(tiny()))
    results = _grid(_runs(), tmp_path, data)
    assert results.failures == ["random-0"]
    assert "belongs to another experiment: model.layers" in results.failed[0]["error"]


def test_runs_of_several_tasks_are_refused(data, tmp_path):
    other = Run("other", "other", 0, tiny(task__data__train=121))
    with pytest.raises(SpecError, match=r"the run 'other' has the task .*train=121.* the runs of a grid must have one"):
        _grid([*_runs(), other], tmp_path, data)


def test_a_run_listed_before_the_one_that_it_needs_is_refused(data, tmp_path):
    with pytest.raises(SpecError, match="the run 'random-0' needs 'routed-0', which must precede it in the grid"):
        _grid(_runs((0,))[::-1], tmp_path, data)


def killed(spec, folder, data, **_):
    """Fake training that the system kills, as when memory runs out."""
    if spec.model.layer_specs[0].router.kind == "always":
        signal.raise_signal(signal.SIGKILL)
    fake.train(spec, folder, data, **_)


def test_a_killed_process_counts_as_a_failed_run(data, tmp_path):
    results = _grid(_runs((0,)), tmp_path / "out", data, jobs=2, trainer=killed)
    assert [row["name"] for row in results.rows] == ["routed-0", "random-0"]
    assert [(run["name"], run["error"]) for run in results.failed] == [("always-0", "ended by SIGKILL")]


def interrupted(*_, **__):
    """Fake training that ends with Ctrl-C."""
    raise KeyboardInterrupt


def test_an_interrupt_ends_the_grid(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _grid(_runs(), tmp_path, data, trainer=interrupted)
    assert not (tmp_path / "routed-0" / ERROR).exists()
