"""Sparse modular activation from plain modules: values, gradients, and errors."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from sma import Decision, Ragged, RoutedOutput, Router, SparseModularActivation, State, SubModule, compress
from sma.activation import Around
from sma.errors import InputError
from sma.modules.conv import ConvSpec
from sma.modules.gau import GAUSpec
from sma.positions import RelativeBiasSpec
from sma.routers import AlwaysRouterSpec, NeverRouterSpec, RandomRouterSpec, RouterSpec, SMARouter, SMARouterSpec
from sma.spec import kinds
from tests import oracles
from tests.cases import generator, gradients, masks, normal, pad, sides, spread, strided
from tests.test_sma.test_routers.each import routers

WIDTH = 3


class Chosen(Router):
    """A router with a given decision."""

    def __init__(self, names: list[str], active: Tensor, confidence: Tensor) -> None:
        super().__init__(names)
        self.decision = Decision(
            active, confidence, torch.zeros(*active.shape, 2), torch.zeros_like(confidence), self.names
        )

    def forward(self, control_BLD, valid=None, positions=None, state=None):
        return self.decision, None


class Double(nn.Module):
    """A plain module that takes ragged tokens."""

    causal = True

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, None]:
        return 2 * tokens.values, None


def _modules(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    gau = GAUSpec(query_size=2, hidden_size=4, window=2, position=RelativeBiasSpec(max_positions=6)).build(WIDTH)
    return {"reach": oracles.Reach(WIDTH), "gau": gau, "conv": ConvSpec(kernel_size=2).build(WIDTH)}


def _routed(spec: RouterSpec | None = None, modules: dict[str, nn.Module] | None = None) -> SparseModularActivation:
    modules = _modules() if modules is None else modules
    routed = SparseModularActivation((spec or SMARouterSpec()).build(WIDTH, list(modules)), modules).double()
    spread(routed)
    return routed


def _by_hand(routed: SparseModularActivation, x: Tensor, decision: Decision, valid: Tensor) -> Tensor:
    """The sum over sub-modules of confidence times result, one row and one sub-module at a time."""
    out = torch.zeros_like(x)
    rank = valid.cumsum(1) - 1
    for b, (m, name) in itertools.product(range(x.shape[0]), enumerate(decision.names)):
        places = [t for t in range(x.shape[1]) if decision.active[b, t, m]]
        if places:
            results = routed.submodules[name](oracles.one_row(x[b, places], [int(rank[b, t]) for t in places]))[0]
            for slot, t in enumerate(places):
                place = nn.functional.one_hot(torch.tensor(b * x.shape[1] + t), x.shape[0] * x.shape[1]).reshape(
                    *x.shape[:2], 1
                )
                out = out + place * decision.confidence[b, t, m] * results[slot]
    return out


ROUTERS = routers()


@ROUTERS
@given(valid=masks(rows=3, length=6))
def test_values_are_the_sum_over_the_active_sub_modules(spec, valid):
    routed, x = _routed(spec), normal(*valid.shape, WIDTH)
    output = routed(x, valid=valid)
    assert output.state is None
    assert output.values.dtype == x.dtype
    torch.testing.assert_close(output.values, _by_hand(routed, x, output.decision, valid))


@ROUTERS
def test_gradients_equal_those_of_the_sum(spec):
    routed = _routed(spec)
    x, valid = normal(3, 6, WIDTH).requires_grad_(), torch.rand(3, 6, generator=generator(1)) < 0.8
    output = routed(x, valid=valid)
    by_hand = _by_hand(routed, x, output.decision, valid)
    weight = normal(*x.shape, seed=2)
    inputs = [x, *routed.parameters()]
    found, expected = (
        torch.autograd.grad((values * weight).sum() + 0 * x.sum(), inputs, retain_graph=True, materialize_grads=True)
        for values in (output.values, by_hand)
    )
    torch.testing.assert_close(found, expected)


def test_works_from_plain_modules_without_a_spec():
    routed = SparseModularActivation(AlwaysRouterSpec().build(WIDTH, ["twice"]), {"twice": Double()})
    x = normal(2, 4, WIDTH)
    output = routed(x)
    assert type(output) is RoutedOutput
    assert torch.equal(output.values, 2 * x)


@given(valid=masks(rows=3, length=6))
def test_always_is_the_dense_sum(valid):
    """With all tokens active at confidence 1, the result is the sum of the sub-modules on every valid token."""
    routed, x = _routed(AlwaysRouterSpec()), normal(*valid.shape, WIDTH)
    output = routed(x, valid=valid)
    assert torch.equal(output.decision.active, valid[..., None].expand(*valid.shape, 3))
    tokens = compress(x, valid, positions_BL=valid.cumsum(1) - 1)
    dense = sum(module(tokens)[0] for module in routed.submodules.values())
    torch.testing.assert_close(output.values[valid], dense)
    assert not output.values[~valid].any()


def test_padding_that_a_third_party_router_activates_is_excluded():
    valid = torch.tensor([[True, True, False], [False, True, True]])
    everything = torch.ones(2, 3, 1, dtype=torch.bool)
    routed = SparseModularActivation(Chosen(["twice"], everything, everything.double()), {"twice": Double()})
    x = normal(2, 3, WIDTH).where(valid[..., None], torch.nan)
    output = routed(x, valid=valid)
    assert torch.equal(output.decision.active[..., 0], valid)
    assert torch.equal(output.values, (2 * x).where(valid[..., None], 0))


def test_nothing_active_gives_zeros():
    x = normal(2, 4, WIDTH)
    assert torch.equal(_routed(NeverRouterSpec())(x).values, torch.zeros_like(x))


@pytest.mark.parametrize(
    "subset", [pytest.param(s, id="+".join(s) or "none") for n in range(4) for s in itertools.combinations("abc", n)]
)
def test_every_subset_of_sub_modules_can_be_chosen_by_a_token(subset):
    router = SMARouterSpec().build(WIDTH, ["a", "b", "c"])
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([[1.0, 2.0] if name in subset else [2.0, 1.0] for name in "abc"]).flatten())
    routed = SparseModularActivation(router, {name: Double() for name in "abc"})
    x = normal(1, 4, WIDTH, dtype=torch.float32)
    output = routed(x)
    assert output.decision.active[0, 0].tolist() == [name in subset for name in "abc"]
    confidence = torch.sigmoid(1 / router.log_temperature.exp())
    torch.testing.assert_close(output.values, len(subset) * 2 * confidence * x)


def test_tokens_of_one_batch_choose_different_subsets():
    router = SMARouterSpec().build(3, ["a", "b", "c"])
    with torch.no_grad():
        router.weight.zero_()
        router.weight[1::2] = torch.eye(3)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))[None]
    routed = SparseModularActivation(router, {name: Double() for name in "abc"})
    assert torch.equal(routed(corners).decision.active, corners > 0)


def test_order_of_the_sub_modules_permutes_decisions_and_keeps_values():
    order = [2, 0, 1]
    one = _routed()
    names = list(one.router.names)
    router = SMARouterSpec().build(WIDTH, [names[m] for m in order]).double()
    assert isinstance(one.router, SMARouter)
    rows = torch.tensor([row for m in order for row in (2 * m, 2 * m + 1)])
    with torch.no_grad():
        router.weight.copy_(one.router.weight[rows])
        router.bias.copy_(one.router.bias[rows])
        router.log_temperature.copy_(one.router.log_temperature)
    other = SparseModularActivation(router, dict(reversed(one.submodules.items())))
    x = normal(2, 7, WIDTH)
    first, second = one(x), other(x)
    assert second.decision.names == tuple(names[m] for m in order)
    assert torch.equal(second.decision.active, first.decision.active[..., order])
    torch.testing.assert_close(second.values, first.values)


def test_the_router_reads_the_control_state_and_sub_modules_the_tokens():
    router = SMARouterSpec().build(5, ["twice"])
    spread(router)
    routed = SparseModularActivation(router, {"twice": Double()})
    x, control = normal(2, 7, WIDTH, dtype=torch.float32), normal(2, 7, 5, dtype=torch.float32)
    decision = router(control)[0]
    output = routed(x, control_BLD=control)
    assert torch.equal(output.decision.active, decision.active)
    torch.testing.assert_close(output.values, (2 * x * decision.confidence).where(decision.active, 0))


def test_gradients_reach_the_router_through_the_confidence_of_active_tokens_only():
    routed, control = _routed(modules={"reach": oracles.Reach(WIDTH)}), normal(2, 9, WIDTH).requires_grad_()
    output = routed(normal(2, 9, WIDTH, seed=1), control_BLD=control)
    by_control, *by_router = gradients(output.values, [control, *routed.router.parameters()])
    assert all(gradient.any() for gradient in by_router)
    touched = by_control.any(-1)
    assert torch.equal(touched, output.decision.active.any(-1))
    assert 0 < touched.sum() < touched.numel()


def _kinds_of_sub_modules() -> list[object]:
    settings: dict[str, list[dict[str, Any]]] = {
        "attention": [{"heads": 1}, {"heads": 1, "bidirectional": False}],
        "chunked_gau": [{"query_size": 2, "hidden_size": 4, "window": window} for window in (1, 3)],
        "conv": [{}, {"bidirectional": True, "kernel_size": 3}],
        "ema": [{}, {"bidirectional": False, "truncation": 2}],
        "gated_mlp": [{"hidden_size": 4}],
        "gau": [
            {"query_size": 2, "hidden_size": 4, "window": window, "attention": attention, "position": position}
            for window in (None, 2)
            for attention in ("softmax", "relu2", "laplace")
            for position in ({"kind": "relative_bias"}, {"kind": "rotary"}, {"kind": "none"})
        ],
        "identity": [{}],
        "local_attention": [{"heads": 1, "window": 2}, {"heads": 1, "window": 2, "bidirectional": False}],
        "s4d": [{"state_size": 4}, {"state_size": 4, "bidirectional": False, "activation": "none", "mixing": "none"}],
    }
    assert set(settings) == {
        kind for kind in kinds("sub-module") if kinds("sub-module")[kind].__module__.startswith("sma.")
    }
    return [
        pytest.param(kind, fields, id=f"{kind}-{place}")
        for kind, cases in settings.items()
        for place, fields in enumerate(cases)
    ]


@pytest.mark.parametrize(("kind", "fields"), _kinds_of_sub_modules())
@pytest.mark.parametrize("rows", [0, 2])
def test_a_sub_module_without_active_tokens_gets_zero_gradients_not_none(kind, fields, rows):
    module = kinds("sub-module")[kind](**fields).build(WIDTH)
    x = normal(rows, 4, WIDTH, dtype=torch.float32).requires_grad_()
    routed = SparseModularActivation(NeverRouterSpec().build(WIDTH, ["module"]), {"module": module})
    (x + routed(x).values).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert torch.equal(x.grad, torch.ones_like(x))


def test_an_sma_router_without_active_tokens_gets_zero_gradients_not_none():
    routed = _routed()
    with torch.no_grad():
        routed.router.weight.zero_()
        routed.router.bias.zero_()
    output = routed(normal(2, 4, WIDTH))
    assert not output.decision.active.any()
    output.values.sum().backward()
    for name, parameter in routed.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@ROUTERS
def test_no_input_is_changed(spec):
    inputs = {
        "x_BLD": normal(2, 5, WIDTH),
        "control_BLD": normal(2, 5, WIDTH, seed=1),
        "valid": torch.rand(2, 5, generator=generator(0)) < 0.7,
        "positions": torch.arange(10).reshape(2, 5),
    }
    kept = {name: tensor.clone() for name, tensor in inputs.items()}
    _routed(spec)(**inputs)
    assert all(torch.equal(inputs[name], kept[name]) for name in inputs)


@ROUTERS
def test_results_are_added_to_a_flattened_batch_in_place_and_it_gets_its_gradient(spec):
    routed, x, base = _routed(spec), normal(2, 5, WIDTH), normal(10, WIDTH, seed=1).requires_grad_()
    out = base.clone()
    around = Around(lambda x_TD, places: (out, x_TD.index_select(0, places().index)), lambda sum_BLD: sum_BLD)
    summed = routed(x, around=around).values.flatten(0, 1)
    assert summed.data_ptr() == out.data_ptr()
    torch.testing.assert_close(summed, base + routed(x).values.flatten(0, 1))
    assert torch.equal(gradients(summed, [base])[0], normal(10, WIDTH, seed=7))


def test_input_that_is_not_contiguous_gives_the_same_values():
    routed, x, valid = _routed(), normal(3, 6, WIDTH), torch.rand(3, 6, generator=generator(0)) < 0.7
    for other, mask in zip(strided(x), strided(valid), strict=True):
        torch.testing.assert_close(routed(other, valid=mask).values, routed(x, valid=valid).values)
        torch.testing.assert_close(routed(other).values, routed(x).values)


@sides
@pytest.mark.parametrize("fill", [0.0, 1e4, torch.inf, torch.nan])
@ROUTERS
def test_padding_never_changes_a_valid_token_or_a_gradient(spec, side, fill):
    routed = _routed(RandomRouterSpec(rate=0.5) if spec.kind == "random" else spec)
    rows = [normal(length, WIDTH, seed=length) for length in (4, 0, 1, 6)]
    x, valid = pad(rows, side, fill=fill)
    x.requires_grad_()
    clean = x.detach().where(valid[..., None], 0).requires_grad_()
    outputs = [routed(batch, valid=valid).values for batch in (x, clean)]
    assert torch.equal(outputs[0], outputs[1])
    if outputs[0].requires_grad:
        found, expected = (
            gradients(output, [batch, *routed.parameters()]) for output, batch in zip(outputs, (x, clean), strict=True)
        )
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)


def test_positions_default_to_the_rank_among_the_valid_tokens():
    seen = []

    class Spy(Double):
        def forward(self, tokens, state=None):
            seen.append(tokens.positions.tolist())
            return super().forward(tokens)

    routed = SparseModularActivation(AlwaysRouterSpec().build(WIDTH, ["spy"]), {"spy": Spy()})
    valid = torch.tensor([[False, True, False, True], [True, True, False, False]])
    routed(normal(2, 4, WIDTH), valid=valid)
    routed(normal(2, 4, WIDTH))
    routed(normal(2, 4, WIDTH), valid=valid, positions=torch.arange(8).reshape(2, 4) + 100)
    assert seen == [[0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3], [101, 103, 104, 105]]


def test_dropout_drops_results_in_training_only():
    routed = SparseModularActivation(AlwaysRouterSpec().build(64, ["twice"]), {"twice": Double()}, dropout=0.5)
    x = torch.ones(4, 64, 64)
    values = routed.train()(x).values
    assert set(values.unique().tolist()) == {0.0, 4.0}
    assert (values == 0).double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(routed.eval()(x).values, 2 * x)


def test_is_causal_if_router_and_all_sub_modules_are():
    def causal(*kernels: dict) -> bool:
        modules = {f"m{place}": ConvSpec(**fields).build(WIDTH) for place, fields in enumerate(kernels)}
        return SparseModularActivation(AlwaysRouterSpec().build(WIDTH, list(modules)), modules).causal

    assert causal({}, {})
    assert not causal({}, {"kernel_size": 3, "bidirectional": True})
    routed = SparseModularActivation(Chosen(["a"], torch.ones(1, 1, 1).bool(), torch.ones(1, 1, 1)), {"a": Double()})
    assert routed.causal
    routed.router.causal = False
    assert not routed.causal


@pytest.mark.usefixtures("as_users_run")
class TestWrongInput:
    def test_names_that_do_not_match(self):
        with pytest.raises(
            InputError, match=r"the router decides about \['a'\], but the sub-modules are \['b'\]; use the same names"
        ):
            SparseModularActivation(AlwaysRouterSpec().build(WIDTH, ["a"]), {"b": Double()})

    @pytest.mark.parametrize("name", ["double", "type", "items", "training", "forward"])
    def test_name_that_torch_uses(self, name):
        with pytest.raises(
            InputError,
            match=f"the sub-module name '{name}' is taken by torch.nn.ModuleDict; choose another, such as '{name}_'",
        ):
            SparseModularActivation(AlwaysRouterSpec().build(WIDTH, [name]), {name: Double()})

    def test_sub_module_without_a_forward(self):
        with pytest.raises(TypeError, match=r"SubModule must define forward\(self, tokens, state=None\)"):
            SubModule()(oracles.one_row(torch.ones(2, WIDTH)))
