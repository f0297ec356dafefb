"""The optional convolution over control states of the router `sma`: against a loop, in streams, and in models."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sma
from sma.errors import SpecError, StateError
from sma.routers import SMARouter, SMARouterSpec
from sma.routers.control import ControlConv, ControlState
from sma.testing import check_model, check_router
from tests.cases import normal, spread

WIDTH = 6
NAMES = ("attention", "mlp")

LAYER = {
    "backbone": {"kind": "ema", "state_size": 2, "bidirectional": False},
    "router": {"kind": "sma", "control_conv": 4, "temperature_scale": 0.3},
    "modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 4}},
}
MODEL = {
    "kind": "language_model",
    "width": 4,
    "encoder": {"kind": "token_embedding", "vocabulary": 7},
    "layers": {"repeat": 2, "layer": LAYER},
}


def router(taps: int | None) -> SMARouter:
    made = SMARouterSpec(control_conv=taps, temperature_scale=0.3).build(WIDTH, NAMES).double()
    spread(made)
    return made


def convolved(conv: ControlConv, control: Tensor, valid: Tensor) -> Tensor:
    """The convolution, token by token, over the valid tokens of a row; zeros at padding."""
    out = torch.zeros_like(control)
    for row in range(control.shape[0]):
        before: list[Tensor] = []
        for position in valid[row].nonzero().flatten().tolist():
            before.append(control[row, position])
            total = conv.bias.clone()
            for back, token in enumerate(reversed(before[-conv.weight.shape[1] :])):
                total = total + conv.weight[:, -1 - back] * token
            out[row, position] = total * torch.sigmoid(total)
    return out


@pytest.mark.parametrize("taps", [2, 4, 9])
def test_scores_are_computed_from_the_convolved_control_states(taps):
    part, plain = router(taps), router(None)
    plain.load_state_dict({name: value for name, value in part.state_dict().items() if not name.startswith("conv.")})
    control, valid = normal(3, 7, WIDTH), torch.rand(3, 7) < 0.7
    valid[1] = False
    leaves = [control.requires_grad_(), *part.parameters()]
    found = part(control, valid)[0]
    assert isinstance(part.conv, ControlConv)
    wanted = plain(convolved(part.conv, control, valid), valid)[0]
    assert torch.equal(found.active, wanted.active)
    weight = normal(*found.confidence.shape) * valid[..., None]
    for name in ("confidence", "p_on", "logits"):
        torch.testing.assert_close(getattr(found, name)[valid], getattr(wanted, name)[valid], atol=1e-12, rtol=0)
    gradients = torch.autograd.grad((found.confidence * weight).sum(), leaves)
    again = torch.autograd.grad((wanted.confidence * weight).sum(), [control, *part.conv.parameters()])
    named = dict(zip(["control", *(name for name, _ in part.named_parameters())], gradients, strict=True))
    for name, wanted_gradient in zip(["control", "conv.weight", "conv.bias"], again, strict=True):
        torch.testing.assert_close(named[name], wanted_gradient, atol=1e-10, rtol=0)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("taps", [2, 4])
def test_a_router_with_a_convolution_keeps_the_contract(taps):
    check_router(SMARouterSpec(control_conv=taps, temperature_scale=0.3, gate="margin"), effort=6)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_run")
def test_a_model_with_a_convolution_keeps_the_contract():
    check_model(sma.load_spec(MODEL), effort=4)


def test_the_convolution_changes_no_other_initial_weights():
    assert SMARouterSpec().control_conv is None
    weights: list[Tensor] = []
    for taps in (None, 4):
        torch.manual_seed(0)
        part = SMARouterSpec(control_conv=taps).build(WIDTH, NAMES)
        weights.append(part.weight)
        assert (set(part.state_dict()) == {"weight", "bias", "log_temperature", "score_bias"}) == (taps is None)
    assert torch.equal(*weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_stream_keeps_the_newest_control_states_in_float32_or_wider(dtype):
    part = SMARouterSpec(control_conv=4).build(WIDTH, NAMES).to(dtype)
    state = part.init_state(2)
    assert isinstance(state, ControlState)
    control = normal(2, 5, WIDTH).to(dtype)
    valid = torch.tensor([[True] * 5, [False, True, False, False, False]])
    after = part(control, valid, None, state)[1]
    assert after.newest.dtype is torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(after.newest[0], control[0, 2:].to(after.newest.dtype))
    torch.testing.assert_close(after.newest[1, -1], control[1, 1].to(after.newest.dtype))
    assert not after.newest[1, :2].any()


def test_the_state_of_another_router_is_refused():
    control = normal(2, 5, WIDTH)
    with pytest.raises(StateError, match=r"SMARouter got the state of another model: control states \(2, 6\) instead"):
        router(4)(control, None, None, router(3).init_state(2))
    with pytest.raises(StateError, match="ControlState"):
        router(4)(control, None, None, router(None).init_state(2))


@pytest.mark.parametrize("taps", [0, 1, 257, 2.5])
def test_a_convolution_of_no_or_too_many_tokens_is_refused(taps):
    with pytest.raises(SpecError, match="control_conv"):
        sma.load_spec({"kind": "sma", "control_conv": taps}, "router")


def test_macs_of_the_convolution_are_elementwise_and_those_of_the_scores_matmul():
    with_it, without = sma.load_spec(MODEL), sma.load_spec(MODEL, overrides={"layers.layer.router.control_conv": None})
    found, plain = with_it.macs(10), without.macs(10)
    assert found.matmul == plain.matmul
    assert found.elementwise - plain.elementwise == 2 * 10 * 4 * 4
    part = router(4).float()
    with FlopCounterMode(display=False) as counter:
        part(normal(1, 10, WIDTH, dtype=torch.float32))
    spec, count = part.spec, len(NAMES)
    scored = spec.macs_per_token(WIDTH, count) - spec.elementwise_macs_per_token(WIDTH, count)
    assert 10 * scored == counter.get_total_flops() / 2


def test_decisions_of_a_model_with_a_convolution_are_replayed():
    model = sma.build(sma.load_spec(MODEL), seed=0).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    ids = torch.randint(7, (3, 9))
    valid = torch.rand(3, 9) < 0.8
    output = model(ids, valid)
    again = model(ids, valid, decisions=output.decisions)
    torch.testing.assert_close(again.logits[valid], output.logits[valid], atol=1e-12, rtol=0)
