"""A routed layer against a loop over its tokens, and the laws of padding, rows, dense limits and precision."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sma import LayerSpec, RoutedLayer, State
from sma.errors import InputError, SpecError, StateError
from sma.modules.ema import EMASpec
from sma.routers import SMARouter
from sma.spec import FrozenDict
from tests import oracles
from tests.cases import balance, generator, gradients, masks, normal, pad, sides, spread, strided

WIDTH = 4
GAU: dict[str, Any] = {
    "kind": "gau",
    "query_size": 2,
    "hidden_size": 3,
    "window": 2,
    "position": {"kind": "relative_bias", "max_positions": 4},
}
CAUSAL_GAU = {**GAU, "bidirectional": False, "attention": "relu2", "position": {"kind": "relative_bias", "distance": "slot_distance"}}
LAYERS: dict[str, dict[str, Any]] = {
    "seqboat": {
        "backbone": {"kind": "ema", "state_size": 2},
        "modules": {"attention": GAU},
        "norm": {"kind": "layer_norm", "place": "post"},
    },
    "causal seqboat": {
        "backbone": {"kind": "ema", "state_size": 2, "bidirectional": False, "truncation": 3},
        "modules": {"attention": CAUSAL_GAU},
        "norm": {"kind": "rms_norm"},
        "dropout_on": "sum",
    },
    "several modules": {
        "modules": {
            "attention": {**GAU, "window": None, "attention": "laplace", "position": {"kind": "rotary"}},
            "conv": {"kind": "conv", "kernel_size": 2},
            "mlp": {"kind": "gated_mlp", "hidden_size": 3},
        },
        "norm": {"kind": "layer_norm"},
        "bypass": "identity",
        "activation": "none",
    },
    "no bypass": {
        "backbone": {"kind": "conv", "kernel_size": 3, "bidirectional": True},
        "backbone_activation": "none",
        "modules": {"attention": {"kind": "attention", "heads": 2, "position": {"kind": "rotary"}}, "skip": {"kind": "identity"}},
        "norm": {"kind": "scale_norm", "place": "post"},
        "bypass": "none",
    },
    "bare": {"modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 3}}, "bypass": "identity"},
    "always": {"router": {"kind": "always"}, "modules": {"attention": GAU}},
    "never": {"router": {"kind": "never"}, "modules": {"attention": GAU}, "norm": {"kind": "batch_norm"}},
    "no modules": {"backbone": {"kind": "attention", "heads": 1, "bidirectional": False}, "norm": {"kind": "batch_norm", "place": "post"}},
}
layers = pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in LAYERS])
some_layers = pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in ("seqboat", "causal seqboat", "several modules")])


def _layer(name: str, dtype: torch.dtype = torch.float64, **changes) -> RoutedLayer:
    layer = LayerSpec.model_validate({**LAYERS[name], **changes}).build(WIDTH).to(dtype)
    spread(layer)
    if layer.routed is not None and isinstance(layer.routed.router, SMARouter):
        balance(layer.routed.router, layer(normal(3, 7, WIDTH, seed=1, dtype=dtype)).decision)
    return layer.eval()


_unchanged = functools.cache(_layer)  # for tests that only run it


@layers
@given(valid=masks(rows=3, length=7))
def test_layer_equals_the_loop_over_its_tokens(name, valid):
    layer, x = _unchanged(name), normal(*valid.shape, WIDTH, seed=1)
    output = layer(x, valid)
    hidden, active = oracles.layer(layer, x, valid)
    torch.testing.assert_close(output.hidden.where(valid[..., None], 0), hidden)
    assert output.state is None
    if layer.routed is None:
        assert output.decision is None
    else:
        assert torch.equal(output.decision.active, active)
    if valid.all():
        torch.testing.assert_close(layer(x).hidden, hidden)


@layers
def test_gradients_are_those_of_the_loop(name):
    layer, x = _layer(name), normal(3, 6, WIDTH, seed=1).requires_grad_()
    valid = torch.rand(3, 6, generator=generator(2)) < 0.7
    inputs = [x, *layer.parameters()]
    found, expected = (
        torch.autograd.grad((hidden.where(valid[..., None], 0) * normal(3, 6, WIDTH)).sum(), inputs, materialize_grads=True)
        for hidden in (layer(x, valid).hidden, oracles.layer(layer, x, valid)[0])
    )
    torch.testing.assert_close(found, expected)


def test_loop_sees_tokens_that_are_on_and_off():
    """The cases above are worth little where every token decides the same."""
    for name in ("seqboat", "causal seqboat", "several modules", "no bypass", "bare"):
        rates = _layer(name)(normal(3, 7, WIDTH, seed=1)).decision.rate()
        assert ((rates > 0) & (rates < 1)).all(), name


def _valid_rows(count: int = 4) -> list[Tensor]:
    return [normal(length, WIDTH, seed=length) for length in (4, 0, 1, 6)[:count]]


@sides
@pytest.mark.parametrize("fill", [0.0, 1e4, torch.nan, torch.inf])
@layers
def test_a_row_alone_and_the_same_row_in_a_padded_batch_agree(name, side, fill):
    layer, rows = _layer(name), _valid_rows()
    batch, valid = pad(rows, side, fill=fill)
    batch.requires_grad_()
    output = layer(batch, valid)
    for b, row in enumerate(rows):
        alone = layer(row[None])
        torch.testing.assert_close(output.hidden[b][valid[b]], alone.hidden[0], atol=1e-12, rtol=1e-9)
        if alone.decision is not None:
            assert torch.equal(output.decision.active[b][valid[b]], alone.decision.active[0])
            torch.testing.assert_close(output.decision.confidence[b][valid[b]], alone.decision.confidence[0])
    if output.decision is not None:
        assert not output.decision.active[~valid].any()


@sides
@pytest.mark.parametrize("fill", [0.0, torch.nan])
@layers
def test_padding_never_changes_a_gradient(name, side, fill):
    layer, rows = _layer(name), _valid_rows()
    batch, valid = pad(rows, side, fill=fill)
    weight = pad([normal(*row.shape, seed=9) for row in rows], side)[0]
    batch.requires_grad_()
    parameters = list(layer.parameters())
    hidden = layer(batch, valid).hidden.where(valid[..., None], 0)
    by_batch, *found = torch.autograd.grad((hidden * weight).sum(), [batch, *parameters], materialize_grads=True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for b, row in enumerate(rows):
        row = row[None].clone().requires_grad_()
        alone = (layer(row).hidden * weight[b][valid[b]]).sum()
        by_row, *parts = torch.autograd.grad(alone, [row, *parameters], materialize_grads=True)
        torch.testing.assert_close(by_batch[b][valid[b]], by_row[0])
        total = [one + other for one, other in zip(total, parts, strict=True)]
    torch.testing.assert_close(found, total)
    assert not by_batch[~valid].any()


@layers
def test_a_rows_result_does_not_depend_on_the_other_rows(name):
    layer, x = _layer(name), normal(3, 6, WIDTH)
    valid = torch.rand(3, 6, generator=generator(2)) < 0.7
    changed = torch.stack([x[0], -1e3 * x[1], x[2].fill_(7.0)])
    one, other = layer(x, valid), layer(changed, valid)
    torch.testing.assert_close(one.hidden[0], other.hidden[0], atol=1e-12, rtol=1e-9)


@layers
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_a_batch_without_a_valid_token_gives_zero_gradients_not_none(name, shape):
    layer, x = _layer(name).train(), torch.full((*shape, WIDTH), torch.nan, dtype=torch.float64).requires_grad_()
    output = layer(x, torch.zeros(shape, dtype=torch.bool))
    assert output.hidden.isfinite().all()
    output.hidden.where(torch.zeros(*shape, 1, dtype=torch.bool), 0).sum().backward()
    for name, tensor in [("input", x), *layer.named_parameters()]:
        assert tensor.grad is not None, name
        assert not tensor.grad.any(), name


@sides
def test_decision_is_returned_in_the_original_places(side):
    """A token that looks like a marker is the only one that routes, wherever the padding stands."""
    layer = LayerSpec(modules=FrozenDict(skip={"kind": "identity"}), bypass="identity").build(WIDTH).double()
    router = layer.routed.router
    assert isinstance(router, SMARouter)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0] * 4, [1.0, 0.0, 0.0, 0.0]]))
    rows = [torch.rand(length, WIDTH, generator=generator(length), dtype=torch.float64) - 2 for length in (5, 3)]
    rows[0][2, 0] = rows[1][1, 0] = 1.0
    batch, valid = pad(rows, side)
    decision = layer(batch, valid).decision
    assert torch.equal(decision.active[..., 0], (batch[..., 0] == 1) & valid)
    assert torch.equal(decision.logits[..., 0, 1][valid], batch[..., 0][valid])


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(module, id=f"{module['kind']}-{place}")
        for place, module in enumerate(
            [
                GAU,
                CAUSAL_GAU,
                {"kind": "attention", "heads": 2},
                {"kind": "conv"},
                {"kind": "ema", "state_size": 2},
                {"kind": "gated_mlp", "hidden_size": 3},
                {"kind": "identity"},
            ]
        )
    ],
)
def test_an_always_active_module_is_a_dense_layer(module):
    """Two specs, one function: routed with confidence 1 past no bypass, and as the backbone of a layer that routes nothing."""
    routed = LayerSpec(router={"kind": "always"}, modules={"module": module}, bypass="none").build(WIDTH).double()
    dense = LayerSpec(backbone=module, backbone_activation="none", bypass="identity").build(WIDTH).double()
    spread(routed)
    dense.backbone.load_state_dict(routed.routed.submodules["module"].state_dict())
    batch, valid = pad(_valid_rows(), "middle")
    torch.testing.assert_close(routed(batch, valid).hidden[valid], dense(batch, valid).hidden[valid])
    torch.testing.assert_close(routed(batch).hidden, dense(batch).hidden)


def test_a_layer_that_never_routes_is_the_bypass_alone():
    never, alone = _layer("seqboat", router={"kind": "never"}), _layer("seqboat", modules={})
    weights = {name: tensor for name, tensor in never.state_dict().items() if not name.startswith("routed.")}
    alone.load_state_dict(weights)
    x = normal(2, 5, WIDTH)
    assert torch.equal(never(x).hidden, alone(x).hidden)


@some_layers
@pytest.mark.usefixtures("as_users_run")  # hundreds of forward passes: shapes are checked elsewhere
def test_gradient_check_in_float64_through_router_compaction_modules_and_combine(name):
    layer, x = _layer(name), normal(2, 5, WIDTH, seed=1).requires_grad_()
    valid = torch.tensor([[True] * 5, [False, True, True, False, True]])
    decision = layer(x, valid).decision
    margin = (decision.p_on - 0.5).abs()[valid].min()
    assert margin > 1e-4  # a tie would be a step, and a step has no derivative
    assert decision.active.any()
    assert not decision.active[valid].all()
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x, valid).hidden[valid], [x, *layer.parameters()])


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_results_and_gradients_near_the_full_ones(name, dtype):
    layer, x = _layer(name, torch.float32), normal(3, 40, WIDTH, seed=1, dtype=torch.float32).requires_grad_()
    valid = torch.rand(3, 40, generator=generator(2)) < 0.8
    exact = layer(x, valid)
    with torch.autocast("cpu", dtype=dtype):
        output = layer(x, valid)
    assert output.hidden.dtype == torch.float32
    if output.decision is not None:
        assert (output.decision.active == exact.decision.active)[valid].double().mean() > 0.9
        valid = valid & (output.decision.active == exact.decision.active).all(-1)
    near = (output.hidden - exact.hidden).abs()[valid].median()
    assert near < (0.05 if dtype == torch.bfloat16 else 0.02)
    for gradient in torch.autograd.grad(output.hidden.square().mean(), [x, *layer.parameters()], materialize_grads=True):
        assert gradient.isfinite().all()


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_half_precision_parameters_runs(name, dtype):
    layer, x = _layer(name, dtype), normal(2, 9, WIDTH, seed=1, dtype=dtype).requires_grad_()
    hidden = layer(x, torch.rand(2, 9, generator=generator(2)) < 0.8).hidden
    assert hidden.dtype == dtype
    for gradient in torch.autograd.grad(hidden.sum(), [x, *layer.parameters()], materialize_grads=True):
        assert gradient.isfinite().all()


@layers
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_extreme_tokens_give_finite_results_and_gradients(name, size):
    layer, x = _layer(name, torch.float32), (size * normal(2, 9, WIDTH, dtype=torch.float32)).requires_grad_()
    hidden = layer(x).hidden
    assert hidden.isfinite().all()
    for gradient in torch.autograd.grad(hidden.mean(), [x, *layer.parameters()], materialize_grads=True):
        assert gradient.isfinite().all()


@layers
def test_no_input_is_changed(name):
    x, valid = normal(2, 6, WIDTH), torch.rand(2, 6, generator=generator(2)) < 0.7
    kept = x.clone(), valid.clone()
    _layer(name).train()(x, valid).hidden.sum()
    assert torch.equal(x, kept[0])
    assert torch.equal(valid, kept[1])


@layers
def test_input_that_is_not_contiguous_gives_the_same(name):
    layer, x, valid = _layer(name), normal(2, 6, WIDTH), torch.rand(2, 6, generator=generator(2)) < 0.7
    for other, mask in zip(strided(x), strided(valid), strict=True):
        torch.testing.assert_close(layer(other, mask).hidden[valid], layer(x, valid).hidden[valid])
        torch.testing.assert_close(layer(other).hidden, layer(x).hidden)


@pytest.mark.parametrize(
    ("name", "changes", "junk"),
    [
        pytest.param("causal seqboat", {}, 1e4, id="seqboat"),
        # Attention reads what is masked with a weight of 0, and 0 x NaN is NaN; recurrences and inactive tokens leave no trace.
        pytest.param("causal seqboat", {}, torch.nan, id="seqboat, NaN that routes nowhere"),
        pytest.param("causal seqboat", {"router": {"kind": "always"}}, 1e4, id="seqboat, always active"),
        pytest.param("no modules", {}, 1e4, id="attention"),
    ],
)
def test_a_causal_layer_never_looks_ahead(name, changes, junk):
    layer, x = _layer(name, **changes), normal(2, 9, WIDTH)
    assert layer.causal
    for cut in range(1, 9):
        changed = torch.cat([x[:, :cut], torch.full_like(x[:, cut:], junk)], dim=1)
        before, after = layer(x), layer(changed)
        torch.testing.assert_close(after.hidden[:, :cut], before.hidden[:, :cut])
        if before.decision is not None:
            assert torch.equal(after.decision.active[:, :cut], before.decision.active[:, :cut])


@pytest.mark.parametrize("name", ["seqboat", "several modules", "no bypass"])
def test_a_layer_that_looks_ahead_says_so(name):
    assert not _layer(name).causal


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("place", ["pre", "post"])
def test_activation_checkpointing_changes_nothing_and_updates_batch_norm_once(reentrant, place):
    plain, saved = (_layer("seqboat", norm={"kind": "batch_norm", "place": place}).train() for _ in range(2))
    x, valid = normal(3, 6, WIDTH).requires_grad_(), torch.rand(3, 6, generator=generator(2)) < 0.7
    results = []
    for layer in (plain, saved):
        x.grad = None
        if layer is plain:
            hidden = plain(x, valid).hidden
        else:
            hidden = checkpoint(lambda *inputs: saved(*inputs).hidden, x, valid, use_reentrant=reentrant)
        hidden.where(valid[..., None], 0).square().sum().backward()
        results.append([hidden.detach(), x.grad, *(parameter.grad for parameter in layer.parameters()), *layer.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert plain.norm.running_mean.any()


def test_batch_norm_in_a_layer_sees_the_valid_tokens_only():
    layer = _layer("seqboat", norm={"kind": "batch_norm", "momentum": 1.0}).train()
    batch, valid = pad(_valid_rows(), "left", fill=1e4)
    layer(batch, valid)
    torch.testing.assert_close(layer.norm.running_mean, batch[valid].mean(0))
    torch.testing.assert_close(layer.norm.running_var, batch[valid].var(0))


@sides
def test_batch_norm_after_the_residual_sees_the_valid_tokens_only(side):
    layer = _layer("seqboat", norm={"kind": "batch_norm", "place": "post", "affine": False, "epsilon": 1e-12}).train()
    batch, valid = pad(_valid_rows(), side, fill=1e4)
    tokens = layer(batch, valid).hidden[valid]
    torch.testing.assert_close(tokens.mean(0), torch.zeros(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(tokens.var(0, correction=0), torch.ones(WIDTH, dtype=torch.float64))


class TestDropout:
    def _values(self, training: bool, **fields) -> Tensor:
        spec = {"router": {"kind": "always"}, "modules": {"skip": {"kind": "identity"}}, "activation": "none", "dropout": 0.5, **fields}
        layer = LayerSpec.model_validate(spec).build(64).train(training)
        return layer(torch.ones(8, 64, 64)).hidden

    def test_drops_the_modules_results(self):
        # x + bypass + dropped module
        values = self._values(True, bypass="identity")
        assert set(values.unique().tolist()) == {2.0, 4.0}
        assert (values == 2).double().mean().item() == pytest.approx(0.5, abs=0.02)

    def test_or_their_sum_with_the_bypass(self):
        # x + dropped (bypass + module)
        values = self._values(True, bypass="identity", dropout_on="sum")
        assert set(values.unique().tolist()) == {1.0, 5.0}

    def test_drops_the_backbones_result(self):
        values = self._values(True, bypass="identity", backbone={"kind": "identity"}, backbone_activation="none", modules={})
        assert set(values.unique().tolist()) == {1.0, 3.0}

    @pytest.mark.parametrize("dropout_on", ["modules", "sum"])
    @pytest.mark.parametrize("name", ["seqboat", "several modules", "no bypass"])
    def test_gradient_is_that_of_the_same_drawn_mask(self, name, dropout_on):
        layer, x = _layer(name, dropout=0.3, dropout_on=dropout_on).train(), normal(2, 5, WIDTH).requires_grad_()

        def run(values: Tensor) -> Tensor:
            torch.manual_seed(1)
            return layer(values).hidden

        assert not torch.equal(run(x), layer.eval()(x).hidden)
        layer.train()
        assert torch.autograd.gradcheck(run, [x])

    @pytest.mark.parametrize("dropout_on", ["modules", "sum"])
    def test_drops_nothing_in_evaluation(self, dropout_on):
        assert self._values(False, bypass="identity", dropout_on=dropout_on).unique().tolist() == [3.0]


@pytest.mark.usefixtures("as_users_run")
class TestWrongInput:
    def test_tokens_of_another_width(self):
        with pytest.raises(InputError, match=r"the tokens have shape \(2, 3, 5\); required is \(B, L, D = 4\)"):
            _layer("seqboat")(normal(2, 3, 5))

    def test_tokens_that_are_whole_numbers(self):
        with pytest.raises(InputError, match=r"the tokens have dtype torch\.int64; required is a floating-point dtype"):
            _layer("seqboat")(torch.zeros(2, 3, WIDTH, dtype=torch.long))

    def test_mask_of_another_shape(self):
        with pytest.raises(InputError, match=r"valid has shape \(3, 2\); required is \(B, L\) = \(2, 3\), as the input has"):
            _layer("seqboat")(normal(2, 3, WIDTH), torch.ones(3, 2, dtype=torch.bool))

    def test_state(self):
        with pytest.raises(StateError, match="RoutedLayer does not support streaming yet; run whole sequences with state=None"):
            _layer("seqboat")(normal(2, 3, WIDTH), None, State())


class TestSpec:
    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            (
                {"bypass": "none"},
                "LayerSpec: a layer without modules needs bypass='linear' or 'identity'; otherwise it passes its input on",
            ),
            (
                {"modules": {"a.b": {"kind": "identity"}}},
                r"LayerSpec: the module name 'a\.b' must be a word of letters, digits and '_'; fie",
            ),
            ({"modules": {"": {"kind": "identity"}}}, r"LayerSpec: the module name '' must be a word of letters, digits and '_'"),
            (
                {"modules": {"type": {"kind": "identity"}}},
                r"LayerSpec: the module name 'type' is taken by torch\.nn\.ModuleDict; choose anoth",
            ),
            ({"dropout": 1.0}, r"LayerSpec: dropout=1\.0 must be less than 1\.0; dropout: probability of dropping a channel"),
            ({"bypass": "lineal"}, "LayerSpec: bypass='lineal' must be 'none', 'linear' or 'identity'; did you mean 'linear'"),
        ],
    )
    def test_impossible_layer(self, fields, complaint):
        with pytest.raises(SpecError, match=complaint):
            LayerSpec.model_validate(fields)

    @layers
    def test_layer_has_as_many_parameters_as_its_spec_predicts(self, name):
        layer = _layer(name)
        assert sum(parameter.numel() for parameter in layer.parameters()) == layer.spec.num_parameters(WIDTH)

    def test_operations_of_a_layer_are_those_of_its_parts(self):
        spec = LayerSpec.model_validate(LAYERS["several modules"])
        one, two = spec.operations(WIDTH, 10, 0.5), spec.operations(WIDTH, 10, {"attention": 0.5, "conv": 0.5, "mlp": 0.5})
        parts = [module.operations(WIDTH, 5) for module in spec.modules.values()]
        router = 10 * spec.router.operations(WIDTH, 3)
        assert one == two
        assert one.products == sum(part.products for part in parts) + router
        assert one.transforms == sum(part.transforms for part in parts)
        assert spec.replace(bypass="linear").operations(WIDTH, 10, 0.5).products == one.products + 10 * WIDTH * WIDTH
        backbone = EMASpec(bidirectional=False)
        with_backbone = spec.replace(backbone=backbone).operations(WIDTH, 10, 0.5)
        assert with_backbone.products == one.products + backbone.operations(WIDTH, 10).products
        assert one.total == one.products + one.transforms

    def test_bypass_starts_small(self):
        layer = LayerSpec().build(300)
        assert layer.bypass.weight.abs().max() <= 0.04
        assert layer.bypass.weight.std().item() == pytest.approx(0.0176, abs=0.0005)  # 0.02 cut at 2 standard deviations
        assert not layer.bypass.bias.any()


def test_random_routers_draw_by_position_so_left_padding_changes_nothing():
    layer = _layer("several modules", router={"kind": "random", "rate": 0.5})
    row = normal(6, WIDTH)
    alone = layer(row[None])
    for side in ("left", "middle", "right"):
        batch, valid = pad([row], side, fill=torch.nan)
        output = layer(batch, valid)
        assert torch.equal(output.decision.active[valid], alone.decision.active[0])
        torch.testing.assert_close(output.hidden[valid], alone.hidden[0])


def test_gradients_reach_everything_that_ran():
    layer = _layer("several modules")
    output = layer(normal(3, 9, WIDTH))
    assert (output.decision.rate() > 0).all()
    for name, gradient in zip(dict(layer.named_parameters()), gradients(output.hidden, layer.parameters()), strict=True):
        assert gradient.any(), name
