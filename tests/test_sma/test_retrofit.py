"""Routed parts in third-party models: which tokens skip a part, what stays unchanged, and how to undo it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.errors import InputError, SmaError
from sma.retrofit import RoutedPart, Target, collect_decisions, intermediate_and_output, retrofit
from tests.cases import generator
from tests.test_sma.foreign_models import HALF, OPEN, Block, TwoModules, ids, made


def losses_and_gradients(model: nn.Module, *inputs: Any) -> list[Tensor]:
    model.zero_grad()
    result = model(*inputs)
    result.square().sum().backward()
    return [result.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("blocks", "target"),
    [
        pytest.param((Block, Block), "layers.*.mlp", id="one-module"),
        pytest.param((TwoModules, TwoModules), intermediate_and_output, id="two-modules"),
        pytest.param((lambda: TwoModules(norm=False),), intermediate_and_output, id="without-norm"),
    ],
)
def test_with_everything_active_the_model_equals_the_original_bit_by_bit(blocks, target, dtype):
    model, original = made(*blocks, dtype=dtype).eval(), made(*blocks, dtype=dtype).eval()
    retrofit(model, {target: OPEN})
    found, wanted = model(ids()), original(ids())
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, parameter in original.named_parameters():
        matching = [other for path, other in model.named_parameters() if torch.equal(other, parameter)]
        assert any(torch.equal(other.grad, parameter.grad) for other in matching if other.grad is not None), name


@pytest.mark.parametrize("training", [True, False])
def test_new_parts_take_the_mode_of_the_replaced_ones_and_others_keep_theirs(training):
    model = made(TwoModules).train(training)
    model.layers[0].output.dropout.train(not training)
    retrofit(model, {intermediate_and_output: OPEN})
    for path, part in model.named_modules():
        assert part.training == (training != isinstance(part, nn.Dropout)), path


def test_a_skipped_token_bypasses_the_part():
    model, original = made(Block), made(Block)
    retrofit(model, {"layers.*.mlp": HALF})
    with collect_decisions(model) as decisions:
        found = model(ids())
    (decision,) = decisions
    active = decision.active[..., 0]
    assert active.any()
    assert not active.all()
    wanted = original(ids())
    block = original.layers[0]
    x = original.embedding(ids())
    normal = block.norm(x)
    skipped = original.head(x + block.attention(normal, normal, normal)[0])
    torch.testing.assert_close(found, wanted.where(active[..., None], skipped))


def test_random_routers_of_different_parts_are_independent():
    model = made()
    retrofit(model, {"layers.*.mlp": {"kind": "random", "rate": 0.5}})
    with collect_decisions(model) as decisions:
        model(ids(4, 50))
    first, second = (decision.active for decision in decisions)
    assert 0.3 < (first == second).double().mean() < 0.7


def test_post_norm_blocks_normalise_skipped_tokens():
    model, original = made(TwoModules).eval(), made(TwoModules).eval()
    retrofit(model, {intermediate_and_output: {"kind": "never"}})
    x = original.embedding(ids())
    torch.testing.assert_close(model(ids()), original.head(original.layers[0].output.LayerNorm(x)))


@pytest.mark.usefixtures("as_users_run")
def test_a_handle_after_undo_steers_nothing():
    handle = retrofit(made(), {"layers.*.mlp": HALF})
    handle.undo()
    handle.undo()
    for call in (lambda: handle.budget(0.3), lambda: handle.calibrate([ids()], 0.3)):
        with pytest.raises(InputError, match="the retrofit of Model was undone"):
            call()


def test_undo_restores_the_model():
    model, original = made(), made()
    before = [(name, id(part)) for name, part in model.named_modules()]
    model.head.bias.requires_grad_(False)
    handle = retrofit(model, {"layers.*.mlp": HALF}, train="routers")
    assert handle.undo() is model
    assert [(name, id(part)) for name, part in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == [p is not model.head.bias for p in model.parameters()]
    for found, wanted in zip(losses_and_gradients(model, ids()), losses_and_gradients(original, ids()), strict=False):
        assert torch.equal(found, wanted)
    retrofit(model, {"layers.*.mlp": HALF})  # can be applied again


def test_only_the_routers_are_trained():
    model = made()
    retrofit(model, {"layers.*.mlp": {**HALF, "initial_bias": 1.0}}, train="routers")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".router." in name for name in trained)
    model(ids()).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_preview_counts_the_routed_parameters():
    handle = retrofit(made(), {"layers.*.mlp": HALF})
    lines = handle.preview().splitlines()
    assert len(lines) == 3
    # Norm 16, two matrices of 8 x 16 with biases 16 and 8; the router 2 x 8 + 2 + 1.
    assert lines[1].split() == ["layers.0.mlp", "296", "19", "256"]


def test_a_budget_and_calibrate_reach_their_rates():
    model = made().eval()
    handle = retrofit(model, {"layers.*.mlp": HALF})
    controller = handle.budget(0.3)
    data = [torch.randint(11, (8, 32), generator=generator(seed)) for seed in range(3)]
    for _ in range(60):
        for batch in data:
            with collect_decisions(model) as decisions:
                model(batch)
            controller.update(decisions)
    rates = torch.cat([decision.rate() for decision in decisions])
    assert (rates - 0.3).abs().max() < 0.1
    counted = handle.calibrate(data, 0.6)
    assert (counted.rates - 0.6).abs().max() < 0.1
    valid = torch.rand(8, 32, generator=generator(5)) < 0.5
    valid[:, 0] = True
    handle.calibrate([(batch, valid) for batch in data], 0.6)
    counted = handle.calibrate(data, 0.4, over="total")
    assert abs(counted.rates.mean() - 0.4) < 0.02


def _shared() -> nn.Module:
    model = made()
    model.layers[1].mlp = model.layers[0].mlp
    return model


def _retrofitted() -> nn.Module:
    model = made()
    retrofit(model, {"layers.0.mlp": HALF})
    return model


def adapted(*targets: Any) -> Any:
    """An adapter that returns these targets; a tuple is a path and the path that it replaces."""

    def adapter(model: nn.Module) -> list[Any]:
        return [_target(model, *each) if isinstance(each, tuple) else each for each in targets]

    return adapter


def _target(model: nn.Module, path: str, replaced: str) -> Target:
    return Target(path, model.get_submodule(path), lambda routed: {replaced: routed})


def nothing(model: nn.Module) -> None:
    """An adapter that returns None."""


FIRST = ("layers.0.mlp", "layers.0.mlp")


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [
        pytest.param(made, {"layers.*.mlpp": HALF}, r"did you mean 'layers\.\*\.mlp'", id="typo"),
        pytest.param(made, {"*.mlp": HALF}, "no module of Model matches", id="too-short"),
        pytest.param(made, {}, "expected a mapping of patterns", id="empty"),
        pytest.param(made, "layers.*.mlp", "expected a mapping of patterns", id="text"),
        pytest.param(made, {"layers.*.mlp": HALF, "layers.0.*": HALF}, "two targets match|lies inside", id="twice"),
        pytest.param(made, {"layers.*": HALF, "layers.*.mlp": HALF}, "lies inside of|cannot be routed", id="nested"),
        pytest.param(made, {"layers.*.attention": HALF}, "'layers.0.attention' cannot be routed: .*mixes", id="mixing"),
        pytest.param(made, {intermediate_and_output: HALF}, "finds no part in Model", id="none"),
        pytest.param(_shared, {"layers.0.mlp": HALF}, "a part that is shared cannot be routed", id="shared"),
        pytest.param(_retrofitted, {"layers.1.mlp": HALF}, "is retrofitted already", id="again"),
        pytest.param(lambda: 3, {"layers.*.mlp": HALF}, "expected a Module", id="no-model"),
        pytest.param(made, {3: HALF}, "a target is an int; expected a pattern of paths", id="number"),
        pytest.param(made, {"layers.*.mlp": 3}, "a spec is read from a path or a mapping", id="no-router"),
        pytest.param(made, {nothing: HALF}, "the adapter nothing returned None; expected a Target", id="no-list"),
        pytest.param(made, {adapted(): HALF}, "the adapter adapter finds no part in Model", id="no-target"),
        pytest.param(made, {adapted(5): HALF}, "the adapter adapter returned an int", id="no-targets"),
        pytest.param(made, {adapted(FIRST, ("layers.1.mlp", "x.y")): HALF}, "replaces 'x.y', which", id="nowhere"),
        pytest.param(
            made,
            {adapted(FIRST, ("layers.1.mlp", "layers.0.mlp")): HALF},
            "both replace 'layers.0.mlp'",
            id="same-place",
        ),
        pytest.param(
            lambda: made(TwoModules), {adapted(("layers.0.output.dropout", "layers.0")): HALF}, "cannot", id="dropout"
        ),
        pytest.param(made, {"layers.*.mlp.1": HALF}, r"Linear does not map tokens \(…, D\) alone", id="half-block"),
        pytest.param(made, {"head": HALF}, r"'head' cannot be routed: Linear does not map", id="head"),
        pytest.param(made, {"layers.*.mlp": "smaa"}, "unknown router kind 'smaa'", id="kind"),
    ],
)
def test_parts_that_cannot_be_routed_are_refused_and_nothing_changes(model, targets, said):
    given = model()
    before = list(given.named_modules()) if isinstance(given, nn.Module) else None
    with pytest.raises(SmaError, match=said):
        retrofit(given, targets)
    assert before is None or list(given.named_modules()) == before


@pytest.mark.usefixtures("as_users_run")
def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="expected 'all' or 'routers'"):
        retrofit(made(), {"layers.*.mlp": HALF}, train="router")


def test_a_third_party_adapter_may_choose_the_parts():
    def feed_forwards(model: nn.Module) -> list[Target]:
        return [Target("layers.0.mlp", model.layers[0].mlp, lambda routed: {"layers.0.mlp": routed})]

    handle = retrofit(made(), {feed_forwards: HALF})
    assert list(handle.parts) == ["layers.0.mlp"]
    assert isinstance(handle.model.layers[0].mlp, RoutedPart)
