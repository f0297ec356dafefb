"""Novelty against its formula, and what it chooses."""

import pytest
import torch
from sma.budget import BudgetController, BudgetSpec
from sma.errors import SpecError

from sma_shift.novelty import NoveltyRouter, NoveltyRouterSpec


def router(modules: int = 1, **fields: float) -> NoveltyRouter:
    return NoveltyRouterSpec(**fields).build(4, [f"m{place}" for place in range(modules)]).double()


def test_every_token_is_decided_by_the_formula() -> None:
    torch.manual_seed(0)
    one = router(2)
    with torch.no_grad():
        one.gain.normal_(std=5)
        one.threshold.uniform_()
        one.score_bias.normal_()
    control, valid = torch.randn(3, 8, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 8) < 0.6
    decision, _ = one(control, valid)
    assert not decision.active[~valid].any()
    confidences = []
    for b in range(3):
        before = torch.zeros(4, dtype=torch.float64)
        for t in valid[b].nonzero().squeeze(1):
            token = control[b, t]
            novelty = (token - before).abs().sum() / (token.abs().sum() + before.abs().sum() + 4e-6)
            p_on = torch.sigmoid(one.gain * (novelty - one.threshold) + one.score_bias)
            torch.testing.assert_close(decision.p_on[b, t], p_on)
            assert torch.equal(decision.active[b, t], p_on > 0.5)
            confidences.append(torch.maximum(p_on, 1 - p_on))
            before = token
    wanted = torch.stack(confidences)
    torch.testing.assert_close(decision.confidence[valid], wanted)
    inputs, weight = [control, *one.parameters()], torch.randn_like(wanted)
    gradients = [torch.autograd.grad((found * weight).sum(), inputs) for found in (decision.confidence[valid], wanted)]
    torch.testing.assert_close(*gradients)


def test_what_repeats_is_not_new_and_the_first_token_is() -> None:
    control = torch.ones(1, 5, 4, dtype=torch.float64)
    control[:, 3:] = -1
    assert router()(control)[0].active[0, :, 0].tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("size", [1e-2, 1e2, 1e20])
def test_the_size_of_tokens_does_not_matter(size: float) -> None:
    control = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    one = router().float()
    found, wanted = one(control * size)[0], one(control)[0]
    assert 0 < wanted.rate().item() < 1
    torch.testing.assert_close(found.p_on, wanted.p_on, atol=1e-3, rtol=0)


def test_a_higher_threshold_activates_fewer_tokens() -> None:
    control = torch.randn(4, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rates = [router(threshold=threshold)(control)[0].rate().item() for threshold in (0.0, 0.4, 0.6, 1.0)]
    assert rates[0] == 1
    assert rates[-1] == 0
    assert rates == sorted(rates, reverse=True)


def test_a_budget_holds_its_rate() -> None:
    control = torch.randn(4, 200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = router(2)
    controller = BudgetController(BudgetSpec(target={"m0": 0.2, "m1": 0.7}, speed=0.5), [one])
    for _ in range(30):
        controller.update([one(control)[0]])
    assert one(control)[0].rate().tolist() == pytest.approx([0.2, 0.7], abs=0.02)


def test_a_threshold_beyond_the_range_is_refused() -> None:
    with pytest.raises(SpecError, match=r"NoveltyRouterSpec: threshold=1\.5 must be at most 1"):
        NoveltyRouterSpec(threshold=1.5)
