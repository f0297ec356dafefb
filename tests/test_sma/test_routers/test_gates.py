"""The gates of the router `sma`: the confidence of a choice, its gradient, and the initial rate."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sma
from sma.errors import SpecError
from sma.routers import SMARouter, SMARouterSpec
from sma.testing import check_router
from tests.cases import generator, normal, spread

WIDTH = 6
NAMES = ("attention", "mlp")

# Confidence and its derivative at the probability of the choice.
GATES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "probability": (lambda p: p, lambda p: 1.0),
    "margin": (lambda p: 2 * p - 1, lambda p: 2.0),
    "root_margin": (
        lambda p: min(math.sqrt(2 * p - 1 + 1e-5), 1.0),
        lambda p: 1 / math.sqrt(2 * p - 1 + 1e-5) if math.sqrt(2 * p - 1 + 1e-5) <= 1 else 0.0,
    ),
    "straight_through": (lambda p: 1.0, lambda p: 1.0),
}
gates = pytest.mark.parametrize("gate", list(GATES))


def router(gate: str, **fields: float) -> SMARouter:
    made = SMARouterSpec(gate=gate, temperature_scale=0.3, **fields).build(WIDTH, NAMES).double()
    spread(made)
    return made


@gates
def test_confidence_and_its_gradient_agree_with_the_formula(gate):
    part, control = router(gate), normal(3, 7, WIDTH).requires_grad_()
    decision = part(control)[0]
    value, slope = GATES[gate]
    temperature = float(part.temperature)
    (gradient,) = torch.autograd.grad(decision.confidence.sum(), decision.logits)
    for b, t, m in torch.cartesian_prod(*map(torch.arange, decision.active.shape)).tolist():
        off, on = decision.logits[b, t, m].tolist()
        p_on = 1 / (1 + math.exp((off - on) / temperature))
        p = max(p_on, 1 - p_on)
        assert decision.confidence[b, t, m].item() == pytest.approx(value(p), abs=1e-12)
        sign = 1 if on > off else -1
        wanted = sign * slope(p) * p_on * (1 - p_on) / temperature
        assert gradient[b, t, m, 1].item() == pytest.approx(wanted, rel=1e-6, abs=1e-12)


@gates
def test_a_replayed_choice_has_the_confidence_of_its_probability(gate):
    part, control = router(gate), normal(3, 7, WIDTH)
    decision = part(control)[0]
    found = part.replay(decision, torch.ones_like(decision.active)).confidence
    for confidence, p in zip(found.flatten().tolist(), decision.p_on.flatten().tolist(), strict=True):
        wanted = GATES[gate][0](max(p, 0.5)) if gate in ("margin", "root_margin") else GATES[gate][0](p)
        assert confidence == pytest.approx(wanted, abs=1e-12)


@gates
def test_decisions_do_not_depend_on_the_gate(gate):
    control = normal(3, 7, WIDTH)
    found, wanted = router(gate)(control)[0], router("probability")(control)[0]
    assert torch.equal(found.active, wanted.active)
    assert torch.equal(found.p_on, wanted.p_on)


@pytest.mark.usefixtures("as_users_run")
@gates
def test_every_gate_keeps_the_contract(gate):
    # A straight-through confidence is constant, so its gradient is not its derivative.
    exempt = ["gradients_are_right"] if gate == "straight_through" else []
    check_router(SMARouterSpec(gate=gate, temperature_scale=0.3, initial_bias=0.5), effort=4, exempt=exempt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_everything_active_a_straight_through_layer_equals_the_dense_one(dtype):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)).to(dtype)
    spec = SMARouterSpec(gate="straight_through", initial_bias=50.0)
    routed = sma.SparseModularActivation(spec, {"mlp": sma.TokenWise(mlp)}).to(dtype)
    x = torch.randn(3, 40, WIDTH, dtype=dtype, generator=generator(1))
    output = routed(x)
    assert output.decision.active.all()
    assert torch.equal(output.values, mlp(x))
    output.values.sum().backward()
    assert routed.router.weight.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("bias", [-3.0, 0.0, 4.0])
def test_the_initial_bias_is_the_log_odds_of_being_active(bias, scale):
    part = SMARouterSpec(initial_bias=bias, temperature_scale=scale).build(WIDTH, NAMES)
    p_on = part(torch.zeros(1, 1, WIDTH))[0].p_on
    torch.testing.assert_close(p_on, torch.sigmoid(torch.full_like(p_on, bias)))


def test_the_initial_bias_changes_no_draw_of_the_weights():
    weights: list[Tensor] = []
    for bias in (0.0, 4.0):
        torch.manual_seed(0)
        weights.append(SMARouterSpec(initial_bias=bias).build(WIDTH, NAMES).weight)
    assert torch.equal(*weights)


@pytest.mark.parametrize("fields", [{"gate": "margn"}, {"initial_bias": math.inf}, {"initial_bias": 1e3}])
def test_an_impossible_gate_or_bias_is_refused(fields):
    with pytest.raises(SpecError, match=next(iter(fields))):
        sma.load_spec({"kind": "sma", **fields}, "router")
