"""Tools of the phases: recorded measurements, times, peak memory, precisions, routed layers at a rate."""

import gc
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from benchmarks.count import SHAPES, Shape, layer_spec
from benchmarks.gpu.results import Points, Record, Results
from benchmarks.layer import set_rate
from sma.layer import LayerSpec, RoutedLayer
from sma.routers import SMARouter

PRECISIONS = ("fp32", "tf32", "bf16")
# The batch of Path-X is smaller than that of its preset, 128 rows, so that plain PyTorch fits into 80 GB.
PAPER = {**SHAPES, "pathx": Shape("seqboat_pathx", 32, 16384)}
TOY = {
    "text": Shape("seqboat_text_tiny", 1, 16),
    "image": Shape("seqboat_image_tiny", 1, 12),
    "pathx": Shape("seqboat_pathx_tiny", 1, 16),
    "enwik8": Shape("seqboat_language_tiny", 1, 16),
}


class NotMeasuredError(Exception):
    """The point cannot be measured on this device; the message has the reason."""


class Bench:
    """One phase on one device.

    Args:
        results: file of the points.
        phase: name of the phase.
        device: `cuda` or `cpu`; on a CPU all sizes are small.
        until: `time.monotonic()` at which no further point begins.
    """

    def __init__(self, results: Results, phase: str, device: str, until: float) -> None:
        self.results, self.phase, self.device, self.until = results, phase, device, until

    @property
    def toy(self) -> bool:
        """Whether the sizes are small."""
        return self.device == "cpu"

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the layers."""
        return TOY if self.toy else PAPER

    @property
    def points(self) -> Points:
        """Points of the run so far."""
        return Points(self.results.read())

    def require_gpu(self, what: str) -> None:
        """Refuse a point that has no meaning on a CPU."""
        if self.toy:
            raise NotMeasuredError(f"not measured on this device: {what}")

    def attempt(self, name: str, function: Callable[[], Record], **labels: Any) -> None:
        """Measure a point and record its figures and the warnings of torch, or the reason of its failure."""
        if time.monotonic() > self.until:
            self.results.add("missing", phase=self.phase, name=name, reason="no time was left")
            return
        since = time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                figures = function()
        except NotMeasuredError as why:
            self.results.add("missing", phase=self.phase, name=name, reason=str(why))
        except Exception as error:  # of a kernel, a compiler or the allocator; the next point may succeed
            self.results.fail(error, phase=self.phase, name=name)
        else:
            said = sorted({str(each.message).splitlines()[0] for each in caught if _matters(each)})
            notes: Record = {"warnings": said} if said else {}
            took = round(time.monotonic() - since, 2)
            self.results.add("point", phase=self.phase, name=name, **labels, **figures, **notes, took=took)
        finally:
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def milliseconds(self, step: Callable[[], object], seconds: float = 0.6, calls: int = 1) -> float:
        """Median time of a step by the clock of the device, after warm-up steps.

        Args:
            step: the timed function.
            seconds: about how long it is repeated.
            calls: number of calls that are timed together, for steps of few microseconds.
        """

        def several() -> None:
            for _ in range(calls):
                step()

        if self.toy:
            since = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - since)
        for _ in range(3):
            several()
        torch.cuda.synchronize()
        times: list[float] = []
        until = time.monotonic() + seconds
        while len(times) < 5 or (len(times) < 200 and time.monotonic() < until):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            several()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times) / calls

    def device_milliseconds(self, step: Callable[[], object], seconds: float = 0.3, calls: int = 10) -> float:
        """Median time of a step on the device, without the host: calls in one CUDA graph.

        Args:
            step: the timed function, which must not wait for the device.
            seconds: about how long the graph is repeated.
            calls: number of calls in the graph.
        """
        if self.toy:
            return self.milliseconds(step)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                step()
        return self.milliseconds(graph.replay, seconds) / calls

    def peak_gigabytes(self, step: Callable[[], object]) -> float | None:
        """Peak memory of a step; None on a CPU, where only the process could be measured."""
        if self.toy:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Autocast to bfloat16, or nothing."""
        return torch.autocast(self.device, torch.bfloat16) if precision == "bf16" else nullcontext()

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """New random numbers on the device."""
        return (torch.randn(shape, device=self.device) * scale).to(dtype)


def _matters(warning: warnings.WarningMessage) -> bool:
    return "cannot be compiled" in str(warning.message) or "flash" in str(warning.message).lower()


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Allow or forbid TF32 for float32 products on CUDA inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in the Euclidean norm; NaN where one of them has a NaN."""
    wide, exact = found.detach().double().cpu(), wanted.detach().double().cpu()
    scale = float(exact.norm())
    return float((wide - exact).norm()) / (scale if scale > 0 else 1.0)


class Built(NamedTuple):
    """A layer of a preset with an activation rate, and inputs.

    Attributes:
        layer: the layer, in training mode.
        inputs: several batches, so that the next one is in no cache.
        rate: the actual activation rate on the first batch.
    """

    layer: RoutedLayer
    inputs: list[Tensor]
    rate: float


def build_layer(bench: Bench, shape: Shape, rate: float, variant: str = "routed", seed: int = 0) -> Built:
    """Build the layer of a preset and set its activation rate.

    Args:
        bench: the phase, with its device.
        shape: preset, rows and length.
        rate: activation rate.
        variant: `routed`; `dense`, in which every token runs; or `without` the routed part.
        seed: seed of the parameters and the inputs.
    """
    torch.manual_seed(seed)
    width, spec = layer_spec(shape.model)
    layer = _variant(spec, variant).build(width).to(bench.device).train()
    inputs = [bench.random(shape.batch, shape.length, width).requires_grad_() for _ in range(1 if bench.toy else 3)]
    if layer.routed is None or not isinstance(layer.routed.router, SMARouter):
        return Built(layer, inputs, float(layer.routed is not None))
    if 0 < rate < 1:
        set_rate(layer, inputs[0], rate)
    else:  # dropout changes scores from call to call
        with torch.no_grad():
            layer.routed.router.bias[1] += math.copysign(1e4, rate - 0.5)
    decision = cast(Any, layer(inputs[0].detach()).decision)
    return Built(layer, inputs, float(decision.rate()[0]))


def _variant(spec: LayerSpec, variant: str) -> LayerSpec:
    if variant == "dense":
        return spec.replace(router={"kind": "always"})
    return spec.replace(modules={}) if variant == "without" else spec


def step_of(
    bench: Bench, module: Callable[..., Any], inputs: list[Tensor], precision: str, **options: Any
) -> Callable[[], Tensor]:
    """Forward + backward of a module on the next of the inputs; returns the results."""
    turns = itertools.cycle(inputs)
    parameters = list(getattr(module, "parameters", tuple)())
    weight = torch.randn_like(inputs[0])

    def step() -> Tensor:
        x = next(turns)
        with bench.autocast(precision):
            output = module(x, **options)
        hidden: Tensor = output if isinstance(output, Tensor) else output.hidden
        hidden.backward(weight.to(hidden.dtype))
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        return hidden.detach()

    return step
