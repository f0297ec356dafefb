"""Training by several workers has the results of a single process, also if a worker is killed."""

import csv
import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sma.errors import SmaError, SpecError
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.claims import run_lock
from sma.recipes.io.run_folder import BEST, LAST, SUMMARY
from sma.recipes.training.classification import Classifier
from sma.recipes.training.language import LanguageModule
from sma.recipes.training.run import run_experiment
from sma.spec import dump_yaml
from sma.tune.__main__ import main
from sma.tune.parallel import RAY, Workers, train_parallel
from sma.tune.storage import Storage
from tests.test_recipes.test_training import test_language
from tests.test_recipes.tiny import MODEL, checkpoint, power_failure, same, tiny
from tests.test_tune.sweeps import wait_for
from tests.test_tune.test_killed import PATIENCE, alive, driver

# The tests take seconds on a free machine. On a busy one, each exchange of gradients waits until both workers have a
# core.
pytestmark = pytest.mark.timeout(1200)

GAU = test_language.MODEL["layers"]["layer"]["modules"]["attention"]  # type: ignore[index]
NO_DROPOUT = {"embedding_dropout": 0.0, "layers__layer__dropout": 0.0, "head__dropout": 0.0}
BUDGET = {"training__budget": "{target: 0.3, hold: 4, anneal: 8}"}
LONG = {"training__updates": 120, "training__evaluate_every": 20}


def language(data_folder: Path, **settings: Any) -> ExperimentSpec:
    """A tiny language model, also with dropout."""
    book = data_folder / "book.txt"
    book.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    changed = {"training__batch_size": 4, **settings}
    return test_language.experiment(book, *(f"{path.replace('__', '.')}={value}" for path, value in changed.items()))


def alone(spec: ExperimentSpec, out: Path, data_folder: Path, resume: bool = False) -> dict[str, Any]:
    """The summary of a run of a single process."""
    return run_experiment(
        spec, out, spec.task.prepare(data_folder, progress=False), accelerator="cpu", progress=False, resume=resume
    ).summary


def assert_equal_weights(ours: Path, theirs: Path, tolerance: float, name: str = LAST) -> None:
    """Assert that two runs have the same weights up to rounding."""
    left, right = (checkpoint(folder, name)["state_dict"] for folder in (ours, theirs))
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[key], rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


def assert_equal_checkpoints(ours: Path, theirs: Path, *parts: str) -> None:
    """Assert that parts of the checkpoints of two runs are equal bit for bit."""
    for name in (LAST, BEST):
        for part in parts:
            assert same(checkpoint(ours, name)[part], checkpoint(theirs, name)[part]), f"{part} of {name}"


def recorded(out: Path) -> dict[tuple[float, frozenset[str]], dict[str, float]]:
    """The logged metrics of a run, by update and names; a resumed part replaces those of earlier parts."""
    rows: dict[tuple[float, frozenset[str]], dict[str, float]] = {}
    for path in sorted((out / "metrics").glob("version_*/metrics.csv")):
        with path.open() as file:
            for line in csv.DictReader(file):
                row = {name: float(value) for name, value in line.items() if value}
                rows[row["step"], frozenset(row)] = row
    return rows


def train_with_2(
    spec: ExperimentSpec, out: Path | str, data_folder: Path, *, restarts: int = 3, on_line: Any = lambda line: None
) -> dict[str, Any]:
    workers = Workers(2, accelerator="cpu", restarts=restarts)
    return train_parallel(spec, Storage(out), workers, data_folder=data_folder, progress=False, on_line=on_line)


def files(folder: Path) -> set[str]:
    """The files of a run folder, without numbers in their names and without the figures of the command line."""
    found = {
        re.sub(r"events\.out.*", "events", str(path.relative_to(folder)))
        for path in folder.rglob("*")
        if path.is_file()
    }
    return found - {"activation.png", "confusion.png"}


class Killer:
    """Stores the lines of a training, and kills the second worker once, when the first has reported update 40.

    The checkpoint of this update is then complete.
    """

    def __init__(self, kill: bool = True) -> None:
        self.kill = kill
        self.process: int | None = None
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if (found := re.match(r"worker 2 of 2: process (\d+)", line)) and len(self.of("worker 2")) == 1:
            self.process = int(found[1])
        if self.kill and line.startswith("update 40 ") and self.process is not None:
            os.kill(self.process, signal.SIGKILL)
            self.process = None

    def of(self, start: str) -> list[str]:
        return [line for line in self.lines if line.startswith(start)]


@pytest.mark.slow
def test_two_workers_equal_one_process_with_the_same_batch(two_slots: None, data_folder: Path, tmp_path: Path) -> None:
    norms = ({"kind": "layer_norm", "place": "post"}, {"kind": "batch_norm", "place": "pre", "synchronized": True})
    spec = tiny(
        threads=1,
        precision="64-true",
        model__layers=different_layers(MODEL, *({"norm": norm, "dropout": 0.0} for norm in norms)),
        model__embedding_dropout=0.0,
        model__head__dropout=0.0,
        **BUDGET,
    )
    measures = ["test_accuracy", "test_loss", "per_class"]
    summary = assert_one_and_two_are_equal(spec, tmp_path / "two", data_folder, tmp_path, measures)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert json.loads((tmp_path / "two" / SUMMARY).read_text()) == summary


def different_layers(model: dict[str, Any], *changes: dict[str, Any]) -> str:
    """One layer per change, from a model with a repeated layer, as JSON."""
    return json.dumps([{**model["layers"]["layer"], **change} for change in changes])


def assert_one_and_two_are_equal(
    spec: ExperimentSpec, out: Path | str, data_folder: Path, tmp_path: Path, measures: list[str], **options: Any
) -> dict[str, Any]:
    """Assert that two workers, which write `tmp_path / "two"`, equal one process; returns their summary."""
    ours, theirs = train_with_2(spec, out, data_folder, **options), alone(spec, tmp_path / "one", data_folder)
    for name in (LAST, BEST):
        assert_equal_weights(tmp_path / "two", tmp_path / "one", 1e-10, name)
    assert ours["data"] == theirs["data"]
    for key in (*measures, "activation_rate", "best_update"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("killed", [pytest.param(True, id="carried-killed-uri"), pytest.param(False, id="afresh")])
def test_two_workers_with_a_language_model_equal_one_process(
    killed: bool, two_slots: None, data_folder: Path, tmp_path: Path
) -> None:
    """Also with a state carried from segment to segment, and after a worker was killed and replaced."""
    windows = [{"modules": {"attention": {**GAU, "window": window}}, "dropout": 0.0} for window in (8, None)]
    settings = LONG if killed else {"task__carry_state": "false", "task__context": 10}
    layers = different_layers(test_language.MODEL, *windows)
    spec = language(data_folder, threads=1, precision="64-true", model__layers=layers, **BUDGET, **settings)
    killer, two = Killer(kill=killed), tmp_path / "two"
    two.mkdir()
    out = f"file://{two}" if killed else two
    measures = ["bits_per_character", "marks", "bytes"]
    assert_one_and_two_are_equal(spec, out, data_folder, tmp_path, measures, on_line=killer)
    assert (len(killer.of("worker 2")), len(killer.of("resuming"))) == ((2, 1) if killed else (1, 0)), killer.lines
    assert re.search(r"update (\d+) of \1: bits per character \d\.\d{4}, rate", "\n".join(killer.lines))
    carried = [checkpoint(tmp_path / folder)["carried"] or {} for folder in ("two", "one")]
    assert bool(carried[0]) is killed
    torch.testing.assert_close(*carried, rtol=0, atol=1e-10)
    logs = [recorded(tmp_path / folder) for folder in ("two", "one")]
    assert "val_bits_per_character" in {name for row in logs[0].values() for name in row}
    assert logs[0].keys() == logs[1].keys()
    for key, ours in logs[0].items():
        assert ours == pytest.approx(logs[1][key], rel=1e-5), key


@pytest.fixture(scope="module")
def uninterrupted(two_slots: None, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers with dropout everywhere."""
    out = tmp_path_factory.mktemp("run") / "out"
    train_with_2(tiny(threads=1, **LONG), out, data_folder)
    return out


@pytest.mark.slow
def test_a_run_with_a_killed_worker_equals_the_uninterrupted_run(
    uninterrupted: Path, data_folder: Path, tmp_path: Path
) -> None:
    killer, out = Killer(), tmp_path / "out"
    train_with_2(tiny(threads=1, **LONG), out, data_folder, on_line=killer)
    assert (len(killer.of("worker 2")), len(killer.of("resuming"))) == (2, 1), killer.lines
    assert_equal_checkpoints(out, uninterrupted, "state_dict", "optimizer_states", "global_step")
    assert not (out / RAY).exists()
    assert {*files(uninterrupted)} <= files(out)


@pytest.mark.slow
def test_a_run_resumed_after_its_driver_was_killed_equals_the_uninterrupted_run(
    uninterrupted: Path, data_folder: Path, tmp_path: Path
) -> None:
    out, log, spec = tmp_path / "out", tmp_path / "log", tmp_path / "experiment.yaml"
    spec.write_text(dump_yaml(tiny(threads=1, **LONG)))
    common = ["--workers=2", f"--data={data_folder}"]
    with driver("train", f"--spec={spec}", f"--out={out}", *common, log=log) as process:
        wait_for(lambda: "update 40 " in log.read_text(), PATIENCE, "an evaluation")
        process.kill()
        process.wait()
    workers = [int(found) for found in re.findall(r"worker \d of 2: process (\d+)", log.read_text())]
    assert len(workers) == 2
    wait_for(lambda: not any(map(alive, workers)), 200, "the end of the workers")
    assert not (out / SUMMARY).exists()
    with driver("train", f"--resume={out}", *common, log=log) as process:
        assert process.wait(PATIENCE) == 0, log.read_text()
    assert log.read_text().count("resuming from the last checkpoint") == 1
    assert_equal_checkpoints(out, uninterrupted, "state_dict")
    assert not (out / RAY).exists()
    assert (out / SUMMARY).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["listops", "language"])
def test_two_workers_resume_a_run_of_one_process_and_vice_versa(
    task: str, two_slots: None, data_folder: Path, tmp_path: Path
) -> None:
    exact: dict[str, Any] = {"threads": 1, "precision": "64-true", **LONG}
    spec, module = (
        (tiny(**exact, **NO_DROPOUT), Classifier)
        if task == "listops"
        else (language(data_folder, **exact, model__layers__layer__dropout=0.0), LanguageModule)
    )
    out, killer = tmp_path / "out", Killer()
    with power_failure(30, module):
        alone(spec, out, data_folder)
    with pytest.raises(SmaError, match=r"the training failed after 0 restarts: .*valid up to its last checkpoint"):
        train_with_2(spec, out, data_folder, restarts=0, on_line=killer)
    assert len(killer.of("resuming")) == 1
    assert 40 <= checkpoint(out)["global_step"] < 120
    alone(spec, out, data_folder, resume=True)
    alone(spec, tmp_path / "alone", data_folder)
    assert_equal_weights(out, tmp_path / "alone", 1e-9)


@pytest.mark.slow
def test_a_failure_that_would_repeat_is_not_retried(two_slots: None, data_folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(SmaError, match=r"the loss of update \d+ is (nan|inf); .*a lower training.learning_rate"):
        train_with_2(tiny(threads=1, training__learning_rate=1e30), tmp_path / "out", data_folder, on_line=lines.append)
    assert len([line for line in lines if line.startswith("worker 1")]) == 1


def test_a_split_with_fewer_samples_than_workers_is_refused(data_folder: Path) -> None:
    spec = tiny(task__data__validation=1)
    with pytest.raises(SpecError, match=r"the validation split has 1 samples for 2 workers; lower --workers"):
        Workers(2).check_data(spec, spec.task.prepare(data_folder, progress=False))


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "something").write_text("")
    assert main(["train", "--out", str(tmp_path)]) == 2
    assert "is not empty; give another --out, or --resume" in capsys.readouterr().err


def test_a_second_driver_is_refused_even_before_the_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, codes = tmp_path / "run", []

    def train_it(spec: ExperimentSpec, storage: Storage, *_: Any, **__: Any) -> None:
        with run_lock(out):  # as the first worker does
            pass
        again = threading.Thread(
            target=lambda: codes.append(main(["train", "--resume", str(out), "--accelerator", "cpu"]))
        )
        again.start()
        again.join()

    monkeypatch.setattr("sma.tune.parallel.train_parallel", train_it)
    monkeypatch.setattr(Workers, "check_room", lambda _: None)
    for command in (["--out", str(out)], ["--resume", str(out)]):
        assert main(["train", *command, "--accelerator", "cpu"]) == 0
        assert f"the folder '{out}' is being written by process {os.getpid()} on" in capsys.readouterr().err
    assert codes == [2, 2]
    assert [path.name for path in out.iterdir()] == ["experiment.yaml"]


def test_a_finished_run_is_not_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Storage(tmp_path).write("experiment.yaml", "task: {}")
    Storage(tmp_path).write(SUMMARY, "{}")
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "is finished; its results are in" in capsys.readouterr().err
