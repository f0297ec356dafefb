"""Comparison with recordings of the SeqBoat authors' code: outputs, decisions, gradients, and conversion of weights."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sma.decision import Decision
from sma.errors import CheckpointError, SpecError
from sma.interop.seqboat import from_reference, to_reference
from sma.layer import LayerSpec, RoutedLayer
from sma.model import SequenceModel

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "parity"
SHARED = ROOT.parent / "shared" / "parity"
NAMES = (
    "always_active",
    "bidirectional_batchnorm_train",
    "bidirectional_relu2_slot_distance",
    "bidirectional_rotary_batchnorm_eval",
    "bidirectional_softmax_true_distance",
    "bidirectional_truncated_ema",
    "causal_relu2_true_distance",
    "causal_softmax_rotary",
    "classifier_two_layers",
    "full_attention_laplace",
    "full_attention_relu2",
    "full_attention_softmax",
    "lra_pixel_encoder",
    "lra_text_encoder",
    "row_with_no_active_token",
    "softmax_scalenorm_postnorm",
)
every_case = pytest.mark.parametrize("name", NAMES)


class Case(NamedTuple):
    """One recorded case."""

    info: dict[str, Any]
    tensors: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by the authors' names."""
        return self.under("param/") | self.under("buffer/")

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}

    def build(self) -> RoutedLayer | SequenceModel:
        return from_reference(self.info["kind"], self.info["config"], self.weights())

    @property
    def valid(self) -> Tensor:
        return self.tensors["valid"].bool()


class Played(NamedTuple):
    """Results of our module for a recorded case."""

    output: Tensor
    decisions: tuple[Decision, ...]
    grad_input: Tensor | None
    gradients: dict[str, Tensor]


@cache
def recorded(name: str) -> Case:
    return Case(
        json.loads((DATA / f"{name}.json").read_text(encoding="utf-8")), load_file(DATA / f"{name}.safetensors")
    )


@cache
def played(name: str, dtype: torch.dtype = torch.float32) -> Played:
    case = recorded(name)
    module = case.build().to(dtype).train(case.info["training_mode"])
    inputs = case.tensors["input"].clone()
    if inputs.is_floating_point():
        inputs = inputs.to(dtype).requires_grad_()
    result = module(inputs, case.valid)
    if isinstance(module, RoutedLayer):
        output, decisions = result.hidden, [result.decision]
    else:
        output, decisions = result.pooled if result.logits is None else result.logits, result.decisions
    output.backward(case.tensors["grad_output"].to(dtype))
    made = tuple(decision for decision in decisions if decision is not None)
    return Played(output.detach(), made, inputs.grad, to_reference(module, gradients=True))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    assert ((found - wanted).abs() <= 1e-5 * (1 + wanted.abs())).all(), f"off by {(found - wanted).abs().max()}"


def test_the_repository_has_every_recorded_case() -> None:
    assert {path.name for path in DATA.iterdir()} == {"README.md"} | {
        f"{name}.{ending}" for name in NAMES for ending in ("json", "safetensors")
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="the recordings that ours were copied from are not on this machine")
def test_the_copies_equal_the_recordings() -> None:
    assert {path.name for path in SHARED.iterdir()} == {path.name for path in DATA.iterdir()}
    assert [path.name for path in SHARED.iterdir() if path.read_bytes() != (DATA / path.name).read_bytes()] == []


@every_case
def test_output_equals_that_of_the_authors(name: str) -> None:
    case, ours = recorded(name), played(name)
    wanted = case.tensors["output"]
    assert ours.output.shape == wanted.shape
    assert_near(*((ours.output[case.valid], wanted[case.valid]) if wanted.ndim == 3 else (ours.output, wanted)))


@every_case
def test_the_same_tokens_are_active(name: str) -> None:
    case, ours = recorded(name), played(name)
    wanted = [
        case.tensors[f"layer{place}/active"].bool() for place in range(len(case.info["activation_rate_per_layer"]))
    ]
    if case.info["config"].get("always_act"):
        wanted = [case.valid]
    assert len(ours.decisions) == len(wanted)
    for decision, active in zip(ours.decisions, wanted, strict=True):
        assert decision.names == ("attention",)
        assert torch.equal(decision.active[..., 0], active)


@every_case
def test_confidence_equals_that_of_the_authors(name: str) -> None:
    case, ours = recorded(name), played(name)
    for place, decision in enumerate(ours.decisions):
        confidence = decision.confidence[..., 0][case.valid]
        if case.info["config"].get("always_act"):
            assert (confidence == 1).all()
        else:
            assert_near(confidence, case.tensors[f"layer{place}/confidence"][case.valid])


@every_case
def test_rates_equal_those_of_the_authors(name: str) -> None:
    case, ours = recorded(name), played(name)
    rates = case.info["activation_rate_per_layer"] or [1.0]
    assert [decision.rate(case.valid).item() for decision in ours.decisions] == pytest.approx(rates, abs=6e-4)


@every_case
def test_gradient_of_the_input_equals_that_of_the_authors(name: str) -> None:
    case, ours = recorded(name), played(name)
    if "grad_input" in case.tensors:
        assert ours.grad_input is not None
        assert_near(ours.grad_input[case.valid], case.tensors["grad_input"][case.valid])


@every_case
def test_gradients_of_the_weights_equal_those_of_the_authors(name: str) -> None:
    # In float64, so that only the recording has rounding errors in sums that cancel.
    wanted, found = recorded(name).under("grad/"), played(name, torch.float64).gradients
    assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in wanted.items()}
    assert [key for key, tensor in wanted.items() if not (found[key] - tensor).norm() <= 1e-4 * tensor.norm()] == []


@every_case
def test_to_reference_undoes_from_reference(name: str) -> None:
    case = recorded(name)
    # The authors' inv_freq is a constant, computed from the width, and not a weight.
    wanted = {key: tensor for key, tensor in case.weights().items() if not key.endswith("inv_freq")}
    found = to_reference(case.build())
    assert set(found) == set(wanted)
    assert [
        key for key, tensor in wanted.items() if found[key].dtype != tensor.dtype or not torch.equal(found[key], tensor)
    ] == []


@every_case
def test_a_second_conversion_changes_nothing(name: str) -> None:
    case = recorded(name)
    once = to_reference(case.build())
    again = to_reference(from_reference(case.info["kind"], case.info["config"], once))
    assert all(torch.equal(again[key], tensor) for key, tensor in once.items())


@every_case
def test_the_number_of_parameters_equals_that_of_the_authors(name: str) -> None:
    case = recorded(name)
    module = case.build()
    assert sum(tensor.numel() for tensor in module.parameters()) == sum(
        tensor.numel() for tensor in case.under("param/").values()
    )


def test_to_reference_returns_copies() -> None:
    module = recorded("causal_softmax_rotary").build()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for tensor in to_reference(module).values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_from_reference_copies_the_given_tensors() -> None:
    case = recorded("causal_softmax_rotary")
    copies = {key: tensor.clone() for key, tensor in case.weights().items()}
    module = case.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, copies[key]) for key, tensor in case.weights().items())


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    """The weights of one case with some tensors replaced, or removed if None; `__` stands for a dot."""
    weights = recorded("causal_softmax_rotary").weights()
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        weights.pop(key, None)
        if tensor is not None:
            weights[key] = tensor
    return weights


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param(
            {"ssm__omega": None},
            r"do not fit 'standalone_layer': missing \['ssm.omega'\], unknown nothing",
            id="missing",
        ),
        pytest.param(
            {"extra": torch.ones(1)},
            r"do not fit 'standalone_layer': missing nothing, unknown \['extra'\]",
            id="unknown",
        ),
        pytest.param(
            {"ssm__omega": None, "move__omega": torch.ones(16)},
            r"missing \['ssm.omega'\], unknown \['move.omega'\]",
            id="the-other-version",
        ),
        pytest.param(
            {"ssm__omega": torch.ones(17)},
            r"'ssm.omega' has shape \(17,\), which does not fit \(16,\) here",
            id="longer",
        ),
        pytest.param(
            {"h_proj__weight": torch.ones(24, 16)},
            r"'h_proj.weight' has shape \(24, 16\), which does not fit \(16, 24\)",
            id="turned",
        ),
        pytest.param(
            {"hx_proj__weight": torch.ones(17, 16)},
            r"'hx_proj.weight' has shape \(17, 16\), which does not fit",
            id="no-router-rows",
        ),
        pytest.param(
            {"hx_proj__bias": torch.ones(1)},
            r"'hx_proj.bias' has shape \(1,\), which does not fit \(2,\) here",
            id="shorter",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Tensor | None], complaint: str) -> None:
    case = recorded("causal_softmax_rotary")
    with pytest.raises(CheckpointError, match=complaint):
        from_reference(case.info["kind"], case.info["config"], changed(**changes))


@pytest.mark.usefixtures("as_users_run")
def test_an_unknown_kind_is_refused() -> None:
    complaint = (
        r"unknown kind 'standalone_layr' .*; did you mean 'standalone_layer'\? known kinds: standalone_layer, unit"
    )
    with pytest.raises(CheckpointError, match=complaint):
        from_reference("standalone_layr", {}, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"norm_type": "groupnorm"},
            "norm_type='groupnorm' .* known: layernorm, rmsnorm, scalenorm, batchnorm, syncbatchnorm$",
        ),
        ({"norm_type": "rms_norm"}, r"norm_type='rms_norm' .*; did you mean 'rmsnorm'\? known: layernorm, rmsnorm"),
        ({"norm_type": ["layernorm"]}, r"norm_type=\['layernorm'\] of the authors' modules is not supported here"),
        ({"attention_activation": "relu"}, "attention_activation='relu' .* known: softmax, relu2, laplace$"),
        (
            {"rel_pos_bias": "t5"},
            "rel_pos_bias='t5' of the authors' modules is not supported here; known: simple, rotary$",
        ),
        ({"activation": "gelu"}, "activation='gelu' of the authors' modules is not supported here; .*known: silu$"),
    ],
)
def test_an_unsupported_value_of_the_authors_config_is_refused(changes: dict[str, Any], complaint: str) -> None:
    case = recorded("causal_softmax_rotary")
    with pytest.raises(CheckpointError, match=complaint):
        from_reference(case.info["kind"], {**case.info["config"], **changes}, case.weights())


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [(argument, wrong) for argument in ("embed_dim", "zdim", "chunk_size") for wrong in (None, "wide", [1])]
    + [("embed_dim", -1)],
)
def test_an_argument_of_a_wrong_type_is_refused(argument: str, wrong: Any) -> None:
    case = recorded("always_active")
    with pytest.raises((CheckpointError, SpecError), match=r"; give the arguments of the authors|zdim|query_size"):
        from_reference(case.info["kind"], {**case.info["config"], argument: wrong}, case.weights())


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("kind", [None, 3, ["unit"]])
def test_a_kind_of_a_wrong_type_is_refused(kind: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"^unknown kind .* of the authors' modules; .*known kinds: standalone_layer, unit"
    ):
        from_reference(kind, {}, {})


@pytest.mark.parametrize(
    "name", ["causal_softmax_rotary", "classifier_two_layers", "lra_text_encoder", "always_active"]
)
def test_the_error_names_a_missing_argument(name: str) -> None:
    case = recorded(name)
    widths = {"embed_dim", "d_model", "embedding_dim", "zdim", "d_qk", "z_dim"}
    for argument in widths & set(case.info["config"]):
        config = {key: value for key, value in case.info["config"].items() if key != argument}
        with pytest.raises(
            CheckpointError, match=f"^the config of '{case.info['kind']}' lacks '{argument}'; give every argument"
        ):
            from_reference(case.info["kind"], config, case.weights())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["layernorm", "rmsnorm", "scalenorm", "batchnorm", "syncbatchnorm"])
def test_every_norm_equals_that_of_the_authors(name: str, affine: bool) -> None:
    """The authors' formulas: eps is 1e-5 in all; RMS and scale norm multiply by the gain before the division."""
    case = recorded("bidirectional_softmax_true_distance")
    weights = {key: value for key, value in case.weights().items() if ".norm." not in f".{key}"}
    width = case.info["config"]["embed_dim"]
    gain, bias = (torch.randn(1 if name == "scalenorm" else width) for _ in range(2))
    mean, var = torch.randn(width), torch.rand(width) + 0.5
    if affine:
        weights["norm.norm.scalar" if name == "scalenorm" else "norm.norm.weight"] = gain
        if name not in ("rmsnorm", "scalenorm"):
            weights["norm.norm.bias"] = bias
    if "batch" in name:
        weights |= {
            "norm.norm.running_mean": mean,
            "norm.norm.running_var": var,
            "norm.norm.num_batches_tracked": torch.tensor(3),
        }
    module = from_reference(
        case.info["kind"], {**case.info["config"], "norm_type": name, "norm_affine": affine}, weights
    ).eval()
    x = 0.01 * torch.randn(2, 7, width)
    if name in ("rmsnorm", "scalenorm"):
        wanted = (x * gain if affine else x) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    else:
        centre, spread = (
            (mean, var) if "batch" in name else (x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True))
        )
        wanted = (x - centre) * torch.rsqrt(spread + 1e-5)
        wanted = wanted * gain + bias if affine else wanted
    assert isinstance(module, RoutedLayer)
    assert module.norm is not None
    torch.testing.assert_close(module.norm(x), wanted)
    back = to_reference(module)
    assert set(back) == {key for key in weights if not key.endswith("num_batches_tracked")}
    assert all(torch.equal(back[key], weights[key]) for key in back)


def test_gradients_before_backward_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'ssm.alpha' has no gradient; call backward\(\) first"):
        to_reference(recorded("causal_softmax_rotary").build(), gradients=True)


def test_a_module_that_was_not_loaded_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"was not made by sma\.interop\.seqboat\.from_reference, so the authors' names"
    ):
        to_reference(LayerSpec().build(4))


def test_a_part_without_a_counterpart_in_the_authors_code_is_refused() -> None:
    module = recorded("causal_softmax_rotary").build()
    module.bypass = None
    with pytest.raises(
        CheckpointError, match="a layer without a GAU or a linear bypass has no counterpart in the authors' code"
    ):
        to_reference(module)
