"""Programs that compile models and compare them with the eager ones: `python -m tests.test_sma.compiled CASE`.

They run in separate processes, because torch.compile cannot trace the suite's shape checker, which wraps functions.
"""

import itertools
import sys
import warnings
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sma import build, load_spec
from sma.norms import BatchNormSpec
from sma.pytree import named_tensors
from tests.cases import generator
from tests.forks import run_fork

GAU: dict[str, Any] = {"kind": "gau", "query_size": 4, "hidden_size": 8}
MIXED = {"attention": {**GAU, "window": 3}, "mlp": {"kind": "gated_mlp", "hidden_size": 8}, "conv": {"kind": "conv"}}
KINDS: dict[str, dict[str, Any]] = {
    "gau": {**GAU, "window": 3},
    "gau of all tokens": GAU,
    "causal relu2": {**GAU, "window": 3, "attention": "relu2", "bidirectional": False, "position": {"kind": "rotary"}},
    "laplace": {
        **GAU,
        "window": 3,
        "attention": "laplace",
        "position": {"kind": "relative_bias", "distance": "slot_distance"},
    },
    "gated_mlp": {"kind": "gated_mlp", "hidden_size": 8},
    "conv": {"kind": "conv", "kernel_size": 3, "bidirectional": True},
    "chunked_gau": {**GAU, "kind": "chunked_gau", "window": 6},
    "ema": {"kind": "ema", "state_size": 2},
    "causal ema": {"kind": "ema", "state_size": 2, "bidirectional": False, "truncation": 5},
    "attention": {"kind": "attention", "heads": 2},
    "causal attention": {"kind": "attention", "heads": 2, "bidirectional": False, "position": {"kind": "rotary"}},
    "local_attention": {"kind": "local_attention", "heads": 2, "window": 3},
    "s4d": {"kind": "s4d", "state_size": 4},
    "causal s4d": {"kind": "s4d", "state_size": 4, "bidirectional": False},
}
LENGTH = 40  # more than one block of a window, and of a scan


def model_of(modules: dict[str, Any], norm: str = "layer_norm") -> nn.Module:
    """A classifier with one layer that routes these modules."""
    layer = {
        "backbone": {"kind": "ema", "state_size": 2},
        "router": {"kind": "sma", "temperature_scale": 0.3},
        "modules": modules,
        "norm": {"kind": norm},
    }
    spec = {
        "kind": "sequence_classifier",
        "width": 8,
        "encoder": {"kind": "token_embedding", "vocabulary": 9},
        "layers": [layer],
        "head": {"kind": "mean_pool_mlp", "hidden": 8, "classes": 3},
    }
    return build(load_spec(spec), seed=0)


def batches() -> list[tuple[Tensor, Tensor | None]]:
    """Batches with padding on the right, on the left, and without padding."""
    inputs = torch.randint(0, 9, (3, LENGTH), generator=generator(0))
    valid = torch.arange(LENGTH) < torch.tensor([LENGTH, 21, 4])[:, None]
    return [(inputs, valid), (inputs.flip(1), valid.flip(1)), (inputs, None)]


def logits_and_gradients(model: nn.Module, inputs: Tensor, valid: Tensor | None, **options: Any) -> list[Tensor]:
    """The logits, and the gradients of every parameter."""
    logits = model(inputs, valid, **options).logits
    return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


def assert_compiles(model: nn.Module, backend: str, **options: Any) -> None:
    """Assert that the model compiles to one graph with the outputs and gradients of the eager model."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for inputs, valid in batches():
        found, wanted = (logits_and_gradients(each, inputs, valid, **options) for each in (compiled, model))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def static() -> None:
    """Static capacity with the default backend; some tokens overflow."""
    model = model_of(MIXED)
    capacity = {"attention": 0.5, "mlp": 9, "conv": LENGTH}
    assert any(bool(decision.overflow.any()) for decision in model(*batches()[0], capacity=capacity).decisions)
    assert_compiles(model, "inductor", capacity=capacity)


def ragged() -> None:
    """Every active token, with the default backend."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    assert_compiles(model_of(MIXED), "inductor")


def _assert_every_kind_compiles(**options: Any) -> None:
    """Compile half of the kinds in one layer, without code generation; the rest of the model takes most of the time."""
    names = list(KINDS)
    for part in (names[::2], names[1::2]):
        torch._dynamo.reset()
        model = model_of({name.replace(" ", "_"): KINDS[name] for name in part})
        assert_compiles(model, "aot_eager", **options)


def every_kind_static() -> None:
    """Every kind with static capacity."""
    _assert_every_kind_compiles(capacity=9)


def every_kind_ragged() -> None:
    """Every kind with all active tokens."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    _assert_every_kind_compiles()


def batch_norm() -> None:
    """Running statistics count a training batch once, even if backward recomputes it inside or outside a graph."""
    x = torch.randn(3, 5, 8, generator=generator(0)).requires_grad_()

    def trained(wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> list[Tensor]:
        torch._dynamo.reset()
        norm = BatchNormSpec(momentum=0.3).build(8)
        out = wrap(norm)(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *norm.parameters()]), *norm.buffers()]

    def again(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(part, x, use_reentrant=False)

    wanted = trained(lambda norm: norm)
    for backend in ("aot_eager", "inductor"):
        compiled: Callable[..., Any] = partial(torch.compile, fullgraph=True, backend=backend)
        for steps in ([compiled], [compiled, again], [again, compiled]):
            torch.testing.assert_close(
                trained(lambda norm, steps=steps: reduce(lambda part, step: step(part), steps, norm)), wanted
            )
    model = model_of({"module": KINDS["gated_mlp"]}, "batch_norm").train()
    assert_compiles(model.recompute_activations(), "aot_eager", capacity=9)


def other_lengths() -> None:
    """A compiled model accepts batches of other lengths and recompiles if necessary."""
    model = model_of(MIXED)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (40, 25, 70):
        inputs = torch.randint(0, 9, (2, length), generator=generator(length))
        valid = torch.rand(2, length, generator=generator(1)) < 0.7
        found, wanted = (logits_and_gradients(each, inputs, valid, capacity=0.3) for each in (compiled, model))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def step() -> None:
    """Single steps of a stream equal the eager ones, including the state."""
    gau = {**GAU, "window": 3, "bidirectional": False}
    layer = {
        "backbone": {"kind": "ema", "state_size": 2, "bidirectional": False},
        "modules": {"attention": gau, "conv": {"kind": "conv"}},
    }
    encoder = {"kind": "token_embedding", "vocabulary": 9}
    model = build(
        load_spec({"kind": "language_model", "width": 8, "encoder": encoder, "layers": [layer]}), seed=0
    ).eval()
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    compiled = torch.compile(model, dynamic=False, backend="aot_eager")
    inputs = torch.randint(0, 9, (2, 8), generator=generator(0))
    one = other = model.init_state(2)
    with torch.no_grad():
        for t in range(inputs.shape[1]):
            found, wanted = (
                compiled(inputs[:, t : t + 1], state=one),
                model(inputs[:, t : t + 1], state=other),
            )
            torch.testing.assert_close(named_tensors(found), named_tensors(wanted), rtol=1e-4, atol=1e-5)
            one, other = found.state, wanted.state


def parts() -> None:
    """A layer or one of its parts compiled separately with `compile()` inside an eager model."""
    for name in (
        "layers.0",
        "layers.0.routed",
        "layers.0.routed.submodules.mlp",
        "layers.0.backbone",
        "encoder",
        "head",
    ):
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        model = model_of(MIXED)
        for inputs, valid in batches():
            model.get_submodule(name)._compiled_call_impl = None
            wanted = logits_and_gradients(model, inputs, valid, capacity=9)
            model.get_submodule(name).compile(backend=backend, fullgraph=True)
            torch.testing.assert_close(
                logits_and_gradients(model, inputs, valid, capacity=9), wanted, rtol=1e-4, atol=1e-5
            )
        assert graphs, f"{name} was never compiled"


def capacities() -> None:
    """Every form of static capacity."""
    from sma.capacity import PerBatch
    from tests.test_sma.test_capacity import MODEL

    model, x = build(MODEL, seed=0), torch.randn(2, 20, 2)
    valid = torch.arange(20) < torch.tensor([[20], [11]])
    for capacity in (0.4, 5, PerBatch(0.3), {"attention": PerBatch(9), "conv": 3, "mlp": 0.1}):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found, wanted = (each(x, valid, capacity=capacity).logits for each in (compiled, model))
        torch.testing.assert_close(found, wanted)


def glue() -> None:
    """The fused functions of a layer in two sizes, and their gradients; many in one graph to save time."""
    from tests.test_sma.test_glue import OPERATORS, WITH_GRADIENTS, N

    def long(x: Any) -> bool:
        return isinstance(x, Tensor) and x.shape[:1] == (N,)

    def all_of(functions: list[Callable[..., Any]], calls: list[tuple[Any, ...]]) -> list[Any]:
        return [function(*arguments) for function, arguments in zip(functions, calls, strict=True)]

    def check(functions: list[Callable[..., Any]], calls: list[tuple[Any, ...]], sizes: int) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(lambda calls: all_of(functions, calls), dynamic=True, fullgraph=True)
        for _ in range(sizes):
            torch.testing.assert_close(compiled(calls), all_of(functions, calls))
            calls = [tuple(torch.cat([each, each]) if long(each) else each for each in call) for call in calls]

    check([case.values[0].function for case in OPERATORS], [case.values[1] for case in OPERATORS], 2)
    fused, gradients = [], []
    for case in WITH_GRADIENTS:
        function, arguments = case.values
        grads = [torch.randn_like(result) for result in function.function(*arguments)]
        fused.append((function.fused.function, arguments))
        gradients.append((function.gradient.function, (*grads, *arguments)))
    for functions, calls in (zip(*fused, strict=True), zip(*gradients, strict=True)):
        check(list(functions), list(calls), 1)
    check_compilations()


def check_compilations() -> None:
    """A fused function is compiled once per width and set of numbers for any number of rows above 1.

    It runs after any change of sizes, modes or layouts, and sets no attributes on tensors.
    """
    from sma.fused import Compiled
    from sma.glue import join_parts_backward

    function, graphs = join_parts_backward.function, torch._dynamo.utils.counters["stats"]

    def given(rows: int, width: int, tokens: int, p: float) -> tuple[Any, ...]:
        x, routed, slots = torch.randn(rows, width), torch.randn(tokens, width), torch.arange(rows)
        places = routed, x[:, 0].contiguous(), slots, torch.arange(tokens)
        return x, x.cos(), x > 0, *places, None, p, False, True

    def check(run: Compiled, *arguments: Any) -> None:
        torch.testing.assert_close(run(*arguments), function(*arguments))
        assert not any(vars(each) for each in arguments if isinstance(each, Tensor))

    torch._dynamo.reset()
    run, before = Compiled(function), graphs["unique_graphs"]
    for made, (width, p) in enumerate([(6, 0.1), (6, 0.5), (3, 0.5)], 1):
        for more in range(3):
            check(run, *given(9 + 3 * more, width, 4 + more, p))
        assert graphs["unique_graphs"] - before == made, (graphs, before, made)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # All backends share the guards; this one skips code generation, which takes seconds per program.
        with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
            run = Compiled(function)
        for width, p in itertools.product((3, 5, 6, 7), (0.0, 0.1)):
            for rows, tokens in ((1, 1), (9, 1), (9, 4)):
                check(run, *given(rows, width, tokens, p))
                with torch.inference_mode():
                    check(run, *given(rows, width, tokens, p))
                x, *rest = given(rows, width, tokens, p)
                check(run, x.T.contiguous().T, *rest)


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (static, ragged, every_kind_static, every_kind_ragged, batch_norm, other_lengths, step, parts)
}
ELSEWHERE: dict[str, Callable[[], None]] = {case.__name__: case for case in (capacities, glue)}


def assert_equal_if_compiled(case: str, folder: Path) -> None:
    """Run a case of this file in a fork of a process that has imported the compiler.

    Args:
        case: name of the case.
        folder: an empty folder.
    """
    imported = ("torch._inductor.compile_fx", "tests.test_sma.compiled")
    done = run_fork("tests.test_sma.compiled", case, folder=folder, imported=imported, timeout=880)
    assert done.stdout.strip() == "equal", done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    {**CASES, **ELSEWHERE}[sys.argv[1]]()
    print("equal")
