"""Static capacity: the ragged result for the earliest active tokens, in shapes independent of the data."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sma import SparseModularActivation, build
from sma.capacity import Capacity, PerBatch, place, slots_per_row
from sma.decision import Decision
from sma.errors import InputError, StateError
from sma.layer import RoutedLayer
from sma.routers import AlwaysRouterSpec, Router, SMARouter
from tests.cases import balance, generator, masks, normal, pad, sides, spread
from tests.test_sma.compiled import assert_equal_if_compiled
from tests.test_sma.layers import GAU, LAYERS, WIDTH, make

MODEL: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": WIDTH,
    "encoder": {"kind": "linear", "features": 2},
    "sinusoid": True,
    "layers": [LAYERS["several modules"], LAYERS["seqboat"], {}],
    "head": {"kind": "mean_pool_linear", "classes": 3},
}
CAPACITIES = st.one_of(st.integers(1, 9), st.sampled_from([0.1, 0.5, 1.0]))
routed_layers = pytest.mark.parametrize(
    "name", [pytest.param(name, id=name) for name, spec in LAYERS.items() if "modules" in spec]
)


class Truncated(Router):
    """The decision of another router, without the tokens of a row that exceed its capacity."""

    def __init__(self, router: Router, capacity: Capacity) -> None:
        super().__init__(router.names)
        self.router, self.capacity = router, capacity

    def forward(self, control_BLD, valid=None, positions=None, state=None):
        decision, state = self.router(control_BLD, valid, positions, state)
        valid = torch.ones(control_BLD.shape[:2], dtype=torch.bool) if valid is None else valid
        slots = [slots_per_row(self.capacity, self.names, length) for length in valid.sum(1).tolist()]
        return replace(decision, active=_earliest(decision.active, slots)), state


def _earliest(active: Tensor, slots: list[list[int]]) -> Tensor:
    kept = torch.zeros_like(active)
    for b in range(active.shape[0]):
        for m, count in enumerate(slots[b]):
            kept[b, active[b, :, m].nonzero()[:count], m] = True
    return kept


def _truncated(module: nn.Module, capacity: Capacity) -> nn.Module:
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, SparseModularActivation):
            part.router = Truncated(part.router, capacity)
    return module


def _undecided_model() -> nn.Module:
    model = build(MODEL, seed=0).double().eval()
    spread(model)
    for layer, decision in zip(model.routed_layers, model(normal(3, 9, 2, seed=1)).decisions, strict=False):
        assert isinstance(layer.routed.router, SMARouter)
        balance(layer.routed.router, decision)
    return model


def _results_and_gradients(
    module: nn.Module, x: Tensor, valid: Tensor | None, **options: Any
) -> tuple[list[Tensor], Any]:
    x = x.clone().requires_grad_()
    output = module(x, valid, **options)
    kept = output.hidden if valid is None else output.hidden.where(valid[..., None], 0)
    results = [kept] if isinstance(module, RoutedLayer) else [kept, output.pooled, output.logits]
    total = sum((result * normal(*result.shape, seed=place)).sum() for place, result in enumerate(results))
    found = torch.autograd.grad(total, [x, *module.parameters()], materialize_grads=True)
    return [*results, *found], output


def _assert_same_decision(found: Decision, wanted: Decision) -> None:
    for name in ("active", "confidence", "logits", "p_on"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


@routed_layers
@given(valid=masks(rows=3, length=7), capacity=CAPACITIES)
@settings(max_examples=10)
def test_layer_equals_the_ragged_one_without_the_tokens_over_capacity(name, valid, capacity):
    layer, x = make(name), normal(*valid.shape, WIDTH, seed=1)
    wanted, ragged = _results_and_gradients(_truncated(layer, capacity), x, valid)
    found, static = _results_and_gradients(layer, x, valid, capacity=capacity)
    torch.testing.assert_close(found, wanted)
    _assert_same_decision(static.decision, ragged.decision)
    plain = layer(x, valid)
    assert torch.equal(static.decision.overflow, plain.decision.active.sum(1) - static.decision.active.sum(1))
    if not static.decision.overflow.any():
        torch.testing.assert_close(static.hidden.where(valid[..., None], 0), plain.hidden.where(valid[..., None], 0))


@sides
@given(capacity=st.fixed_dictionaries({"attention": CAPACITIES, "conv": CAPACITIES, "mlp": CAPACITIES}) | CAPACITIES)
@settings(max_examples=8)
def test_model_equals_the_ragged_one_without_the_tokens_over_capacity(side, capacity):
    model = _undecided_model()
    x, valid = pad([normal(length, 2, seed=length) for length in (6, 0, 1, 9)], side, fill=torch.nan)
    clean = x.where(valid[..., None], 0)
    wanted, ragged = _results_and_gradients(_truncated(model, capacity), clean, valid)
    found, static = _results_and_gradients(model, clean, valid, capacity=capacity)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(static.decisions, ragged.decisions, strict=True):
        _assert_same_decision(one, other)
    torch.testing.assert_close(model(x, valid, capacity=capacity).logits, static.logits)


@routed_layers
@given(valid=masks(rows=3, length=7), spare=st.integers(0, 3))
@settings(max_examples=10)
def test_capacity_for_every_token_changes_nothing(name, valid, spare):
    layer, x = make(name), normal(*valid.shape, WIDTH, seed=1)
    wanted, ragged = _results_and_gradients(layer, x, valid)
    for capacity in (max(valid.shape[1], 1) + spare, 1.0):
        found, static = _results_and_gradients(layer, x, valid, capacity=capacity)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(static.decision.active, ragged.decision.active)
        assert not static.decision.overflow.any()


def test_overflow_counts_per_row_and_sub_module_and_is_none_without_a_capacity():
    routed = SparseModularActivation(
        AlwaysRouterSpec().build(WIDTH, ["a", "b"]), {name: make("bare").routed.submodules["mlp"] for name in "ab"}
    )
    valid = torch.tensor([[True] * 5, [False, True, False, True, True], [False] * 5])
    decision = routed(normal(3, 5, WIDTH), valid=valid, capacity={"a": 4, "b": 0.2}).decision
    assert decision.overflow.tolist() == [[1, 4], [0, 2], [0, 0]]
    assert decision.active.sum(1).tolist() == [[4, 1], [3, 1], [0, 0]]
    assert decision.active[1, :, 1].tolist() == [False, True, False, False, False]
    assert routed(normal(3, 5, WIDTH), valid=valid).decision.overflow is None


@routed_layers
@pytest.mark.parametrize("capacity", [0.1, 0.34, 0.5, 0.99, 1.0, 2, 5])
def test_a_row_alone_and_in_a_padded_batch_keep_the_same_tokens(name, capacity):
    layer, rows = make(name), [normal(length, WIDTH, seed=length) for length in (1, 10, 0, 4, 7)]
    x, valid = pad(rows, "middle", extra=9)
    with torch.no_grad():
        output = layer(x, valid, capacity=capacity)
        for row, alone in enumerate(rows):
            single = layer(alone[None], capacity=capacity)
            torch.testing.assert_close(output.hidden[row][valid[row]], single.hidden[0])
            assert torch.equal(output.decision.active[row][valid[row]], single.decision.active[0])
            assert torch.equal(output.decision.overflow[row], single.decision.overflow[0])


def test_shapes_of_sub_modules_never_depend_on_the_decisions():
    layer, shapes = make("several modules"), set()
    for module in layer.routed.submodules.values():
        module.register_forward_pre_hook(
            lambda module, inputs: shapes.add((inputs[0].values.shape, inputs[0].stride, inputs[0].holes))
        )
    for seed, scale in enumerate((0.0, 1.0, 100.0)):
        layer(scale * normal(2, 6, WIDTH, seed=seed), torch.rand(2, 6, generator=generator(seed)) < 0.7, capacity=4)
    assert shapes == {((8, WIDTH), 4, True)}


def test_a_non_finite_value_never_reaches_another_token():
    """Holes are filled from the first position of a row, so a non-finite value there must not reach other tokens."""
    layer = make("bare")
    with torch.no_grad():
        layer.routed.router.weight.zero_()
        layer.routed.router.bias.copy_(torch.tensor([1.0, 0.0]))  # nothing is active
    x = normal(2, 4, WIDTH)
    x[0, 0] = torch.inf
    output = layer(x.requires_grad_(), capacity=2)
    assert output.hidden[0, 1:].isfinite().all()
    output.hidden[0, 1:].sum().backward()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.routed.submodules.parameters()
    )


def _earliest_of_all(active: Tensor, size: int) -> Tensor:
    kept, left = torch.zeros_like(active), size
    for t in range(active.shape[1]):
        for b in range(active.shape[0]):
            if active[b, t] and left:
                kept[b, t], left = True, left - 1
    return kept


class TruncatedInAll(Truncated):
    """The decision of another router, without the tokens that exceed the capacity of the batch."""

    def forward(self, control_BLD, valid=None, positions=None, state=None):
        decision, state = self.router(control_BLD, valid, positions, state)
        size = decision.active.shape[:2].numel()
        tokens = self.capacity.tokens if isinstance(self.capacity, PerBatch) else 1.0
        count = max(1, math.ceil(round(tokens * size, 6))) if isinstance(tokens, float) else tokens
        kept = [_earliest_of_all(active, count) for active in decision.active.unbind(-1)]
        return replace(decision, active=torch.stack(kept, -1)), state


@routed_layers
@given(valid=masks(rows=3, length=7), tokens=st.integers(1, 22) | st.sampled_from([0.1, 0.34, 0.5, 1.0]))
@settings(max_examples=10)
def test_capacity_of_the_batch_equals_the_ragged_layer_without_the_latest_tokens(name, valid, tokens):
    layer, x = make(name), normal(*valid.shape, WIDTH, seed=1)
    capacity, cut = PerBatch(tokens), copy.deepcopy(layer)
    cut.routed.router = TruncatedInAll(cut.routed.router, capacity)
    cured = valid.sort(1, descending=True).values  # the layer moves padding to the right first
    wanted, ragged = _results_and_gradients(cut, x, cured)
    found, static = _results_and_gradients(layer, x, cured, capacity=capacity)
    torch.testing.assert_close(found, wanted)
    _assert_same_decision(static.decision, ragged.decision)
    plain = layer(x, cured)
    assert torch.equal(static.decision.overflow, plain.decision.active.sum(1) - static.decision.active.sum(1))


def test_a_row_may_use_the_slots_of_others_in_a_capacity_of_the_batch():
    active = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()[..., None]
    kept, (frame,) = place(active, PerBatch(6), ["a"], None, None)
    assert kept[..., 0].int().tolist() == [[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert frame.index.tolist() == [0, 1, 2, 3, 4, 6]
    kept, (frame,) = place(active, PerBatch(0.6), ["a"], None, None)
    assert torch.equal(kept, active)
    assert frame.mask.tolist() == [True] * 7 + [False] * 2
    assert frame.rows.tolist() == [0] * 5 + [1, 2, 2, 2]
    assert (frame.index[7:] == 10).all()


def test_a_capacity_of_the_batch_gives_every_sub_module_one_shape():
    layer, shapes = make("several modules"), set()
    for module in layer.routed.submodules.values():
        module.register_forward_pre_hook(lambda module, inputs: shapes.add(inputs[0].values.shape))
    for seed, scale in enumerate((0.0, 1.0, 100.0)):
        layer(scale * normal(2, 6, WIDTH, seed=seed), capacity=PerBatch(5))
    assert shapes == {(5, WIDTH)}


def test_shares_are_rounded_up_and_numbers_limited_to_the_length():
    assert slots_per_row(0.1, ["a", "b"], 30) == [3, 3]
    assert slots_per_row({"a": 0.1, "b": 7}, ["b", "a"], 31) == [7, 4]
    assert slots_per_row({"a": 1e-9, "b": 7}, ["a", "b"], 5) == [1, 5]
    assert slots_per_row(0.5, ["a"], 0) == [0]


@pytest.mark.usefixtures("as_users_run")
class TestRefusals:
    @pytest.mark.parametrize("capacity", [0, -1, True, 0.0, 1.5, -0.5, float("nan"), float("inf"), "3", PerBatch(0)])
    def test_impossible_capacity(self, capacity):
        message = (
            r"capacity=.* must be an integer of at least 1, tokens per row, or a float in \(0, 1\], a share of the row"
        )
        for call in (
            lambda: make("seqboat")(normal(2, 3, WIDTH), capacity=capacity),
            lambda: build(MODEL, 0).double()(normal(2, 3, 2), None, None, capacity),
        ):
            with pytest.raises(InputError, match=message):
                call()

    def test_impossible_capacity_of_one_sub_module(self):
        with pytest.raises(InputError, match=r"capacity\['attention'\]=0 must be an integer of at least 1"):
            make("seqboat")(normal(2, 3, WIDTH), capacity={"attention": 0})

    def test_unknown_sub_module(self):
        with pytest.raises(
            InputError, match="capacity names 'atention', which is not a sub-module; did you mean 'attention'"
        ):
            make("seqboat")(normal(2, 3, WIDTH), capacity={"atention": 3})

    def test_missing_sub_module(self):
        with pytest.raises(
            InputError, match="capacity has no value for 'conv'; give every sub-module one, or one number for all"
        ):
            build(MODEL, 0).double()(normal(2, 3, 2), capacity={"attention": 3, "mlp": 2})

    def test_with_a_state(self):
        layer = make("bare", modules={"attention": {**GAU, "bidirectional": False}})
        with pytest.raises(
            StateError,
            match="capacity=2 cannot be combined with a state, because a stream keeps every active token; leave c",
        ):
            layer(normal(2, 3, WIDTH), state=layer.init_state(2), capacity=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_form_of_capacity_can_be_compiled(tmp_path):
    assert_equal_if_compiled("capacities", tmp_path)
