"""States in files: round trips and errors."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sma
from sma.errors import CheckpointError
from sma.pytree import map_tensors, named_tensors
from tests.test_sma.test_testing import MODELS


def model(name: str = "language-model") -> sma.SequenceModel:
    return sma.build(MODELS[name], seed=0).eval()


def state_of(made: sma.SequenceModel, rows: int = 3) -> sma.State:
    state = made(made.encoder.random_inputs(rows, 9), state=made.init_state(rows)).state  # type: ignore[operator]
    assert state is not None
    return state


def test_every_tensor_keeps_its_dtype_in_a_round_trip(tmp_path: Path) -> None:
    made = model()
    state = state_of(made)
    sma.save_state(state, tmp_path / "stream.safetensors")
    loaded = sma.load_state(tmp_path / "stream.safetensors", made.init_state(1))
    wanted = named_tensors(state)
    assert {name: tensor.dtype for name, tensor in named_tensors(loaded).items()} == {
        name: t.dtype for name, t in wanted.items()
    }
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in named_tensors(loaded).items())


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = tmp_path / "stream.safetensors", model()
    sma.save_state(made.init_state(2), path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sma.checkpoint.write_tensors", full)
    with pytest.raises(
        CheckpointError, match=r"cannot save the state in .*No space left on device; the folder must be writable"
    ):
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
    with pytest.raises(
        CheckpointError, match=r"is the state of another model: '.*' is float64 of shape .*; expected float32"
    ):
        sma.load_state(path, made.init_state(1))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(None, r"there is no saved state in '.*'; give a file that sma\.save_state wrote$", id="missing"),
        pytest.param(b"", r"is damaged or not a safetensors file: of its 0 bytes, 0 would be its header", id="empty"),
        pytest.param(
            b"no tensors",
            r"is damaged or not a safetensors file: of its 10 bytes, 8,030,.* would be its header",
            id="damaged",
        ),
    ],
)
def test_a_missing_or_damaged_file_is_refused(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "stream.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        sma.load_state(path, model().init_state(1))


def test_a_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a named pipe; a plain file is required"):
        sma.load_state(tmp_path / "pipe", model().init_state(1))


def unbounded() -> sma.SequenceModel:
    """A model whose attention keeps every token."""
    part = {"kind": "gau", "query_size": 2, "hidden_size": 3, "bidirectional": False}
    layers = [
        {"backbone": {"kind": "ema", "bidirectional": False}, "modules": {"all": part, "window": {**part, "window": 4}}}
    ]
    return sma.build(
        {"kind": "sequence_encoder", "width": 4, "encoder": {"kind": "real_number"}, "layers": layers}, seed=0
    ).eval()


def test_a_state_that_grows_may_have_any_length(tmp_path: Path) -> None:
    made = unbounded()
    state = state_of(made)
    sma.save_state(state, tmp_path / "stream.safetensors")
    for like in (made.init_state(1), state_of(made, 2)):
        loaded = named_tensors(sma.load_state(tmp_path / "stream.safetensors", like))
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in named_tensors(state).items())


def wrong(path: Path, name: str, change: Any) -> None:
    """Change one tensor of a saved state."""
    tensors = load_file(path)
    (found,) = [key for key in tensors if key.endswith(name)]
    tensors[found] = change(tensors[found]).contiguous()
    save_file(tensors, path)


ALL, WINDOW = ".routed.modules['all']", ".routed.modules['window']"


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        pytest.param(
            ".backbone.hidden",
            lambda t: t[:1],
            r"is float32 of shape \(1, 4, 16\); expected float32 of shape \(3, 4, 16\)",
            id="rows",
        ),
        pytest.param(
            ".backbone.hidden",
            lambda t: t[:, :3],
            r"\(3, 3, 16\); expected float32 of shape \(3, 4, 16\)",
            id="width",
        ),
        pytest.param(
            ".backbone.hidden", lambda t: t[..., 0], r"\(3, 4\); expected float32 of shape \(3, 4, 16\)", id="axes"
        ),
        pytest.param(".backbone.hidden", lambda t: t.sum(), r"of shape \(\); expected", id="a single number"),
        pytest.param(
            ".backbone.hidden", lambda t: t.double(), r"float64 of .*; expected float32", id="another precision"
        ),
        pytest.param(".backbone.hidden", lambda t: t.int(), r"int32 of .*; expected float32", id="integers"),
        pytest.param(
            WINDOW + ".entries[0]",
            lambda t: t[:, 1:],
            r"\(3, 3, 2\); expected float32 of shape \(3, 4, 2\)",
            id="window",
        ),
        pytest.param(
            ALL + ".entries[1]",
            lambda t: t[:, 1:],
            r"expected float32 of shape \(3, \d, 3\)",
            id="entries of two lengths",
        ),
        pytest.param(ALL + ".seen", lambda t: t[:2], r"\(2,\); expected int64 of shape \(3,\)", id="rows of a count"),
        pytest.param(
            "seen",
            lambda t: t[:, None],
            r"\(3, 1\); expected int64 of shape \(3,\)|state of another",
            id="another axis",
        ),
    ],
)
def test_a_state_of_other_sizes_is_refused(tmp_path: Path, name: str, change: Any, complaint: str) -> None:
    made, path = unbounded(), tmp_path / "stream.safetensors"
    sma.save_state(state_of(made), path)
    wrong(path, name if name != "seen" else ".layers[0].routed.modules['window'].seen", change)
    with pytest.raises(CheckpointError, match=rf"is the state of another model: .*{complaint}"):
        sma.load_state(path, made.init_state(1))


def test_none_and_states_on_meta_are_refused(tmp_path: Path, as_users_run: None) -> None:
    made = model()
    with pytest.raises(CheckpointError, match=r"there is no state to save, but None; give model\.init_state"):
        sma.save_state(made(made.encoder.random_inputs(1, 3)).state, tmp_path / "state")  # type: ignore[arg-type,operator]
    with pytest.raises(CheckpointError, match=r"the template state is None; give one of the same model"):
        sma.load_state(tmp_path / "state", None)  # type: ignore[type-var]
    with pytest.raises(CheckpointError, match=r"is on the meta device and has no values"):
        sma.save_state(made.init_state(1, device="meta"), tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_strided_states_that_share_memory_survive_a_round_trip(tmp_path: Path) -> None:
    made = model()
    one = state_of(made, 1)
    state = one.select(torch.zeros(3, dtype=torch.int64))
    strided = map_tensors(lambda tensor: tensor[:1].expand_as(tensor), state)
    sma.save_state(strided, tmp_path / "state")
    loaded = named_tensors(sma.load_state(tmp_path / "state", one))
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in named_tensors(state).items())


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    for made, name in ((model(), "a"), (model(), "b")):
        sma.save_state(made.init_state(1), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        (ALL + ".seen", 10**12),
        (ALL + ".seen", -1),
        (WINDOW + ".seen", -(2**63)),
        (WINDOW + ".seen", 2**62),
        (".seen", 2**62),
        (".seen", -1),
    ],
)
def test_a_state_that_cannot_have_seen_its_tokens_is_refused(tmp_path: Path, name: str, count: int) -> None:
    made, path = unbounded(), tmp_path / "stream.safetensors"
    sma.save_state(state_of(made), path)
    tensors = load_file(path)
    (found,) = [key for key in tensors if key in (name, f".layers[0]{name}")]
    tensors[found][1] = count
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"is damaged: (Cache|ModelState) has seen {count} tokens"):
        sma.load_state(path, made.init_state(1))
