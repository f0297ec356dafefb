"""Devices: what can be used is, and of what cannot one sentence says what there is."""

import pytest
import torch

import sma
from sma.devices import usable_device
from sma.errors import CheckpointError, InputError
from tests.test_sma.test_checkpoint import INPUTS, _model


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None, "cpu:0"])
def test_a_model_is_loaded_onto_a_device(tmp_path, device):
    sma.save(_model(), tmp_path)
    loaded = sma.load(tmp_path, device=device)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(loaded(INPUTS).logits, _model()(INPUTS).logits)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_on_meta_a_model_has_sizes_and_no_weights(tmp_path, device):
    model = _model(dtype=torch.bfloat16)
    sma.save(model, tmp_path)
    loaded = sma.load(tmp_path, device=device).state_dict()
    assert all(tensor.is_meta for tensor in loaded.values())
    assert {name: (t.shape, t.dtype) for name, t in loaded.items()} == {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}


UNUSABLE = ["gpu", "", "nonsense" * 500, "cpu:x", 3.5, -1, "mkldnn", "vulkan", "privateuseone"]
if not torch.cuda.is_available():
    UNUSABLE += ["cuda", "cuda:7", torch.device("cuda:7")]


@pytest.mark.parametrize("device", UNUSABLE, ids=lambda device: str(device)[:9])
@pytest.mark.filterwarnings("ignore:.*is no longer used as device type:UserWarning")
def test_a_device_that_is_not_there_is_named_with_those_that_are(tmp_path, device, as_users_run):
    sma.save(_model(), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"^the device .* cannot be used: .*; there are 'cpu'.*, 'meta' \(sizes without values\)$"
    ) as caught:
        sma.load(tmp_path, device=device)
    assert len(str(caught.value)) < 600
    with pytest.raises(InputError, match="cannot be used"):
        usable_device(device)


def test_no_device_is_where_torch_makes_tensors_now():
    with torch.device("meta"):
        assert usable_device(None).type == "meta"
