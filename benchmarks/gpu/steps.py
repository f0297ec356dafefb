"""A whole training step of the model for Text: eager, with a capacity, and as one CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from benchmarks.count import ROOT
from benchmarks.gpu import profiled
from benchmarks.gpu.measure import Bench, products_in
from benchmarks.gpu.results import Record
from sma.capacity import Capacity, PerBatch
from sma.kernels import use
from sma.model import SequenceModel, build
from sma.spec import load_spec

# A new router activates about half of the tokens.
STATIC = PerBatch(0.75)
UPDATES = 30


class Training(NamedTuple):
    """A model in training.

    Attributes:
        model: the model.
        update: forward, backward, clipping and optimiser; returns the loss.
        restart: sets the weights and the optimiser back.
    """

    model: SequenceModel
    update: Callable[[], Tensor]
    restart: Callable[[], None]


def training_of(bench: Bench, capacity: Capacity | None, repeatable: bool = False) -> Training:
    """The model for Text with random bytes and classes, and its optimiser.

    Args:
        bench: has the device.
        capacity: of the routed sub-modules.
        repeatable: leave out what differs from run to run: dropout, and the gradient of the bias tables.
    """
    shape = bench.shapes["text"]
    torch.manual_seed(0)
    spec = load_spec(ROOT / "recipes" / "specs" / f"{shape.model}.yaml", "model")
    model = build(spec, seed=0).to(bench.device).train(not repeatable)
    ids = torch.randint(1, 257, (shape.batch, shape.length), device=bench.device)
    classes = torch.randint(2, (shape.batch,), device=bench.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (repeatable and name.endswith("bias_table")))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = [each.detach().clone() for each in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True, capturable=not bench.toy)

    def update() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(cast(Tensor, model(ids, capacity=capacity).logits), classes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return loss.detach()

    @torch.no_grad()
    def restart() -> None:
        for parameter, value in zip(parameters, first, strict=True):
            parameter.copy_(value)
        for state in optimiser.state.values():
            for value in state.values():
                value.zero_()

    return Training(model, update, restart)


def captured(training: Training) -> Callable[[], Tensor]:
    """The update as one CUDA graph; the weights and the optimiser are set back after the updates that warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training.update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training.update()
    training.restart()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


@contextmanager
def settings(bench: Bench) -> Iterator[None]:
    """Kernels and TF32 products, as a training on CUDA has them."""
    with use("plain" if bench.toy else "triton"), products_in("tf32"):
        yield


def profile_of_a_step(bench: Bench) -> None:
    """Profile a training step, ragged and with a capacity."""
    for name, capacity in (("ragged", None), ("static", STATIC)):
        bench.attempt(name, partial(_profile, bench, capacity))


def _profile(bench: Bench, capacity: Capacity | None) -> Record:
    with settings(bench):
        training = training_of(bench, capacity)
        found = profiled.figures(profiled.record(bench, training.update), profiled.STEPS, bench.toy)
    return {"layers": len(training.model.layers), **found}


def run(bench: Bench) -> None:
    """Time the step eager and as a graph, and compare their losses."""
    bench.attempt("graph", partial(_graph, bench))
    bench.attempt("losses", partial(_losses, bench))
    for name, capacity in (("eager ragged", None), ("eager static", STATIC)):
        bench.attempt(name, partial(_eager, bench, capacity))


def _eager(bench: Bench, capacity: Capacity | None) -> Record:
    with settings(bench):
        training = training_of(bench, capacity)
        milliseconds = bench.milliseconds(training.update)
        return {"milliseconds": milliseconds, "peak_gigabytes": bench.peak_gigabytes(training.update)}


def _graph(bench: Bench) -> Record:
    bench.require_gpu("CUDA graphs")
    with settings(bench):
        replay = captured(training_of(bench, STATIC))
        milliseconds = bench.milliseconds(replay)
        found = profiled.figures(profiled.record(bench, replay), profiled.STEPS, bench.toy)
    return {"milliseconds": milliseconds, "idle": found["idle"], "launches": found["launches"]}


def _losses(bench: Bench) -> Record:
    """Losses of the same updates."""
    bench.require_gpu("CUDA graphs")
    with settings(bench):
        eager, other = (training_of(bench, STATIC, repeatable=True) for _ in range(2))
        replay = captured(other)
        pairs = [(float(eager.update()), float(replay())) for _ in range(UPDATES)]
    difference = max(abs(one - two) / abs(one) for one, two in pairs)
    return {"updates": UPDATES, "first": pairs[0], "last": pairs[-1], "largest_difference": difference}
