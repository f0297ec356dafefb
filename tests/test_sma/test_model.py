"""Models against a loop over rows and tokens; padding, pooling, building, and errors."""

import copy
import pickle

import pytest
import torch
from hypothesis import given

from sma import LayerSpec, ModelOutput, build, load_spec
from sma.errors import InputError, SpecError
from sma.norms import LayerNormSpec, RMSNormSpec, ScaleNormSpec
from tests import oracles
from tests.cases import generator, gradients, masks, normal, pad, sides
from tests.test_sma.models import MODELS, SEQBOAT, batch_is_real, inputs_of, make_model, model_of, models


@models
@given(valid=masks(rows=3, length=6))
def test_model_equals_the_loop_over_its_rows(name, valid):
    model, inputs = model_of(name), inputs_of(name, *valid.shape)
    output = model(inputs, valid)
    hidden, pooled = oracles.model(model, inputs, valid)
    assert type(output) is ModelOutput
    torch.testing.assert_close(output.hidden, hidden)
    torch.testing.assert_close(output.pooled, pooled)
    if model.head is None:
        assert output.logits is None
    else:
        torch.testing.assert_close(output.logits, model.head(pooled))
    assert len(output.decisions) == sum(bool(layer.modules) for layer in model.spec.layer_specs)
    assert output.state is None
    if valid.all():
        torch.testing.assert_close(model(inputs).hidden, hidden)


@models
def test_gradients_agree_with_the_loop(name):
    model, inputs, valid = make_model(name), inputs_of(name, 3, 6), torch.rand(3, 6, generator=generator(2)) < 0.7
    hidden, pooled = oracles.model(model, inputs, valid)
    output = model(inputs, valid)
    found, expected = (
        torch.autograd.grad(
            (states * normal(*states.shape)).sum() + (mean * normal(*mean.shape, seed=1)).sum(),
            list(model.parameters()),
            materialize_grads=True,
        )
        for states, mean in ((output.hidden, output.pooled), (hidden, pooled))
    )
    torch.testing.assert_close(found, expected)


@sides
@models
def test_a_row_alone_and_the_same_row_in_a_padded_batch_agree(name, side):
    model = make_model(name)
    rows = [inputs_of(name, 1, length)[0] for length in (4, 1, 6)]
    batch, valid = pad(rows, side, fill=torch.nan if batch_is_real(name) else 3)
    output = model(batch, valid)
    for b, row in enumerate(rows):
        alone = model(row[None])
        torch.testing.assert_close(output.hidden[b][valid[b]], alone.hidden[0])
        torch.testing.assert_close(output.pooled[b], alone.pooled[0])
        if output.logits is not None:
            torch.testing.assert_close(output.logits[b], alone.logits[0])
        for decision, other in zip(output.decisions, alone.decisions, strict=True):
            assert torch.equal(decision.active[b][valid[b]], other.active[0])
            assert not decision.active[b][~valid[b]].any()


@sides
@models
def test_padding_never_changes_a_gradient(name, side):
    model = make_model(name)
    rows = [inputs_of(name, 1, length)[0] for length in (4, 1, 6)]
    parameters = list(model.parameters())
    results = []
    for fill in (torch.nan, 1e4) if batch_is_real(name) else (2, 3):
        batch, valid = pad(rows, side, fill=fill)
        results.append(
            torch.autograd.grad(model(batch, valid).pooled.square().sum(), parameters, materialize_grads=True)
        )
    alone = [
        torch.autograd.grad(model(row[None]).pooled.square().sum(), parameters, materialize_grads=True) for row in rows
    ]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    torch.testing.assert_close(results[0], tuple(sum(parts) for parts in zip(*alone, strict=True)))


@models
@given(valid=masks())
def test_pooled_is_the_mean_over_the_valid_tokens_and_zero_for_a_row_without_one(name, valid):
    output = model_of(name)(inputs_of(name, *valid.shape), valid)
    assert not output.hidden[~valid].any()
    for b in range(valid.shape[0]):
        tokens = output.hidden[b][valid[b]]
        torch.testing.assert_close(
            output.pooled[b], tokens.mean(0) if len(tokens) else torch.zeros_like(output.pooled[b])
        )


def test_every_layer_gets_zeros_at_padding():
    model, valid = make_model("classifier"), torch.rand(3, 6, generator=generator(2)) < 0.6
    seen = []
    for layer in model.routed_layers:
        layer.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(inputs_of("classifier", 3, 6), valid)
    assert len(seen) == 2
    for tokens in seen:
        assert tokens.values[tokens.mask].any()
        assert not tokens.values[~tokens.mask].any()


@models
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_a_batch_without_a_valid_token_gives_zero_gradients_not_none(name, shape):
    model = make_model(name).train()
    output = model(inputs_of(name, *shape), torch.zeros(shape, dtype=torch.bool))
    assert not output.hidden.any()
    assert not output.pooled.any()
    assert output.hidden.shape == (*shape, 4)
    (output.hidden.sum() + output.pooled.sum()).backward()
    for parameter_name, parameter in model.named_parameters():
        if not parameter_name.startswith("head."):
            assert parameter.grad is not None, parameter_name
            assert not parameter.grad.any(), parameter_name


@models
def test_nan_in_one_row_never_reaches_another(name):
    model, inputs = make_model(name), inputs_of(name, 3, 6)
    before = model(inputs).hidden
    with torch.no_grad():
        if batch_is_real(name):
            inputs[1, 2] = torch.nan
        else:
            inputs[[0, 2]] = inputs[[0, 2]].clamp(max=5)
            inputs[1, 2] = 6
            before = model(inputs).hidden
            model.encoder.weight[6] = torch.nan
    after = model(inputs).hidden
    assert after[1].isnan().any()
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])


@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_results_and_gradients(name, dtype):
    model, valid = make_model(name, torch.float32), torch.rand(3, 20, generator=generator(2)) < 0.8
    with torch.autocast("cpu", dtype=dtype):
        output = model(inputs_of(name, 3, 20, dtype=torch.float32), valid)
    exact = model(inputs_of(name, 3, 20, dtype=torch.float32), valid)
    assert output.hidden.dtype == output.pooled.dtype == torch.float32
    assert (output.hidden - exact.hidden).abs().median() < 0.05
    for gradient in torch.autograd.grad(
        output.pooled.square().mean(), list(model.parameters()), materialize_grads=True
    ):
        assert gradient.isfinite().all()


@models
def test_results_are_the_same_every_time(name):
    one, other = (make_model(name).train()(inputs_of(name, 2, 6)).hidden for _ in range(2))
    assert torch.equal(one, other)


def test_embedding_dropout_drops_tokens_and_sinusoid_in_training_only():
    model = build(
        {**MODELS["no layers"], "final_norm": None, "sinusoid": True, "width": 64, "embedding_dropout": 0.5}, seed=0
    )
    inputs = torch.ones(8, 64, dtype=torch.long)
    plain, dropped = model.eval()(inputs).hidden, model.train()(inputs).hidden
    zero = dropped == 0
    assert zero.double().mean().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(dropped[~zero], 2 * plain[~zero])


@pytest.mark.gpu
@models
def test_gpu_agrees_with_cpu(name):
    model, inputs, valid = make_model(name), inputs_of(name, 3, 40), torch.rand(3, 40, generator=generator(2)) < 0.8
    results = []
    for device in ("cpu", "cuda"):
        model.to(device)
        output = model(inputs.to(device), valid.to(device))
        grads = torch.autograd.grad(output.pooled.square().sum(), list(model.parameters()), materialize_grads=True)
        results.append(
            [tensor.cpu() for tensor in (output.hidden, output.pooled, *(d.active for d in output.decisions), *grads)]
        )
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.gpu
@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_gives_finite_gradients(name, dtype):
    model, inputs = make_model(name, torch.float32).cuda(), inputs_of(name, 3, 40, dtype=torch.float32).cuda()
    with torch.autocast("cuda", dtype=dtype):
        output = model(inputs, torch.rand(3, 40, generator=generator(2)).cuda() < 0.8)
    for gradient in torch.autograd.grad(
        output.pooled.square().mean(), list(model.parameters()), materialize_grads=True
    ):
        assert gradient.isfinite().all()


class TestBuild:
    @models
    @pytest.mark.parametrize(
        "journey", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
    )
    def test_a_model_can_be_copied_and_pickled(self, name, journey):
        model, inputs = make_model(name), inputs_of(name, 2, 6)
        other = journey(model)
        assert other.spec == model.spec
        assert torch.equal(other(inputs).hidden, model(inputs).hidden)

    @models
    def test_a_seed_gives_the_same_weights_and_keeps_the_random_state(self, name):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        one, other, third = (
            build(MODELS[name], seed=4),
            build(load_spec(MODELS[name]), seed=4),
            build(MODELS[name], seed=5),
        )
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(one.state_dict()[key], tensor) for key, tensor in other.state_dict().items())
        assert any(not torch.equal(one.state_dict()[key], tensor) for key, tensor in third.state_dict().items())

    def test_without_a_seed_weights_follow_the_current_random_state(self):
        weights = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            weights.append(build(MODELS["classifier"]).encoder.weight)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_repeated_layers_have_separate_weights(self):
        model = build(MODELS["classifier"], seed=0)
        first, second = model.routed_layers
        assert first.spec == second.spec
        assert not torch.equal(first.bypass.weight, second.bypass.weight)

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            pytest.param([{}, SEQBOAT], ["", "attention"], id="a list"),
            pytest.param({"repeat": 3, "layer": SEQBOAT}, ["attention"] * 3, id="a repeated layer"),
            pytest.param({"repeat": 2, "layer": [{}, SEQBOAT]}, ["", "attention"] * 2, id="a repeated list"),
        ],
    )
    def test_layers_are_expanded_in_order(self, layers, expected):
        model = build({**MODELS["classifier"], "layers": layers})
        assert ["".join(layer.modules) for layer in model.spec.layer_specs] == expected
        assert [layer.spec for layer in model.routed_layers] == list(model.spec.layer_specs)

    @pytest.mark.parametrize(
        ("norm", "final_norm", "expected"),
        [
            pytest.param({"kind": "rms_norm", "place": "pre"}, None, RMSNormSpec(), id="as in the layers"),
            pytest.param({"kind": "rms_norm", "place": "post"}, None, None, id="none after a norm"),
            pytest.param(None, None, None, id="none without norms"),
            pytest.param(None, {"kind": "scale_norm"}, ScaleNormSpec(), id="its own"),
            pytest.param(
                {"kind": "rms_norm"},
                {"kind": "layer_norm", "affine": False},
                LayerNormSpec(affine=False),
                id="its own in place of",
            ),
        ],
    )
    def test_only_pre_norm_models_have_a_final_norm_by_default(self, norm, final_norm, expected):
        model = build({**MODELS["causal encoder"], "layers": [{"norm": norm}], "final_norm": final_norm})
        assert model.spec.final_norm_spec == expected
        assert (None if model.final_norm is None else model.final_norm.spec) == expected


@pytest.mark.usefixtures("as_users_run")
class TestWrongInput:
    @pytest.mark.parametrize(
        ("name", "inputs", "complaint"),
        [
            ("classifier", torch.tensor([[1, 7]]), "token id 7 is out of range; the vocabulary has ids 0 … 6"),
            (
                "classifier",
                torch.zeros(2, 3),
                r"token ids are of shape \(2, 3\) and dtype torch\.float32; expected an integer tensor of shape",
            ),
            (
                "classifier",
                torch.ones(3, dtype=torch.long),
                r"token ids are of shape \(3,\) and dtype torch\.int64; expected an integer tensor of shape",
            ),
            (
                "causal encoder",
                torch.ones(2, 3, dtype=torch.long),
                r"numbers are of shape \(2, 3\) and dtype torch\.int64; expected a floating-point tensor",
            ),
            (
                "causal encoder",
                torch.zeros(2, 3, 1),
                r"numbers are of shape \(2, 3, 1\) and dtype torch\.float32; expected .* of shape \(B, L\)$",
            ),
        ],
    )
    def test_inputs(self, name, inputs, complaint):
        with pytest.raises(InputError, match=complaint):
            make_model(name, torch.float32)(inputs)

    def test_heads_that_do_not_divide_the_width(self):
        layer = LayerSpec.model_validate({"modules": {"a": {"kind": "attention", "heads": 3}}})
        with pytest.raises(SpecError, match="AttentionSpec: heads=3 must divide the width 4 of the tokens"):
            build({**MODELS["classifier"], "layers": [layer]})


def test_gradients_reach_every_parameter():
    model = make_model("classifier")
    output = model(inputs_of("classifier", 3, 6))
    assert all(0 < rate < 1 for decision in output.decisions for rate in decision.rate().tolist())
    for (name, _), gradient in zip(model.named_parameters(), gradients(output.logits, model.parameters()), strict=True):
        assert gradient.any(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_a_row_of_more_tokens_than_the_largest_float16_is_exact(dtype: torch.dtype) -> None:
    spec = {"kind": "sequence_encoder", "width": 2, "encoder": {"kind": "real_number"}, "layers": []}
    model = build(spec, seed=0).to(dtype)
    x = torch.ones(1, 70_000, dtype=dtype)
    torch.testing.assert_close(model(x).pooled, model.encoder(x[:, :1])[:, 0])
    torch.testing.assert_close(model(x, state=model.init_state(1)).pooled, model.encoder(x[:, :1])[:, 0])
