"""Times of whole layers by one implementation of the operators: the phases `plain` and `kernels`."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.count import RATES, Shape, count, layer_spec
from benchmarks.gpu import operators, profiled
from benchmarks.gpu.measure import PRECISIONS, Bench, build_layer, products_in, step_of
from benchmarks.gpu.results import Points, Record
from sma.kernels import use
from sma.kernels.operator import Name

ON_DEVICE = ", on the device"


def plain(bench: Bench) -> None:
    """Measure the layers in plain PyTorch."""
    _run(bench, "plain")


def kernels(bench: Bench) -> None:
    """Measure the layers with kernels, and the fused functions."""
    operators.fused_functions(bench)
    _run(bench, "triton")


def _run(bench: Bench, implementation: Name) -> None:
    with use(implementation):
        for name, rate, precision, variant in _wanted(bench.toy):
            _attempt(bench, _layer, implementation, name, rate, precision, variant)
            if (name, rate, precision) == ("text", 0.3, "tf32"):
                operators.averages(bench)
                operators.attentions(bench)
        # Last, because a profile slows down everything after it in the process.
        for name, rate, precision, variant in _wanted(bench.toy):
            if implementation == "triton" and precision != PRECISIONS[0]:
                _attempt(bench, _on_device, implementation, name, rate, precision, variant, ON_DEVICE)


def _attempt(
    bench: Bench,
    measure: Callable[..., Record],
    implementation: Name,
    name: str,
    rate: float,
    precision: str,
    variant: str,
    suffix: str = "",
) -> None:
    labels = {"layer": name, "rate": rate, "precision": precision, "implementation": implementation}
    arguments = bench, bench.shapes[name], rate, precision, variant
    bench.attempt(point_name(name, rate, precision, variant) + suffix, partial(measure, *arguments), **labels)


def point_name(layer: str, rate: float, precision: str, variant: str = "routed") -> str:
    """Name of the point of a layer."""
    return f"{layer} {rate} {precision}" + ("" if variant == "routed" else f" {variant}")


def _wanted(toy: bool) -> Iterator[tuple[str, float, str, str]]:
    """Points in the order of their importance."""
    if toy:
        yield "text", 0.3, "tf32", "routed"
        return
    for precision in ("tf32", "bf16"):
        yield "text", 0.3, precision, "routed"
    for precision in ("tf32", "bf16"):
        yield from (("text", rate, precision, "routed") for rate in RATES if rate != 0.3)
        yield from ((name, 0.3, precision, "routed") for name in ("image", "enwik8", "pathx"))
    for name in ("text", "image"):
        yield from ((name, rate, "tf32", variant) for variant, rate in (("dense", 1.0), ("without", 0.0)))
    yield from (("text", rate, PRECISIONS[0], "routed") for rate in RATES)
    yield from ((name, 0.3, PRECISIONS[0], "routed") for name in ("image", "enwik8", "pathx"))


def _layer(bench: Bench, shape: Shape, rate: float, precision: str, variant: str) -> Record:
    with products_in(precision):
        layer, inputs, real = build_layer(bench, shape, rate, variant)
        step = step_of(bench, layer, inputs, precision)
        milliseconds = bench.milliseconds(step)
        return {"milliseconds": milliseconds, "real_rate": real, "peak_gigabytes": bench.peak_gigabytes(step)}


def _on_device(bench: Bench, shape: Shape, rate: float, precision: str, variant: str) -> Record:
    with products_in(precision):
        layer, inputs, real = build_layer(bench, shape, rate, variant)
        device = profiled.device_milliseconds(bench, step_of(bench, layer, inputs, precision))
    figures: Record = {"device_milliseconds": device}
    if variant == "routed" and precision != "bf16":  # the meta device, on which bytes are counted, has no autocast
        figures |= roofline(shape, real, precision, bench.points)
    return figures


def roofline(shape: Shape, rate: float, precision: str, points: Points) -> Record:
    """Minimum time of the counted launches with kernels: each takes its bytes over the bandwidth of a copy, or its
    operations over the speed of a product, whichever is longer.
    """
    copy = points.get("ceilings", "copy", "gigabytes_per_second")
    product = points.get("ceilings", f"product {precision}", "teraflops")
    if copy is None or product is None:
        return {}
    width, spec = layer_spec(shape.model)
    with torch.device("meta"):
        layer = spec.build(width).train()
    calls = count(layer, shape.batch, shape.length, rate).calls
    works = [call.work for call in calls]
    bound = sum(max((w.read + w.written) / copy / 1e6, w.flops / product / 1e9) for w in works)
    return {"roofline": bound, "launches": sum(w.launches for w in works)}
