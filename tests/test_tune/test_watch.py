import io

import pytest
from rich.console import Console

from sma.tune.records import TrialRecord
from sma.tune.watch import FRAME, describe_values, trial_table
from tests.test_tune.sweeps import done_trial, small_sweep

WINDOW, TARGET, TEMPERATURE = (
    "layers.layer.modules.attention.window",
    "training.budget.target",
    "layers.layer.router.temperature_scale",
)
RATE = "training.learning_rate"
VALUES = {TEMPERATURE: 0.12345678, WINDOW: 64, TARGET: 0.12345678, RATE: 0.0012345678}


def lines(records: list[TrialRecord], height: int = 24, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(trial_table(records, small_sweep(samples=60), height - FRAME))
    return str(console.file.getvalue()).rstrip().splitlines()  # type: ignore[attr-defined]


def first_words(found: list[str]) -> list[str]:
    return [line.split()[0] for line in found[3:]]


@pytest.mark.parametrize("count", [1, 19, 20, 21, 60])
def test_the_table_fits_the_terminal(count: int) -> None:
    records = [
        done_trial(number, 0.5, 0.2, status="finished" if number < count - 4 else "running", **VALUES)
        for number in range(count)
    ]
    found = lines(records)
    assert len(found) < 24
    assert max(map(len, found)) <= 80
    assert all(
        " 30 " in line and "temperature_scale=" in line and "window=64" in line
        for line in found[3 : 3 + min(count, 19)]
    )


def test_running_trials_come_first_then_the_best_then_the_latest() -> None:
    records = [done_trial(number, 0.01 * number if number != 7 else 0.9, 0.2, **VALUES) for number in range(40)]
    for record in records:
        record.busy = {f"{100 + record.number}.000 7": 1.0}
    records[30].status = records[3].status = "running"
    records[39].status = "failed"
    found = lines(records, height=12)
    assert first_words(found) == ["3", "30", "7", "38", "37", "39", "36", "…"]
    assert found[-1].split()[1:] == ["33", "more"]
    assert "60 trials of 30 updates: 2 running, 37 finished, 1 failed" in found[0]


def test_values_are_named_by_the_shortest_unique_end_of_their_paths() -> None:
    record = TrialRecord(1, {WINDOW: 8, "layers.layer.modules.other.window": None, TARGET: 0.25}, 0)
    assert describe_values(record) == "attention.window=8, other.window=None, target=0.25"
    assert describe_values(TrialRecord(0, {}, 0)) == "the unchanged experiment"
