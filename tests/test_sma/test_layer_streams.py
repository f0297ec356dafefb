"""Streams of layers, and independence of rows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sma import RoutedLayer
from sma.errors import StateError
from sma.layer import LayerState
from tests.cases import normal
from tests.streams import Plan, even, exactly, few, flow, near, near_states, plans, steps
from tests.test_sma.causal import WIDTH, causal_layers, make_layer
from tests.test_sma.layers import LAYERS, layers, make

ROWS, LENGTH = 3, 10


def run(layer: RoutedLayer, x: Tensor, valid: Tensor | None, state: LayerState | None) -> tuple[list[Tensor], Any]:
    output = layer(x, valid, state)
    decided = [] if output.decision is None else [output.decision.active, output.decision.confidence]
    return [output.hidden, *decided], output.state


@causal_layers
@few
@given(plan=plans(ROWS, LENGTH))
def test_whole_equals_chunked_equals_step_by_step(spec: dict[str, Any], plan: Plan) -> None:
    layer, x = make_layer(spec), normal(ROWS, LENGTH, WIDTH)
    with torch.no_grad():
        wanted, none = run(layer, x, None, None)
        assert none is None
        for each in (plan, even(steps(LENGTH), ROWS)):
            found, state = flow(lambda *chunk: run(layer, *chunk), x, each, layer.init_state(ROWS), fill=torch.nan)
            for ours, theirs in zip(found, wanted, strict=True):
                near(ours, theirs)
            assert state.seen.tolist() == [LENGTH] * ROWS
            near_states(state, run(layer, x, None, layer.init_state(ROWS))[1])


@layers
@pytest.mark.parametrize("active", ["as drawn", "always"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e4])
def test_a_non_finite_row_never_changes_another(name: str, bad: float, active: str) -> None:
    if active == "always" and "modules" not in LAYERS[name]:
        pytest.skip("nothing is routed")
    layer = make(name, **({"router": {"kind": "always"}} if active == "always" else {}))
    x = normal(ROWS, 40, WIDTH)
    changed = x.clone()
    changed[1, 11] = bad
    for valid in (None, torch.arange(40) < torch.tensor([40, 20, 33])[:, None]):
        with torch.no_grad():
            before, after = layer(x, valid), layer(changed, valid)
        rows = torch.tensor([0, 2])
        keep = torch.ones(2, 40, 1, dtype=torch.bool) if valid is None else valid[rows][..., None]
        near(after.hidden[rows].where(keep, 0), before.hidden[rows].where(keep, 0))


@pytest.mark.usefixtures("as_users_run")
class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            (
                "seqboat",
                (
                    "'backbone' (kind ema, causal=False) cannot continue from a state; "
                    "build the model with bidirectional=false to stream it"
                ),
            ),
            (
                "several modules",
                (
                    "'attention' (kind gau, causal=False) cannot continue from a state; "
                    "build the model with bidirectional=false to stream it"
                ),
            ),
            (
                "no bypass",
                (
                    "'backbone' (kind conv, causal=False) cannot continue from a state; "
                    "build the model with bidirectional=false to stream it"
                ),
            ),
        ],
    )
    def test_part_that_looks_ahead(self, name: str, sentence: str) -> None:
        layer = make(name)
        state = LayerState(torch.zeros(2, dtype=torch.long), None, None)
        for call in (lambda: layer.init_state(2), lambda: layer(normal(2, 3, WIDTH), None, state)):
            with pytest.raises(StateError, match=exactly(sentence)):
                call()

    def test_batch_norm_in_training(self) -> None:
        layer = make("no modules")
        state = layer.init_state(2)
        layer.train()
        for call in (lambda: layer.init_state(2), lambda: layer(normal(2, 3, WIDTH), None, state)):
            with pytest.raises(
                StateError,
                match=exactly(
                    "'norm' (kind batch_norm, causal=False) cannot continue from a state; call model.eval() first"
                ),
            ):
                call()

    def test_state_from_inside_a_model_which_counts_no_tokens(self) -> None:
        layer = make("causal seqboat")
        sentence = (
            "RoutedLayer got a state without a token count, such as a part of the state of a layer or a model; "
            "use the init_state of the module that is called"
        )
        with pytest.raises(StateError, match=exactly(sentence)):
            layer(normal(2, 3, WIDTH), None, replace(layer.init_state(2), seen=None))

    @pytest.mark.parametrize(
        ("mine", "other", "has", "needs"),
        [
            ("causal seqboat", {"backbone": None}, "['routed']", "['backbone', 'routed']"),
            ("causal seqboat", {"modules": {}}, "['backbone']", "['backbone', 'routed']"),
            ("bare", {"backbone": {"kind": "conv"}}, "['backbone', 'routed']", "['routed']"),
        ],
    )
    def test_state_of_a_layer_with_other_parts(self, mine: str, other: dict[str, Any], has: str, needs: str) -> None:
        layer, x = make(mine), normal(2, 3, WIDTH)
        for one, another, found, wanted in (
            (layer, make(mine, **other), has, needs),
            (make(mine, **other), layer, needs, has),
        ):
            sentence = f"RoutedLayer got the state of another model: parts {found} instead of {wanted}; use init_state"
            with pytest.raises(StateError, match=exactly(sentence)):
                one(x, None, another.init_state(2))
