"""The exploring router: its trials, which reverse decisions, its gradients from inactive tokens, and its training."""

import pytest
import torch
from torch import Tensor

import sma
from sma.budget import BudgetController, BudgetSpec
from sma.errors import SpecError
from sma.losses import budget_loss, policy_gradient_loss
from sma.routers import ExploreRouter, ExploreRouterSpec, SMARouterSpec
from tests.cases import normal

WIDTH = 6


def router(**fields: float) -> ExploreRouter:
    torch.manual_seed(0)
    return ExploreRouterSpec(temperature_scale=0.3, **fields).build(WIDTH, ["mlp"]).double()


@pytest.mark.parametrize("tries", [0.02, 0.2])
def test_trials_reverse_their_share_of_the_decisions_of_sma_in_training_only(tries):
    part, control = router(tries=tries), normal(50, 200, WIDTH)
    plain = SMARouterSpec(temperature_scale=0.3).build(WIDTH, ["mlp"]).double()
    plain.load_state_dict({name: value for name, value in part.state_dict().items() if name != "updates"})
    wanted = plain(control)[0].active
    assert torch.equal(part.eval()(control)[0].active, wanted)
    seen = []
    for update in range(3):
        part.train().set_step(update)
        decision = part(control)[0]
        seen.append(decision.active ^ wanted)
        assert seen[-1].double().mean().item() == pytest.approx(tries, abs=4 * (tries / control[..., 0].numel()) ** 0.5)
        assert torch.equal(decision.p_on.detach() > 0.5, wanted)
    assert not torch.equal(seen[0], seen[1])


def test_a_router_without_active_tokens_still_learns_from_its_trials():
    part, control = router(tries=0.1), normal(4, 50, WIDTH)
    with torch.no_grad():
        part.bias[1] = -5.0
    for training in (True, False):
        part.zero_grad()
        decision = part.train(training)(control)[0]
        (decision.confidence * decision.active).sum().backward()
        assert bool(part.weight.grad.any()) == training
    assert decision.confidence.max() < 0.5


def test_losses_of_the_rate_give_gradients_through_the_probability():
    part, control = router(tries=0.1), normal(4, 50, WIDTH)
    budget_loss([part.train()(control)[0]], 0.9).backward()
    assert part.weight.grad.any()


def test_a_nan_token_is_never_tried():
    part = router(tries=0.49)
    control = normal(4, 50, WIDTH).masked_fill(torch.rand(4, 50, 1) < 0.5, torch.nan)
    assert not part.train()(control)[0].active[control[..., 0].isnan()].any()


@pytest.mark.parametrize("start", [-2.0, 2.0], ids=["all off", "all on"])
def test_trials_find_the_tokens_that_lower_the_loss_of_their_row(start):
    """Half of the tokens lower the loss of their row if they are active; the loss does not use their own results."""
    torch.manual_seed(0)
    part = ExploreRouterSpec(tries=0.1).build(2, ["mlp"]).train()
    with torch.no_grad():
        part.weight.zero_()
        part.bias[1] = start
    useful = torch.rand(64, 20) < 0.5
    control = torch.stack([useful, ~useful], -1).float()
    optimizer = torch.optim.Adam(part.parameters(), lr=0.05)
    for update in range(200):
        part.set_step(update)
        decision = part(control)[0]
        active = decision.active.squeeze(-1)
        losses = -(active & useful).float().mean(1) + 0.5 * (active & ~useful).float().mean(1)
        optimizer.zero_grad()
        policy_gradient_loss([decision], losses).backward()
        optimizer.step()
    assert torch.equal(part.eval()(control)[0].active.squeeze(-1), useful)


def test_a_budget_holds_its_rate():
    part, control = router(), normal(8, 100, WIDTH)
    controller = BudgetController(BudgetSpec(target=0.3), [part])
    for update in range(60):
        part.train().set_step(update)
        controller.update([part(control)[0]])
    assert part.eval()(control)[0].rate().item() == pytest.approx(0.3, abs=0.02)


def test_a_stream_tries_the_same_tokens_as_the_whole():
    part, control = router(tries=0.3).train(), normal(3, 20, WIDTH)
    whole, state, parts = part(control)[0].active, part.init_state(3), []
    for start in range(0, 20, 6):
        positions = torch.arange(start, min(start + 6, 20)).expand(3, -1)
        decision, state = part(control[:, start : start + 6], None, positions, state)
        parts.append(decision.active)
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("tries", [0.0, 0.5, -1.0])
def test_an_impossible_share_of_trials_is_refused(tries: float) -> None:
    with pytest.raises(SpecError, match="tries"):
        sma.load_spec({"kind": "explore", "tries": tries}, "router")


def test_results_are_weighted_by_the_probability_even_below_one_half() -> None:
    part = router(tries=0.3).train()
    double = sma.TokenWise(torch.nn.Identity())
    routed = sma.SparseModularActivation(part, {"mlp": double})
    x: Tensor = normal(2, 30, WIDTH)
    output = routed(x)
    weight = output.decision.confidence * output.decision.active
    torch.testing.assert_close(output.values, weight * x)
    assert ((weight > 0) & (weight < 0.5)).any()
