from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search import Searcher
from ray.tune.utils import flatten_dict

from sma.tune.records import TrialRecord
from sma.tune.search import Halving, Search
from sma.tune.space import random_trials, searched
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec
from tests.test_tune.sweeps import SPACE, done_trial, small_sweep

pytestmark = pytest.mark.slow  # real trainings

RATE, WINDOW = "training.learning_rate", "layers.layer.modules.attention.window"


def finish(search: Search, trial_id: str, accuracy: float, rate: float) -> None:
    search.on_trial_complete(trial_id, {"status": "finished", "metrics/accuracy": accuracy, "metrics/rate": rate})


def run(search: Search, count: int, start: int = 0) -> list[dict[str, Any]]:
    """Suggest trials, and finish each with an accuracy that depends on its values; returns their configurations."""
    suggested = []
    for place in range(start, start + count):
        config = search.suggest(f"t{place}")
        assert isinstance(config, dict)
        suggested.append(config)
        finish(search, f"t{place}", config["values"].get(RATE, 0.003), 0.5)
    return suggested


def test_trial_0_is_the_experiment_and_the_values_of_the_others_are_valid(tmp_path: Path) -> None:
    sweep = small_sweep(samples=12)
    search = Search(sweep, Storage(tmp_path))
    suggested = run(search, 12)
    assert suggested[0] == {"number": 0, "values": {}, "checkpoint": None, "pulse": "0"}
    assert [config["number"] for config in suggested] == list(range(12))
    for config in suggested[1:]:
        assert list(config["values"]) == searched(sweep.space)
        sweep.trial(config["values"])
    assert search.suggest("t12") == Searcher.FINISHED


def test_the_same_seed_draws_the_same_values(tmp_path: Path) -> None:
    found = [run(Search(small_sweep(samples=9, seed=seed), Storage(tmp_path)), 9) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0][1:] != found[2][1:]


@pytest.mark.parametrize("known", [True, False], ids=["in-the-space", "outside"])
def test_trial_0_is_added_to_the_study_if_the_space_contains_it(tmp_path: Path, known: bool) -> None:
    space = (
        {path: SPACE[path] for path in (RATE, WINDOW)}
        if known
        else {RATE: {"kind": "uniform", "low": 0.1, "high": 0.2}}
    )
    search = Search(small_sweep(space=space), Storage(tmp_path))
    run(search, 1)
    assert [trial.params for trial in search.study(1).trials] == ([{RATE: 0.003, WINDOW: 1}] if known else [])


def test_a_failed_trial_is_not_added_to_the_study(tmp_path: Path) -> None:
    search = Search(small_sweep(), Storage(tmp_path))
    for place, result in enumerate(
        [None, {"status": "failed", "metrics/accuracy": 0.9, "metrics/rate": 0.1}, {"metrics/accuracy": float("nan")}]
    ):
        run(search, 1, start=2 * place)
        search.suggest(f"t{2 * place + 1}")
        search.on_trial_complete(f"t{2 * place + 1}", result, error=result is None)
    # Trial 0 lies outside the space.
    assert [trial.state.name for trial in search.study(9).trials] == ["COMPLETE"] * 2


def test_a_new_driver_resumes_from_the_records(tmp_path: Path) -> None:
    sweep = small_sweep(samples=6)
    values = {
        "training.learning_rate": 0.005,
        WINDOW: None,
        "training.budget.target": 0.2,
        "layers.layer.router.temperature_scale": 0.5,
    }
    done = [
        done_trial(0, 0.5, 0.5),
        done_trial(1, 0.6, 0.4, **values),
        done_trial(3, 0.3, 0.4, status="stopped", updates=10, **values),
    ]
    left = done_trial(2, 0.4, 0.3, status="running", **values)
    left.checkpoint = "trials/driver-0/0002/checkpoint_000001"
    search = Search(sweep, Storage(tmp_path), [*done, left])
    assert [(trial.state.name, trial.values) for trial in search.study(4).trials] == [
        ("COMPLETE", [0.6, 0.4]),
        ("RUNNING", None),
        ("PRUNED", None),
    ]
    again = search.suggest("a")
    assert again == {
        "number": 2,
        "values": values,
        "checkpoint": f"{tmp_path}/trials/driver-0/0002/checkpoint_000001",
        "pulse": "2",
    }
    finish(search, "a", 0.7, 0.1)
    assert [config["number"] for config in run(search, 2)] == [4, 5]
    assert search.suggest("b") == Searcher.FINISHED


def simulate(
    sweep: SweepSpec, folder: Path, order: list[int], interrupted_at: int | None, slots: int = 2
) -> dict[int, dict[str, Any]]:
    """The values of all trials of a sweep with several slots, whose trials end in a given order of the slots.

    After `interrupted_at` trials have ended, a new driver resumes from the records.
    """
    search, records, running, values = Search(sweep, Storage(folder)), {}, {}, {}
    for end in range(2 * sweep.samples):
        if end == interrupted_at:
            search = Search(sweep, Storage(folder), [replace(record) for _, record in sorted(records.items())])
            running = {}
        while len(running) < slots and isinstance(
            config := search.suggest(f"{end}-{len(running)}-{len(values)}"), dict
        ):
            number = config["number"]
            assert values.setdefault(number, config["values"]) == config["values"]
            records.setdefault(number, TrialRecord(number, config["values"], 0))
            running[number] = next(name for name, known in search.numbers.items() if known == number)
        if not running:
            return values
        ended = sorted(running)[order[end % len(order)] % len(running)]
        record, found = records[ended], {"accuracy": values[ended].get(RATE, 0.003), "rate": 0.1 * (ended % 7)}
        record.status = "stopped" if ended % 5 == 4 else "failed" if ended % 7 == 6 else "finished"
        record.metrics = found
        reported = {"status": "running" if record.status == "stopped" else record.status}
        search.on_trial_complete(
            running.pop(ended), {**reported, **{f"metrics/{name}": value for name, value in found.items()}}
        )
    raise AssertionError("the sweep does not end")


SEARCHED = small_sweep(samples=14)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=14, max_size=14), st.integers(0, 13))
def test_an_interrupted_sweep_draws_the_values_of_an_uninterrupted_one(order: list[int], interrupted_at: int) -> None:
    folder = Path("nowhere")
    assert simulate(SEARCHED, folder, order, interrupted_at) == simulate(SEARCHED, folder, order, None)


def test_the_first_trials_depend_on_seed_and_number_alone() -> None:
    one, other = (simulate(SEARCHED, Path("nowhere"), [0], None, slots) for slots in (1, 3))
    # A third of the 14 trials, at least four.
    assert [one[number] == other[number] for number in range(4)] == [True] * 4
    assert any(one[number] != other[number] for number in range(5, 14))
    assert len({str(values) for values in one.values()}) == 14


def test_a_number_without_a_record_is_run(tmp_path: Path) -> None:
    trial = next(random_trials())
    values = {path: distribution.draw(trial, path) for path, distribution in small_sweep().space.items()}
    search = Search(
        small_sweep(samples=6),
        Storage(tmp_path),
        [done_trial(0, 0.5, 0.5), *(done_trial(n, 0.5, 0.5, **values) for n in (2, 3))],
    )
    assert [config["number"] for config in run(search, 3)] == [1, 4, 5]
    assert search.suggest("end") == Searcher.FINISHED


def test_stopped_trials_rank_below_finished_ones(tmp_path: Path) -> None:
    search = Search(small_sweep(samples=32), Storage(tmp_path))
    for place in range(31):
        config = search.suggest(f"t{place}")
        assert config is not None
        weak = place > 0 and config["values"][RATE] < 0.006
        found = {"metrics/accuracy": 0.99 if weak else 0.5, "metrics/rate": 0.01 if weak else 0.5}
        search.on_trial_complete(f"t{place}", {"status": "running" if weak else "finished", **found})
    study = search.study(31)
    assert {"COMPLETE", "PRUNED"} == {trial.state.name for trial in study.trials}
    assert all(trial.values == [0.5, 0.5] for trial in study.best_trials)
    late = study.trials[search.startup :]
    assert sum(trial.params[RATE] >= 0.006 for trial in late) > len(late) / 2


class FakeTrial(NamedTuple):
    """The attributes of a trial that halving uses."""

    trial_id: str
    config: dict[str, Any]


def decide(
    halving: Halving, number: int, update: int, accuracy: float, rate: float = 0.5, status: str = "running"
) -> str:
    trial = FakeTrial(f"t{number}", {"number": number})
    metrics = {"update": update, "accuracy": accuracy, "rate": rate}
    result = flatten_dict({"update": update, "metrics": metrics, "status": status})  # in the format of Ray
    return str(halving.on_trial_result(None, trial, result))  # type: ignore[arg-type]


def halving_sweep(**fields: Any) -> SweepSpec:
    return small_sweep({"training.updates": 40}, stopping={"grace": 10, "reduction": 2}, **fields)


def test_the_lower_half_is_stopped_at_equal_updates() -> None:
    halving = Halving(halving_sweep())
    assert [decide(halving, number, 5, 0.0) for number in (1, 2)] == ["CONTINUE", "CONTINUE"]
    assert [decide(halving, number, 10, accuracy) for number, accuracy in ((1, 0.5), (2, 0.4), (3, 0.6))] == [
        "CONTINUE",
        "STOP",
        "CONTINUE",
    ]
    assert decide(halving, 1, 20, 0.7) == "CONTINUE"
    assert decide(halving, 3, 20, 0.6) == "STOP"


def test_trial_0_is_never_stopped_and_is_ranked_with_the_others() -> None:
    halving = Halving(halving_sweep())
    assert decide(halving, 1, 10, 0.9) == "CONTINUE"
    assert decide(halving, 0, 10, 0.8) == "CONTINUE"
    assert decide(halving, 2, 10, 0.82) == "STOP"


def test_a_trial_is_not_stopped_after_its_last_update() -> None:
    halving = Halving(halving_sweep())
    assert [decide(halving, number, 40, 1 / (1 + number)) for number in (1, 2, 3)] == ["CONTINUE"] * 3
    assert decide(halving, 4, 10, 0.0, status="failed") == "CONTINUE"


def test_trials_on_the_pareto_front_continue() -> None:
    halving = Halving(halving_sweep())
    points = {1: (0.5, 0.5), 2: (0.3, 0.1), 3: (0.7, 0.9), 4: (0.4, 0.6), 5: (0.2, 0.2), 6: (0.6, 0.5)}
    decided = {number: decide(halving, number, 10, *point) for number, point in points.items()}
    assert [number for number, decision in decided.items() if decision == "STOP"] == [4, 5]
    quality = Halving(halving_sweep(objectives=("quality",)))
    decided = {number: decide(quality, number, 10, *point) for number, point in points.items()}
    assert [number for number, decision in decided.items() if decision == "STOP"] == [2, 4, 5]


def test_each_trial_enters_a_rung_once_with_its_first_measure() -> None:
    halving = Halving(halving_sweep(objectives=("quality",)))
    assert [decide(halving, 1, 20, 0.5), decide(halving, 1, 30, 0.1)] == ["CONTINUE"] * 2
    assert decide(halving, 2, 30, 0.3) == "STOP"


HALVED = halving_sweep()


@settings(max_examples=20)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_a_new_driver_stops_the_trials_that_the_old_one_would_stop(known: list[float], accuracy: float) -> None:
    sweep = HALVED
    old = Halving(sweep)
    kept = []
    for number, value in enumerate(known, start=1):
        status = "stopped" if decide(old, number, 10, value) == "STOP" else "finished"
        kept.append(done_trial(number, value, 0.5, status=status, updates=10))
    assert decide(Halving(sweep, kept), 9, 10, accuracy) == decide(old, 9, 10, accuracy)
