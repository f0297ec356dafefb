"""Correctness of the kernels: against plain PyTorch in float64, with NaN, in models, and in two equal runs."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from benchmarks.count import ROOT
from benchmarks.gpu.measure import Bench, build_layer, products_in, relative_error
from benchmarks.gpu.processes import in_parallel
from benchmarks.gpu.results import Record
from sma.kernels import use
from sma.kernels.ema import ema
from sma.kernels.operator import Name
from sma.kernels.weighting import Weighting
from sma.model import SequenceModel, build
from sma.modules.sliding_window import Bias, attend
from sma.pairs import PairClassifierSpec as PairClassifierSpec  # registers its kind where nothing is installed
from sma.ragged import compress
from sma.spec import load_spec

MODELS = ("image", "language", "listops", "mqar", "pathfinder", "pathx", "retrieval", "speech", "text")
NAMES: tuple[Name, ...] = ("triton", "plain")
WEIGHTINGS: tuple[Weighting, ...] = ("softmax", "relu2", "laplace")


def run(bench: Bench) -> None:
    """Compare the kernels of every operator, then models, then two runs.

    On a GPU in parallel processes: most of the time kernels are compiled, and nothing is timed.
    """
    functions = [partial(bench.attempt, name, function, **labels) for name, function, labels in _points(bench)]
    if bench.toy:
        for function in functions:
            function()
    else:
        torch.set_num_threads(1)  # of the processes that are forked from this one
        in_parallel(bench.results, bench.phase, bench.until, functions)


def _points(bench: Bench) -> Iterator[tuple[str, Callable[[], Record], dict[str, str]]]:
    yield "two runs", partial(_two_runs, bench), {}
    yield "nan", partial(_nan, bench), {}
    for causal, truncation in ((True, None), (True, 7), (False, None), (False, 7)):
        name = f"ema {_way(causal)} {'whole' if truncation is None else 'truncated'}"
        yield name, partial(_ema, bench, causal, truncation), {}
    for index, (weighting, causal) in enumerate(itertools.product(WEIGHTINGS, (True, False))):
        for precision in _precisions(bench.toy, weighting):
            name = f"attention {weighting} {_way(causal)} {precision}"
            function = partial(_attention, bench, weighting, causal, precision, over_slots=index % 2 == 0)
            yield name, function, {"precision": precision}
    names = [f"{name}_tiny" for name in ("image", "recall")] if bench.toy else [*MODELS, "recall_tiny"]
    for name in names:
        yield f"model {name}", partial(_model, bench, name), {}


def _precisions(toy: bool, weighting: Weighting) -> tuple[str, ...]:
    return ("fp32",) if toy or weighting == "laplace" else ("fp32", "tf32", "bf16")


def _way(causal: bool) -> str:
    return "causal" if causal else "both ways"


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that results that no kernel writes are detected."""
    with mock.patch.multiple(torch, empty=_full(torch.empty), empty_like=_full(torch.empty_like)):
        new = _full(Tensor.new_empty)
        with mock.patch.object(Tensor, "new_empty", new):
            yield


def _full(make: Any) -> Any:
    def made(*arguments: Any, **options: Any) -> Tensor:
        tensor: Tensor = make(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return made


def _ema(bench: Bench, causal: bool, truncation: int | None) -> Record:
    """Relative errors of the results and the gradients of the scan."""
    rows, length, width, states = (2, 19, 5, 3) if bench.toy else (4, 1000, 128, 16)
    ways = 1 if causal else 2
    truncation = truncation if truncation is None or bench.toy else 100 * truncation

    def inputs() -> list[Tensor]:
        decay = -torch.rand(ways, width, states, device=bench.device) * 3 - 1e-3
        return [
            bench.random(rows, length, width),
            decay,
            bench.random(ways, width, states),
            bench.random(width),
        ]

    given = inputs()
    weight = bench.random(rows, length, width)
    found = _ema_results(given, weight, truncation, "triton")
    exact = _ema_results([each.double() for each in given], weight.double(), truncation, "plain")
    return _errors(found, exact)


def _ema_results(given: list[Tensor], weight: Tensor, truncation: int | None, name: Name) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in given]
    with use(name), poisoned():
        out = ema(leaves[0], leaves[1], leaves[2], leaves[3], truncation=truncation).out
        return [out, *torch.autograd.grad(out, leaves, weight)]


def _attention(bench: Bench, weighting: Weighting, causal: bool, precision: str, over_slots: bool) -> Record:
    """Relative errors of the results and the gradients of the attention."""
    given = _problem(bench, over_slots, torch.bfloat16 if precision == "bf16" else torch.float32)
    options = {"weighting": weighting, "causal": causal}
    with products_in(precision):
        found = _attended(given, "triton", **options)
    wide = {name: part.double() if torch.is_tensor(part) else part for name, part in given.items()}
    return _errors(found, _attended(wide, "plain", **options))


def _problem(bench: Bench, over_slots: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens of rows of different lengths, the second empty."""
    rows, length, z, h, window = (3, 20, 5, 9, 4) if bench.toy else (6, 700, 96, 320, 128)
    active = torch.rand(rows, length, device=bench.device) < 0.5
    active[1] = False
    tokens = compress(bench.random(rows, length, 1), active)
    count = tokens.index.shape[0]
    sizes = {"q": z, "k": z, "v": h, "incoming": h}
    parts = {name: bench.random(count, size, scale=size**-0.25, dtype=dtype) for name, size in sizes.items()}
    entries, middle = (6 * window - 1, 4 * window - 1) if over_slots else (2 * length - 1, length - 1)
    table = bench.random(entries, scale=0.1)
    return {**parts, "table": table, "tokens": tokens, "window": window, "middle": middle, "over_slots": over_slots}


def _attended(given: dict[str, Any], name: Name, **options: Any) -> list[Tensor]:
    leaves = [given[part].detach().requires_grad_() for part in ("q", "k", "v", "table")]
    q, k, v, table = leaves
    bias = Bias(table, given["middle"], given["over_slots"])
    with use(name), poisoned():
        out = attend(q, k, v, given["tokens"], window=given["window"], bias=bias, **options)
        return [out, *torch.autograd.grad(out, leaves, given["incoming"])]


def _errors(found: list[Tensor], wanted: list[Tensor]) -> Record:
    errors = [relative_error(one, other) for one, other in zip(found, wanted, strict=True)]
    finite = all(bool(part.isfinite().all()) for part in found)
    return {"error": max(errors) if finite else float("nan"), "forward_error": errors[0], "finite": finite}


def _nan(bench: Bench) -> Record:
    """Whether a NaN value makes the same results NaN with kernels and in plain PyTorch."""
    given = _problem(bench, True, torch.float32)
    given["v"][given["v"].shape[0] // 2, 0] = torch.nan
    same = []
    for weighting in WEIGHTINGS:
        outs = []
        for name in NAMES:
            with torch.no_grad(), use(name):
                q, k, v = (given[part] for part in "qkv")
                bias = Bias(given["table"], given["middle"], True)
                options = {"window": given["window"], "causal": False, "weighting": weighting, "bias": bias}
                outs.append(attend(q, k, v, given["tokens"], **options).isnan())
        same.append(bool(torch.equal(*outs)) and 0 < int(outs[0].sum()) < outs[0].numel())
    return {"same_pattern": all(same)}


def _two_runs(bench: Bench) -> Record:
    """Results and gradients that differ between two runs of a layer on the same input."""
    with use("triton"), products_in("tf32"):
        layer, inputs, _ = build_layer(bench, bench.shapes["image" if bench.toy else "text"], 0.3)
        layer.eval()
        weight = torch.randn_like(inputs[0])
        runs = []
        for _ in range(2):
            layer.zero_grad()
            inputs[0].grad = None
            out = layer(inputs[0]).hidden
            out.backward(weight)
            leaves = {"x": inputs[0], **dict(layer.named_parameters())}
            runs.append({"results": out.detach(), **{name: cast(Tensor, leaf.grad) for name, leaf in leaves.items()}})
    one, two = runs
    return {"differ": [name for name in one if not torch.equal(one[name], two[name])]}


def _model(bench: Bench, name: str) -> Record:
    """Difference of scores and gradients of a model between the CPU and the device, with the decisions of the CPU."""
    spec = load_spec(ROOT / "recipes" / "specs" / f"seqboat_{name}.yaml", "model")
    reference, model = (build(spec, seed=0).eval() for _ in range(2))
    model = model.to(bench.device)
    length = 12 if bench.toy else 300
    inputs = _inputs(reference, 1 if bench.toy else 2, length)
    with use("plain"):
        wanted = reference(inputs)
        scores = cast(Tensor, wanted.logits)
        scores.square().mean().backward()
    with use("triton"), products_in("fp32"):
        placed = inputs.to(bench.device)
        free = model(placed)
        chosen = tuple(decision.active.to(bench.device) for decision in wanted.decisions)
        found = cast(Tensor, model(placed, decisions=chosen).logits)
        found.square().mean().backward()
    flips = sum(
        int((one.active.to("cpu") != other.active).sum())
        for one, other in zip(free.decisions, wanted.decisions, strict=True)
    )
    gradients = [
        [each.grad.cpu().flatten() for each in part.parameters() if each.grad is not None]
        for part in (model, reference)
    ]
    return {
        "error": relative_error(found, scores),
        "gradient_error": relative_error(torch.cat(gradients[0]), torch.cat(gradients[1])),
        "flipped_decisions": flips,
    }


def _inputs(model: SequenceModel, rows: int, length: int) -> Tensor:
    torch.manual_seed(1)
    inputs: Tensor = model.encoder.random_inputs(rows * model.spec.rows_per_sample, length)
    return inputs
