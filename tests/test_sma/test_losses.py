"""Routing losses against loops over tokens."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.decision import Decision
from sma.errors import InputError
from sma.losses import budget_loss, load_balance_loss, policy_gradient_loss, z_loss
from sma.routers import ExclusiveRouterSpec, SMARouterSpec, TopKRouterSpec
from tests.cases import masks, normal, spread
from tests.streams import exactly, near

NAMES = ("attention", "mlp", "conv")
LOSSES = pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda decisions, valid=None: budget_loss(decisions, 0.3, valid), id="budget"),
        pytest.param(load_balance_loss, id="load_balance"),
        pytest.param(z_loss, id="z"),
    ],
)


def _decision(active: Tensor, p_on: Tensor | None = None, names: tuple[str, ...] = NAMES, seed: int = 0) -> Decision:
    """A decision with this mask and random probabilities and scores."""
    p_on = normal(*active.shape, seed=seed).sigmoid() if p_on is None else p_on
    return Decision(active, torch.ones_like(p_on), 3 * normal(*active.shape, 2, seed=seed + 1), p_on, names)


def _random(rows: int = 2, length: int = 6, seed: int = 0) -> Decision:
    return _decision(normal(rows, length, 3, seed=seed + 5) > 0, seed=seed)


class TestBudget:
    @given(valid=masks(), target=st.floats(0, 1))
    def test_value_is_the_mean_squared_distance_of_the_rates_from_the_target(self, valid, target):
        decisions = [_decision(normal(*valid.shape, 3, seed=seed) > 0) for seed in (1, 2)]
        gaps = []
        for decision in decisions:
            for m in range(3):
                tokens = [bool(decision.active[b, t, m]) for b, t in valid.nonzero().tolist()]
                gaps.append(sum(tokens) / len(tokens) - target if tokens else 0.0)
        near(
            budget_loss(decisions, target, valid),
            torch.tensor(sum(gap**2 for gap in gaps) / len(gaps), dtype=torch.float64),
        )

    @pytest.mark.parametrize("length", [0, 4])
    def test_without_a_valid_token_the_loss_and_its_gradients_are_zero(self, length):
        p_on = normal(2, length, 3).sigmoid().requires_grad_()
        decision = _decision(torch.zeros(2, length, 3, dtype=torch.bool), p_on)
        for valid in (torch.zeros(2, length, dtype=torch.bool), *([None] * (length == 0))):
            loss = budget_loss([decision], 0.3, valid)
            assert loss == 0
            assert not torch.autograd.grad(loss, [p_on])[0].any()

    def test_one_valid_token_gives_a_loss(self):
        one, valid = _random(), torch.zeros(2, 6, dtype=torch.bool)
        valid[0, 0] = True
        assert budget_loss([one], 0.3, valid) > 0

    @pytest.mark.parametrize("active", range(9))
    def test_loss_is_0_at_the_target_and_its_gradient_points_there(self, active):
        p_on = normal(2, 4, 1).sigmoid().requires_grad_()
        decision = _decision((torch.arange(8) < active).reshape(2, 4, 1), p_on, ("mlp",))
        loss = budget_loss([decision], 0.5)
        (gradient,) = torch.autograd.grad(loss, [p_on])
        assert (loss == 0) == (active == 4)
        assert torch.equal(gradient.sign(), torch.full((2, 4, 1), float((active > 4) - (active < 4))).double())
        near(gradient, torch.full((2, 4, 1), 2 * (active / 8 - 0.5) / 8).double())

    @pytest.mark.parametrize("start", [3.0, -3.0])
    def test_gradient_descent_brings_a_router_to_the_target(self, start):
        router, control = spread(SMARouterSpec().build(4, NAMES).double()), normal(2, 100, 4)
        with torch.no_grad():
            router.bias[1::2] += start
        for _ in range(200):
            gradients = torch.autograd.grad(budget_loss([router(control)[0]], {"mlp": 0.3, "conv": 0.6}), [router.bias])
            with torch.no_grad():
                router.bias -= 5.0 * gradients[0]
        assert router(control)[0].rate()[1:].tolist() == pytest.approx([0.3, 0.6], abs=0.03)

    def test_sub_modules_without_a_target_are_ignored(self):
        p_on = normal(2, 4, 3).sigmoid().requires_grad_()
        decision = _decision(torch.ones(2, 4, 3, dtype=torch.bool), p_on)
        loss = budget_loss([decision], {"mlp": 0.5})
        assert loss == 0.25
        assert torch.autograd.grad(loss, [p_on])[0].any(0).any(0).tolist() == [False, True, False]

    def test_layers_with_other_sub_modules_are_ignored(self):
        one, other = _random(), _decision(torch.ones(2, 4, 1, dtype=torch.bool), names=("ema",))
        assert budget_loss([one, other], {"ema": 0.25}) == 0.75**2

    @pytest.mark.parametrize(
        ("target", "sentence"),
        [
            ({"mpl": 0.5}, r"the target rate names 'mpl', which is not a sub-module; did you mean 'mlp'"),
            (1.5, "the target rate of 'attention' is 1.5; it must lie between 0 and 1"),
            ({"mlp": math.nan}, "the target rate of 'mlp' is nan; it must lie between 0 and 1"),
        ],
    )
    def test_impossible_targets_are_refused(self, target, sentence):
        with pytest.raises(InputError, match=sentence):
            budget_loss([_random()], target)


class TestLoadBalance:
    @given(valid=masks(rows=3, length=6))
    def test_value_agrees_with_the_formula(self, valid):
        decision = _decision(normal(*valid.shape, 3, seed=1) > 0)
        tokens = valid.nonzero().tolist()
        runs = [sum(bool(decision.active[b, t, m]) for b, t in tokens) for m in range(3)]
        soft = [sum(float(decision.p_on[b, t, m]) for b, t in tokens) for m in range(3)]
        wanted = 0.0
        if tokens:
            shares = [run / sum(runs) if sum(runs) else 1 / 3 for run in runs]
            wanted = 3 * sum(share * p / sum(soft) for share, p in zip(shares, soft, strict=True))
        near(load_balance_loss([decision], valid), torch.tensor(wanted, dtype=torch.float64))

    def test_loss_is_1_when_balanced(self):
        active = torch.eye(3, dtype=torch.bool)[None].expand(2, 3, 3)
        p_on = (
            torch.tensor([0.6, 0.3, 0.1])
            .double()[(torch.arange(3)[:, None] - torch.arange(3)) % 3][None]
            .expand(2, 3, 3)
        )
        near(load_balance_loss([_decision(active, p_on)]), torch.ones(()).double())

    def test_loss_is_1_if_nothing_ran_and_the_probabilities_are_equal(self):
        near(
            load_balance_loss([_decision(torch.zeros(2, 3, 3, dtype=torch.bool), torch.full((2, 3, 3), 0.2).double())]),
            torch.ones(()).double(),
        )

    @given(scores=st.lists(st.floats(-3, 3), min_size=3, max_size=3, unique=True))
    def test_loss_is_larger_if_one_sub_module_takes_all_tokens(self, scores):
        p_on = torch.tensor(scores).double().softmax(0).expand(2, 5, 3)
        active = p_on == p_on.amax(-1, keepdim=True)
        loss = load_balance_loss([_decision(active, p_on)])
        assert loss >= 1
        near(loss, 3 * p_on.max())

    def test_gradient_descent_balances_a_router(self):
        router, control = spread(TopKRouterSpec(k=1).build(4, NAMES).double()), normal(2, 200, 4)
        with torch.no_grad():
            router.bias[0] += 2.0
        before = router(control)[0].rate()
        for _ in range(200):
            gradients = torch.autograd.grad(load_balance_loss([router(control)[0]]), [router.bias])
            with torch.no_grad():
                router.bias -= 0.5 * gradients[0]
        assert before.max() > 0.55
        assert router(control)[0].rate().max() < 0.45


class TestZ:
    @given(valid=masks(rows=3, length=6))
    def test_value_agrees_with_the_formula(self, valid):
        decision = _random(*valid.shape)
        squares = [
            math.log(math.exp(float(decision.logits[b, t, m, 0])) + math.exp(float(decision.logits[b, t, m, 1]))) ** 2
            for b, t in valid.nonzero().tolist()
            for m in range(3)
        ]
        near(z_loss([decision], valid), torch.tensor(sum(squares) / max(1, len(squares)), dtype=torch.float64))

    @pytest.mark.parametrize("spec", [SMARouterSpec(), ExclusiveRouterSpec(), TopKRouterSpec()])
    def test_the_log_sum_of_exponentials_is_over_each_pair_of_scores(self, spec):
        decision = spec.build(4, NAMES).double()(torch.zeros(1, 2, 4, dtype=torch.float64))[0]  # all scores are 0
        near(z_loss([decision]), torch.tensor(math.log(2) ** 2, dtype=torch.float64))

    def test_gradient_descent_makes_scores_smaller(self):
        router, control = spread(SMARouterSpec().build(4, NAMES).double(), scale=2.0), normal(2, 20, 4)
        before = router(control)[0].logits.logsumexp(-1).abs().mean()
        for _ in range(100):
            gradients = torch.autograd.grad(z_loss([router(control)[0]]), [router.weight, router.bias])
            with torch.no_grad():
                router.weight -= 0.05 * gradients[0]
                router.bias -= 0.05 * gradients[1]
        assert router(control)[0].logits.logsumexp(-1).abs().mean() < 0.5 * before


@LOSSES
def test_loss_is_the_mean_over_layers(loss):
    one, other = _random(seed=1), _random(seed=2)
    near(loss([one, other]), (loss([one]) + loss([other])) / 2)


@LOSSES
@pytest.mark.parametrize("junk", [1e4, math.nan])
def test_padding_never_changes_a_loss(loss, junk):
    decision, valid = _random(seed=3), normal(2, 6, seed=9) > -0.3
    p_on, logits = decision.p_on.clone().requires_grad_(), decision.logits.clone().requires_grad_()
    value = loss([Decision(decision.active, decision.confidence, logits, p_on, NAMES)], valid)
    hidden = valid[..., None]
    dirty = Decision(
        decision.active & hidden,
        decision.confidence,
        decision.logits.where(hidden[..., None], junk),
        decision.p_on.where(hidden, junk),
        NAMES,
    )
    near(loss([dirty], valid), value.detach())
    for gradient in torch.autograd.grad(value, [p_on, logits], allow_unused=True):
        assert gradient is None or not gradient[~valid].any()


@LOSSES
def test_loss_is_finite_without_layers_or_tokens(loss):
    assert loss([]) == 0
    empty = _random(rows=2, length=0)
    assert loss([empty]).isfinite()
    nothing_valid = _random()
    assert loss([nothing_valid], torch.zeros(2, 6, dtype=torch.bool)).isfinite()


@LOSSES
def test_a_mask_that_does_not_fit_is_refused(loss, as_users_run):
    with pytest.raises(InputError, match=r"valid is of shape \(2, 5\) .*; expected .* \(B = 2, L = 6\)$"):
        loss([_random()], torch.ones(2, 5, dtype=torch.bool))


def _draws(active: Tensor, margins: Tensor, names: tuple[str, ...] = NAMES) -> Decision:
    """A decision that was sampled with the probabilities of these margins."""
    return Decision(
        active,
        torch.ones_like(margins),
        torch.stack([torch.zeros_like(margins), margins], -1),
        margins.sigmoid(),
        names,
    )


class TestPolicyGradient:
    @given(valid=masks(), at_positions=st.booleans(), over=st.sampled_from([None, "each", "total"]))
    def test_gradient_agrees_with_the_loop(self, valid, at_positions, over):
        rows, length = valid.shape
        active = [(normal(rows, length, 3, seed=seed) > 0) & valid[..., None] for seed in (5, 6)]
        margins = [normal(rows, length, 3, seed=seed).requires_grad_() for seed in (1, 2)]
        losses = normal(rows, length, seed=3).abs() if at_positions else normal(rows, seed=3).abs()
        loss = policy_gradient_loss(
            [_draws(*pair) for pair in zip(active, margins, strict=True)], losses, valid, budget_over=over
        )
        wanted = torch.zeros(2, rows, length, 3, dtype=torch.float64)
        for t in range(length):
            here = [b for b in range(rows) if valid[b, t]]
            ahead = {b: float(losses[b, t:].sum() if at_positions else losses[b]) for b in here}
            mean = sum(ahead.values()) / max(1, len(here))
            deviation = math.sqrt(sum((value - mean) ** 2 for value in ahead.values()) / max(1, len(here)))
            for b in here:
                advantage = (mean - ahead[b]) / deviation if deviation > 1e-12 else 0.0
                for layer in range(2):
                    for m in range(3):
                        # d log P(a) / d margin is 1 - p for active tokens and -p for inactive ones.
                        p = 1 / (1 + math.exp(-margins[layer][b, t, m].item()))
                        slope = 1 - p if active[layer][b, t, m] else -p
                        wanted[layer, b, t, m] = -advantage * slope / (2 * 3 * int(valid.sum()))
        if over and valid.any():
            means = wanted[:, valid].mean(1)  # by layer and sub-module
            held = means if over == "each" else means.mean().expand(2, 3)
            wanted = torch.where(valid[..., None], wanted - held[:, None, None], 0)
        for found, expected in zip(torch.autograd.grad(loss, margins), wanted, strict=True):
            near(found, expected, 1e-9)

    def test_under_a_total_budget_tokens_move_to_the_layer_that_lowers_the_loss(self):
        # Active tokens of layer 0 lower the loss of their row, those of layer 1 do not: the scores of layer 0 rise, and
        # those of layer 1 fall by the same amount. With each layer held separately, both stay.
        active = [torch.rand(500, 4, 1, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in (0, 1)]
        scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        decisions = [_draws(each, scores[n].expand(500, 4, 1), ("mlp",)) for n, each in enumerate(active)]
        losses = -active[0].sum((1, 2)).double()
        slopes = {
            over: torch.autograd.grad(policy_gradient_loss(decisions, losses, budget_over=over), [scores])[0].tolist()
            for over in ("each", "total")
        }
        assert slopes["each"] == pytest.approx([0.0, 0.0], abs=1e-12)
        assert slopes["total"][1] > 0.01
        assert slopes["total"][0] == pytest.approx(-slopes["total"][1], abs=1e-12)

    def test_descent_raises_the_score_of_the_token_that_lowers_the_loss(self):
        # If active, token 1 lowers the loss of its row, token 2 raises it slightly, and tokens 0 and 3 have no effect.
        scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        rows = 4000
        active = torch.rand(rows, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) < 0.5
        losses = 1.0 - 0.8 * active[:, 1, 0] + 0.2 * active[:, 2, 0]
        decision = _draws(active, scores[None, :, None].expand(rows, 4, 1), ("mlp",))
        (gradient,) = torch.autograd.grad(policy_gradient_loss([decision], losses), [scores])
        # The covariance of a draw, of variance 1/4, with the loss, divided by the standard deviation of the losses.
        deviation = math.sqrt(0.25 * (0.8**2 + 0.2**2))
        near(gradient, torch.tensor([0, -0.8, 0.2, 0], dtype=torch.float64) / 4 / deviation / 4, 0.01)

    def test_the_gradient_of_a_token_ignores_earlier_losses(self):
        active, margins = normal(6, 5, 1, seed=5) > 0, normal(6, 5, 1).requires_grad_()
        losses = normal(6, 5, seed=3).abs()
        gradients = []
        for change in (0.0, 7.0):
            changed = losses.clone()
            changed[:3, :2] += change
            (gradient,) = torch.autograd.grad(
                policy_gradient_loss([_draws(active, margins, ("mlp",))], changed), [margins]
            )
            gradients.append(gradient)
        assert torch.equal(gradients[0][:, 2:], gradients[1][:, 2:])
        assert not torch.allclose(gradients[0][:, :2], gradients[1][:, :2])

    def test_equal_losses_give_no_gradient_and_certain_draws_no_nan(self):
        margins = torch.tensor([-1e30, 1e30, 0.0, 800.0]).reshape(1, 4, 1).expand(3, 4, 1).contiguous().requires_grad_()
        decision = _draws(torch.tensor([False, True, True, False]).reshape(1, 4, 1).expand(3, 4, 1), margins, ("mlp",))
        assert not torch.autograd.grad(policy_gradient_loss([decision], torch.full((3,), 2.0)), [margins])[0].any()
        (gradient,) = torch.autograd.grad(policy_gradient_loss([decision], torch.tensor([1.0, 2.0, 9.0])), [margins])
        assert gradient.isfinite().all()
        assert not gradient[:, :2].any()  # draws of probability 1 have no gradient
        assert policy_gradient_loss([], torch.ones(3)) == 0

    @pytest.mark.parametrize("shape", [(2, 5), (1, 6)])
    def test_a_mask_of_another_shape_is_refused(self, shape, as_users_run):
        with pytest.raises(
            InputError, match=rf"valid is of shape {re.escape(str(shape))} .*; expected .* \(B = 2, L = 6\)$"
        ):
            policy_gradient_loss([_random()], torch.ones(2), torch.ones(shape, dtype=torch.bool))

    def test_losses_of_another_shape_are_refused(self):
        with pytest.raises(
            InputError, match=exactly("the losses have shape (3,); expected (B,) = (2,), or (B, L) = (2, 6)")
        ):
            policy_gradient_loss([_random()], torch.ones(3))
