"""Streams of sparse modular activation: whole = chunked = step by step, and errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sma import Ragged, Router, SparseModularActivation, State, SubModule
from sma.activation import RoutedState
from sma.errors import StateError
from sma.modules.attention import AttentionSpec
from sma.modules.conv import ConvSpec
from sma.modules.ema import EMASpec
from sma.modules.gau import GAUSpec
from sma.modules.mlp import GatedMLPSpec
from sma.positions import RelativeBiasSpec, RotarySpec
from sma.routers import AlwaysRouterSpec, NeverRouterSpec, RandomRouterSpec, RouterSpec, SMARouter, SMARouterSpec
from tests.cases import balance, normal
from tests.streams import Plan, copied, even, exactly, few, flow, near, near_states, plans, same_bits, steps
from tests.test_sma.causal import far_from_the_start

WIDTH, ROWS, LENGTH = 4, 3, 10
PARTS = {
    "gau": GAUSpec(
        query_size=2, hidden_size=3, window=2, bidirectional=False, position=RelativeBiasSpec(max_positions=4)
    ),
    "all": AttentionSpec(heads=1, bidirectional=False, position=RotarySpec()),
    "average": EMASpec(state_size=2, bidirectional=False, truncation=2),
    "conv": ConvSpec(kernel_size=3),
    "mlp": GatedMLPSpec(hidden_size=3),
}
ROUTERS = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=spec.kind)
        for spec in (SMARouterSpec(), AlwaysRouterSpec(), NeverRouterSpec(), RandomRouterSpec(rate=0.6))
    ],
)


def make(spec: RouterSpec) -> SparseModularActivation:
    modules = {name: part.build(WIDTH) for name, part in PARTS.items()}
    routed = SparseModularActivation(spec.build(WIDTH, list(modules)), modules).double().eval()
    far_from_the_start(routed)
    if isinstance(routed.router, SMARouter):
        balance(routed.router, routed(normal(ROWS, LENGTH, WIDTH)).decision)
    return routed


def run(
    routed: SparseModularActivation, x: Tensor, valid: Tensor | None, state: RoutedState | None
) -> tuple[list[Tensor], Any]:
    output = routed(x, valid=valid, state=state)
    return [output.values, output.decision.active, output.decision.confidence], output.state


@ROUTERS
@few
@given(plan=plans(ROWS, LENGTH))
def test_whole_equals_chunked_equals_step_by_step(spec: RouterSpec, plan: Plan) -> None:
    routed, x = make(spec), normal(ROWS, LENGTH, WIDTH)
    wanted, _ = run(routed, x, None, None)
    with torch.no_grad():
        for each in (plan, even(steps(LENGTH), ROWS)):
            found, state = flow(lambda *chunk: run(routed, *chunk), x, each, routed.init_state(ROWS), fill=torch.nan)
            for ours, theirs in zip(found, wanted, strict=True):
                near(ours, theirs.detach())
            assert state.seen.tolist() == [LENGTH] * ROWS
            near_states(state, run(routed, x, None, routed.init_state(ROWS))[1])


@ROUTERS
def test_gradients_through_the_states_are_those_of_the_whole(spec: RouterSpec) -> None:
    routed, x = make(spec), normal(ROWS, LENGTH, WIDTH).requires_grad_()
    plan = Plan(
        [
            [slice(0, 4), slice(4, 5), slice(5, LENGTH)],
            [slice(0, 0), slice(0, 9), slice(9, LENGTH)],
            [slice(0, 10), *[slice(10, 10)] * 2],
        ]
    )
    inputs, incoming = [x, *routed.parameters()], normal(ROWS, LENGTH, WIDTH, seed=8)
    wanted = torch.autograd.grad((routed(x).values * incoming).sum(), inputs, materialize_grads=True)
    (values, *_), _ = flow(lambda *chunk: run(routed, *chunk), x, plan, routed.init_state(ROWS))
    for ours, theirs in zip(
        torch.autograd.grad((values * incoming).sum(), inputs, materialize_grads=True), wanted, strict=True
    ):
        near(ours, theirs)


@ROUTERS
@pytest.mark.parametrize("graph", [False, True], ids=["no_grad", "grad"])
def test_a_state_is_never_changed_in_place_and_idle_rows_keep_theirs(spec: RouterSpec, graph: bool) -> None:
    routed, x = make(spec), normal(ROWS, LENGTH, WIDTH)
    with torch.set_grad_enabled(graph):
        state = routed(x, state=routed.init_state(ROWS)).state
        kept, valid = copied(state), torch.tensor([[True], [False], [False]])
        after = routed(x[:, :1], valid=valid, state=state).state
        assert same_bits(state, kept)
        idle = torch.tensor([1, 2])
        near_states(after.select(idle), state.select(idle), 0.0)
        assert after.seen.tolist() == [LENGTH + 1, LENGTH, LENGTH]
        assert same_bits(routed(x[:, :0], state=state).state, state)


def test_given_positions_replace_the_counted_ones() -> None:
    routed, x = make(AlwaysRouterSpec()), normal(1, 4, WIDTH)
    state = routed(x[:, :2], state=routed.init_state(1)).state
    counted = routed(x[:, 2:], state=state).values
    near(routed(x[:, 2:], state=state, positions=torch.tensor([[2, 3]])).values, counted)
    assert not torch.allclose(routed(x[:, 2:], state=state, positions=torch.tensor([[0, 1]])).values, counted)


class Counting(SubModule):
    """A third-party sub-module without a state."""

    causal = True

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        return tokens.values * 2, state


class WholeRow(Router):
    """A router that is not causal."""

    causal = False


@pytest.mark.usefixtures("as_users_run")
class TestRefusals:
    def _refuses(self, routed: SparseModularActivation, sentence: str) -> None:
        state = RoutedState(State(), {}, torch.zeros(2, dtype=torch.long))
        for call in (lambda: routed.init_state(2), lambda: routed(normal(2, 3, WIDTH).float(), state=state)):
            with pytest.raises(StateError, match=exactly(sentence)):
                call()

    def test_sub_module_that_looks_ahead(self) -> None:
        parts = {"mlp": PARTS["mlp"].build(WIDTH), "wide": GAUSpec(query_size=2, hidden_size=2).build(WIDTH)}
        routed = SparseModularActivation(SMARouterSpec().build(WIDTH, list(parts)), parts)
        assert not routed.causal
        self._refuses(
            routed,
            "'wide' (kind gau, causal=False) cannot continue from a state; "
            "build the model with bidirectional=false to stream it",
        )

    def test_router_that_looks_ahead(self) -> None:
        routed = SparseModularActivation(WholeRow(["twice"]), {"twice": Counting()})
        self._refuses(
            routed,
            "'router' (kind WholeRow, causal=False) cannot continue from a state; "
            "choose a causal router, such as 'sma', to stream the model",
        )

    def test_state_of_sub_modules_with_other_names(self) -> None:
        one, other = (
            SparseModularActivation(AlwaysRouterSpec().build(WIDTH, [name]), {name: Counting()})
            for name in ("one", "other")
        )
        sentence = (
            "SparseModularActivation got the state of another model: parts ['other'] instead of ['one']; use init_state"
        )
        with pytest.raises(StateError, match=exactly(sentence)):
            one(normal(2, 3, WIDTH), state=other.init_state(2))

    def test_state_from_inside_a_layer_which_counts_no_tokens(self) -> None:
        routed = make(SMARouterSpec())
        sentence = (
            "SparseModularActivation got a state without a token count, such as a part of the state of a layer or a "
            "model; use the init_state of the module that is called"
        )
        with pytest.raises(StateError, match=exactly(sentence)):
            routed(normal(2, 3, WIDTH), state=replace(routed.init_state(2), seen=None))


def test_a_third_party_sub_module_without_a_state_can_be_streamed() -> None:
    routed = SparseModularActivation(AlwaysRouterSpec().build(WIDTH, ["twice"]), {"twice": Counting()})
    x = normal(2, 6, WIDTH, dtype=torch.float32)
    (values, *_), _ = flow(lambda *chunk: run(routed, *chunk), x, even(steps(6), 2), routed.init_state(2))
    assert torch.equal(values, 2 * x)
