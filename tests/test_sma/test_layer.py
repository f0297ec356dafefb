"""A routed layer against a loop over its tokens; dense limits, precision, causality and recomputation."""

import functools

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sma import LayerSpec
from sma.errors import InputError, SpecError
from sma.modules.ema import EMASpec
from sma.submodule import MACs
from tests import oracles
from tests.cases import generator, gradients, masks, normal, pad, spread, strided
from tests.test_sma.layers import CAUSAL_GAU, GAU, LAYERS, WIDTH, layers, make, some_layers

_unchanged = functools.cache(make)  # for tests that only run it


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
def test_gradients_agree_with_the_loop(name):
    layer, x = make(name), normal(3, 6, WIDTH, seed=1).requires_grad_()
    valid = torch.rand(3, 6, generator=generator(2)) < 0.7
    inputs = [x, *layer.parameters()]
    found, expected = (
        torch.autograd.grad(
            (hidden.where(valid[..., None], 0) * normal(3, 6, WIDTH)).sum(), inputs, materialize_grads=True
        )
        for hidden in (layer(x, valid).hidden, oracles.layer(layer, x, valid)[0])
    )
    torch.testing.assert_close(found, expected)


def test_layers_have_active_and_inactive_tokens():
    """The cases above are meaningful only if decisions differ between tokens."""
    for name in ("seqboat", "causal seqboat", "several modules", "no bypass", "bare"):
        rates = make(name)(normal(3, 7, WIDTH, seed=1)).decision.rate()
        assert ((rates > 0) & (rates < 1)).all(), name


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
def test_an_always_active_module_equals_a_dense_layer(module):
    """A module routed with confidence 1 without a bypass equals the backbone of a layer without routing."""
    routed = LayerSpec(router={"kind": "always"}, modules={"module": module}, bypass="none").build(WIDTH).double()
    dense = LayerSpec(backbone=module, backbone_activation="none", bypass="identity").build(WIDTH).double()
    spread(routed)
    dense.backbone.load_state_dict(routed.routed.submodules["module"].state_dict())
    batch, valid = pad([normal(length, WIDTH, seed=length) for length in (4, 0, 1, 6)], "middle")
    torch.testing.assert_close(routed(batch, valid).hidden[valid], dense(batch, valid).hidden[valid])
    torch.testing.assert_close(routed(batch).hidden, dense(batch).hidden)


def test_a_layer_that_never_routes_equals_its_bypass():
    never, alone = make("seqboat", router={"kind": "never"}), make("seqboat", modules={})
    weights = {name: tensor for name, tensor in never.state_dict().items() if not name.startswith("routed.")}
    alone.load_state_dict(weights)
    x = normal(2, 5, WIDTH)
    assert torch.equal(never(x).hidden, alone(x).hidden)


@some_layers
@pytest.mark.usefixtures("as_users_run")  # hundreds of forward passes: shapes are checked elsewhere
def test_gradient_check_in_float64_through_router_compaction_modules_and_combine(name):
    layer, x = make(name), normal(2, 5, WIDTH, seed=1).requires_grad_()
    valid = torch.tensor([[True] * 5, [False, True, True, False, True]])
    decision = layer(x, valid).decision
    margin = (decision.p_on - 0.5).abs()[valid].min()
    assert margin > 1e-4  # the result is not differentiable at ties
    assert decision.active.any()
    assert not decision.active[valid].all()
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x, valid).hidden[valid], [x, *layer.parameters()])


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_results_and_gradients_near_the_full_ones(name, dtype):
    layer, x = make(name, torch.float32), normal(3, 40, WIDTH, seed=1, dtype=torch.float32).requires_grad_()
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
    for gradient in torch.autograd.grad(
        output.hidden.square().mean(), [x, *layer.parameters()], materialize_grads=True
    ):
        assert gradient.isfinite().all()


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_half_precision_parameters_runs(name, dtype):
    layer, x = make(name, dtype), normal(2, 9, WIDTH, seed=1, dtype=dtype).requires_grad_()
    hidden = layer(x, torch.rand(2, 9, generator=generator(2)) < 0.8).hidden
    assert hidden.dtype == dtype
    for gradient in torch.autograd.grad(hidden.sum(), [x, *layer.parameters()], materialize_grads=True):
        assert gradient.isfinite().all()


@layers
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_extreme_tokens_give_finite_results_and_gradients(name, size):
    layer, x = make(name, torch.float32), (size * normal(2, 9, WIDTH, dtype=torch.float32)).requires_grad_()
    hidden = layer(x).hidden
    assert hidden.isfinite().all()
    for gradient in torch.autograd.grad(hidden.mean(), [x, *layer.parameters()], materialize_grads=True):
        assert gradient.isfinite().all()


@layers
def test_no_input_is_changed(name):
    x, valid = normal(2, 6, WIDTH), torch.rand(2, 6, generator=generator(2)) < 0.7
    kept = x.clone(), valid.clone()
    make(name).train()(x, valid).hidden.sum()
    assert torch.equal(x, kept[0])
    assert torch.equal(valid, kept[1])


@layers
def test_input_that_is_not_contiguous_gives_the_same_result(name):
    layer, x, valid = make(name), normal(2, 6, WIDTH), torch.rand(2, 6, generator=generator(2)) < 0.7
    for other, mask in zip(strided(x), strided(valid), strict=True):
        torch.testing.assert_close(layer(other, mask).hidden[valid], layer(x, valid).hidden[valid])
        torch.testing.assert_close(layer(other).hidden, layer(x).hidden)


@pytest.mark.parametrize(
    ("name", "changes", "junk"),
    [
        pytest.param("causal seqboat", {}, 1e4, id="seqboat"),
        # Attention multiplies masked values by a weight of 0, and 0 x NaN is NaN; recurrences and inactive tokens
        # have no such effect.
        pytest.param("causal seqboat", {}, torch.nan, id="seqboat, NaN that routes nowhere"),
        pytest.param("causal seqboat", {"router": {"kind": "always"}}, 1e4, id="seqboat, always active"),
        pytest.param("no modules", {}, 1e4, id="attention"),
    ],
)
def test_a_causal_layer_never_looks_ahead(name, changes, junk):
    layer, x = make(name, **changes), normal(2, 9, WIDTH)
    assert layer.causal
    for cut in range(1, 9):
        changed = torch.cat([x[:, :cut], torch.full_like(x[:, cut:], junk)], dim=1)
        before, after = layer(x), layer(changed)
        torch.testing.assert_close(after.hidden[:, :cut], before.hidden[:, :cut])
        if before.decision is not None:
            assert torch.equal(after.decision.active[:, :cut], before.decision.active[:, :cut])


@pytest.mark.parametrize("name", ["seqboat", "several modules", "no bypass"])
def test_a_layer_that_looks_ahead_has_causal_false(name):
    assert not make(name).causal


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("place", ["pre", "post"])
def test_activation_checkpointing_changes_nothing_and_updates_batch_norm_once(reentrant, place):
    plain, saved = (make("seqboat", norm={"kind": "batch_norm", "place": place}).train() for _ in range(2))
    x, valid = normal(3, 6, WIDTH).requires_grad_(), torch.rand(3, 6, generator=generator(2)) < 0.7
    results = []
    for layer in (plain, saved):
        x.grad = None
        if layer is plain:
            hidden = plain(x, valid).hidden
        else:
            hidden = checkpoint(lambda *inputs: saved(*inputs).hidden, x, valid, use_reentrant=reentrant)
        hidden.where(valid[..., None], 0).square().sum().backward()
        results.append(
            [hidden.detach(), x.grad, *(parameter.grad for parameter in layer.parameters()), *layer.buffers()]
        )
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert plain.norm.running_mean.any()


class TestDropout:
    def _values(self, training: bool, **fields) -> Tensor:
        spec = {
            "router": {"kind": "always"},
            "modules": {"skip": {"kind": "identity"}},
            "activation": "none",
            "dropout": 0.5,
            **fields,
        }
        layer = LayerSpec.model_validate(spec).build(64).train(training)
        return layer(torch.ones(8, 64, 64)).hidden

    def test_it_drops_the_results_of_modules(self):
        # x + bypass + dropped module
        values = self._values(True, bypass="identity")
        assert set(values.unique().tolist()) == {2.0, 4.0}
        assert (values == 2).double().mean().item() == pytest.approx(0.5, abs=0.02)

    def test_it_drops_the_sum_of_results_and_bypass(self):
        # x + dropped (bypass + module)
        values = self._values(True, bypass="identity", dropout_on="sum")
        assert set(values.unique().tolist()) == {1.0, 5.0}

    def test_it_drops_the_result_of_the_backbone(self):
        values = self._values(
            True, bypass="identity", backbone={"kind": "identity"}, backbone_activation="none", modules={}
        )
        assert set(values.unique().tolist()) == {1.0, 3.0}

    @pytest.mark.parametrize("dropout_on", ["modules", "sum"])
    @pytest.mark.parametrize("name", ["seqboat", "several modules", "no bypass"])
    def test_gradient_uses_the_same_mask_as_forward(self, name, dropout_on):
        layer, x = make(name, dropout=0.3, dropout_on=dropout_on).train(), normal(2, 5, WIDTH).requires_grad_()

        def run(values: Tensor) -> Tensor:
            torch.manual_seed(1)
            return layer(values).hidden

        assert not torch.equal(run(x), layer.eval()(x).hidden)
        layer.train()
        assert torch.autograd.gradcheck(run, [x])

    @pytest.mark.parametrize("dropout_on", ["modules", "sum"])
    def test_it_drops_nothing_in_evaluation(self, dropout_on):
        assert self._values(False, bypass="identity", dropout_on=dropout_on).unique().tolist() == [3.0]


@pytest.mark.usefixtures("as_users_run")
class TestWrongInput:
    def test_tokens_of_another_width(self):
        with pytest.raises(InputError, match=r"the tokens are of shape \(2, 3, 5\) .*; expected .* \(B, L, D = 4\)$"):
            make("seqboat")(normal(2, 3, 5))


class TestSpec:
    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            (
                {"bypass": "none"},
                (
                    "LayerSpec: a layer without modules needs bypass='linear' or 'identity'; "
                    "otherwise it passes its input on"
                ),
            ),
            (
                {"modules": {"a.b": {"kind": "identity"}}},
                r"LayerSpec: the module name 'a\.b' must be a word of letters, digits and '_'; fie",
            ),
            (
                {"modules": {"": {"kind": "identity"}}},
                r"LayerSpec: the module name '' must be a word of letters, digits and '_'",
            ),
            (
                {"modules": {"type": {"kind": "identity"}}},
                r"LayerSpec: the module name 'type' is taken by torch\.nn\.ModuleDict; choose anoth",
            ),
            (
                {"dropout": 1.0},
                r"LayerSpec: dropout=1\.0 must be less than 1\.0; dropout: probability of dropping a channel",
            ),
            (
                {"bypass": "lineal"},
                "LayerSpec: bypass='lineal' must be 'none', 'linear' or 'identity'; did you mean 'linear'",
            ),
        ],
    )
    def test_impossible_layer(self, fields, complaint):
        with pytest.raises(SpecError, match=complaint):
            LayerSpec.model_validate(fields)

    def test_macs_of_a_layer_are_the_sum_of_its_parts(self):
        spec = LayerSpec.model_validate(LAYERS["several modules"])
        one, two = (
            spec.macs(WIDTH, 10, 0.5),
            spec.macs(WIDTH, 10, {"attention": 0.5, "conv": 0.5, "mlp": 0.5}),
        )
        parts = [module.macs(WIDTH, 5) for module in spec.modules.values()]
        router = 10 * spec.router.macs_per_token(WIDTH, 3)
        assert one == two
        assert one == MACs.sum([*parts, MACs(matmul=router)])
        assert spec.replace(bypass="linear").macs(WIDTH, 10, 0.5).matmul == one.matmul + 10 * WIDTH * WIDTH
        backbone = EMASpec(bidirectional=False)
        with_backbone = spec.replace(backbone=backbone).macs(WIDTH, 10, 0.5)
        assert with_backbone.matmul == one.matmul + backbone.macs(WIDTH, 10).matmul

    def test_initial_bypass_is_small(self):
        layer = LayerSpec().build(300)
        assert layer.bypass.weight.abs().max() <= 0.04
        # 0.02, truncated at 2 standard deviations.
        assert layer.bypass.weight.std().item() == pytest.approx(0.0176, abs=0.0005)
        assert not layer.bypass.bias.any()


def test_gradients_reach_every_parameter():
    layer = make("several modules")
    output = layer(normal(3, 9, WIDTH))
    assert (output.decision.rate() > 0).all()
    for name, gradient in zip(
        dict(layer.named_parameters()), gradients(output.hidden, layer.parameters()), strict=True
    ):
        assert gradient.any(), name
