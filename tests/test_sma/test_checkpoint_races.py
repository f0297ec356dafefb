"""Saving while others load, save or are killed: a folder always holds one complete model, and drafts are removed."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sma
from tests.test_sma.test_checkpoint import SPEC

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (128, 256)


def made(width: int) -> sma.SequenceModel:
    """A model whose weights and buffers identify its width."""
    model = sma.build({**SPEC, "width": width}, seed=width)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(width)
    return model


def load_complete(folder: Path) -> int:
    """The width of the model in a folder; fails unless all weights belong to the model of that width."""
    model = sma.load(folder)
    bounds = {float(bound) for tensor in model.state_dict().values() for bound in tensor.double().aminmax()}
    assert bounds == {float(model.spec.width)}
    return model.spec.width


def run(function: str, folder: Path) -> dict[str, Any]:
    """Run a function of this file in a separate process, which may fork, and return its JSON output."""
    code = f"import json, sys; from {__name__} import {function}; print(json.dumps({function}(sys.argv[1])))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))


def forked(function: Callable[[], None]) -> int:
    """Start a child process that repeats a function until it is killed."""
    child = os.fork()
    if child:
        return child
    try:
        while True:
            function()
    finally:
        os._exit(1)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child ended by itself"


def load_while_another_process_replaces(folder: str) -> dict[str, Any]:
    """Load a model for some seconds while another process replaces it as fast as possible."""
    torch.set_num_threads(1)
    there = Path(folder, "there", "model.safetensors")
    for width in WIDTHS:
        sma.save(made(width), Path(folder, str(width)))
    turns = itertools.cycle(WIDTHS)

    def replace() -> None:
        shutil.copyfile(Path(folder, str(next(turns)), "model.safetensors"), there.with_name("next"))
        there.with_name("next").replace(there)

    there.parent.mkdir()
    replace()
    child, seen, until = forked(replace), [], time.monotonic() + 5
    try:
        while time.monotonic() < until or len(seen) < 50:
            seen.append(load_complete(there.parent))
    finally:
        kill(child)
    return {
        "loads": len(seen),
        "changes": sum(one != other for one, other in itertools.pairwise(seen)),
        "widths": sorted(set(seen)),
    }


@pytest.mark.slow
def test_load_reads_one_complete_model_while_another_process_saves(tmp_path):
    found = run("load_while_another_process_replaces", tmp_path)
    print(found)
    assert found["widths"] == list(WIDTHS)
    assert found["changes"] > 5


def kill_at_random_moments(folder: str, kills: int = 60) -> dict[str, Any]:
    """Kill processes that save models in turn, and check the folder after each."""
    torch.set_num_threads(1)
    rng, drafts, ends = random.Random(0), 0, []
    models = [made(width) for width in WIDTHS]
    sma.save(models[0], folder)
    for _ in range(kills):
        turns = itertools.cycle(models)
        child = forked(lambda turns=turns: sma.save(next(turns), folder) and None)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.15))
        kill(child)
        drafts += len(list(Path(folder).glob(".*.draft")))
        ends.append(load_complete(Path(folder)))
        sma.save(models[0], folder)
        assert {path.name for path in Path(folder).iterdir()} == {"model.safetensors", "spec.yaml"}
    return {"kills": kills, "drafts": drafts, "ends": [ends.count(width) for width in WIDTHS]}


@pytest.mark.slow
def test_a_killed_save_leaves_a_complete_model_and_the_next_one_removes_its_draft(tmp_path):
    found = run("kill_at_random_moments", tmp_path)
    print(found)
    assert min(found["ends"]) > 0
    assert found["drafts"] > 0


# Kills itself while it writes the weights into the given folder.
DIES = """
import os, signal, sys, sma, sma.checkpoint
from pathlib import Path
from tests.test_sma.test_checkpoint_races import made
def half(path, *rest):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
sma.checkpoint.write_tensors = half
sma.save(made(256), sys.argv[1])
"""

# Writes the draft of the weights and waits for a line of input before the draft replaces the model.
WAITS = """
import sys, sma, sma.checkpoint
from tests.test_sma.test_checkpoint_races import made
write = sma.checkpoint.write_tensors
def slowly(path, *rest):
    write(path, *rest)
    print(path.name, flush=True)
    sys.stdin.readline()
sma.checkpoint.write_tensors = slowly
sma.save(made(256), sys.argv[1])
"""


@pytest.mark.slow
def test_the_next_save_removes_abandoned_drafts_and_keeps_drafts_in_use(tmp_path):
    sma.save(made(128), tmp_path)
    assert (
        subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    )
    (dead,) = tmp_path.glob(".*.draft")
    assert load_complete(tmp_path) == 128
    command = [sys.executable, "-c", WAITS, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        live = tmp_path / process.stdout.readline().strip()
        assert not dead.exists()
        sma.save(made(128), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "spec.yaml", live.name}
        process.communicate("\n")
    assert process.returncode == 0
    assert load_complete(tmp_path) == 256
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "spec.yaml"}


@pytest.mark.slow
def test_equal_runs_write_equal_bytes(tmp_path):
    code = "import sys, sma; from tests.test_sma.test_checkpoint_races import made; sma.save(made(128), sys.argv[1])"
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], cwd=ROOT, env=environment, check=True)
    for name in ("model.safetensors", "spec.yaml"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
