"""Saving and loading: equal bits, an old model that survives an interrupted save, and errors for damaged files."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

import sma.checkpoint
import sma.files
import sma.spec
from sma import SequenceModel, SubModuleSpec, build, load, load_spec, register, save
from sma.errors import CheckpointError
from sma.modules.identity import Identity
from tests.cases import spread

SPEC: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": 4,
    "encoder": {"kind": "token_embedding", "vocabulary": 5, "padding": 0},
    "sinusoid": True,
    "layers": {
        "repeat": 2,
        "layer": {
            "backbone": {"kind": "ema", "state_size": 2},
            "modules": {"attention": {"kind": "gau", "query_size": 2, "hidden_size": 3}, "conv": {"kind": "conv"}},
            "norm": {"kind": "batch_norm"},
        },
    },
    "head": {"kind": "mean_pool_linear", "classes": 3},
}
INPUTS = torch.tensor([[1, 2, 3, 4, 1], [4, 3, 2, 0, 0]])


def _model(seed: int = 0, dtype: torch.dtype = torch.float32) -> SequenceModel:
    """A model with random parameters and updated buffers."""
    model = build(SPEC, seed=seed).to(dtype)
    spread(model, seed=seed)
    model.train()(INPUTS)
    return model.eval()


def _same(one: SequenceModel, other: SequenceModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_load_undoes_save_bit_by_bit(tmp_path, dtype):
    model = _model(dtype=dtype)
    assert save(model, tmp_path / "some" / "folder") == tmp_path / "some" / "folder"
    loaded = load(str(tmp_path / "some" / "folder"))
    assert _same(loaded, model)
    assert loaded.spec == model.spec
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    assert torch.equal(loaded(INPUTS).logits, model(INPUTS).logits)
    assert any(buffer.any() for name, buffer in loaded.named_buffers() if name.endswith("running_mean"))


def test_loaded_model_is_in_evaluation_mode_and_can_be_trained(tmp_path):
    save(_model().train(), tmp_path)
    loaded = load(tmp_path)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()(INPUTS).logits.sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    assert not _same(loaded, load(tmp_path))


def test_saving_changes_neither_the_model_nor_the_random_state(tmp_path):
    model, before = _model().train(), torch.get_rng_state()
    save(model, tmp_path)
    load(tmp_path)
    assert model.training
    assert _same(model, _model())
    assert torch.equal(torch.get_rng_state(), before)


def test_folder_holds_the_weights_and_a_readable_spec(tmp_path):
    save(_model(), tmp_path)
    assert _files(tmp_path) == {"model.safetensors", "spec.yaml"}
    assert load_spec(tmp_path / "spec.yaml") == load_spec(SPEC)
    assert oct((tmp_path / "model.safetensors").stat().st_mode)[-3:] == "644"


def test_second_save_replaces_the_first(tmp_path):
    save(_model(0), tmp_path)
    save(_model(1), tmp_path)
    assert _same(load(tmp_path), _model(1))
    assert _files(tmp_path) == {"model.safetensors", "spec.yaml"}


def test_a_third_party_kind_is_rebuilt_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sma.spec, "_registry", {family: dict(members) for family, members in sma.spec._registry.items()}
    )

    @register
    class MineSpec(SubModuleSpec):
        kind: Literal["mine"] = "mine"

        def build(self, width: int) -> Identity:
            return Identity()

    layers = [{"modules": {"mine": {"kind": "mine"}}}]
    save(build({**SPEC, "layers": layers}), tmp_path)
    assert load(tmp_path).spec.layer_specs[0].modules["mine"] == MineSpec()
    sma.spec._registry["sub-module"].pop("mine")
    with pytest.raises(
        CheckpointError,
        match=r"the spec saved in .*model\.safetensors cannot be built here: "
        r"unknown sub-module kind 'mine' in layers\[0\]\.mod",
    ):
        load(tmp_path)


def _no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def _half_written(path: Path, *args: Any) -> None:
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def _interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


class TestInterrupted:
    @pytest.mark.parametrize(
        ("place", "failure"),
        [
            pytest.param("sma.checkpoint.write_tensors", _no_space, id="before writing"),
            pytest.param("sma.checkpoint.write_tensors", _half_written, id="while writing"),
            pytest.param("sma.files.os.fsync", _no_space, id="while flushing"),
            pytest.param("pathlib.Path.replace", _no_space, id="while replacing"),
        ],
    )
    @pytest.mark.parametrize("saved_before", [True, False])
    def test_failed_save_leaves_the_old_model_and_nothing_else(
        self, tmp_path, monkeypatch, place, failure, saved_before
    ):
        if saved_before:
            save(_model(0), tmp_path)
        monkeypatch.setattr(place, failure)
        with pytest.raises(
            CheckpointError,
            match=r"cannot save the model in '.*': .*No space left.*; the folder must be writable and have sp",
        ):
            save(_model(1), tmp_path)
        monkeypatch.undo()
        assert _files(tmp_path) == ({"model.safetensors", "spec.yaml"} if saved_before else set())
        if saved_before:
            assert _same(load(tmp_path), _model(0))

    @pytest.mark.parametrize("place", ["sma.checkpoint.write_tensors", "sma.files.os.fsync", "pathlib.Path.replace"])
    def test_an_interrupt_is_raised_and_leaves_the_old_model_and_nothing_else(self, tmp_path, monkeypatch, place):
        save(_model(0), tmp_path)
        monkeypatch.setattr(place, _interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            save(_model(1), tmp_path)
        monkeypatch.undo()
        assert _files(tmp_path) == {"model.safetensors", "spec.yaml"}
        assert _same(load(tmp_path), _model(0))

    def test_an_interrupt_between_the_two_files_leaves_the_new_model(self, tmp_path, monkeypatch):
        save(_model(0), tmp_path)
        other = build({**SPEC, "width": 6}, seed=1)
        monkeypatch.setattr(sma.checkpoint, "dump_yaml", _interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            save(other, tmp_path)
        monkeypatch.undo()
        assert _files(tmp_path) == {"model.safetensors", "spec.yaml"}
        assert _same(load(tmp_path), other)

    def test_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "taken").write_text("mine")
        with pytest.raises(
            CheckpointError,
            match=r"cannot save the model in '.*taken': .*File exists.*; the folder must be writable and ha",
        ):
            save(_model(), tmp_path / "taken")
        assert (tmp_path / "taken").read_text() == "mine"

    def test_write_keeps_the_old_file_until_the_new_one_is_complete(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        seen = []

        def write(temporary: Path) -> None:
            seen.append((path.read_text(), temporary.parent))
            temporary.write_text("new")

        sma.files.write_atomically(path, write)
        assert seen == [("old", tmp_path)]
        assert path.read_text() == "new"
        assert _files(tmp_path) == {"file"}


def _rewrite(folder: Path, change: Any, metadata: dict[str, str] | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


METADATA = {"spec": json.dumps(SPEC)}


class TestDamaged:
    @pytest.mark.parametrize("folder", [".", "none"])
    def test_missing_model(self, tmp_path, folder):
        with pytest.raises(
            CheckpointError,
            match=r"there is no saved model in '.*': model\.safetensors is missing; give a folder that sma\.sa",
        ):
            load(tmp_path / folder)

    def test_a_file_in_place_of_the_folder_is_refused(self, tmp_path):
        save(_model(), tmp_path)
        with pytest.raises(
            CheckpointError, match=r"^'.*model\.safetensors' is a file; give the folder in which sma\.save wrote"
        ):
            load(tmp_path / "model.safetensors")

    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda content: b"", id="empty"),
            pytest.param(lambda content: content[:5], id="cut in its header size"),
            pytest.param(lambda content: content[:100], id="cut in its header"),
            pytest.param(lambda content: content[:-1], id="cut at its end"),
            pytest.param(lambda content: b"PK\x03\x04" + content[4:], id="another format"),
        ],
    )
    def test_damaged_file_is_refused(self, tmp_path, damage):
        path = save(_model(), tmp_path) / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file: "):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("change", "metadata", "complaint"),
        [
            pytest.param(
                lambda tensors: tensors.pop("encoder.weight"),
                METADATA,
                r"model\.safetensors does not fit its spec: missing \['encoder\.weight'\], unknown nothing",
                id="a tensor too few",
            ),
            pytest.param(
                lambda tensors: tensors.update(extra=torch.zeros(1)),
                METADATA,
                r"does not fit its spec: missing nothing, unknown \['extra'\]",
                id="a tensor too many",
            ),
            pytest.param(
                lambda tensors: tensors.update({"encoder.weight": torch.zeros(5, 3)}),
                METADATA,
                r"does not fit its spec: 'encoder\.weight' is float32 of shape \(5, 3\); "
                r"expected float32 of shape \(5, 4\)$",
                id="a tensor of another shape",
            ),
            pytest.param(
                lambda tensors: tensors.update({"encoder.weight": torch.zeros(5, 4, dtype=torch.int32)}),
                METADATA,
                r"does not fit its spec: 'encoder\.weight' is int32 of shape \(5, 4\); expected float32 of shape",
                id="integers",
            ),
            pytest.param(
                lambda tensors: tensors.update({"encoder.weight": torch.zeros(5, 4).to(torch.float8_e4m3fn)}),
                METADATA,
                r"'encoder\.weight' is float8_e4m3fn of shape \(5, 4\); expected float32 of shape",
                id="8 bits",
            ),
            pytest.param(
                lambda tensors: tensors.update({"encoder.weight": torch.zeros(5, 4, dtype=torch.complex64)}),
                METADATA,
                r"'encoder\.weight' is complex64 of shape \(5, 4\); expected float32 of shape",
                id="complex numbers",
            ),
            pytest.param(
                lambda tensors: tensors.update({"layers.0.routed.router.score_bias": torch.zeros(2, dtype=torch.bool)}),
                METADATA,
                r"'layers\.0\.routed\.router\.score_bias' is bool of shape \(2,\); expected float32 of shape",
                id="a buffer of another dtype",
            ),
            pytest.param(
                lambda tensors: None,
                None,
                r"model\.safetensors holds weights without a spec; load the model with the code that wrote it",
                id="no spec",
            ),
            pytest.param(
                lambda tensors: None,
                {"spec": json.dumps({**SPEC, "width": 0})},
                r"the spec saved in .*model\.safetensors cannot be built here: SequenceClassifierSpec: "
                r"width=0 must be at least 1",
                id="an impossible spec",
            ),
            pytest.param(
                lambda tensors: None,
                {"spec": '"/etc/hostname"'},
                r"the spec saved in .* cannot be built here: it is '/etc/hostname'; expected a mapping of fields$",
                id="a spec that is a path",
            ),
            pytest.param(
                lambda tensors: None,
                {"spec": "[" * 100_000},
                r"the spec saved in .* cannot be built here: (RecursionError|Expecting value)",
                id="a deep spec",
            ),
            pytest.param(
                lambda tensors: None,
                {"spec": json.dumps({**SPEC, "head": "x" * 5_000_000})},
                r"the spec saved in .* cannot be built here: it has 5,\d\d\d,\d\d\d characters; "
                r"at most 4,194,304 are read$",
                id="an enormous spec",
            ),
            pytest.param(
                lambda tensors: None,
                {"spec": json.dumps({**SPEC, "width": 25000, "layers": {**SPEC["layers"], "repeat": 9999}})},
                r"model\.safetensors does not fit its spec: "
                r"it holds [\d,]+ numbers, and the spec has [\d,]+ parameters; save the",
                id="a spec of a larger model",
            ),
            pytest.param(
                lambda tensors: None,
                {"spec": '{"kind": '},
                r"the spec saved in .* cannot be built here: Expecting value",
                id="half a spec",
            ),
        ],
    )
    def test_weights_that_do_not_fit_the_spec_are_refused(self, tmp_path, change, metadata, complaint):
        save(_model(), tmp_path)
        _rewrite(tmp_path, change, metadata)
        with pytest.raises(CheckpointError, match=complaint):
            load(tmp_path)


def test_a_killed_write_leaves_a_draft_that_can_be_removed(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from sma.files import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), lambda draft: "
        "(draft.write_text('half'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    (tmp_path / "model").write_text("whole")
    assert (
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False).returncode == -signal.SIGKILL
    )
    assert len(_files(tmp_path)) == 2
    (tmp_path / ".mine").write_text("")
    sma.files.remove_drafts(tmp_path)
    assert _files(tmp_path) == {"model", ".mine"}
    assert (tmp_path / "model").read_text() == "whole"
