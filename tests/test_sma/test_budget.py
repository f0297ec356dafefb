"""The budget controller reaches its target from any start, follows its schedule, and changes only score biases."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor

from sma.budget import BudgetController, BudgetSpec
from sma.errors import InputError
from sma.routers import (
    BernoulliRouterSpec,
    ExclusiveRouterSpec,
    GumbelRouterSpec,
    Router,
    SMARouterSpec,
    ThresholdRouterSpec,
    TopKRouterSpec,
)
from tests.cases import normal, spread

NAMES = ("attention", "mlp", "conv")
RATES = {"attention": 0.2, "mlp": 0.3, "conv": 0.5}
STEERABLE = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=spec.kind)
        for spec in (
            SMARouterSpec(),
            ThresholdRouterSpec(),
            GumbelRouterSpec(),
            BernoulliRouterSpec(),
            ExclusiveRouterSpec(),
            TopKRouterSpec(k=1),
        )
    ],
)


def _router(spec, bias: float = 0.0, seed: int = 3) -> Router:
    """A router with random scores; `bias` is added to those of the sub-modules."""
    router = spec.build(5, NAMES).double()
    spread(router, seed=seed)
    with torch.no_grad():
        on = {
            "sma": slice(1, None, 2),
            "gumbel": slice(1, None, 2),
            "bernoulli": slice(1, None, 2),
            "exclusive": slice(1, None),
        }.get(spec.kind, slice(None))
        router.bias[on] += bias
    return router


def _run(controller: BudgetController, updates: int, *, start: int = 0, tokens: int = 400) -> list[Tensor]:
    """Update the controller on batches of random tokens; return the rates of every batch."""
    rates = []
    for number in range(start, start + updates):
        decisions = []
        for router in controller.routers:
            router.set_step(number)
            decisions.append(router(normal(2, tokens // 2, 5, seed=number))[0])
        rates.append(torch.stack([decision.rate() for decision in decisions]))
        controller.update(decisions)
    return rates


def _rate(router: Router, tokens: int = 20000) -> Tensor:
    """Activation rates in evaluation mode, without sampling."""
    training = router.training
    rate = router.eval()(normal(1, tokens, 5, seed=12345))[0].rate()
    router.train(training)
    return rate


class TestTarget:
    @STEERABLE
    @pytest.mark.parametrize(
        "bias", [pytest.param(0.0, id="alive"), pytest.param(-50.0, id="dead"), pytest.param(50.0, id="saturated")]
    )
    def test_each_sub_module_reaches_its_target_in_a_hundred_updates(self, spec, bias):
        targets = {"attention": 0.2, "mlp": 0.3, "conv": 0.3} if spec.kind == "exclusive" else RATES
        router = _router(spec, bias)
        _run(BudgetController(BudgetSpec(target=targets), [router]), 100)
        assert _rate(router).tolist() == pytest.approx(list(targets.values()), abs=0.03)

    @pytest.mark.parametrize("spec", [GumbelRouterSpec(), BernoulliRouterSpec()])
    def test_a_sampling_router_holds_a_rate_of_1_and_then_reaches_the_target(self, spec):
        router = _router(spec)
        controller = BudgetController(BudgetSpec(target=0.3, start=1.0, hold=100, anneal=100), [router])
        for held in (True, False):
            _run(controller, 100)
            if held:
                assert router(normal(2, 400, 5, seed=9))[0].p_on.mean() > 0.98
        _run(controller, 100)
        assert _rate(router).tolist() == pytest.approx([0.3] * 3, abs=0.03)

    def test_updates_with_more_tokens_have_more_weight(self):
        router = _router(SMARouterSpec())
        controller = BudgetController(BudgetSpec(target=0.3), [router])
        few, many = normal(1, 100, 5, seed=1) + 0.4, normal(1, 900, 5, seed=2)
        for number in range(400):
            controller.update([router(many if number % 2 else few)[0]])
        active = torch.cat([router(control)[0].active[0] for control in (few, many)])
        assert active.double().mean(0).tolist() == pytest.approx([0.3] * 3, abs=0.04)

    def test_a_dead_router_gets_tokens_after_one_update(self):
        router = _router(SMARouterSpec(), bias=-50.0)
        assert not _rate(router).any()
        _run(BudgetController(BudgetSpec(target=0.3, floor=0.05), [router]), 1)
        assert _rate(router).tolist() == pytest.approx([0.05] * 3, abs=0.03)

    @pytest.mark.parametrize("bias", [-50.0, 0.0, 50.0])
    def test_a_total_budget_holds_the_mean_rate_weighted_by_cost(self, bias):
        routers, costs = (
            [_router(SMARouterSpec(), bias), _router(ThresholdRouterSpec(), seed=4)],
            [[1.0, 2.0, 4.0], [8.0, 1.0, 1.0]],
        )
        controller = BudgetController(BudgetSpec(target=0.3, over="total"), routers, costs)
        _run(controller, 150)
        rates, weights = torch.stack([_rate(router) for router in routers]), torch.tensor(costs, dtype=torch.float64)
        assert float((rates * weights).sum() / weights.sum()) == pytest.approx(0.3, abs=0.03)

    @pytest.mark.parametrize(
        "spec", [ExclusiveRouterSpec(), TopKRouterSpec(k=1, skips=1), TopKRouterSpec(k=2, skips=1)]
    )
    def test_no_score_bias_drifts_under_a_total_that_cannot_be_reached(self, spec):
        # The cheap sub-modules take every token from the expensive one, so no shift reaches the requested total.
        router, costs = _router(spec), [[1.0, 1.0, 50.0]]
        with torch.no_grad():
            router.bias[-1 - getattr(spec, "skips", 0)] -= 5.0
        controller, offsets = BudgetController(BudgetSpec(target=0.5, over="total", floor=0.0), [router], costs), []
        for start in (0, 100, 200):
            _run(controller, 100, start=start)
            offsets.append(router.score_bias.clone())
        assert float((offsets[2] - offsets[1]).abs().max()) < 0.2 * float(offsets[1].abs().max())
        assert _rate(router).sum() > controller.routers[0].maximum_total_rate - 0.02

    def test_a_total_excludes_layers_of_constant_total_rate(self):
        fixed, free = _router(TopKRouterSpec(k=1)), _router(SMARouterSpec())
        _run(BudgetController(BudgetSpec(target=0.3, over="total"), [fixed, free]), 150)
        assert not fixed.score_bias.any()
        assert float(torch.cat([_rate(fixed), _rate(free)]).mean()) == pytest.approx(0.3, abs=0.03)

    def test_every_layer_may_have_its_own_targets(self):
        routers = [_router(SMARouterSpec(), seed=seed) for seed in (1, 2, 3)]
        free = _rate(routers[2]).tolist()
        _run(BudgetController(BudgetSpec(target=[0.2, RATES, {}]), routers), 100)
        assert _rate(routers[0]).tolist() == pytest.approx([0.2] * 3, abs=0.03)
        assert _rate(routers[1]).tolist() == pytest.approx(list(RATES.values()), abs=0.03)
        assert _rate(routers[2]).tolist() == free

    def test_sub_modules_without_a_target_are_left_alone(self):
        router = _router(SMARouterSpec())
        _run(BudgetController(BudgetSpec(target={"mlp": 0.1}), [router]), 20)
        assert router.score_bias.bool().tolist() == [False, True, False]

    def test_layers_have_separate_score_biases(self):
        routers = [_router(SMARouterSpec(), seed=seed) for seed in (3, 4)]
        _run(BudgetController(BudgetSpec(target=0.25), routers), 80)
        assert not torch.isclose(routers[0].score_bias, routers[1].score_bias).any()
        for router in routers:
            assert _rate(router).tolist() == pytest.approx([0.25] * 3, abs=0.03)

    def test_padding_is_not_counted(self):
        routers = [_router(SMARouterSpec()) for _ in range(2)]
        control, valid = normal(2, 100, 5), normal(2, 100, seed=1) > 0.5
        for router, junk in zip(routers, (1.0, 100.0), strict=True):
            controller = BudgetController(BudgetSpec(target=0.1), [router])
            for _ in range(5):
                controller.update([router(control.where(valid[..., None], junk), valid)[0]], valid)
        assert torch.equal(routers[0].score_bias, routers[1].score_bias)

    @pytest.mark.parametrize("valid", [None, torch.zeros(2, 0, dtype=torch.bool)])
    def test_a_batch_without_tokens_changes_no_score_bias(self, valid):
        router = _router(SMARouterSpec())
        controller = BudgetController(BudgetSpec(target=0.1), [router])
        controller.update([router(normal(2, 0, 5))[0]], valid)
        assert not router.score_bias.any()

    @STEERABLE
    @pytest.mark.parametrize("junk", [math.nan, math.inf])
    def test_non_finite_tokens_are_not_counted(self, spec, junk):
        target = 0.2 if spec.kind != "top_k" else 1 / 3
        broken, clean = (_router(spec) for _ in range(2))
        control = normal(2, 100, 5)
        bad = normal(2, 100, seed=1) > 0.5
        for router, fill, valid in ((broken, junk, None), (clean, 0.0, ~bad)):
            controller = BudgetController(BudgetSpec(target=target), [router])
            for _ in range(5):
                controller.update([router(control.masked_fill(bad[..., None], fill), valid)[0]], valid)
        assert clean.score_bias.any()
        assert torch.equal(broken.score_bias, clean.score_bias)

    @STEERABLE
    @pytest.mark.parametrize("over", ["each", "total"])
    def test_a_batch_of_nan_tokens_changes_no_score_bias(self, spec, over):
        router, costs = _router(spec), [[1.0, 1.0, 1.0]]
        controller = BudgetController(BudgetSpec(target=1 / 3, over=over), [router], costs)
        _run(controller, 3)
        kept = router.score_bias.clone()
        controller.update([router(torch.full((2, 9, 5), math.nan, dtype=torch.float64))[0]])
        assert torch.equal(router.score_bias, kept)

    def test_a_non_finite_step_is_skipped(self):
        router = _router(SMARouterSpec())
        decision = router(normal(2, 100, 5))[0]
        controller = BudgetController(BudgetSpec(target=0.1), [router])
        counts = controller.count([decision])
        with torch.no_grad():
            router.log_temperature.fill_(math.nan)
        controller.move(counts, 1.0)
        assert not router.score_bias.any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_router_in_half_precision_reaches_its_target(self, dtype):
        router = _router(SMARouterSpec(), bias=-30.0).to(dtype)
        controller = BudgetController(BudgetSpec(target=0.3, speed=0.05), [router])
        for number in range(300):
            controller.update([router(normal(2, 200, 5, seed=number).to(dtype))[0]])
        assert router(normal(1, 5000, 5, seed=12345).to(dtype))[0].rate().tolist() == pytest.approx([0.3] * 3, abs=0.04)

    def test_only_score_biases_change(self):
        router = _router(SMARouterSpec())
        kept = copy.deepcopy(router.state_dict())
        controller = BudgetController(BudgetSpec(target=0.1), [router])
        _run(controller, 3)
        assert [name for name, tensor in router.state_dict().items() if not torch.equal(tensor, kept[name])] == [
            "score_bias"
        ]
        assert list(controller.parameters()) == []


class TestSchedule:
    def test_the_rate_holds_and_then_falls_geometrically(self):
        spec = BudgetSpec(target=0.25, start=1.0, hold=10, anneal=20)
        assert [spec.scheduled(0.25, update) for update in (0, 10, 20, 30, 1000)] == pytest.approx(
            [1.0, 1.0, 0.5, 0.25, 0.25]
        )

    def test_without_a_schedule_the_target_applies_from_the_first_update(self):
        assert BudgetSpec(target=0.25).scheduled(0.25, 0) == 0.25

    def test_exploration_oscillates_above_the_target_and_fades(self):
        spec = BudgetSpec(target=0.2, exploration=0.5, period=10, until=100)
        rates = [spec.scheduled(0.2, update) for update in range(200)]
        assert rates[0] == rates[10] == pytest.approx(0.2)
        assert rates[5] == pytest.approx(0.2 * (1 + 0.5 * 0.95))
        assert min(rates) == pytest.approx(0.2)
        assert rates[100:] == pytest.approx([0.2] * 100)
        assert max(rates[80:100]) < rates[5]

    def test_the_controller_follows_its_schedule(self):
        spec = BudgetSpec(target=0.1, start=0.8, hold=60, anneal=100, speed=0.5)
        controller = BudgetController(spec, [_router(SMARouterSpec())])
        rates = _run(controller, 240)
        for update in (50, 110, 200, 239):
            assert rates[update][0].tolist() == pytest.approx([spec.scheduled(0.1, update)] * 3, abs=0.08)

    def test_a_rate_of_1_moves_the_score_bias_only_as_far_as_needed(self):
        router = _router(SMARouterSpec())
        _run(BudgetController(BudgetSpec(target=0.3, start=1.0, hold=50, speed=1.0), [router]), 20)
        assert _rate(router).min() > 0.97
        assert router.score_bias.max() < 50


class TestResuming:
    def test_a_resumed_run_equals_an_uninterrupted_one(self):
        spec = BudgetSpec(target=0.2, start=0.9, hold=3, anneal=20, exploration=0.3, period=7)
        whole, first, second = (BudgetController(spec, [_router(SMARouterSpec())]) for _ in range(3))
        _run(whole, 24)
        _run(first, 11)
        second.load_state_dict(first.state_dict())
        second.routers[0].load_state_dict(first.routers[0].state_dict())
        _run(second, 13, start=11)
        assert int(second.updates) == int(whole.updates) == 24
        assert torch.equal(second.routers[0].score_bias, whole.routers[0].score_bias)


class TestRefused:
    def test_another_number_of_decisions(self):
        router = _router(SMARouterSpec())
        controller = BudgetController(BudgetSpec(target=0.5), [router])
        with pytest.raises(InputError, match="there are 2 decisions for 1 routers; give those of all routed layers"):
            controller.update([router(normal(1, 2, 5))[0]] * 2)

    @pytest.mark.parametrize("names", [("mlp", "attention", "conv"), ("attention", "mlp"), ("a", "b", "c", "d")])
    @pytest.mark.parametrize("target", [0.5, {}])
    def test_decisions_about_other_sub_modules(self, names, target):
        router, other = _router(SMARouterSpec()), SMARouterSpec().build(5, names).double()
        controller = BudgetController(BudgetSpec(target=[0.5, target]), [router, router])
        sentence = f"decision 1 is about {list(names)}; expected {list(NAMES)}, in this order"
        with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
            controller.update([part(normal(1, 2, 5))[0] for part in (router, other)])
        assert not router.score_bias.any()

    def test_a_mask_that_does_not_fit(self, as_users_run):
        router = _router(SMARouterSpec())
        with pytest.raises(InputError, match=r"valid is of shape \(1, 2\) .*; expected .* \(B = 3, L = 2\)$"):
            BudgetController(BudgetSpec(target={}), [router]).update(
                [router(normal(3, 2, 5))[0]], torch.ones(1, 2, dtype=torch.bool)
            )


def _without_a_target(rank: int, folder: str, ranks: int) -> None:
    """A budget without targets must not wait for other ranks: rank 1 makes more updates than rank 0."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    router = _router(SMARouterSpec())
    controller = BudgetController(BudgetSpec(target={}), [router])
    _run(controller, 1 + rank, tokens=4)
    torch.save(controller.updates, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_budget_without_targets_never_waits_for_other_ranks(tmp_path):
    torch.multiprocessing.start_processes(_without_a_target, (str(tmp_path), 2), nprocs=2, start_method="fork")
    assert [int(torch.load(tmp_path / f"{rank}.pt")) for rank in (0, 1)] == [1, 2]


def _score_bias_of_rank(rank: int, folder: str, ranks: int) -> None:
    """Steer on the tokens of one rank, which differ between ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    router = _router(SMARouterSpec())
    controller = BudgetController(BudgetSpec(target=0.2), [router])
    for update in range(60):
        controller.update([router(normal(2, 100, 5, seed=1000 * rank + update) + rank)[0]])
    torch.save(router.score_bias, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_equal_score_biases_and_reach_the_rate_together(tmp_path):
    torch.multiprocessing.start_processes(_score_bias_of_rank, (str(tmp_path), 2), nprocs=2, start_method="fork")
    offsets = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert offsets[0].any()
    assert torch.equal(*offsets)
    router = _router(SMARouterSpec())
    router.score_bias.copy_(offsets[0])
    rates = [router(normal(1, 20000, 5, seed=77) + rank)[0].rate() for rank in (0, 1)]
    assert ((rates[0] + rates[1]) / 2).tolist() == pytest.approx([0.2] * 3, abs=0.03)
    assert (rates[0] - rates[1]).abs().max() > 0.03
