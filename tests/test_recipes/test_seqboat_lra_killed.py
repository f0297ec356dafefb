"""Runs of ListOps in separate processes that are killed or interrupted, and resumed."""

import json
import os
import random
import signal
import time

import pytest

from sma.recipes.reports.classification import rates_over_training
from tests.forks import fork, run_fork
from tests.test_recipes.lra_command import RESUME, SCRIPT, run, write_spec
from tests.test_recipes.tiny import checkpoint, same


@pytest.fixture(autouse=True)
def _without_settings_in_the_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SMA_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def spec(tmp_path):
    """The experiment as a file."""
    return write_spec(tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the data is kept between runs."""
    return tmp_path_factory.mktemp("cache")


LONG = ["--set", "training.updates=400", "--set", "training.evaluate_every=20", "--no-progress"]


MODULE = "sma.recipes.seqboat_lra"


def _wait_for(pattern, folder, process, seconds=600):
    """Wait until the process has created another file that matches the pattern."""
    before, end = set(folder.glob(pattern)), time.monotonic() + seconds
    while set(folder.glob(pattern)) == before and process.poll() is None:
        assert time.monotonic() < end, f"no {pattern} after {seconds} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    """Folder of the uninterrupted long run, and its training time in seconds."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    words = ["--spec", write_spec(folder), "--data", cache, "--out", folder / "run", *LONG]
    done = run_fork(MODULE, *words, folder=folder, timeout=800)
    assert done.returncode == 0, done.stderr
    return folder / "run", json.loads((folder / "run" / "summary.json").read_text())["seconds"]


def _assert_same_result(out, reference):
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        for part in ("state_dict", "optimizer_states", "global_step"):
            assert same(checkpoint(out, name)[part], checkpoint(reference, name)[part]), f"{part} of {name}"
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (out, reference))
    for name in ("test_accuracy", "activation_rate", "best_update"):
        assert mine[name] == theirs[name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_run_killed_at_random_moments_and_resumed_equals_the_uninterrupted_one(uninterrupted, spec, cache, tmp_path):
    reference, seconds = uninterrupted
    out, kills = tmp_path / "run", []
    words = ["--spec", spec, "--data", cache, "--out", out, *LONG]
    for _ in range(3):
        process = fork(MODULE, *words, stdout=(log := tmp_path / "log"))
        # Every part of the run logs into its own folder, from its first updates on.
        _wait_for("metrics/version_*/metrics.csv", out, process)
        kills.append(random.SystemRandom().uniform(0, seconds / 5))
        time.sleep(kills[-1])
        process.kill()
        words = ["--resume", out, "--data", cache, "--no-progress"]
        if process.wait() != -signal.SIGKILL:  # it ended before the kill
            assert process.returncode == 0, log.read_text()
            break
    else:
        done = run_fork(MODULE, *words, folder=tmp_path, timeout=800)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if "the router of" not in line] == []
    print("killed after", kills)  # shown if an assertion below fails
    _assert_same_result(out, reference)
    assert rates_over_training(out) == rates_over_training(reference)
    # The next part has removed the remains of a killed write.
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ctrl_c_in_a_real_process_exits_130_and_the_run_resumes(uninterrupted, spec, cache, tmp_path):
    out = tmp_path / "run"
    words, log = ["--spec", spec, "--data", cache, "--out", out, *LONG], tmp_path / "log"
    process = fork(MODULE, *words, stdout=tmp_path / "out", stderr=log)
    _wait_for("checkpoints/last.ckpt", out, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == 130, log.read_text()
    err = log.read_text()
    assert [line for line in err.splitlines() if "the router of" not in line] == [
        f"interrupted; resume with: {RESUME} {out} --data {cache} --no-progress"
    ]
    assert not (out / "summary.json").exists()
    done = run([*SCRIPT, "--resume", out, "--data", cache, "--no-progress"], timeout=800)
    assert done.returncode == 0, done.stderr
    _assert_same_result(out, uninterrupted[0])
