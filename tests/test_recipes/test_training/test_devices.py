"""A missing or unsuitable device is refused with one error message, before anything is written."""

import pytest
import torch

from sma.errors import SpecError
from sma.recipes.seqboat_lra import main
from sma.recipes.training.devices import check_device, device_of
from tests.test_recipes.tiny import tiny, train


@pytest.fixture
def none(monkeypatch):
    """A machine with only a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_missing_device_is_refused(none, name):
    with pytest.raises(SpecError, match=rf"--accelerator {name}: torch finds no such device.*; available: cpu$"):
        device_of(name)
    assert device_of("auto") == device_of("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "tpu", "", "x" * 10_000])
def test_unknown_device_is_refused(name):
    with pytest.raises(SpecError, match=r"^unknown accelerator '.{0,120}; give one of auto, cpu, cuda, mps$"):
        device_of(name)


def test_automatic_device_is_the_fastest_available(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("auto") == "cuda"


def test_precision_that_the_device_does_not_support_is_refused(none, monkeypatch):
    with pytest.raises(
        SpecError, match=r"precision=16-mixed needs a GPU, and the run is on the CPU; set precision=bf16-mixed or"
    ):
        check_device("auto", "16-mixed")
    assert check_device("auto", "bf16-mixed") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(
        SpecError, match=r"precision=64-true does not exist on mps; give --accelerator cpu, or set precision=32-true"
    ):
        check_device("auto", "64-true")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        pytest.param(["--accelerator", "cuda"], "error: --accelerator cuda: torch finds no such device", id="cuda"),
        pytest.param(
            ["--accelerator", "mps"], "error: --accelerator: unknown choice 'mps'; choices: auto, cpu, cuda", id="mps"
        ),
        pytest.param(["--set", "precision=16-mixed"], "error: precision=16-mixed needs a GPU", id="precision"),
    ],
)
def test_command_refuses_the_device_before_creating_a_folder(none, tmp_path, capsys, monkeypatch, options, complaint):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--out", str(tmp_path / "run")]):
        assert main(["--data", str(tmp_path / "data"), *options, *more]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(complaint)
        assert len(printed.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_run_refuses_the_device_before_creating_a_folder(none, data, tmp_path):
    with pytest.raises(SpecError, match="--accelerator cuda: torch finds no such device"):
        train(tiny(), tmp_path / "run", data, accelerator="cuda")
    assert not (tmp_path / "run").exists()
