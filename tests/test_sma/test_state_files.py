"""States in files: what comes back, and what is refused."""

from pathlib import Path

import pytest
import torch

import sma
from sma.errors import CheckpointError
from sma.pytree import named_tensors
from tests.test_sma.test_testing import MODELS


def model(name: str = "language-model") -> sma.SequenceModel:
    return sma.build(MODELS[name], seed=0).eval()


def state_of(made: sma.SequenceModel, rows: int = 3) -> sma.State:
    state = made(made.encoder.random_inputs(rows, 9), state=made.init_state(rows)).state  # type: ignore[operator]
    assert state is not None
    return state


def test_every_tensor_comes_back_with_its_dtype(tmp_path: Path) -> None:
    made = model()
    state = state_of(made)
    sma.save_state(state, tmp_path / "stream.safetensors")
    loaded = sma.load_state(tmp_path / "stream.safetensors", made.init_state(1))
    wanted = named_tensors(state)
    assert {name: tensor.dtype for name, tensor in named_tensors(loaded).items()} == {name: t.dtype for name, t in wanted.items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in named_tensors(loaded).items())


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = tmp_path / "stream.safetensors", model()
    sma.save_state(made.init_state(2), path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sma.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot save the state in .*No space left on device; the folder must be writable"):
        sma.save_state(state_of(made, 2), path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["stream.safetensors"]


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ("classifier-causal", "is the state of another model: it (lacks|has) "),
        ("batch-norm", "is the state of another model"),
    ],
)
def test_the_state_of_another_model_is_refused(other: str, complaint: str, tmp_path: Path) -> None:
    sma.save_state(model().init_state(2).layers[0], tmp_path / "stream.safetensors")
    with pytest.raises(CheckpointError, match=complaint):
        sma.load_state(tmp_path / "stream.safetensors", model(other).init_state(1))


def test_another_width_and_another_dtype_are_refused(tmp_path: Path) -> None:
    path, made = tmp_path / "stream.safetensors", model()
    sma.save_state(made.init_state(2, dtype=torch.float64), path)
    with pytest.raises(CheckpointError, match=r"is the state of another model: '.*' has \(torch.float64, .*; required is \(torch.float32"):
        sma.load_state(path, made.init_state(1))


@pytest.mark.parametrize("content", [None, b"", b"no tensors"], ids=["missing", "empty", "damaged"])
def test_a_file_that_is_none_is_a_sentence(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "stream.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="there is no saved state in "):
        sma.load_state(path, model().init_state(1))
