from pathlib import Path

import pytest

from sma.tune.__main__ import main
from sma.tune.folder import load_sweep, start_sweep
from sma.tune.storage import Storage
from tests.test_tune.sweeps import done_trial, small_sweep, write_sweep


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--task", "listop"], "no shipped sweep 'listop_tiny'; did you mean 'listops_tiny'", id="task"),
        pytest.param(["--set", "training.updats=3"], "unknown field path 'training.updats'", id="set"),
        pytest.param(["--samples", "0"], "samples=0 must be at least 1", id="samples"),
        pytest.param(["--objectives", "quality,colour"], "'colour'", id="objectives"),
        pytest.param(["--grace", "5000"], "stopping.grace=5000 must be at most training.updates=1200", id="grace"),
        pytest.param(["--cpus", "4096"], "no machine has 4096 CPUs", id="cpus"),
        pytest.param(["--gpus", "4096"], "and 4096 GPUs for a trial", id="gpus"),
        pytest.param(["--concurrent", "4096"], "--concurrent 4096 trials", id="concurrent"),
        pytest.param(["--resume", "nowhere"], "there is no sweep in", id="resume-nothing"),
        pytest.param(["--resume", "nowhere", "--samples", "3"], "leave --samples out", id="resume-another"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_sweep_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_sweep(small_sweep(), Storage(tmp_path / "sweep"))
    assert main(["--space", str(write_sweep(tmp_path)), "--storage", str(tmp_path / "sweep")]) == 2
    assert "belongs to another sweep" in capsys.readouterr().err


def test_report_makes_the_results_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(tmp_path / "sweep")
    start_sweep(small_sweep(), storage)
    assert main(["report", storage.location]) == 2
    assert "has no records yet" in capsys.readouterr().err
    for record in (done_trial(0, 0.5, 0.6), done_trial(1, 0.6, 0.2)):
        record.save(storage)
    assert main(["report", storage.location]) == 0
    shown = capsys.readouterr().out
    assert "sparsest as good  accuracy 0.6000, rate 0.200: trial 1" in shown
    assert {"summary.json", "pareto.png", "trials.csv"} <= set(storage.names())


def test_a_sweep_that_is_done_is_only_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(tmp_path)
    start_sweep(small_sweep(samples=2), storage)
    for record in (done_trial(0, 0.5, 0.6), done_trial(1, 0.6, 0.2)):
        record.save(storage)
    assert main(["--resume", storage.location]) == 0
    assert "2 trials finished" in capsys.readouterr().out
    assert load_sweep(storage).samples == 2
