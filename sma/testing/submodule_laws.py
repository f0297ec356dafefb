"""The laws of a sub-module, each checked on one random example at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sma.pytree import named_tensors
from sma.submodule import State, SubModule, SubModuleSpec
from sma.testing.examples import Example, lay, put_back, reproducible
from sma.testing.requirements import (
    Law,
    copied,
    if_streams,
    refuses_a_state_unless_causal,
    require,
    require_gradients,
    require_near,
    require_prediction,
    require_slope,
    require_unchanged,
    saved_and_loaded,
    trained_parameters,
)


@dataclass(frozen=True)
class SubModuleCase:
    """The sub-module that is checked: a spec, or a function from the width to a module."""

    spec: SubModuleSpec | Callable[[int], SubModule]
    width: int

    def make(self, dtype: torch.dtype = torch.float64) -> SubModule:
        """A new module with spread parameters, always the same ones."""
        build = self.spec.build if isinstance(self.spec, SubModuleSpec) else self.spec
        return reproducible(lambda: build(self.width), dtype)

    @cached_property
    def streams(self) -> bool:
        """Whether the module continues from a state."""
        module = self.make()
        return module.causal and module.keeps_state

    def tokens(self, example: Example, dtype: torch.dtype = torch.float64) -> Tensor:
        """A random batch `(B, L, D)`."""
        return torch.randn(len(example.lengths), example.length, self.width, dtype=torch.float64).to(dtype)


def run(module: SubModule, x: Tensor, active: Tensor, example: Example, garbage: float = 0.0) -> Tensor:
    """Results of the active tokens at their positions, `(B, L, D)`."""
    tokens = lay(x, active, example.layout, garbage=garbage)
    return put_back(module(tokens)[0], tokens, x.shape)


def stream(
    module: SubModule, x: Tensor, active: Tensor, example: Example, chunks: Iterable[slice], state: State | None = None
) -> tuple[Tensor, State]:
    """Results as those of `run`, computed chunk by chunk, and the last state."""
    state = module.init_state(x.shape[0], dtype=x.dtype) if state is None else state
    positions = torch.arange(x.shape[1]).expand_as(active)
    results = []
    for chunk in chunks:
        tokens = lay(x[:, chunk], active[:, chunk], example.layout, positions[:, chunk], garbage=1e3)
        values, after = module(tokens, state)
        if not isinstance(after, State):
            raise AssertionError(f"forward was given a state and returned {type(after).__name__} instead of a new one")
        results.append(put_back(values, tokens, x[:, chunk].shape))
        state = after
    return torch.cat(results, 1), state


def returns_one_result_per_token(case: SubModuleCase, example: Example) -> None:
    """`(T, D)` in the dtype of the tokens, finite, and no state unless one was given."""
    for dtype in (torch.float64, torch.float32):
        tokens = lay(case.tokens(example, dtype), example.active(), example.layout)
        values, state = case.make(dtype)(tokens)
        require(
            values.shape == tokens.values.shape,
            f"results of shape {tuple(values.shape)} for tokens {tuple(tokens.values.shape)}",
        )
        require(values.dtype is dtype, f"results in {values.dtype} for tokens in {dtype}")
        require(bool(values.isfinite().all()), "a result of finite tokens is not finite")
        require(state is None, f"no state was given, and {type(state).__name__} was returned")


def changes_nothing_and_repeats(case: SubModuleCase, example: Example) -> None:
    """Forward changes no parameter, buffer or token, and gives the same results again."""
    module, x, active = case.make(), case.tokens(example), example.active()
    before, given = copied(module.state_dict()), x.clone()
    first, again = run(module, x, active, example), run(module, x, active, example)
    require(torch.equal(x, given), "forward changed the tokens it was given")
    require_unchanged(module.state_dict(), before, "forward changed")
    require(torch.equal(first, again), "the same tokens gave two different results")


def layouts_agree(case: SubModuleCase, example: Example) -> None:
    """Packed and rectangular tokens give the same results and gradients, and the numbers in holes change nothing."""
    x, active, weight = case.tokens(example), example.active(), case.tokens(example)
    found = []
    for layout in ("packed", example.layout):
        module, leaf = case.make(), x.clone().requires_grad_()
        tokens = lay(leaf, active, layout, garbage=1e3)
        (put_back(module(tokens)[0], tokens, x.shape) * weight).sum().backward()
        out = put_back(module(tokens)[0], tokens, x.shape).detach()
        found.append((out, leaf.grad, [parameter.grad for parameter in module.parameters()]))
    (one, one_x, one_all), (other, other_x, other_all) = found
    require_near(other, one, f"results of {example.layout} tokens against packed ones")
    for a, b in zip([other_x, *other_all], [one_x, *one_all], strict=True):
        if a is not None and b is not None:
            require_near(a, b, f"gradients of {example.layout} tokens against packed ones", 1e-8)


def rows_are_independent(case: SubModuleCase, example: Example) -> None:
    """A row gives the same results alone and in a batch, whatever the other rows contain, NaN included."""
    module, x, active = case.make(), case.tokens(example), example.active()
    wanted = run(module, x[:1], active[:1], example)
    for stranger in (1.0, 1e4, torch.nan):
        if len(example.lengths) > 1:
            x = torch.cat([x[:1], x[1:] * stranger])
        require_near(
            run(module, x, active, example)[:1], wanted, f"a row beside rows times {stranger} against the row alone"
        )


def takes_no_tokens(case: SubModuleCase, example: Example) -> None:
    """Without tokens there is no result, and every parameter gets a gradient of zeros, never None."""
    module, rows = case.make(), len(example.lengths)
    for length in (0, 3):
        x = torch.randn(rows, length, case.width, dtype=torch.float64, requires_grad=True)
        tokens = lay(x, torch.zeros(rows, length, dtype=torch.bool), example.layout)
        put_back(module(tokens)[0], tokens, x.shape).sum().backward()
        require_gradients(module, zero=True)


def every_parameter_gets_a_gradient(case: SubModuleCase, example: Example) -> None:
    """Every gradient exists and is finite."""
    module, x = case.make(), case.tokens(example).requires_grad_()
    run(module, x, example.active(), example).square().sum().backward()
    require(x.grad is not None and bool(x.grad.isfinite().all()), "the gradient of the tokens is missing or not finite")
    require_gradients(module, zero=False)


def gradients_are_right(case: SubModuleCase, example: Example) -> None:
    """Backward agrees with differences of forward, in random directions."""
    module, x = case.make(), case.tokens(example)[:2, :9].clone()
    active = torch.ones(x.shape[:2], dtype=torch.bool)
    leaves = [x.requires_grad_(), *trained_parameters(module).values()]
    directions = [torch.randn_like(leaf) for leaf in leaves]
    weight = torch.randn_like(x)

    def value(step: float) -> Tensor:
        moved = case.make()
        with torch.no_grad():
            for parameter, direction in zip(trained_parameters(moved).values(), directions[1:], strict=True):
                parameter.add_(direction, alpha=step)
        return (run(moved, x + step * directions[0], active, example) * weight).sum()

    (run(module, x, active, example) * weight).sum().backward()
    require_slope(value, leaves, directions)


def never_looks_ahead(case: SubModuleCase, example: Example) -> None:
    """A causal sub-module's earlier results stay the same when later tokens change, even by 1e4 or to NaN."""
    module, x, active = case.make(), case.tokens(example), example.active()
    if not module.causal:
        return
    wanted, cut = run(module, x, active, example), example.length // 2
    for stranger in (1.0, 1e4, torch.nan):
        changed = x.clone()
        changed[:, cut:] = torch.randn_like(changed[:, cut:]) * stranger
        found = run(module, changed, active, example)
        require_near(
            found[:, :cut],
            wanted[:, :cut],
            f"results before tokens that were changed to random numbers times {stranger}",
        )


@if_streams
def chunks_equal_the_whole(case: SubModuleCase, example: Example) -> None:
    """Whole rows, chunks of any size and single steps give the same results."""
    module, x, active = case.make(), case.tokens(example), example.active()
    wanted = run(module, x, active, example)
    for name, chunks in {"chunks": list(example.chunks()), "single steps": list(example.steps())}.items():
        for gradients in (True, False):  # without gradients a part may take another path
            with torch.set_grad_enabled(gradients):
                require_near(stream(module, x, active, example, chunks)[0], wanted, f"{name} against the whole")


@if_streams
def gradients_cross_chunks(case: SubModuleCase, example: Example) -> None:
    """A state carries gradients: training on chunks without detaching is training on the whole."""
    x, active, weight = case.tokens(example), example.active(), case.tokens(example)
    whole, parts = case.make(), case.make()
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    (run(whole, one, active, example) * weight).sum().backward()
    (stream(parts, other, active, example, example.chunks())[0] * weight).sum().backward()
    if one.grad is not None and other.grad is not None:
        require_near(other.grad, one.grad, "the tokens' gradient through a state", 1e-8)
    for (name, a), b in zip(trained_parameters(parts).items(), trained_parameters(whole).values(), strict=True):
        if a.grad is None or b.grad is None:
            raise AssertionError(f"the gradient of {name!r} is None")
        require_near(a.grad, b.grad, f"the gradient of {name!r} through a state", 1e-8)


@if_streams
def states_are_values(case: SubModuleCase, example: Example) -> None:
    """Forward does not change the state it is given, so a stream can be continued from it twice."""
    module, x, active = case.make(), case.tokens(example), example.active()
    _, state = stream(module, x, active, example, example.chunks())
    kept = copied(named_tensors(state))
    first, again = (stream(module, x, active, example, example.chunks(), state)[0] for _ in range(2))
    require_unchanged(named_tensors(state), kept, "forward changed the state it was given:")
    require(torch.equal(again, first), "one state gave two different results")


@if_streams
def rows_without_tokens_keep_their_state(case: SubModuleCase, example: Example) -> None:
    """A chunk without tokens of a row leaves the row's state unchanged bit by bit."""
    module, x, active = case.make(), case.tokens(example), example.active()
    _, state = stream(module, x, active, example, example.chunks())
    idle = torch.arange(x.shape[0]) % 2 == 0
    _, after = stream(module, x, active & ~idle[:, None], example, example.chunks(), state)
    for (name, found), wanted in zip(named_tensors(after).items(), named_tensors(state).values(), strict=True):
        held = found if found.ndim < 2 else found[:, : wanted.shape[1]]  # the previous content of a growing state
        same = found.shape[2:] == wanted.shape[2:] and torch.equal(held[idle], wanted[idle])
        require(same, f"{name} of a row without tokens changed")


@if_streams
def states_can_be_moved(case: SubModuleCase, example: Example) -> None:
    """A state can be permuted, reset, saved and loaded, and every row then continues from its own state."""
    module, x, active = case.make(), case.tokens(example), example.active()
    chunks, rows = list(example.chunks()), x.shape[0]
    _, state = stream(module, x, active, example, chunks)
    wanted = stream(module, x, active, example, chunks, state)[0]
    order = torch.randperm(rows)
    found = stream(module, x[order], active[order], example, chunks, state.reorder(order))[0]
    require_near(found, wanted[order], "rows that were permuted with their state")
    reset = torch.arange(rows) % 2 == 0
    found = stream(module, x, active, example, chunks, state.reset(reset))[0]
    fresh = stream(module, x, active, example, chunks)[0]
    require_near(found, fresh.where(reset[:, None, None], wanted), "rows of which some were reset")
    loaded = saved_and_loaded(state, module.init_state(1, dtype=x.dtype))
    found = stream(module, x, active, example, chunks, loaded)[0]
    require(torch.equal(found, wanted), "a stream that was saved and loaded")


def works_in_every_dtype(case: SubModuleCase, example: Example) -> None:
    """Results in float32 are near those in float64; results in bfloat16 keep the dtype and are finite."""
    x, active = case.tokens(example), example.active()
    wanted = run(case.make(), x.float().double(), active, example)
    found = run(case.make(torch.float32), x.float(), active, example)
    require_near(found.double(), wanted, "float32 against float64", 1e-3)
    rough = run(case.make(torch.bfloat16), x.bfloat16(), active, example)
    require(
        rough.dtype is torch.bfloat16 and bool(rough.isfinite().all()),
        "bfloat16 tokens gave another dtype or non-finite numbers",
    )


def spec_predicts_and_survives(case: SubModuleCase, example: Example) -> None:
    """The spec predicts the number of parameters, predicts MACs, and survives dump and load."""
    if not isinstance(case.spec, SubModuleSpec):
        return
    require_prediction(case.spec, case.spec.num_parameters(case.width), case.make(), "sub-module")
    require(case.spec.macs(case.width, 0).total == 0, "the MACs of no token are not 0")
    require(case.spec.macs(case.width, example.length).total >= 0, "MACs are negative")


SUBMODULE_LAWS: tuple[Law, ...] = (
    returns_one_result_per_token,
    changes_nothing_and_repeats,
    layouts_agree,
    rows_are_independent,
    takes_no_tokens,
    every_parameter_gets_a_gradient,
    gradients_are_right,
    never_looks_ahead,
    chunks_equal_the_whole,
    gradients_cross_chunks,
    states_are_values,
    rows_without_tokens_keep_their_state,
    states_can_be_moved,
    refuses_a_state_unless_causal,
    works_in_every_dtype,
    spec_predicts_and_survives,
)
