"""The controller of the rate: it comes to its target from anywhere, follows its schedule, and touches nothing but offsets."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

from sma import load_spec
from sma.budget import BudgetController, BudgetSpec, calibrate, module_costs, routers_of
from sma.errors import InputError, SpecError
from sma.routers import (
    BernoulliRouterSpec,
    ExclusiveRouterSpec,
    ExpertChoiceRouterSpec,
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
    """A router with spread scores, of which those of the sub-modules are moved."""
    router = spec.build(5, NAMES).double()
    spread(router, seed=seed)
    with torch.no_grad():
        on = {"sma": slice(1, None, 2), "gumbel": slice(1, None, 2), "bernoulli": slice(1, None, 2), "exclusive": slice(1, None)}.get(
            spec.kind, slice(None)
        )
        router.bias[on] += bias
    return router


def _run(controller: BudgetController, updates: int, *, start: int = 0, tokens: int = 400) -> list[Tensor]:
    """Steer by batches of random tokens; the rates of every batch."""
    rates = []
    for number in range(start, start + updates):
        decisions = []
        for router in controller.routers:
            router.advance(number)
            decisions.append(router(normal(2, tokens // 2, 5, seed=number))[0])
        rates.append(torch.stack([decision.rate() for decision in decisions]))
        controller.update(decisions)
    return rates


def _rate(router: Router, tokens: int = 20000) -> Tensor:
    """In evaluation, where nothing is drawn."""
    training = router.training
    rate = router.eval()(normal(1, tokens, 5, seed=12345))[0].rate()
    router.train(training)
    return rate


class TestTarget:
    @STEERABLE
    @pytest.mark.parametrize("bias", [pytest.param(0.0, id="alive"), pytest.param(-50.0, id="dead"), pytest.param(50.0, id="saturated")])
    def test_each_sub_module_comes_to_its_target_in_a_hundred_updates(self, spec, bias):
        targets = {"attention": 0.2, "mlp": 0.3, "conv": 0.3} if spec.kind == "exclusive" else RATES
        router = _router(spec, bias)
        _run(BudgetController(BudgetSpec(target=targets), [router]), 100)
        assert _rate(router).tolist() == pytest.approx(list(targets.values()), abs=0.03)

    @pytest.mark.parametrize("spec", [GumbelRouterSpec(), BernoulliRouterSpec()])
    def test_a_router_that_samples_runs_nearly_all_at_a_rate_of_1_and_then_keeps_the_target(self, spec):
        router = _router(spec)
        controller = BudgetController(BudgetSpec(target=0.3, start=1.0, hold=100, anneal=100), [router])
        for held in (True, False):
            _run(controller, 100)
            if held:
                assert router(normal(2, 400, 5, seed=9))[0].p_on.mean() > 0.98
        _run(controller, 100)
        assert _rate(router).tolist() == pytest.approx([0.3] * 3, abs=0.03)

    def test_updates_of_many_tokens_count_more(self):
        router = _router(SMARouterSpec())
        controller = BudgetController(BudgetSpec(target=0.3), [router])
        few, many = normal(1, 100, 5, seed=1) + 0.4, normal(1, 900, 5, seed=2)
        for number in range(400):
            controller.update([router(many if number % 2 else few)[0]])
        active = torch.cat([router(control)[0].active[0] for control in (few, many)])
        assert active.double().mean(0).tolist() == pytest.approx([0.3] * 3, abs=0.04)

    def test_a_dead_router_has_tokens_again_after_one_update(self):
        router = _router(SMARouterSpec(), bias=-50.0)
        assert not _rate(router).any()
        _run(BudgetController(BudgetSpec(target=0.3, floor=0.05), [router]), 1)
        assert _rate(router).tolist() == pytest.approx([0.05] * 3, abs=0.03)

    @pytest.mark.parametrize("bias", [-50.0, 0.0, 50.0])
    def test_a_total_budget_keeps_the_mean_weighted_by_cost(self, bias):
        routers, costs = [_router(SMARouterSpec(), bias), _router(ThresholdRouterSpec(), seed=4)], [[1.0, 2.0, 4.0], [8.0, 1.0, 1.0]]
        controller = BudgetController(BudgetSpec(target=0.3, over="total"), routers, costs)
        _run(controller, 150)
        rates, weights = torch.stack([_rate(router) for router in routers]), torch.tensor(costs, dtype=torch.float64)
        assert float((rates * weights).sum() / weights.sum()) == pytest.approx(0.3, abs=0.03)

    def test_every_layer_may_have_targets_of_its_own(self):
        routers = [_router(SMARouterSpec(), seed=seed) for seed in (1, 2, 3)]
        free = _rate(routers[2]).tolist()
        _run(BudgetController(BudgetSpec(target=[0.2, RATES, {}]), routers), 100)
        assert _rate(routers[0]).tolist() == pytest.approx([0.2] * 3, abs=0.03)
        assert _rate(routers[1]).tolist() == pytest.approx(list(RATES.values()), abs=0.03)
        assert _rate(routers[2]).tolist() == free

    def test_sub_modules_without_a_target_are_left_alone(self):
        router = _router(SMARouterSpec())
        _run(BudgetController(BudgetSpec(target={"mlp": 0.1}), [router]), 20)
        assert router.offset.bool().tolist() == [False, True, False]

    def test_layers_have_offsets_of_their_own(self):
        routers = [_router(SMARouterSpec(), seed=seed) for seed in (3, 4)]
        _run(BudgetController(BudgetSpec(target=0.25), routers), 80)
        assert not torch.isclose(routers[0].offset, routers[1].offset).any()
        for router in routers:
            assert _rate(router).tolist() == pytest.approx([0.25] * 3, abs=0.03)

    def test_padding_is_not_counted(self):
        routers = [_router(SMARouterSpec()) for _ in range(2)]
        control, valid = normal(2, 100, 5), normal(2, 100, seed=1) > 0.5
        for router, junk in zip(routers, (1.0, 100.0), strict=True):
            controller = BudgetController(BudgetSpec(target=0.1), [router])
            for _ in range(5):
                controller.update([router(control.where(valid[..., None], junk), valid)[0]], valid)
        assert torch.equal(routers[0].offset, routers[1].offset)

    @pytest.mark.parametrize("valid", [None, torch.zeros(2, 0, dtype=torch.bool)])
    def test_a_batch_without_tokens_moves_nothing(self, valid):
        router = _router(SMARouterSpec())
        controller = BudgetController(BudgetSpec(target=0.1), [router])
        controller.update([router(normal(2, 0, 5))[0]], valid)
        assert not router.offset.any()

    def test_only_offsets_change(self):
        router = _router(SMARouterSpec())
        kept = copy.deepcopy(router.state_dict())
        controller = BudgetController(BudgetSpec(target=0.1), [router])
        _run(controller, 3)
        assert [name for name, tensor in router.state_dict().items() if not torch.equal(tensor, kept[name])] == ["offset"]
        assert list(controller.parameters()) == []


class TestSchedule:
    def test_the_rate_holds_and_then_falls_in_the_logarithm(self):
        spec = BudgetSpec(target=0.25, start=1.0, hold=10, anneal=20)
        assert [spec.scheduled(0.25, update) for update in (0, 10, 20, 30, 1000)] == pytest.approx([1.0, 1.0, 0.5, 0.25, 0.25])

    def test_without_a_schedule_the_target_counts_from_the_first_update(self):
        assert BudgetSpec(target=0.25).scheduled(0.25, 0) == 0.25

    def test_exploration_swings_above_the_target_and_fades(self):
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

    def test_a_rate_of_1_moves_the_offset_no_further_than_the_tokens_need(self):
        router = _router(SMARouterSpec())
        _run(BudgetController(BudgetSpec(target=0.3, start=1.0, hold=50, speed=1.0), [router]), 20)
        assert _rate(router).min() > 0.97
        assert router.offset.max() < 50


class TestResuming:
    def test_interrupted_and_resumed_is_uninterrupted(self):
        spec = BudgetSpec(target=0.2, start=0.9, hold=3, anneal=20, exploration=0.3, period=7)
        whole, first, second = (BudgetController(spec, [_router(SMARouterSpec())]) for _ in range(3))
        _run(whole, 24)
        _run(first, 11)
        second.load_state_dict(first.state_dict())
        second.routers[0].load_state_dict(first.routers[0].state_dict())
        _run(second, 13, start=11)
        assert int(second.updates) == int(whole.updates) == 24
        assert torch.equal(second.routers[0].offset, whole.routers[0].offset)


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"target": 0.0}, "target=0.0 must be above 0 and at most 1; for no activity at all use the router {kind: never}"),
            ({"target": {"mlp": 1.5}}, "target=1.5 must be above 0 and at most 1"),
            ({"target": {"mlp": 0.5}, "over": "total"}, "over='total' keeps one rate, so target must be one number"),
            ({"target": [0.5, {"mlp": 1.5}]}, "target=1.5 must be above 0 and at most 1"),
            ({"target": [0.5, 0.2], "over": "total"}, "over='total' keeps one rate, so target must be one number"),
            ({"target": 0.1, "floor": 0.2}, "floor=0.2 must be at most the target; lower it"),
        ],
    )
    def test_impossible_budgets(self, settings, sentence):
        with pytest.raises(SpecError, match=f"BudgetSpec: .*{sentence}"):
            BudgetSpec(**settings)

    @pytest.mark.parametrize(
        ("spec", "target", "sentence"),
        [
            pytest.param(ExpertChoiceRouterSpec(share=0.5), 0.3, "the router kind 'expert_choice' cannot be steered", id="not steerable"),
            pytest.param(ExclusiveRouterSpec(), 0.5, "the rates of the router kind 'exclusive' sum to 1 at most", id="exclusive"),
            pytest.param(TopKRouterSpec(k=1), 0.5, "the rates of this top_k router sum to 1", id="top_k"),
            pytest.param(SMARouterSpec(), [0.5, 0.2], "targets for 2 layers, and 1 are routed; give one for each of those", id="layers"),
            pytest.param(
                SMARouterSpec(), {"mpl": 0.5}, "no layer has a sub-module 'mpl', for which the budget has a target.*'mlp'", id="name"
            ),
        ],
    )
    def test_targets_that_a_router_cannot_reach(self, spec, target, sentence):
        with pytest.raises(InputError, match=sentence):
            BudgetController(BudgetSpec(target=target), [spec.build(5, NAMES)])

    def test_another_number_of_decisions(self):
        router = _router(SMARouterSpec())
        controller = BudgetController(BudgetSpec(target=0.5), [router])
        with pytest.raises(InputError, match="there are 2 decisions for 1 routers; give those of all routed layers"):
            controller.update([router(normal(1, 2, 5))[0]] * 2)


def _offset_of_rank(rank: int, folder: str, ranks: int) -> None:
    """What one of the processes does: its tokens are its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    router = _router(SMARouterSpec())
    controller = BudgetController(BudgetSpec(target=0.2), [router])
    for update in range(60):
        controller.update([router(normal(2, 100, 5, seed=1000 * rank + update) + rank)[0]])
    torch.save(router.offset, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_equal_offsets_and_one_rate_over_both(tmp_path):
    torch.multiprocessing.start_processes(_offset_of_rank, (str(tmp_path), 2), nprocs=2, start_method="fork")
    offsets = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert offsets[0].any()
    assert torch.equal(*offsets)
    router = _router(SMARouterSpec())
    router.offset.copy_(offsets[0])
    rates = [router(normal(1, 20000, 5, seed=77) + rank)[0].rate() for rank in (0, 1)]
    assert ((rates[0] + rates[1]) / 2).tolist() == pytest.approx([0.2] * 3, abs=0.03)
    assert (rates[0] - rates[1]).abs().max() > 0.03


def _model(router: dict, layers: int = 2):
    layer = {
        "router": router,
        "modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 6}, "conv": {"kind": "conv", "kernel_size": 3}},
        "norm": {"kind": "layer_norm"},
    }
    data = {
        "kind": "sequence_encoder",
        "width": 5,
        "encoder": {"kind": "linear", "features": 3},
        "layers": {"repeat": layers, "layer": layer},
    }
    return spread(load_spec(data).build().double())


class TestCalibrate:
    @pytest.mark.parametrize("kind", ["sma", "threshold", "gumbel"])
    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
    def test_it_reaches_the_rate_and_leaves_all_else_untouched(self, kind, rate):
        model = _model({"kind": kind}).train()
        kept, data = (
            copy.deepcopy(model.state_dict()),
            [(normal(3, 60, 3, seed=seed), normal(3, 60, seed=seed + 9) > -1) for seed in (1, 2)],
        )
        reached = calibrate(model, data, rate, tolerance=0.01)
        assert reached.rates.flatten().tolist() == pytest.approx([rate] * 4, abs=0.02)
        assert model.training
        changed = {name.rpartition(".")[2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, kept[name])}
        assert changed == {"offset"}
        assert all(parameter.grad is None for parameter in model.parameters())
        with torch.no_grad():
            outputs = [model.eval()(inputs, valid) for inputs, valid in data]
        tokens = sum(int(valid.sum()) for _, valid in data)
        for layer, m in itertools.product(range(2), range(2)):
            active = sum(int(output.decisions[layer].active[..., m].sum()) for output in outputs)
            assert active / tokens == pytest.approx(float(reached.rates[layer, m]))

    def test_a_total_rate_is_weighted_by_operations(self):
        model, data = _model({"kind": "sma"}), [normal(3, 100, 3)]
        reached = calibrate(model, data, 0.3, over="total")
        costs = torch.tensor(module_costs(model.spec, 100), dtype=torch.float64)
        assert float((reached.rates * costs).sum() / costs.sum()) == pytest.approx(0.3, abs=0.02)

    def test_rates_by_name(self):
        model = _model({"kind": "sma"})
        reached = calibrate(model, [normal(3, 100, 3)], {"conv": 0.2})
        assert reached.rates[:, 1].tolist() == pytest.approx([0.2] * 2, abs=0.02)
        assert [router.offset.bool().tolist() for router in routers_of(model)] == [[False, True]] * 2

    def test_rates_by_layer(self):
        reached = calibrate(_model({"kind": "sma"}), [normal(3, 100, 3)], [{"conv": 0.2, "mlp": 0.6}, 0.4])
        assert reached.rates.tolist() == [pytest.approx([0.6, 0.2], abs=0.02), pytest.approx([0.4, 0.4], abs=0.02)]

    def test_data_that_can_be_gone_through_only_once_is_refused(self):
        with pytest.raises(InputError, match="this can be gone through only once: give a list of batches"):
            calibrate(_model({"kind": "sma"}), iter([normal(1, 4, 3)]), 0.5)

    def test_no_data_is_refused(self):
        with pytest.raises(InputError, match="calibrate got no batch; give it some of the data that the model is to run on"):
            calibrate(_model({"kind": "sma"}), [], 0.5)
