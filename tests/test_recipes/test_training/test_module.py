"""The training module: rates against loops, the optimiser of the paper, precisions, and non-finite losses."""

import copy

import lightning
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from sma.errors import DataError
from sma.model import build
from sma.recipes.experiment import load_experiment
from sma.recipes.io.run_folder import BEST, LAST
from sma.recipes.training.classification import Classification, Classifier
from sma.recipes.training.measures import RateMetric
from tests.test_recipes.decisions import LAYERS, batches
from tests.test_recipes.tiny import before_update, checkpoint, tiny, train


def test_rates_over_batches_equal_a_loop_over_tokens():
    metric, ran, tokens = RateMetric(LAYERS), {}, 0
    for decisions, valid in batches(LAYERS):
        metric.update(decisions, valid)
        for row in range(valid.shape[0]):
            for position in range(valid.shape[1]):
                if not valid[row, position]:
                    continue
                tokens += 1
                for layer, decision in enumerate(decisions):
                    for place, name in enumerate(decision.names):
                        ran[layer, name] = ran.get((layer, name), 0) + int(decision.active[row, position, place])
    expected = {f"layer{layer}/{name}": count / tokens for (layer, name), count in ran.items()}
    assert metric.by_name() == expected
    assert set(expected) == {"layer0/attention", "layer0/mlp", "layer1/mlp", "layer2/conv", "layer2/attention"}
    rates = metric.compute()
    assert rates.shape == (3, 3)
    assert int(rates.isnan().sum()) == 4  # a sub-module that a layer lacks has no rate


def test_reset_clears_the_rates():
    metric, (first, second, *_) = RateMetric(LAYERS), batches(LAYERS)
    metric.update(*first)
    metric.reset()
    metric.update(*second)
    alone = RateMetric(LAYERS)
    alone.update(*second)
    assert metric.by_name() == alone.by_name()


def test_rates_without_tokens_are_zero():
    assert RateMetric([("attention",)]).by_name() == {"layer0/attention": 0.0}
    assert RateMetric([]).by_name() == {}


def _classifier(**settings):
    spec = tiny(**settings)
    classifier = Classifier(build(spec.model, seed=0), spec.training, spec.task.classes)
    classifier.trainer = lightning.Trainer(accelerator="cpu", precision=spec.precision, barebones=True)
    return classifier


def test_weight_decay_is_decoupled_and_applies_to_every_parameter():
    classifier = _classifier(training__weight_decay=0.5, training__warmup=0)
    optimizer = classifier.configure_optimizers()["optimizer"]
    (group,) = optimizer.param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in classifier.parameters()}
    before = copy.deepcopy(list(classifier.parameters()))
    for parameter in classifier.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for old, new in zip(before, classifier.parameters(), strict=True):
        torch.testing.assert_close(new, old * (1 - 0.003 * 0.5))


def test_optimiser_of_the_paper_preset_has_the_settings_of_the_paper():
    spec = load_experiment("listops_paper")
    classifier = _classifier()
    classifier.training_spec = spec.training
    (group,) = classifier.configure_optimizers()["optimizer"].param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-8, 0.001)
    assert (group["initial_lr"], group["amsgrad"], group["maximize"]) == (0.004, False, False)


def test_learning_rate_of_every_update_follows_the_schedule(data, tmp_path, monkeypatch):
    spec = tiny(training__decay_power=2)
    rates = []
    for update in range(30):
        before_update(monkeypatch, update, lambda self: rates.append(self.optimizers().param_groups[0]["lr"]))
    train(spec, tmp_path, data)
    warm = [1e-7 + (0.003 - 1e-7) * step / 5 for step in range(5)]
    assert rates == pytest.approx(warm + [0.003 * ((30 - step) / 25) ** 2 for step in range(5, 30)], rel=1e-9)


@pytest.mark.parametrize(("clip", "changed"), [(1e-3, True), ("null", False)], ids=["clipped", "not-clipped"])
def test_gradient_is_clipped_to_the_given_norm(data, tmp_path, clip, changed):
    norms = []

    def measure(optimizer, *_):
        gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
        norms.append(
            float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])))
        )

    hook = register_optimizer_step_post_hook(measure)
    train(tiny(training__clip_norm=clip, training__updates=6), tmp_path, data)
    hook.remove()
    assert len(norms) == 6
    assert (norms == pytest.approx([1e-3] * 6, rel=1e-2)) == changed


def test_training_equals_a_plain_loop_over_the_formulas(data, tmp_path):
    # In float64, where rounding flips no decision, and without dropout.
    settings = {"embedding_dropout": 0, "layers__layer__dropout": 0, "head__dropout": 0, "precision": "64-true"}
    spec = tiny(**settings, training__clip_norm=0.5, training__weight_decay=0.3)
    trained = train(spec, tmp_path, data).module.model
    trained.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in checkpoint(tmp_path)["state_dict"].items()}
    )

    model = build(spec.model, seed=spec.seed).double()
    parameters = list(model.parameters())
    means, squares = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    for step, batch in enumerate(Classification(spec.task, data).training_batches(spec.training, spec.seed)):
        loss = torch.nn.functional.cross_entropy(model(batch.inputs, batch.valid).logits, batch.targets)
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
        rate = 1e-7 + (0.003 - 1e-7) * step / 5 if step < 5 else 0.003 * (30 - step) / 25
        for parameter, gradient, mean, square in zip(parameters, gradients, means, squares, strict=True):
            gradient = gradient * min(1.0, 0.5 / (norm + 1e-6))
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.98).add_(gradient.square(), alpha=0.02)
            update = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8)
            parameter.data = parameter.data * (1 - rate * 0.3) - rate * update
    for (name, mine), theirs in zip(model.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_every_precision_trains_with_clipping(data, tmp_path, precision):
    _check_precision(train(tiny(precision=precision, training__updates=6), tmp_path, data), precision)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "64-true"])
def test_every_precision_trains_with_clipping_on_a_gpu(data, tmp_path, precision):
    done = train(tiny(precision=precision, training__updates=6), tmp_path, data, accelerator="cuda")
    _check_precision(done, precision)
    assert done.summary["hardware"] == torch.cuda.get_device_name()


def _check_precision(done, precision):
    before = build(tiny().model, seed=0).state_dict()
    assert all(tensor.isfinite().all() for tensor in done.module.state_dict().values())
    assert any(
        not torch.equal(tensor.float().cpu(), before[name]) for name, tensor in done.module.model.state_dict().items()
    )
    weights = torch.float64 if precision == "64-true" else torch.float32
    assert {tensor.dtype for tensor in done.module.model.state_dict().values()} == {weights}


def _break_weights(classifier: Classifier) -> None:
    with torch.no_grad():
        next(classifier.parameters()).fill_(float("nan"))


def _break_gradient(classifier: Classifier) -> None:
    next(classifier.parameters()).register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("update", "act", "failed", "kept"),
    [
        pytest.param(23, _break_weights, 23, 20, id="weights"),
        # Update 19 is the last before an evaluation, and no later loss shows that its gradient is not finite.
        pytest.param(19, _break_gradient, 20, 10, id="gradient-before-an-evaluation"),
    ],
)
def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoints(
    data, tmp_path, monkeypatch, update, act, failed, kept
):
    before_update(monkeypatch, update, act)
    with pytest.raises(
        DataError,
        match=f"the loss of update {failed} is nan; the last checkpoint is still good: start a new run with a lower",
    ):
        train(tiny(), tmp_path, data)
    assert checkpoint(tmp_path)["global_step"] == kept
    for name in (LAST, BEST):
        assert all(tensor.isfinite().all() for tensor in checkpoint(tmp_path, name)["state_dict"].values())
