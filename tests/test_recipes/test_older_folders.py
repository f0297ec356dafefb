"""Folders of the first version load, evaluate equally, continue streams, and resume bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sma
from sma.recipes import seqboat_lra
from tests.test_recipes import tiny

OLDER = Path(__file__).resolve().parents[1] / "data" / "baseline" / "format_0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny.tiny_data(folder)
    return folder


def _values(folder: Path) -> list[torch.Tensor]:
    return list(sma.load(folder).state_dict().values())


def _run(*words: object) -> None:
    assert seqboat_lra.main([*map(str, words), "--no-progress", "--accelerator", "cpu"]) == 0


def test_a_model_loads_with_the_values_of_its_file():
    for folder in ("finished/model", "language"):
        recorded = load_file(OLDER / folder / "model.safetensors")
        loaded = sma.load(OLDER / folder).state_dict()
        assert sorted(map(_digest, loaded.values())) == sorted(map(_digest, recorded.values()))


def _digest(tensor: torch.Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.numpy().tobytes()


def test_a_finished_run_evaluates_equally(tmp_path, data):
    run = shutil.copytree(OLDER / "finished", tmp_path / "run")
    _run("--evaluate", run, "--data", data)
    recorded, found = (json.loads((folder / "evaluation.json").read_text()) for folder in (OLDER / "finished", run))
    assert found["test_loss"] == pytest.approx(recorded["test_loss"], abs=1e-6)
    measured = ("task", "test_accuracy", "per_class", "classes", "confusion")
    assert {name: found[name] for name in measured} == {name: recorded[name] for name in measured}


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_bits_of_an_uninterrupted_one(tmp_path, data):
    run = shutil.copytree(OLDER / "stopped", tmp_path / "run")
    _run("--resume", run, "--data", data)
    fresh = tmp_path / "fresh"
    _run("--spec", OLDER / "stopped" / "experiment.yaml", "--out", fresh, "--data", data)
    resumed, recorded, here = _values(run / "model"), _values(OLDER / "finished" / "model"), _values(fresh / "model")
    if all(map(torch.equal, here, recorded)):
        assert all(map(torch.equal, resumed, recorded))
    else:  # another processor rounds differently, in the twenty updates before the stop too
        torch.testing.assert_close(resumed, here, rtol=0, atol=1e-4)


def test_a_stream_continues_from_a_saved_state():
    model = sma.load(OLDER / "language")
    state = sma.load_state(OLDER / "language" / "state.safetensors", model.init_state(1))
    ids = torch.arange(40).reshape(2, 20) % 16
    with torch.no_grad():
        logits = model(ids[:, 12:], state=state).logits[:, -1]
    expected = torch.tensor(json.loads((OLDER / "language" / "logits.json").read_text()))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
