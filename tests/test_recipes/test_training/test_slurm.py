"""The script on the page about Slurm works as described. Slurm is simulated by its signals and variables."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sma.recipes.io.run_folder import LAST
from tests.forks import fork
from tests.test_recipes.tiny import EXPERIMENT, assert_same_run, checkpoint, tiny, train

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
SCRIPT = re.search(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL).group(1)  # type: ignore[union-attr]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "t",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# 300 updates take seconds, so that a signal arrives between the first and the last.
UPDATES = 300


def test_script_is_valid(tmp_path):
    (tmp_path / "job.sh").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def job(tmp_path, data):
    """Start the script of the page like Slurm, with a small experiment and stand-ins for `srun` and `scontrol`."""
    experiment = {**EXPERIMENT, "training": {**EXPERIMENT["training"], "updates": UPDATES, "evaluate_every": 150}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    programs = tmp_path / "bin"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    programs.mkdir()
    # Slurm sends the signal to the tasks, not to the script, so the task writes its process id.
    _program(programs, "srun", f'shift; echo $$ > "{tmp_path}/task"; exec "$@"')
    _program(programs, "scontrol", f'echo "$@" >> "{tmp_path}/requeued"')
    _program(programs, "python", f'exec "{sys.executable}" "$@"')
    script = SCRIPT.replace(
        "--task listops --preset paper", f'--spec "{tmp_path}/spec.yaml" --data "{tmp_path}/data" --accelerator cpu'
    )
    assert script != SCRIPT
    (tmp_path / "job.sh").write_text(script, encoding="utf-8")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SLURM, "PATH": path, "SLURM_SUBMIT_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def start(output):
        (tmp_path / "task").unlink(missing_ok=True)
        return subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment, stdout=output, stderr=output)

    return start


@pytest.mark.parametrize(
    ("status", "again"), [(0, False), (2, False), (75, True), (130, False), (138, True), (143, True)]
)
def test_job_is_requeued_if_a_signal_ended_the_run(job, tmp_path, status, again):
    _program(tmp_path / "bin", "srun", f"exit {status}")
    assert job(subprocess.DEVNULL).wait() == status
    assert (tmp_path / "requeued").exists() == again


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    spec = tiny(training__updates=UPDATES, training__evaluate_every=150)
    train(spec, folder / "run", spec.task.prepare(folder / "data", progress=False))
    return folder / "run"


def _updates_seen(out):
    """Whether the training has begun: its metrics get the first line after 50 updates."""
    return any(len(path.read_text().splitlines()) > 1 for path in out.glob("metrics/version_*/metrics.csv"))


def _wait(process, ready):
    until = time.monotonic() + 200
    while process.poll() is None and not ready() and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None, "it was over before the signal"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_requeued_job_ends_with_the_results_of_the_uninterrupted_one(job, whole, tmp_path):
    out, printed = tmp_path / "runs" / "listops", tmp_path / "printed.txt"
    sent = []
    with printed.open("w") as output:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            process = job(output)
            _wait(process, lambda: _updates_seen(out) if not sent else (tmp_path / "task").exists())
            task = int((tmp_path / "task").read_text())
            if sent:
                time.sleep(1)  # the task may be importing, preparing, or training
            os.kill(task, number)
            sent.append(number)
            assert process.wait(timeout=200) == (75 if number == signal.SIGUSR1 else process.returncode)
        assert (tmp_path / "requeued").read_text().splitlines()[0] == "requeue 7"
        assert 0 < checkpoint(out)["global_step"] < UPDATES
        assert job(output).wait(timeout=400) == 0  # the same command
        assert job(output).wait(timeout=200) == 0  # again: nothing is left to do
    assert "preempted by SIGUSR1: update " in printed.read_text()
    assert f"the run in {Path('runs') / 'listops'} is finished" in printed.read_text()
    assert list(out.rglob("hpc_ckpt*")) == []
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_signal_followed_by_a_kill_loses_nothing(job, whole, tmp_path):
    out = tmp_path / "runs" / "listops"
    process = job(subprocess.DEVNULL)
    _wait(process, lambda: _updates_seen(out))
    task = int((tmp_path / "task").read_text())
    os.kill(task, signal.SIGUSR1)
    process.wait(timeout=100)
    assert (out / LAST).is_file()
    saved = checkpoint(out)["global_step"]
    process = job(subprocess.DEVNULL)
    _wait(process, lambda: (tmp_path / "task").exists() and len([*out.glob("metrics/version_*")]) > 1)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR1)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGKILL)
    process.wait(timeout=100)
    assert checkpoint(out)["global_step"] >= saved
    assert job(subprocess.DEVNULL).wait(timeout=400) == 0
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_second_of_two_concurrent_starts_is_refused(tmp_path, data):
    experiment = {**EXPERIMENT, "training": {**EXPERIMENT["training"], "updates": UPDATES, "evaluate_every": 150}}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    common = ["--data", tmp_path / "data", "--accelerator", "cpu", "--no-progress"]
    environment = {**os.environ, **SLURM, "SLURM_NTASKS": "2", "PYTHONPATH": str(ROOT)}

    def start(log, *options):
        words = [*common, *options]
        return fork("sma.recipes.seqboat_lra", *words, stdout=tmp_path / log, cwd=tmp_path, environment=environment)

    pair = {name: start(name, "--spec", "spec.yaml", "--out", "run", "--auto-resume") for name in ("one", "two")}
    assert sorted(process.wait(400) for process in pair.values()) == [0, 2]
    first, second = sorted(pair, key=lambda name: pair[name].returncode)
    assert f"'run' is being written by process {pair[first].pid} on" in (tmp_path / second).read_text()
    # Without --out each start gets its own folder, and trains its own seed.
    processes = [start("seeds", "--spec", "spec.yaml", "--seed", str(seed)) for seed in (0, 1)]
    assert [process.wait(600) for process in processes] == [0, 0]
    folders = sorted((tmp_path / "runs").iterdir())
    assert sorted(yaml.safe_load((folder / "experiment.yaml").read_text())["seed"] for folder in folders) == [0, 1]
    for folder in folders:
        seed = yaml.safe_load((folder / "experiment.yaml").read_text())["seed"]
        assert checkpoint(folder)["callbacks"]["Origin"]["experiment"]["seed"] == seed
