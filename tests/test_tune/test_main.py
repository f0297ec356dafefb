from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sma.__main__ import main as sma_main
from sma.tune.__main__ import Options, _claimed, _sweep, main
from sma.tune.records import TrialRecord
from sma.tune.storage import Storage
from sma.tune.sweep_folder import load_sweep, start_sweep
from tests.test_tune.sweeps import done_trial, small_sweep, write_sweep


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--task", "listop"], "unknown task 'listop'; did you mean 'listops'? tasks: digits", id="task"),
        pytest.param(["--set", "training.updats=3"], "unknown field path 'training.updats'", id="set"),
        pytest.param(["--samples", "0"], "samples=0 must be at least 1", id="samples"),
        pytest.param(["--objectives", "quality,colour"], "'colour'", id="objectives"),
        pytest.param(["--grace", "5000"], "stopping.grace=5000 must be at most training.updates=1200", id="grace"),
        pytest.param(["--cpus", "4096"], "no machine has 4096 CPUs", id="cpus"),
        pytest.param(["--gpus", "4096"], "and 4096 GPUs for a trial", id="gpus"),
        pytest.param(
            ["--accelerator", "cpu", "--gpus", "1"], "accelerator=cpu uses no GPU, and gpus=1", id="cpu-with-gpu"
        ),
        pytest.param(
            ["--set", "training.learning_rate=0.1"], "the sweep searches 'training.learning_rate'", id="set-searched"
        ),
        pytest.param(
            ["repor", "x"], "unknown command 'repor'; did you mean 'report'? commands: report, train", id="command"
        ),
        pytest.param(
            ["--workers", "2", "--task", "listop"], "unknown task 'listop'; did you mean 'listops'?", id="workers"
        ),
        pytest.param(
            ["--task=listop", "--workers=2"], "unknown task 'listop'; did you mean 'listops'?", id="workers-last"
        ),
        pytest.param(["--concurrent", "4096"], "--concurrent 4096 trials", id="concurrent"),
        pytest.param(
            ["--task", "digits", "--preset", "paper"],
            "the task 'digits' has no sweep 'paper'; its only sweep is 'tiny'",
            id="no-paper",
        ),
        pytest.param(
            ["--space", "x.yaml", "--task", "digits"],
            "--space replaces the shipped sweep; leave --task out",
            id="space",
        ),
        pytest.param(
            ["--no-stop", "--grace", "3", "--reduction", "2"],
            "--no-stop trains every trial to its end; leave --grace, --reduction out",
            id="no-stop",
        ),
        pytest.param(
            ["--workers", "2", "--spec", "x.yaml", "--preset", "tiny"],
            "--spec has its own task and training; leave --preset out",
            id="workers-spec",
        ),
        pytest.param(
            ["--workers", "2", "--resume", "x", "--out", "y"],
            "--resume continues the experiment as it was; leave --out out, or start a new run",
            id="workers-resume",
        ),
        pytest.param(["--sampels", "3"], "--sampels: unknown option; did you mean --samples?", id="option"),
        pytest.param(["--resume", "nowhere"], "there is no sweep in", id="resume-nothing"),
        pytest.param(["--resume", "nowhere", "--samples", "3"], "leave --samples out", id="resume-another"),
        *(
            pytest.param(["train", "--accelerator", "cpu", *arguments], message, id=f"train-{name}")
            for name, arguments, message in (
                ("set", ["--set", "training.updats=3"], "unknown field path 'training.updats'"),
                ("no-workers", ["--workers", "0"], "--workers='0'"),
                ("batch", ["--workers", "7"], "cannot be shared evenly by 7 workers"),
                (
                    "workers",
                    ["--workers", "4096", "--set", "training.batch_size=4096"],
                    "4096 workers of 1 CPUs do not fit; there is room for",
                ),
                ("cpus", ["--cpus", "4096"], "no machine has 4096 CPUs and 0 GPUs for a worker"),
                (
                    "language",
                    ["--task", "language", "--workers", "3"],
                    "a batch of 4 samples cannot be shared evenly by 3 workers",
                ),
                ("resume-nothing", ["--resume", "nowhere"], "there is no run in"),
                ("resume-another", ["--resume", "nowhere", "--seed", "3"], "leave --seed out"),
            )
        ),
    ],
)
def test_wrong_arguments_are_refused_with_an_error_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_sweep(small_sweep(), Storage(tmp_path / "sweep"))
    assert main(["--space", str(write_sweep(tmp_path)), "--storage", str(tmp_path / "sweep")]) == 2
    assert "belongs to another sweep" in capsys.readouterr().err


def test_report_writes_the_results_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(tmp_path / "sweep")
    start_sweep(small_sweep(), storage)
    assert main(["report", storage.location]) == 2
    assert "has no records yet" in capsys.readouterr().err
    for record in (done_trial(0, 0.5, 0.6), done_trial(1, 0.6, 0.2)):
        record.save(storage)
    assert main(["report", storage.location]) == 0
    shown = capsys.readouterr().out
    assert "sparsest as good  accuracy 0.6000, rate 0.200: trial 1" in shown
    front = "Pareto front      1 of 2 finished trials\n  trial 1         accuracy 0.6000, rate 0.200\n"
    assert f"{front}train one         sma train --spec {tmp_path}/sweep/best/trial_0001.yaml\n" in shown
    assert (tmp_path / "sweep" / "best" / "trial_0001.yaml").is_file()
    assert {"summary.json", "pareto.png", "trials.csv"} <= set(storage.names())
    assert sma_main(["report", storage.location]) == 0
    assert capsys.readouterr().out == shown
    assert sma_main(["report", storage.location, "--data", "x"]) == 2
    complaint = "the report of a sweep uses the records of its trials only; leave --data out"
    assert capsys.readouterr().err == f"error: {complaint}\n"


def test_a_sweep_without_a_successful_trial_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(tmp_path)
    start_sweep(small_sweep(samples=3), storage)
    for number, reason in enumerate(("no GPU", "out of memory", "no GPU")):
        TrialRecord(number, {}, 0, status="failed", reason=reason).save(storage)
    assert main(["--resume", storage.location]) == 2
    shown = capsys.readouterr()
    assert "trials 0, 2 failed: no GPU\n  trial 1 failed: out of memory" in shown.out
    assert "error: all trials failed, for the reasons above; correct the cause" in shown.err
    assert main(["report", storage.location]) == 0


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        pytest.param([], "", id="plain"),
        pytest.param(
            ["--cpus=2", "--gpus=0", "--concurrent=1", "--accelerator=cpu", "--no-progress", "--data", "my data"],
            " --accelerator cpu --concurrent 1 --cpus 2 --data 'my data' --gpus 0.0 --no-progress",
            id="options",
        ),
    ],
)
def test_after_control_c_the_command_that_resumes_is_shown_once(
    given: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sma.tune.driver.run_sweep", interrupt)
    monkeypatch.setattr("sma.tune.cluster.local_node", lambda: {"CPU": 4.0, "GPU": 0.0})
    assert main(["--space", str(write_sweep(tmp_path)), "--storage", str(tmp_path / "s"), *given]) == 130
    assert capsys.readouterr().err == f"interrupted; resume with: python -m sma.tune --resume {tmp_path / 's'}{hint}\n"
    monkeypatch.setattr("sma.tune.parallel.train_parallel", interrupt)
    words = ["--workers", "4", "--task", "listops", "--out", str(tmp_path / "t"), "--accelerator", "cpu"]
    assert main(words) == 130
    expected = (
        f"interrupted; resume with: python -m sma.tune train --resume {tmp_path / 't'} --accelerator cpu --workers 4\n"
    )
    assert capsys.readouterr().err == expected


def test_settings_of_all_trials_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sma.tune.driver.run_sweep", lambda *arguments, **options: {"trials": 1, "failed": 0})
    monkeypatch.setattr("sma.tune.__main__._print_results", lambda *arguments: None)
    space = write_sweep(tmp_path, {"training.updates": 20})
    assert (
        main(["--space", str(space), "--set", "training.warmup=2", "--seed=3", "--storage", str(tmp_path / "s")]) == 0
    )
    assert "in all trials: training.updates=20, training.warmup=2, seed=3" in capsys.readouterr().out
    fixed = ["--set", "training.budget.hold=5", "--set", "training.budget.anneal=10"]
    assert main(["--spec", str(tmp_path / "experiment.yaml"), *fixed, "--storage", str(tmp_path / "t")]) == 0
    assert (
        "in all trials: training.budget.hold=5, training.budget.anneal=10\n16 trials of 30 updates"
        in capsys.readouterr().out
    )


def test_resuming_a_finished_sweep_only_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(tmp_path)
    start_sweep(small_sweep(samples=2), storage)
    for record in (done_trial(0, 0.5, 0.6), done_trial(1, 0.6, 0.2)):
        record.save(storage)
    assert main(["--resume", storage.location]) == 0
    assert "2 trials finished" in capsys.readouterr().out
    assert load_sweep(storage).samples == 2


def test_sweeps_started_in_the_same_second_get_different_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sma.tune.__main__.datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, 5)))
    with _claimed(Options()) as one, _claimed(Options()) as other:
        start_sweep(small_sweep(), one)
        start_sweep(small_sweep(), other)
    assert [Path(storage.location).name for storage in (one, other)] == [
        "sweep-listops-tiny-20260102-030405",
        "sweep-listops-tiny-20260102-030405-2",
    ]


def test_one_option_of_stopping_keeps_the_other(tmp_path: Path) -> None:
    path = write_sweep(tmp_path)
    path.write_text(path.read_text() + "stopping: {grace: 9, reduction: 4}\n")
    stopping = _sweep(Options(space=path, grace=5)).stopping
    assert stopping is not None
    assert (stopping.grace, stopping.reduction) == (5, 4)
