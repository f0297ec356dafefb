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
from sma.recipes.training.graph import WARM_UP, Graphed, Update, make_capturable
from sma.spec import load_spec

# A new router activates about half of the tokens.
STATIC = PerBatch(0.75)
UPDATES = 30


class Training(NamedTuple):
    """A model in training.

    Attributes:
        model: the model.
        update: forward, backward, clipping and optimiser.
        batch: ids and classes.
    """

    model: SequenceModel
    update: Update
    batch: tuple[Tensor, Tensor]

    def step(self, capacity: Capacity | None, graphed: bool = False) -> Callable[[], Tensor]:
        """Return a function that makes an update and returns its loss; the first updates of a graph run eagerly."""
        run = Graphed(self.update) if graphed else self.update
        return lambda: run(self.batch, capacity)[0]


def training_of(bench: Bench, repeatable: bool = False) -> Training:
    """The model for Text with random bytes and classes, and its optimiser.

    Args:
        bench: the phase, with its device.
        repeatable: omit dropout and the gradient of the bias tables, which differ from run to run.
    """
    shape = bench.shapes["text"]
    torch.manual_seed(0)
    spec = load_spec(ROOT / "recipes" / "specs" / f"{shape.model}.yaml", "model")
    model = build(spec, seed=0).to(bench.device).train(not repeatable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (repeatable and name.endswith("bias_table")))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)
    make_capturable(optimiser)  # in eager updates too, or their step counts would have another type

    def compute(batch: tuple[Tensor, Tensor], capacity: Capacity | None) -> tuple[Tensor, None]:
        ids, classes = batch
        logits = cast(Tensor, model(ids, capacity=capacity).logits)
        return torch.nn.functional.cross_entropy(logits, classes), None

    ids = torch.randint(1, 257, (shape.batch, shape.length), device=bench.device)
    classes = torch.randint(2, (shape.batch,), device=bench.device)
    return Training(model, Update(compute, optimiser, clip_norm=1.0), (ids, classes))


@contextmanager
def settings(bench: Bench) -> Iterator[None]:
    """Use kernels and TF32 products, as training on CUDA does."""
    with use("plain" if bench.toy else "triton"), products_in("tf32"):
        yield


def profile_of_a_step(bench: Bench) -> None:
    """Profile a training step: the host, and the device, ragged and with a capacity."""
    bench.attempt("host", partial(_profile_of_the_host, bench))
    for name, capacity in (("ragged", None), ("static", STATIC)):
        bench.attempt(name, partial(_profile, bench, capacity))


def _profile_of_the_host(bench: Bench) -> Record:
    with settings(bench):
        return profiled.host_functions(bench, training_of(bench).step(None))


def _profile(bench: Bench, capacity: Capacity | None) -> Record:
    with settings(bench):
        training = training_of(bench)
        events = profiled.record(bench, training.step(capacity))
    return {"layers": len(training.model.layers), **profiled.figures(events, profiled.STEPS, bench.toy)}


def run(bench: Bench) -> None:
    """Measure the step, eager and as a graph, and compare the losses."""
    bench.attempt("graph", partial(_graph, bench))
    bench.attempt("losses", partial(_losses, bench))
    for name, capacity in (("eager ragged", None), ("eager static", STATIC)):
        bench.attempt(name, partial(_eager, bench, capacity))


def _eager(bench: Bench, capacity: Capacity | None) -> Record:
    with settings(bench):
        step = training_of(bench).step(capacity)
        return {"milliseconds": bench.milliseconds(step), "peak_gigabytes": bench.peak_gigabytes(step)}


def _graph(bench: Bench) -> Record:
    bench.require_gpu("CUDA graphs")
    with settings(bench):
        step = training_of(bench).step(STATIC, graphed=True)
        for _ in range(WARM_UP + 1):
            step()
        milliseconds = bench.milliseconds(step)
        found = profiled.figures(profiled.record(bench, step), profiled.STEPS, bench.toy)
    return {"milliseconds": milliseconds, "idle": found["idle"], "launches": found["launches"]}


def _losses(bench: Bench) -> Record:
    """Losses of the same updates, eager and as a graph."""
    bench.require_gpu("CUDA graphs")
    with settings(bench):
        steps = [training_of(bench, repeatable=True).step(STATIC, graphed) for graphed in (False, True)]
        losses = [[float(step()) for step in steps] for _ in range(UPDATES)]
    difference = max(abs(eager - graphed) / abs(eager) for eager, graphed in losses)
    return {"updates": UPDATES, "first": losses[0], "last": losses[-1], "largest_difference": difference}
