"""The laws of a model, each checked on one random example at a time."""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import hypothesis
import torch
from torch import Tensor

from sma.checkpoint import load, save
from sma.decision import Decision
from sma.errors import StateError
from sma.model import ModelSpec, SequenceModel, build
from sma.model_output import ModelOutput, ModelState
from sma.padding import move
from sma.pytree import named_tensors
from sma.testing.examples import Example, reproducible
from sma.testing.requirements import (
    Law,
    copied,
    if_streams,
    require,
    require_near,
    require_prediction,
    require_unchanged,
    saved_and_loaded,
    trained_parameters,
)

# Probabilities that are nearer to 1/2 than this may lie on either side after rounding.
TIE = 1e-5


@dataclass(frozen=True)
class ModelCase:
    """The model that is checked."""

    spec: ModelSpec

    def make(self, dtype: torch.dtype = torch.float64) -> SequenceModel:
        """A new model with spread parameters, always the same ones, in evaluation mode."""
        return reproducible(lambda: build(self.spec, seed=0), dtype)

    @cached_property
    def streams(self) -> bool:
        """Whether the model continues from a state."""
        try:
            self.make().init_state(1)
        except StateError:
            return False
        return True


def inputs_of(model: SequenceModel, example: Example) -> tuple[Tensor, Tensor]:
    """A random batch padded on the right, and its mask of valid positions."""
    return model.encoder.random_inputs(len(example.lengths), example.length), example.inside()


def meaningful(output: ModelOutput, valid: Tensor) -> dict[str, Tensor]:
    """The results that a user reads, by name: those of the valid positions and those of whole rows."""
    found = {"hidden": output.hidden[valid], "pooled": output.pooled}
    if output.logits is not None:
        found["logits"] = output.logits[valid] if output.logits.ndim == 3 else output.logits
    return found


def require_same(
    found: ModelOutput, wanted: ModelOutput, valid: tuple[Tensor, Tensor], what: str, tolerance: float = 1e-9
) -> None:
    """Compare results and decisions at the valid positions, except for examples in which a decision is a tie."""
    for one, other in zip(found.decisions, wanted.decisions, strict=True):
        _require_same_decisions(one, other, valid, what)
    results = meaningful(wanted, valid[1])
    for name, tensor in meaningful(found, valid[0]).items():
        require_near(tensor, results[name], f"{what}: {name}", tolerance)


def _require_same_decisions(found: Decision, wanted: Decision, valid: tuple[Tensor, Tensor], what: str) -> None:
    hypothesis.assume(bool(((wanted.p_on[valid[1]] - 0.5).abs() > TIE).all()))
    require(torch.equal(found.active[valid[0]], wanted.active[valid[1]]), f"{what}: decisions differ")


def stream(
    model: SequenceModel, inputs: Tensor, valid: Tensor, chunks: Iterable[slice], state: ModelState | None = None
) -> ModelOutput:
    """The output of a whole batch, computed chunk by chunk and concatenated."""
    state = model.init_state(inputs.shape[0]) if state is None else state
    outputs = []
    for chunk in chunks:
        output = model(inputs[:, chunk], valid[:, chunk], state)
        if output.state is None:
            raise AssertionError("the model was given a state and returned none")
        state = output.state
        outputs.append(output)
    decisions = []
    for layer in zip(*(output.decisions for output in outputs), strict=True):
        active, confidence, logits, p_on = (
            torch.cat([getattr(one, name) for one in layer], 1) for name in ("active", "confidence", "logits", "p_on")
        )
        decisions.append(Decision(active, confidence, logits, p_on, layer[0].names))
    last, scores = outputs[-1], outputs[-1].logits
    if scores is not None and scores.ndim == 3:
        scores = torch.cat([output.logits for output in outputs if output.logits is not None], 1)
    return ModelOutput(
        torch.cat([output.hidden for output in outputs], 1), last.pooled, scores, tuple(decisions), last.state
    )


def scattered(example: Example) -> Tensor:
    """A mask with padding anywhere: before, between and after the valid positions of each row."""
    return example.active() if example.rate < 1 else example.inside()


def padding_changes_nothing(case: ModelCase, example: Example) -> None:
    """Padding on any side, whatever its content, changes no valid position; hidden states are 0 at padding."""
    model, (inputs, _) = case.make(), inputs_of(case.make(), example)
    valid = scattered(example)
    order = torch.argsort(~valid, dim=1, stable=True)
    packed = move(valid, order)
    wanted = model(move(inputs, order), packed)
    for garbage in (inputs, model.encoder.random_inputs(*inputs.shape[:2])):
        mask = valid.reshape(*valid.shape, *[1] * (inputs.ndim - 2))
        found = model(inputs.where(mask, garbage), valid)
        require_same(found, wanted, (valid, packed), "padding anywhere against padding on the right")
        require(not bool(found.hidden[~valid].any()), "hidden states are not 0 at padding")


def rows_are_independent(case: ModelCase, example: Example) -> None:
    """The first row gives the same results alone and in a batch, whatever the other rows contain."""
    model, first = case.make(), slice(case.spec.rows_per_sample)
    inputs, valid = inputs_of(model, example)
    alone = model(inputs[first], valid[first])
    others = model.encoder.random_inputs(*inputs.shape[:2])
    for batch in (inputs, torch.cat([inputs[first], others[first.stop :]])):
        output = model(batch, valid)
        found = ModelOutput(
            output.hidden[first],
            output.pooled[first],
            None if output.logits is None else output.logits[:1],
            tuple(
                Decision(d.active[first], d.confidence[first], d.logits[first], d.p_on[first], d.names)
                for d in output.decisions
            ),
        )
        require_same(found, alone, (valid[first], valid[first]), "the first row in a batch against the row alone")


def rows_may_be_empty(case: ModelCase, example: Example) -> None:
    """Rows without a valid position, and a batch without positions, give finite results and a mean of 0."""
    model = case.make()
    inputs, valid = inputs_of(model, example)
    for batch, mask in ((inputs, valid & False), (inputs[:, :0], valid[:, :0])):
        output = model(batch, mask)
        require(not bool(output.pooled.any()), "pooled is not 0 for rows without a valid position")
        require(
            all(bool(tensor.isfinite().all()) for tensor in meaningful(output, mask).values()), "results are not finite"
        )


def every_parameter_gets_a_gradient(case: ModelCase, example: Example) -> None:
    """Every parameter that is not frozen has a finite gradient in training mode, whichever tokens are active."""
    model = case.make().train()
    inputs, valid = inputs_of(model, example)
    output = model(inputs, valid)
    (output.pooled if output.logits is None else output.logits).square().sum().backward()
    for name, parameter in trained_parameters(model).items():
        if name.startswith(("head.", "final_norm.")) or output.logits is not None:
            require(parameter.grad is not None, f"the gradient of {name!r} is None")
        require(
            parameter.grad is None or bool(parameter.grad.isfinite().all()), f"the gradient of {name!r} is not finite"
        )


@if_streams
def never_looks_ahead(case: ModelCase, example: Example) -> None:
    """In a model that can stream, earlier results and decisions stay the same when later inputs change."""
    model = case.make()
    inputs, valid = inputs_of(model, example)
    cut = example.length // 2
    changed = torch.cat([inputs[:, :cut], model.encoder.random_inputs(*inputs.shape[:2])[:, cut:]], 1)
    strangers = [changed]
    if inputs.is_floating_point():
        strangers += [torch.cat([inputs[:, :cut], inputs[:, cut:] * size], 1) for size in (1e4, torch.nan)]
    earlier = valid & (torch.arange(example.length) < cut)
    wanted = model(inputs, valid)
    for batch in strangers:
        found = model(batch, valid)
        for one, other in zip(found.decisions, wanted.decisions, strict=True):
            _require_same_decisions(one, other, (earlier, earlier), "decisions before a change")
        require_near(found.hidden[earlier], wanted.hidden[earlier], "hidden states before a change")


@if_streams
def chunks_equal_the_whole(case: ModelCase, example: Example) -> None:
    """Whole rows, chunks of any size with padding anywhere, and single steps give the same results and decisions."""
    model = case.make()
    inputs, _ = inputs_of(model, example)
    valid = scattered(example)
    with torch.no_grad():
        wanted = model(inputs, valid)
        for name, chunks in {"chunks": example.chunks(), "single steps": example.steps()}.items():
            require_same(stream(model, inputs, valid, chunks), wanted, (valid, valid), f"{name} against the whole")


@if_streams
def chunks_equal_the_whole_in_float32(case: ModelCase, example: Example) -> None:
    """The same in float32, to 1e-5 of the largest result, where rounding does not change a decision."""
    model = case.make(torch.float32)
    inputs, valid = inputs_of(model, example)
    with torch.no_grad():
        wanted, found = model(inputs, valid), stream(model, inputs, valid, example.chunks())
    for one, other in zip(found.decisions, wanted.decisions, strict=True):
        hypothesis.assume(bool(((other.p_on[valid] - 0.5).abs() > 1e-3).all()))
        require(torch.equal(one.active[valid], other.active[valid]), "chunks against the whole: decisions differ")
    require_same(found, wanted, (valid, valid), "chunks against the whole", 1e-5)


@if_streams
def states_can_be_moved(case: ModelCase, example: Example) -> None:
    """Forward does not change the state it is given, and a state can be permuted, reset, saved and loaded."""
    model = case.make()
    (inputs, valid), rows = inputs_of(model, example), len(example.lengths)
    with torch.no_grad():
        state = stream(model, inputs, valid, example.chunks()).state
        if state is None:
            raise AssertionError("the model returned no state")
        kept = copied(named_tensors(state))
        wanted = stream(model, inputs, valid, example.chunks(), state).hidden
        require_unchanged(named_tensors(state), kept, "forward changed the state it was given:")
        order = torch.randperm(rows)
        found = stream(model, inputs[order], valid[order], example.chunks(), state.reorder(order)).hidden
        require_near(found, wanted[order], "rows that were permuted with their state")
        reset = torch.arange(rows) % 2 == 0
        found = stream(model, inputs, valid, example.chunks(), state.reset(reset)).hidden
        fresh = stream(model, inputs, valid, example.chunks()).hidden
        require_near(found, fresh.where(reset[:, None, None], wanted), "rows of which some were reset")
        loaded = saved_and_loaded(state, model.init_state(1))
        found = stream(model, inputs, valid, example.chunks(), loaded).hidden
        require(torch.equal(found, wanted), "a stream that was saved and loaded")


def survives_saving(case: ModelCase, example: Example) -> None:
    """A saved and loaded model gives the same results; the spec predicts its parameters, survives dump and load."""
    model = case.make(torch.float32)
    inputs, valid = inputs_of(model, example)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(save(model, folder))
    require_unchanged(loaded.state_dict(), model.state_dict(), "the saved and loaded model differs in")
    # Loaded weights have another alignment in memory, with which products may sum in another order.
    require_near(
        loaded(inputs, valid).pooled, model(inputs, valid).pooled, "the saved and loaded model against the model", 1e-5
    )
    require_prediction(case.spec, case.spec.num_parameters(), model)


def replay_is_the_identity(case: ModelCase, example: Example) -> None:
    """Replaying a model's own decisions gives the same results; other decisions are followed at valid positions."""
    model = case.make()
    inputs, valid = inputs_of(model, example)
    output = model(inputs, valid)
    again = model(inputs, valid, decisions=output.decisions)
    for name, tensor in meaningful(again, valid).items():
        require_near(tensor, meaningful(output, valid)[name], f"{name} of the model's own decisions")
    reversed_masks = [~decision.active for decision in output.decisions]
    found = model(inputs, valid, decisions=reversed_masks).decisions
    for index, (decision, mask) in enumerate(zip(found, reversed_masks, strict=True)):
        followed = torch.equal(decision.active, mask & valid[..., None])
        require(followed, f"layer {index} did not follow the decision that it was given")


def hooks_fire(case: ModelCase, example: Example) -> None:
    """Forward hooks fire on every layer and on its norm, backbone, bypass, router and routed part."""
    model = case.make()
    parts = {name: part for name, part in model.named_modules() if re.fullmatch(_HOOKED, name)}
    silent = set(parts)
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: silent.discard(name))
    model(*inputs_of(model, example))
    require(not silent, f"forward hooks on {sorted(silent)} did not fire")


_HOOKED = r"encoder|final_norm|head|layers\.\d+(\.(norm|backbone|bypass|routed(\.router)?))?"

MODEL_LAWS: tuple[Law, ...] = (
    padding_changes_nothing,
    rows_are_independent,
    rows_may_be_empty,
    every_parameter_gets_a_gradient,
    never_looks_ahead,
    chunks_equal_the_whole,
    chunks_equal_the_whole_in_float32,
    states_can_be_moved,
    survives_saving,
    replay_is_the_identity,
    hooks_fire,
)
