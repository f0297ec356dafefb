"""Streams of models: whole = chunked = step by step, for any padding of the chunks; and errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma import SequenceModel, State
from sma.errors import StateError
from sma.model_output import ModelState
from sma.pytree import tensors
from tests.streams import Plan, copied, even, exactly, few, flow, near, near_states, plans, same_bits, steps
from tests.test_sma.causal import CAUSAL, WINDOWED, causal_models, inputs_of, make_model, model_of

ROWS, LENGTH = 3, 12
DECIDED = ("active", "confidence", "logits", "p_on")


def run(
    model: SequenceModel, inputs: Tensor, valid: Tensor | None, state: ModelState | None
) -> tuple[list[Tensor], Any]:
    """All outputs of a model for single tokens, and its state."""
    output = model(inputs, valid, state)
    decided = [getattr(decision, name) for decision in output.decisions for name in DECIDED]
    of_tokens = [output.logits] if output.logits is not None and output.logits.ndim == 3 else []
    return [output.hidden, *of_tokens, *decided], output.state


def assert_streams_as_the_whole(model: SequenceModel, inputs: Tensor, plan: Plan) -> None:
    whole = model(inputs)
    wanted, none = run(model, inputs, None, None)
    assert none is None
    found, state = flow(lambda *chunk: run(model, *chunk), inputs, plan, model.init_state(len(inputs)))
    for ours, theirs in zip(found, wanted, strict=True):
        near(ours, theirs)
    assert state.seen.tolist() == [inputs.shape[1]] * len(inputs)
    near(state.total / inputs.shape[1], whole.pooled)
    near_states(state, run(model, inputs, None, model.init_state(len(inputs)))[1])


@causal_models
@few
@given(plan=plans(ROWS, LENGTH))
def test_whole_equals_chunked_with_padding_on_any_side(name: str, plan: Plan) -> None:
    model = model_of(name)
    with torch.no_grad():
        assert_streams_as_the_whole(model, inputs_of(model, ROWS, LENGTH), plan)


@causal_models
@pytest.mark.parametrize("graph", [False, True], ids=["no_grad", "grad"])
def test_whole_equals_step_by_step(name: str, graph: bool) -> None:
    model = model_of(name)
    with torch.set_grad_enabled(graph):
        assert_streams_as_the_whole(model, inputs_of(model, ROWS, LENGTH), even(steps(LENGTH), ROWS))


@causal_models
def test_these_models_have_active_and_inactive_tokens(name: str) -> None:
    model = model_of(name)
    routed = [part for part in model.routed_layers if part.routed is not None]
    for layer, decision in zip(routed, model(inputs_of(model, ROWS, LENGTH)).decisions, strict=True):
        if layer.spec.router.kind in ("sma", "random"):
            assert all(0 < rate < 1 for rate in decision.rate().tolist())


@causal_models
@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_chunk_without_valid_tokens_keeps_every_state(name: str, length: int) -> None:
    model, inputs = model_of(name), inputs_of(model_of(name), ROWS, LENGTH)
    state = model(inputs, None, model.init_state(ROWS)).state
    after = model(inputs[:, :length], torch.zeros(ROWS, length, dtype=torch.bool), state)
    assert same_bits(after.state, state)
    near(after.pooled, model(inputs).pooled)
    assert after.hidden.shape == (ROWS, length, model.spec.width)


@causal_models
@pytest.mark.parametrize("length", [1, 4])
def test_a_state_is_a_value_that_can_be_continued_twice(name: str, length: int) -> None:
    model, inputs = model_of(name), inputs_of(model_of(name), ROWS, LENGTH)
    state = model(inputs[:, :7], None, model.init_state(ROWS)).state
    kept, valid = copied(state), torch.arange(length) < torch.tensor([length, 0, 1])[:, None]
    once, again = (model(inputs[:, 7 : 7 + length], valid, state) for _ in range(2))
    assert same_bits(state, kept)
    assert torch.equal(once.hidden, again.hidden)
    assert same_bits(once.state, again.state)
    near_states(once.state.select(torch.tensor([1])), state.select(torch.tensor([1])), 0.0)


@causal_models
@few
@given(rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4), cut=st.integers(0, LENGTH), reset=st.booleans())
def test_rows_of_a_state_are_independent_streams(name: str, rows: list[int], cut: int, reset: bool) -> None:
    model, chosen = model_of(name), torch.tensor(rows)
    inputs = inputs_of(model, ROWS, LENGTH)
    with torch.no_grad():
        state = model(inputs[:, :cut], None, model.init_state(ROWS)).state.select(chosen)
        again = torch.arange(len(rows)) % 2 == (0 if reset else 2)
        found = model(inputs[chosen, cut:], None, state.reset(again))
        going = model(inputs[:, cut:], None, model(inputs[:, :cut], None, model.init_state(ROWS)).state)
        fresh = model(inputs[:, cut:])
        for ours, on, anew in ((found.hidden, going.hidden, fresh.hidden), (found.pooled, going.pooled, fresh.pooled)):
            near(ours, anew[chosen].where(again.reshape(-1, *[1] * (ours.ndim - 1)), on[chosen]))


@causal_models
def test_gradients_through_the_states_are_those_of_the_whole(name: str) -> None:
    model = model_of(name)
    inputs, parameters = inputs_of(model, ROWS, LENGTH), list(model.parameters())
    weights = torch.randn(ROWS, LENGTH, model.spec.width, dtype=torch.float64)
    whole = model(inputs)
    wanted = torch.autograd.grad(
        (whole.hidden * weights).sum() + whole.pooled.square().sum(), parameters, materialize_grads=True
    )
    plan = Plan(
        [
            [slice(0, 5), slice(5, 5), slice(5, 6), slice(6, LENGTH)],
            [slice(0, 0), slice(0, 9), slice(9, 11), slice(11, LENGTH)],
        ]
    )
    plan = Plan([*plan.chunks, plan.chunks[0]], "both", 1)
    found: list[Tensor] = []
    for each in (plan, even(steps(LENGTH), ROWS)):
        (hidden, *_), state = flow(lambda *chunk: run(model, *chunk), inputs, each, model.init_state(ROWS))
        total = (hidden * weights).sum() + (state.total / LENGTH).square().sum()
        found = list(torch.autograd.grad(total, parameters, materialize_grads=True))
        for ours, theirs in zip(found, wanted, strict=True):
            near(ours, theirs)


@causal_models
def test_pooled_and_scores_are_those_of_all_tokens_so_far(name: str) -> None:
    model = model_of(name)
    inputs, state = inputs_of(model, ROWS, LENGTH), model.init_state(ROWS)
    hidden = model(inputs).hidden
    for start, end in ((0, 3), (3, 4), (4, 4), (4, LENGTH)):
        output = model(inputs[:, start:end], None, state)
        state = output.state
        near(output.pooled, hidden[:, :end].mean(1))
        if model.head is not None:
            near(output.logits, model.head(output.pooled))


@pytest.mark.parametrize("name", WINDOWED)
def test_a_state_never_grows(name: str) -> None:
    model = model_of(name)
    state = model.init_state(ROWS)
    size, layout = state.num_bytes, [(tensor.shape, tensor.dtype) for tensor in tensors(state)]
    for length in (1, 30, 0, 1):
        state = model(inputs_of(model, ROWS, length), None, state).state
        assert state.num_bytes == size
        assert [(tensor.shape, tensor.dtype) for tensor in tensors(state)] == layout


@pytest.mark.parametrize("name", ["everything", "drawn"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e4])
def test_later_tokens_never_change_earlier_outputs(name: str, bad: float) -> None:
    model, cut = model_of(name), 5
    inputs = inputs_of(model, ROWS, 40)
    changed = inputs.clone()
    changed[:, cut:] = bad
    with torch.no_grad():
        for ours, theirs in zip(run(model, changed, None, None)[0], run(model, inputs, None, None)[0], strict=True):
            near(ours[:, :cut], theirs[:, :cut])


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "language model"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e4])
def test_a_non_finite_row_never_changes_another(name: str, bad: float) -> None:
    model = make_model(name, encoder={"kind": "real_number"})
    inputs = inputs_of(model, ROWS, LENGTH)
    changed = inputs.clone()
    changed[1, 4] = bad
    with torch.no_grad():
        wanted, _ = run(model, inputs, None, None)
        for plan in (
            even([slice(0, LENGTH)], ROWS),
            even([slice(0, 3), slice(3, 7), slice(7, LENGTH)], ROWS),
            even(steps(LENGTH), ROWS),
        ):
            found, _ = flow(lambda *chunk: run(model, *chunk), changed, plan, model.init_state(ROWS))
            for ours, theirs in zip(found, wanted, strict=True):
                near(ours[[0, 2]], theirs[[0, 2]])
                near(ours[1, :4], theirs[1, :4])


@causal_models
def test_float32_streams_stay_near_the_whole_and_half_precision_runs(name: str) -> None:
    model = make_model(name, torch.float32)
    inputs = inputs_of(model, ROWS, LENGTH, dtype=torch.float32)
    with torch.no_grad():
        found, _ = flow(lambda *chunk: run(model, *chunk), inputs, even(steps(LENGTH), ROWS), model.init_state(ROWS))
        near(found[0], model(inputs).hidden, 1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half, state = flow(
                lambda *chunk: run(model, *chunk), inputs, even(steps(LENGTH), ROWS), model.init_state(ROWS)
            )
    assert half[0].isfinite().all()
    assert [tensor.dtype for tensor in tensors(state)] == [tensor.dtype for tensor in tensors(model.init_state(ROWS))]


def test_states_without_a_window_grow_as_num_bytes_shows() -> None:
    model = make_model("everything")
    state = model.init_state(1)
    longer = model(inputs_of(model, 1, LENGTH), None, state).state
    assert longer.num_bytes > state.num_bytes


@pytest.mark.usefixtures("as_users_run")
class TestRefusals:
    def _refuses(self, model: SequenceModel, sentence: str, state: State | None = None) -> None:
        if state is None:
            with pytest.raises(StateError, match=exactly(sentence)):
                model.init_state(2)
            state = ModelState(torch.zeros(2, dtype=torch.long), torch.zeros(2, model.spec.width).double(), ())
        with pytest.raises(StateError, match=exactly(sentence)):
            model(inputs_of(model, 2, 3), None, state)

    @pytest.mark.parametrize("part", ["backbone", "look_back"])
    def test_part_that_looks_ahead_is_named_with_its_layer(self, part: str) -> None:
        ahead = {"kind": "conv", "kernel_size": 3, "bidirectional": True}
        layer = {"backbone": ahead} if part == "backbone" else {"modules": {part: ahead}}
        model = make_model("no layers", layers=[{}, {}, layer])
        self._refuses(
            model,
            f"layer 2 {part!r} (kind conv, causal=False) cannot continue from a state; "
            "build the model with bidirectional=false to stream it",
        )

    def test_batch_norm_in_training(self) -> None:
        model = make_model("no layers", layers=[{}, {"norm": {"kind": "batch_norm"}}]).train()
        self._refuses(
            model,
            "layer 1 'norm' (kind batch_norm, causal=False) cannot continue from a state; call model.eval() first",
        )
        assert model.eval().init_state(2).batch_size == 2

    def test_final_batch_norm_in_training(self) -> None:
        model = make_model("no layers", layers=[{}], final_norm={"kind": "batch_norm"}).train()
        self._refuses(
            model, "'final_norm' (kind batch_norm, causal=False) cannot continue from a state; call model.eval() first"
        )

    def test_state_of_another_number_of_layers(self) -> None:
        model = make_model("seqboat")
        state = model.init_state(2)
        sentence = "SequenceModel got the state of another model: layers 1 instead of 2; use init_state"
        self._refuses(model, sentence, replace(state, layers=state.layers[:1]))

    def test_state_on_another_device(self) -> None:
        model = make_model("seqboat")
        self._refuses(
            model, "state is on meta and the input on cpu; move it with state.to('cpu')", model.init_state(2).to("meta")
        )


def test_these_models_are_causal() -> None:
    assert [name for name in CAUSAL if not model_of(name).causal] == []
