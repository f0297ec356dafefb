"""Routers at extreme temperatures and scores: the scores decide, and every rate is reachable."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from sma import SparseModularActivation, load_spec
from sma.budget import BudgetController, BudgetSpec
from sma.calibration import calibrate
from sma.routers import Router, RouterSpec
from tests.cases import generator

NAMES = ("a", "b", "c")
TEMPERED: dict[str, dict[str, Any]] = {
    "sma": {"kind": "sma"},
    "exclusive": {"kind": "exclusive"},
    "top_k with a skip": {"kind": "top_k", "skips": 1},
    "top_k of all": {"kind": "top_k", "k": 2, "skips": 2},
    "top_k": {"kind": "top_k", "k": 2},
}
OTHERS: dict[str, dict[str, Any]] = {
    "threshold": {"kind": "threshold"},
    "a high threshold": {"kind": "threshold", "threshold": 0.999},
    "gumbel": {"kind": "gumbel", "temperature": 1e4, "final_temperature": 1e-4},
    "bernoulli": {"kind": "bernoulli"},
    "expert_choice": {"kind": "expert_choice", "share": 0.3},
}
ROUTERS = {**TEMPERED, **OTHERS}
BREAKS_TIES = ("top_k", "expert_choice")
TEMPERATURES = (1e-4, 1.0, 1e3, 1e4)


def _router(name: str, scale: float = 1.0, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> Router:
    fields = {**ROUTERS[name], **({"temperature_scale": temperature} if name in TEMPERED else {})}
    spec: RouterSpec = load_spec(fields, "router")
    torch.manual_seed(0)
    router = spec.build(8, NAMES).to(dtype)
    with torch.no_grad():
        for parameter in (router.weight, router.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(3)) * scale)
    return router.eval()


def _assert_the_scores_decided(router: Router, control: Tensor, valid: Tensor | None = None) -> None:
    decision, _ = router(control, valid)
    off, on = decision.logits.unbind(-1)
    wanted = on > off if valid is None else (on > off) & valid[..., None]
    tied = on == off if router.spec.kind in BREAKS_TIES else torch.zeros_like(wanted)
    assert torch.equal(decision.active & ~tied, wanted & ~tied)
    chosen = decision.confidence[decision.active]
    assert chosen.isfinite().all()
    assert ((chosen > 0) & (chosen <= 1)).all()
    assert decision.p_on.isfinite().all()
    if router.training or router.spec.kind == "threshold":
        return
    grads = torch.autograd.grad(
        (decision.confidence + decision.p_on).sum(), list(router.parameters()), allow_unused=True
    )
    assert all(grad is None or grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_are_active_if_the_score_for_on_is_larger(name, scale, temperature):
    control = torch.randn(3, 200, 8, generator=generator(1))
    valid = torch.arange(200) < torch.tensor([[200], [7], [0]])
    router = _router(name, scale, temperature)
    _assert_the_scores_decided(router, control)
    _assert_the_scores_decided(router, control, valid)
    if router.stochastic:
        drawn, _ = router.train()(control, valid)
        assert drawn.p_on.isfinite().all()
        assert drawn.confidence.isfinite().all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ROUTERS)
def test_tokens_are_active_if_the_score_for_on_is_larger_in_every_dtype(name, dtype, temperature):
    router = _router(name, 1.0, temperature, dtype)
    _assert_the_scores_decided(router, torch.randn(3, 200, 8, generator=generator(1)).to(dtype))


@pytest.mark.parametrize("name", ROUTERS)
def test_scores_that_differ_by_one_rounding_step_decide(name):
    """Adjacent floats are equal after the softmax, and no value lies between them."""
    router = _router(name, 0.0, 1e4 if name in TEMPERED else 1.0)
    above = float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    with torch.no_grad():
        router.weight[0 if router.weight.shape[0] in (3, 5) else 1, 0] = 1.0
    control = torch.zeros(1, 4, 8)
    control[0, :, 0] = torch.tensor([1.0, above, 1.0, -above])
    _assert_the_scores_decided(router, control)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "name", sorted(name for name in ROUTERS if ROUTERS[name]["kind"] not in BREAKS_TIES and "high" not in name)
)
def test_equal_scores_are_inactive_at_every_temperature(name, temperature):
    router = _router(name, 0.0, temperature)
    assert not router(torch.randn(2, 5, 8))[0].active.any()
    with torch.no_grad():
        router.bias += 0.0 if name == "threshold" else 1e6
    assert not router(torch.randn(2, 5, 8))[0].active.any()


@pytest.mark.parametrize("name", ROUTERS)
def test_infinite_scores_decide_and_nan_scores_are_inactive(name):
    router = _router(name)
    with torch.no_grad():
        router.bias[-1] = math.inf
    decision, _ = router(torch.randn(2, 9, 8, generator=generator(2)))
    off, on = decision.logits.unbind(-1)
    tied = on == off
    assert torch.equal(decision.active & ~tied, (on > off) & ~tied)
    assert decision.confidence[decision.active].isfinite().all()
    with torch.no_grad():
        router.bias.fill_(math.nan)
    assert not router(torch.randn(2, 9, 8))[0].active.any()


class _Routed(torch.nn.Module):
    """A third-party module with one routed layer."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        parts = {name: load_spec({"kind": "identity"}, "sub-module").build(8) for name in NAMES}
        self.routed = SparseModularActivation(router, parts)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Any:
        output = self.routed(x, valid=valid)
        return type("Output", (), {"decisions": (output.decision,)})()


STEERED = {name: 0.2 for name in ROUTERS if name not in ("expert_choice", "top_k", "top_k of all")} | {
    "top_k": 2 / 3,
    "top_k of all": 0.3,
}


def _cases(names: Iterable[str], scales: tuple[float, ...]) -> list[tuple[str, float, float]]:
    """Router, scale and temperature, if it has one.

    Near a threshold of 6.9, float32 cannot represent differences of 1e-10.
    """
    every = ((name, scale, temperature) for name in names for scale in scales for temperature in TEMPERATURES)
    return [
        case for case in every if (case[0] in TEMPERED or case[2] == 1.0) and case[:2] != ("a high threshold", 1e-10)
    ]


@pytest.mark.parametrize(("name", "scale", "temperature"), _cases(STEERED, (1e-10, 1e-3, 1.0, 1e3, 1e10)))
def test_calibrate_reaches_its_target(name, scale, temperature):
    model = _Routed(_router(name, scale, temperature))
    data = [torch.randn(4, 500, 8, generator=generator(seed)) for seed in (1, 2)]
    # Competing sub-modules take tokens from each other, so each pass makes only partial progress.
    reached = calibrate(model, data, STEERED[name], tolerance=0.01, passes=8 if name in (*OTHERS, "sma") else 16)
    assert reached.rates[0].tolist() == pytest.approx([STEERED[name]] * 3, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-4, 1e3])
def test_calibrate_reaches_its_target_in_half_precision(temperature, dtype):
    model = _Routed(_router("sma", 1.0, temperature, dtype))
    data = [torch.randn(4, 500, 8, generator=generator(1)).to(dtype)]
    reached = calibrate(model, data, 0.3, tolerance=0.01)
    assert reached.rates[0].tolist() == pytest.approx([0.3] * 3, abs=0.01)


@pytest.mark.parametrize(
    ("name", "scale", "temperature"), _cases(("sma", "exclusive", "threshold", "bernoulli"), (1e-6, 1.0, 1e6))
)
def test_a_budget_keeps_its_target(name, scale, temperature):
    router = _router(name, scale, temperature)
    controller = BudgetController(BudgetSpec(target=0.2, speed=0.2), [router])
    for seed in range(60):
        controller.update([router(torch.randn(4, 250, 8, generator=generator(seed)))[0]])
    rates = router(torch.randn(4, 1000, 8, generator=generator(999)))[0].rate()
    assert rates.tolist() == pytest.approx([0.2] * 3, abs=0.04)
