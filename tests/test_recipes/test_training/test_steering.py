"""Trainings with steered routers: by a budget, by losses of the decisions, by the number of updates."""

import re

import pytest
import torch

import sma
from sma.errors import SpecError
from sma.losses import budget_loss, load_balance_loss, policy_gradient_loss, z_loss
from sma.recipes.io.run_folder import BEST, LAST
from sma.recipes.studies.variants import with_routers
from sma.recipes.training.classification import Classifier
from sma.routers import BernoulliRouterSpec, SMARouterSpec
from tests.test_recipes.tiny import checkpoint, same, tiny, train

pytestmark = pytest.mark.slow  # real trainings

BUDGET = "{target: 0.3, hold: 4, anneal: 10, speed: 0.5}"


def test_a_budget_brings_the_rates_to_its_target(data, tmp_path):
    # Slow steering, because eight expressions give a noisy rate; evaluated only at the end.
    budget = "{target: 0.3, start: 0.5, anneal: 10, speed: 0.2}"
    summary = train(
        tiny(training__budget=budget, training__updates=120, training__evaluate_every=120), tmp_path, data
    ).summary
    assert summary["activation_rate"] == pytest.approx([0.3, 0.3], abs=0.1)


def test_best_model_is_chosen_only_after_the_rates_have_settled(data, tmp_path, monkeypatch):
    scores = iter([0.9, 0.5, 0.4])  # before the rate reaches its target, when it does, and later

    def scored(self):
        self.log_dict({**self.val_scores.compute("val"), "val_accuracy": next(scores)})

    monkeypatch.setattr(Classifier, "on_validation_epoch_end", scored)
    train(tiny(training__budget="{target: 0.3, hold: 12, anneal: 5}"), tmp_path, data)
    assert checkpoint(tmp_path, BEST)["global_step"] == 20
    assert checkpoint(tmp_path, LAST)["global_step"] == 30


def test_losses_of_the_decisions_are_added_with_their_weights(data):
    spec = tiny(training__losses="{budget: 2.0, target: 0.25, load_balance: 0.5, z: 0.1}")
    module = Classifier(spec.model.build(), spec.training, 10)
    batch = data.collate([data.train[number] for number in range(6)])
    decisions = module.model.eval()(batch.inputs, batch.valid).decisions
    wanted = (
        2.0 * budget_loss(decisions, 0.25, batch.valid)
        + 0.5 * load_balance_loss(decisions, batch.valid)
        + 0.1 * z_loss(decisions, batch.valid)
    )
    torch.testing.assert_close(module.routing_loss(decisions, batch.valid, torch.zeros(6)), wanted)
    assert Classifier(spec.model.build(), tiny().training, 10).routing_loss(decisions, batch.valid, torch.zeros(6)) == 0


def test_activation_checkpointing_changes_no_weight(data, tmp_path):
    one, other = (
        train(tiny(training__recompute=recompute), tmp_path / recompute, data) for recompute in ("true", "false")
    )
    assert all(layer.recompute for layer in one.module.model.routed_layers)
    assert same(*(checkpoint(tmp_path / name)["state_dict"] for name in ("true", "false")))
    assert not any(layer.recompute for layer in other.module.model.routed_layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"training__budget": "{target: 0.3, hold: 20, anneal: 10}"},
            "the budget reaches its target after 30 updates, which must be below updates=30; "
            "lower budget.hold and budget.anneal",
            id="late",
        ),
        pytest.param(
            {"training__losses__budget": 1.0}, "a budget loss needs a target; set training.losses.target", id="target"
        ),
        pytest.param({"training__budget": "{target: 0}"}, "target=0.0 must be above 0 and at most 1", id="nothing"),
        pytest.param(
            {"training__budget": "{target: 0.5, floor: 0.6}"}, "floor=0.6 must be at most the target", id="floor"
        ),
        pytest.param(
            {"training__losses__policy": 0.5},
            "training.losses.policy=0.5 needs a stochastic router, and the model's are: 'sma'; "
            "use one, such as the router kind 'bernoulli'",
            id="policy-without-draws",
        ),
        pytest.param(
            {"training__losses__policy": 0.5, "layers__layer__modules": "{}"},
            "training.losses.policy=0.5 needs a stochastic router, and the model's are: none",
            id="policy-without-routers",
        ),
        pytest.param(
            {"layers__layer__router": "{kind: bernoulli}"},
            "training.losses.policy=0 leaves the router kind 'bernoulli' without a gradient; "
            "set training.losses.policy=1.0",
            id="draws-without-policy",
        ),
    ],
)
def test_invalid_budgets_and_losses_are_refused(settings, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        tiny(**settings)


@pytest.mark.parametrize("router", ["{kind: gumbel}", "{kind: random, rate: 0.3}", "{kind: sma}"])
def test_other_routers_need_no_policy_gradient(router):
    assert tiny(layers__layer__router=router).training.losses.policy == 0


POLICY = {
    "layers__layer__router": "{kind: bernoulli}",
    "training__losses": "{policy: 0.5}",
    "training__budget": "{target: 0.3, hold: 5, anneal: 5}",
}


@pytest.mark.parametrize("over", ["each", "total"])
def test_policy_gradient_starts_after_the_hold_of_the_budget(data, over):
    spec = tiny(**{**POLICY, "training__budget__over": over})
    module = Classifier(spec.model.build(), spec.training, 10)
    batch = data.collate([data.train[number] for number in range(6)])
    decisions = module.model(batch.inputs, batch.valid).decisions
    losses = torch.arange(6.0)
    for update in range(8):
        found = module.routing_loss(decisions, batch.valid, losses)
        wanted = 0.5 * policy_gradient_loss(decisions, losses, batch.valid, budget_over=over) if update > 5 else 0.0
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted))
        module.steer(decisions, batch.valid)


def test_policy_gradient_uses_only_stochastic_routers(data):
    mixed = with_routers(tiny(**{**POLICY, "training__budget": "null"}), [SMARouterSpec(), BernoulliRouterSpec()])
    module = Classifier(mixed.model.build(), mixed.training, 10)
    batch = data.collate([data.train[number] for number in range(6)])
    decisions = module.model(batch.inputs, batch.valid).decisions
    wanted = 0.5 * policy_gradient_loss(decisions[1:], torch.arange(6.0), batch.valid)
    torch.testing.assert_close(module.routing_loss(decisions, batch.valid, torch.arange(6.0)), wanted)


def test_every_row_of_a_pair_has_the_loss_of_its_sample(data):
    spec = tiny(layers__layer__router="{kind: bernoulli}", training__losses="{policy: 1.0}")
    module = Classifier(spec.model.build(), spec.training, 10)
    batch = data.collate([data.train[number] for number in range(6)])
    decisions = module.model(batch.inputs, batch.valid).decisions
    wanted = policy_gradient_loss(decisions, torch.tensor([1.0, 1.0, 5.0, 5.0, 2.0, 2.0]), batch.valid)
    torch.testing.assert_close(module.routing_loss(decisions, batch.valid, torch.tensor([1.0, 5.0, 2.0])), wanted)


def test_routers_have_their_own_learning_rate_on_the_same_schedule(data, tmp_path):
    seen = []

    class Watch(Classifier):
        def on_train_batch_end(self, *arguments):
            seen.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
            super().on_train_batch_end(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sma.recipes.training.classification.Classifier", Watch)
        spec = tiny(**POLICY, training__router_learning_rate=0.0003)
        finished = train(spec, tmp_path, data)
    assert len(seen) == 30
    for others, routers in seen:
        assert routers == pytest.approx(others / 10)
    assert max(others for others, _ in seen) == pytest.approx(0.003)
    groups = finished.module._groups()
    assert sum(len(group["params"]) for group in groups) == len(list(finished.module.parameters()))
    assert len(groups[1]["params"]) == 4  # weight and bias of two routers
    finished.module.model = sma.build(spec.model.replace(shared_router=True))
    assert len(finished.module._groups()[1]["params"]) == 2
