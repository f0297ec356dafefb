"""Comparison of a run with limits; those on speed are relative to the ceilings of the same run."""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from benchmarks.gpu.layers import ON_DEVICE, point_name
from benchmarks.gpu.results import Points

State = Literal["met", "missed", "not measured"]
RATES = (0.1, 0.3, 1.0)


class Mark(NamedTuple):
    """A figure and its limit.

    Attributes:
        name: name of the figure.
        limit: the condition in words.
        figure: the measured value; None if it was not measured.
        state: whether the condition holds.
    """

    name: str
    limit: str
    figure: float | None
    state: State


def marks(points: Points, timed: bool = True) -> list[Mark]:
    """Compare the points of a run with the limits; on a CPU, where times have no meaning, only the errors."""
    errors, points = _errors(points), points if timed else Points([])
    return [
        *errors,
        *_averages(points),
        *_attentions(points),
        *_glue(points),
        *_layers(points),
        *_steps(points),
    ]


def _judge(name: str, figure: float | None, limit: float, sign: Literal["<=", ">=", "<"], unit: str = "") -> Mark:
    words = f"{sign} {limit:g}{unit}"
    if figure is None:
        return Mark(name, words, None, "not measured")
    holds = {"<=": figure <= limit, ">=": figure >= limit, "<": figure < limit}[sign]
    return Mark(name, words, figure, "met" if holds else "missed")  # NaN satisfies no condition


def _ratio(above: Any, below: Any, factor: float = 1.0) -> float | None:
    return None if above is None or below is None or below == 0 else float(above) / float(below) * factor


def _worst(points: Points, prefix: str, suffix: str = "") -> float | None:
    found = [
        float(each["error"])
        for name, each in points.of("correctness").items()
        if name.startswith(prefix) and name.endswith(suffix)
    ]
    if any(math.isnan(error) for error in found):
        return math.nan
    return max(found, default=None)


def _errors(points: Points) -> Iterator[Mark]:
    yield _judge("error of the moving average, float32", _worst(points, "ema"), 1e-5, "<=")
    for precision, limit in (("fp32", 1e-5), ("tf32", 1e-3), ("bf16", 1e-2)):
        yield _judge(f"error of the attention, {precision}", _worst(points, "attention", precision), limit, "<=")
    same = points.get("correctness", "nan", "same_pattern")
    yield _judge("NaN propagates as in plain PyTorch", None if same is None else float(same), 1, ">=")
    differ = points.get("correctness", "two runs", "differ")
    others = None if differ is None else float(sum(not name.endswith("bias_table") for name in differ))
    yield _judge("tensors that differ between two runs, without the bias table", others, 0, "<=")


def _averages(points: Points) -> Iterator[Mark]:
    size, copy = (
        points.get("kernels", "ema text", "gigabytes"),
        points.get("ceilings", "copy", "gigabytes_per_second"),
    )
    # A chunked scan reads the rows twice and writes them once.
    floor = _ratio(size, copy, 3e3)
    forward = points.get("kernels", "ema text", "forward")
    yield _judge(
        "moving average of Text, forward, relative to three passes",
        _ratio(forward, floor),
        3.5,
        "<=",
        "x",
    )
    for name, what, limit in (
        ("text", "relative to the FFT, forward + backward", 2.0),
        ("enwik8", "causal, relative to the scan of torch, forward + backward", 8.0),
    ):
        plain, ours = (points.get(phase, f"ema {name}", "step") for phase in ("plain", "kernels"))
        yield _judge(f"speed of the moving average of {name} {what}", _ratio(plain, ours), limit, ">=", "x")


def _attentions(points: Points) -> Iterator[Mark]:
    for precision in ("tf32", "bf16"):
        product = points.get("ceilings", f"product {precision}", "teraflops")
        for way, limit in (("forward", 35.0), ("backward", 25.0)):
            speed = points.get("kernels", f"attention text {precision}", f"{way}_teraflops")
            figure = _ratio(speed, product, 100.0)
            yield _judge(f"attention of Text, {way}, {precision}, relative to a product", figure, limit, ">=", " %")


def _glue(points: Points) -> Iterator[Mark]:
    copy = points.get("ceilings", "copy", "gigabytes_per_second")
    speeds = [each["gigabytes_per_second"] for name, each in points.of("kernels").items() if name.startswith("glue ")]
    yield _judge(
        "slowest fused function, relative to a copy", _ratio(min(speeds, default=None), copy, 100), 70, ">=", " %"
    )


def _layers(points: Points) -> Iterator[Mark]:
    def layer(
        name: str, rate: float, precision: str, figure: str, phase: str = "kernels", variant: str = "routed"
    ) -> Any:
        return points.get(phase, point_name(name, rate, precision, variant) + _suffix(figure), figure)

    for name, rate in [*(("text", rate) for rate in RATES), ("image", 0.3), ("enwik8", 0.3), ("pathx", 0.3)]:
        time, bound = (layer(name, rate, "tf32", figure) for figure in ("device_milliseconds", "roofline"))
        yield _judge(f"layer of {name} at {rate}, tf32, relative to its roofline", _ratio(time, bound), 2.0, "<=", "x")
    for what, words in (("device_milliseconds", "on the device"), ("milliseconds", "including the host")):
        for name, rate, limit in (("text", 0.1, 3.0), ("text", 0.3, 2.0), ("text", 1.0, 1.3), ("image", 0.3, 1.0)):
            peer = points.get("peers", f"transformer {name}{_suffix(what)}", what)
            figure = _ratio(peer, layer(name, rate, "bf16", what))
            yield _judge(
                f"speed relative to flash attention, {name} at {rate}, bf16, {words}", figure, limit, ">=", "x"
            )
        for name in ("text", "image"):
            peer = points.get("peers", f"authors {name}{_suffix(what)}", what)
            figure = _ratio(peer, layer(name, 0.3, "tf32", what))
            yield _judge(f"speed relative to the authors' algorithm, {name} at 0.3, {words}", figure, 5.0, ">=", "x")
    for name, rates in (("text", (0.1, 0.3)), ("image", (0.3,))):
        for rate in rates:
            figure = skip_efficiency(points, name, rate)
            yield _judge(f"skip efficiency, {name} at {rate}", figure, 0.85, ">=")
    for name in ("text", "image", "enwik8", "pathx"):
        ours, plain = (layer(name, 0.3, "tf32", "peak_gigabytes", phase) for phase in ("kernels", "plain"))
        yield _judge(f"peak memory relative to plain PyTorch, {name} at 0.3", _ratio(ours, plain), 0.6, "<=", "x")


def _suffix(figure: str) -> str:
    return ON_DEVICE if figure in ("device_milliseconds", "roofline") else ""


def skip_efficiency(points: Points, layer: str, rate: float) -> float | None:
    """(T_dense - T) / ((1 - rate) (T_dense - T_without)) of times on the device; 1 means no overhead."""
    times = [
        points.get("kernels", point_name(layer, *each) + ON_DEVICE, "device_milliseconds")
        for each in ((rate, "tf32"), (1.0, "tf32", "dense"), (0.0, "tf32", "without"))
    ]
    if any(time is None for time in times):
        return None
    routed, dense, without = times
    return _ratio(dense - routed, (1 - rate) * (dense - without))


def _steps(points: Points) -> Iterator[Mark]:
    for name, limit, what in (("ragged", 1.0, "per layer"), ("static", 0.0, "with a capacity")):
        asked, layers = (points.get("profile", name, figure) for figure in ("synchronisations", "layers"))
        yield _judge(f"synchronisations with the host in a training step, {what}", _ratio(asked, layers), limit, "<=")
    idle = points.get("steps", "graph", "idle")
    yield _judge("idle share of a training step as a graph", _ratio(idle, 1, 100), 5, "<", " %")
    difference = points.get("steps", "losses", "largest_difference")
    yield _judge("losses of 30 updates, graph and eager, relative difference", difference, 0, "<=")
