"""Weights under former names can be loaded everywhere; files of a newer version raise an error."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sma
from sma.checkpoint import WEIGHTS
from sma.errors import CheckpointError
from sma.formats import FORMAT, check_format, rename, renamed
from sma.tensor_file import open_tensors, write_tensors

SPEC: dict[str, Any] = {
    "kind": "sequence_encoder",
    "width": 4,
    "encoder": {"kind": "real_number"},
    "layers": [
        {
            "modules": {
                "router": {"kind": "gau", "query_size": 2, "hidden_size": 4},
                "out": {"kind": "gated_mlp", "hidden_size": 3},
            }
        }
    ],
}
FORMER, PRESENT = "layers.0.routed.router.offset", "layers.0.routed.router.score_bias"
OLDER = Path(__file__).resolve().parents[1] / "data" / "baseline" / "format_0"


def _model() -> sma.SequenceModel:
    model = sma.build(SPEC, seed=0)
    model.state_dict()[PRESENT].fill_(0.25)
    return model


def _former(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as version 0 named them."""
    return {_former_name(name): tensor for name, tensor in weights.items()}


def _former_name(name: str) -> str:
    return name.replace(PRESENT, FORMER).replace(".in_proj.", ".fused.").replace(".out_proj.", ".out.")


def test_only_names_that_the_model_lacks_are_renamed() -> None:
    """A sub-module named `router` may have its own `offset`, and a sub-module may be named `out`."""
    weights = _model().state_dict()
    kept, inside = "layers.0.routed.submodules.router.offset", "layers.0.routed.submodules.out.out_proj.weight"
    assert {kept, inside} <= set(weights)
    assert renamed(_former(weights), weights) == {
        former: name for name in weights if (former := _former_name(name)) != name
    }
    assert renamed(weights, weights) == {}
    assert renamed([FORMER], ["layers.0.routed.router.offset"]) == {}
    assert renamed(["out.weight", "out_proj.weight"], ["out.weight", "out_proj.weight"]) == {}


def test_a_parametrised_map_is_renamed() -> None:
    present = "attention.in_proj.parametrizations.weight.original0"
    assert renamed([present.replace("in_proj", "fused")], [present]) == {present.replace("in_proj", "fused"): present}


def test_weights_inside_another_module_are_renamed() -> None:
    weights = {f"model.{name}": tensor for name, tensor in _former(_model().state_dict()).items()}
    rename(weights, _model().state_dict(), "model.")
    assert set(weights) == {f"model.{name}" for name in _model().state_dict()}


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.Sequential(model)], ids=["alone", "inside"])
def test_torch_loads_weights_of_version_0(wrap: Any) -> None:
    weights = _former(wrap(_model()).state_dict())
    loaded = wrap(sma.build(SPEC, seed=1))
    given = dict(weights)
    loaded.load_state_dict(weights)
    assert weights == given  # the mapping of the caller is unchanged
    for name, tensor in wrap(_model()).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def _rewrite(folder: Path, version: str | None, former: bool = False) -> Path:
    """The file of the same model as written by another version."""
    with open_tensors(folder / WEIGHTS) as file:
        tensors = {name: file.read(name, torch.device("cpu")) for name in file.entries}
        metadata = {name: text for name, text in file.metadata.items() if name != "format_version"}
    metadata |= {} if version is None else {"format_version": version}
    write_tensors(folder / WEIGHTS, _former(tensors) if former else tensors, metadata)
    return folder


def test_a_folder_of_version_0_loads_and_is_saved_in_the_present_version(tmp_path: Path) -> None:
    _rewrite(sma.save(_model(), tmp_path / "old"), None, former=True)
    loaded = sma.load(tmp_path / "old")
    assert (loaded.state_dict()[PRESENT] == 0.25).all()
    sma.save(loaded, tmp_path / "new")
    with open_tensors(tmp_path / "new" / WEIGHTS) as file:
        assert file.metadata["format_version"] == str(FORMAT)
        assert PRESENT in file.entries
        assert FORMER not in file.entries


@pytest.mark.parametrize("version", [str(FORMAT + 1), "-1", "one", ""])
def test_a_file_of_another_version_is_refused(tmp_path: Path, version: str) -> None:
    folder = _rewrite(sma.save(_model(), tmp_path), version)
    with pytest.raises(CheckpointError, match=rf"has the format version '{version}', and this version of sma reads up"):
        sma.load(folder)


def test_a_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    shutil.copy(OLDER / "language" / "state.safetensors", tmp_path / "state")
    model = sma.load(OLDER / "language")
    sma.save_state(sma.load_state(tmp_path / "state", model.init_state(1)), tmp_path / "state")
    with open_tensors(tmp_path / "state") as file:
        assert file.metadata["format_version"] == str(FORMAT)
        tensors = {name: file.read(name, torch.device("cpu")) for name in file.entries}
    write_tensors(tmp_path / "state", tensors, {"format_version": str(FORMAT + 1)})
    with pytest.raises(CheckpointError, match="upgrade sma"):
        sma.load_state(tmp_path / "state", model.init_state(1))


def test_a_checkpoint_of_a_newer_version_is_refused() -> None:
    check_format({}, "a checkpoint of version 0")
    check_format({"format_version": FORMAT}, "a checkpoint")
    with pytest.raises(CheckpointError, match=r"^a checkpoint has the format version '\d+', .*; upgrade sma$"):
        check_format({"format_version": FORMAT + 1}, "a checkpoint")
