"""A killed run of any task resumes to the weights of the uninterrupted one, and a full disk gives an error message."""

import errno
import os
import signal
import time

import pytest
import yaml

from sma.recipes.experiment import load_experiment
from sma.recipes.io.run_folder import BEST, LAST
from sma.recipes.seqboat_lra import main
from sma.recipes.training import callbacks
from sma.spec import dump_spec, kinds
from tests.forks import fork
from tests.test_recipes.tiny import checkpoint, same
from tests.test_recipes.tiny_speech import MODEL, speech_experiment

TRAINING = {"updates": 120, "batch_size": 8, "learning_rate": 0.003, "warmup": 10, "evaluate_every": 20}
BUDGET = ("training.budget.hold=40", "training.budget.anneal=60")
IMAGES = ("task.data.train=400", "task.data.validation=40", "task.data.test=40")


def _shipped(task, *settings):
    """The tiny preset of a task with a short training, small batches, and further settings."""
    training = [f"training.{name}={value}" for name, value in {**TRAINING, "batch_size": 4}.items()]
    return dump_spec(load_experiment(f"{task}_tiny", [*training, *settings]))


EXPERIMENTS = {
    "digits": {"task": {"kind": "digits"}, "model": MODEL, "training": TRAINING, "threads": 1},
    "speech": {**speech_experiment(source="synthetic", clips=200), "training": TRAINING},
    "text": _shipped("text", "task.data.length=64"),
    "retrieval": _shipped("retrieval", "task.data.length=64"),
    "image": _shipped("image", "task.data.validation=20"),
    "pathfinder": _shipped("pathfinder", *IMAGES, *BUDGET),
    "pathx": _shipped("pathx", *IMAGES, *BUDGET),
    "recall": _shipped("recall", *IMAGES, *BUDGET),
    "mqar": _shipped("mqar", *IMAGES, *BUDGET),
}
# Runs of ListOps are killed at random moments in test_seqboat_lra_killed.py, language models in test_seqboat_lm.py.
ELSEWHERE = {"listops", "language"}


def test_every_task_has_a_kill_test():
    assert {*EXPERIMENTS, *ELSEWHERE} == {*kinds("task")}


def _spec(folder, experiment):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", EXPERIMENTS)
def test_killed_run_resumes_to_the_weights_of_the_uninterrupted_one(task, tmp_path):
    spec = _spec(tmp_path, EXPERIMENTS[task])
    common = ["--data", str(tmp_path), "--accelerator", "cpu", "--no-progress"]
    assert main(["--spec", str(spec), "--out", str(tmp_path / "whole"), *common]) == 0
    out = tmp_path / "parts"
    process = fork("sma.recipes.seqboat_lra", *common, "--spec", spec, "--out", out, stdout=tmp_path / "log")
    while process.poll() is None and not (out / LAST).is_file():
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    assert not (out / "summary.json").exists()
    assert 0 < checkpoint(out)["global_step"] < TRAINING["updates"]
    assert main(["--resume", str(out), *common]) == 0
    for name in (LAST, BEST):
        for part in ("state_dict", "optimizer_states", "global_step"):
            assert same(checkpoint(out, name)[part], checkpoint(tmp_path / "whole", name)[part]), f"{part} of {name}"


def _fill_disk_after(monkeypatch, checkpoints):
    """Fill the disk after so many checkpoints: of every later one, only a half is written."""
    left, write = [checkpoints], callbacks.write_atomically

    def limited(path, fill):
        if left[0] == 0:

            def half(temporary):
                fill(temporary)
                os.truncate(temporary, temporary.stat().st_size // 2)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return write(path, half)
        left[0] -= 1
        return write(path, fill)

    monkeypatch.setattr(callbacks, "write_atomically", limited)


@pytest.mark.slow
def test_run_resumes_after_a_full_disk(tmp_path, monkeypatch, capsys):
    experiment = {**EXPERIMENTS["digits"], "training": {**TRAINING, "updates": 12, "warmup": 2, "evaluate_every": 4}}
    spec, out = _spec(tmp_path, experiment), tmp_path / "run"
    common = ["--data", str(tmp_path), "--accelerator", "cpu", "--no-progress"]
    assert main(["--spec", str(spec), "--out", str(tmp_path / "whole"), *common]) == 0
    with monkeypatch.context() as patch:
        _fill_disk_after(patch, 3)  # best and last after 4 updates, and one of those after 8
        assert main(["--spec", str(spec), "--out", str(out), *common]) == 2
    complaint = capsys.readouterr().err
    assert "No space left on device; the run folder must be writable and have space" in complaint
    assert "Traceback" not in complaint
    assert checkpoint(out)["global_step"] in (4, 8)
    assert [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert main(["--resume", str(out), *common]) == 0
    assert same(checkpoint(out)["state_dict"], checkpoint(tmp_path / "whole")["state_dict"])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_full_disk_elsewhere_gives_an_error_message(tmp_path, monkeypatch, capsys, code):
    def full(*_, **__):
        raise OSError(code, os.strerror(code), "metrics.csv")

    monkeypatch.setattr("sma.recipes.training.run.run_experiment", full)
    spec = _spec(tmp_path, EXPERIMENTS["digits"])
    assert main(["--spec", str(spec), "--out", str(tmp_path / "run"), "--data", str(tmp_path)]) == 2
    expected = f"error: {os.strerror(code)} ('metrics.csv'); make room, and repeat the command\n"
    assert capsys.readouterr().err == expected


def test_other_errors_of_the_system_are_raised(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("sma.recipes.training.run.run_experiment", broken)
    with pytest.raises(OSError, match="Input/output error"):
        main(
            [
                "--spec",
                str(_spec(tmp_path, EXPERIMENTS["digits"])),
                "--out",
                str(tmp_path / "run"),
                "--data",
                str(tmp_path),
            ]
        )
