"""Available devices are returned; the error for others lists those that exist."""

import pytest
import torch

import sma
from sma.devices import _sum_by_doubling, running_sum, usable_device
from sma.errors import CheckpointError, InputError
from tests.no_host import NoHost
from tests.test_sma.test_checkpoint import INPUTS, _model


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None, "cpu:0"])
def test_a_model_is_loaded_onto_a_device(tmp_path, device):
    sma.save(_model(), tmp_path)
    loaded = sma.load(tmp_path, device=device)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(loaded(INPUTS).logits, _model()(INPUTS).logits)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_model_loaded_on_meta_has_shapes_without_values(tmp_path, device):
    model = _model(dtype=torch.bfloat16)
    sma.save(model, tmp_path)
    loaded = sma.load(tmp_path, device=device).state_dict()
    assert all(tensor.is_meta for tensor in loaded.values())
    assert {name: (t.shape, t.dtype) for name, t in loaded.items()} == {
        n: (t.shape, t.dtype) for n, t in model.state_dict().items()
    }


def test_load_ignores_the_default_device_if_one_is_given(tmp_path):
    sma.save(_model(), tmp_path)
    with torch.device("meta"):
        loaded = sma.load(tmp_path, device="cpu")
    assert torch.equal(loaded(INPUTS).logits, _model()(INPUTS).logits)


CAUSAL = {
    "kind": "language_model",
    "width": 8,
    "encoder": {"kind": "token_embedding", "vocabulary": 7},
    "layers": [
        {
            "backbone": {"kind": "ema", "state_size": 2, "bidirectional": False},
            "norm": {"kind": "layer_norm"},
            "modules": {
                "near": {"kind": "gau", "query_size": 4, "hidden_size": 6, "window": 3, "bidirectional": False},
                "far": {"kind": "gau", "query_size": 4, "hidden_size": 6, "bidirectional": False},
                "mlp": {"kind": "gated_mlp", "hidden_size": 6},
            },
        }
    ],
}


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_with_a_capacity_runs_on_meta_and_gives_the_shapes(masked):
    inputs = torch.zeros(2, 9, dtype=torch.int64)
    valid = inputs == 0 if masked else None
    real = sma.build(CAUSAL, seed=0)(inputs, valid, capacity=4)
    sizes = sma.build(CAUSAL, seed=0).to("meta")(
        inputs.to("meta"), None if valid is None else valid.to("meta"), capacity=4
    )
    pairs = [(getattr(real, name), getattr(sizes, name)) for name in ("hidden", "pooled", "logits")]
    pairs += [
        (getattr(real.decisions[0], name), getattr(sizes.decisions[0], name))
        for name in ("active", "confidence", "overflow")
    ]
    assert all(size.is_meta and (size.shape, size.dtype) == (tensor.shape, tensor.dtype) for tensor, size in pairs)


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_without_a_capacity_is_refused_on_meta(masked, as_users_run):
    inputs = torch.zeros(2, 9, dtype=torch.int64, device="meta")
    with pytest.raises(
        InputError, match=r"^how many tokens are active is not known on the meta device; give a capacity, or load the"
    ):
        sma.build(CAUSAL, seed=0).to("meta")(inputs, inputs == 0 if masked else None)


UNUSABLE = ["gpu", "", "nonsense" * 500, "cpu:x", 3.5, -1, "mkldnn", "vulkan", "privateuseone"]
if not torch.cuda.is_available():
    UNUSABLE += ["cuda", "cuda:7", torch.device("cuda:7")]


@pytest.mark.parametrize("device", UNUSABLE, ids=lambda device: str(device)[:9])
@pytest.mark.filterwarnings("ignore:.*is no longer used as device type:UserWarning")
def test_the_error_for_a_missing_device_lists_the_available_ones(tmp_path, device, as_users_run):
    sma.save(_model(), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"^the device .* cannot be used: .*; there are 'cpu'.*, 'meta' \(sizes without values\)$"
    ) as caught:
        sma.load(tmp_path, device=device)
    assert len(str(caught.value)) < 600
    with pytest.raises(InputError, match="cannot be used"):
        usable_device(device)


def test_no_device_means_the_default_device_of_torch():
    with torch.device("meta"):
        assert usable_device(None).type == "meta"


@pytest.mark.parametrize("length", [0, 1, 2, 7, 64, 65])
def test_a_running_sum_by_doubling_equals_cumsum(length):
    x = torch.randint(-9, 9, (3, length)).double()
    assert torch.equal(_sum_by_doubling(x), x.cumsum(-1))
    assert torch.equal(running_sum(x), x.cumsum(-1))


def test_a_deterministic_running_sum_calls_no_nondeterministic_operator():
    x = torch.ones(3, 9, device="meta")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with NoHost() as host:
            assert running_sum(x).shape == x.shape
        assert host.calls
    finally:
        torch.use_deterministic_algorithms(before)
