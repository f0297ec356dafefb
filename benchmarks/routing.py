"""Cost of routing: router, compaction, extraction and combination of a routed MLP and a routed convolution, forward +
backward.

    python -m benchmarks.routing --json

A pre-norm block out = x + f(norm(x)) with routed f, at several activation rates, is compared with these, on the same
tokens:

- dense: the same block with f on every token: no router, no compaction, no confidence.
- without: the part that no token skips, norm and residual: out = x + norm(x).
- gathered, one for each rate: only f, on the same number of tokens of the same rows, gathered in advance.

`skip_efficiency` is (T_dense - T(rate)) / ((1 - rate) (T_dense - T_without)): 1 means that skipping has no overhead.
`overhead_milliseconds` is T(rate) - T_gathered(rate) - T_without: the cost of moving tokens to f and back. All points
of a model alternate in one process, so that other load on the machine affects all of them; the figures are medians over
the rounds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.layer import set_rate
from benchmarks.stream import take_turns
from sma.decision import Decision
from sma.layer import LayerSpec, RoutedLayer
from sma.modules.conv import ConvSpec
from sma.modules.mlp import GatedMLPSpec
from sma.norms import LayerNormSpec
from sma.ragged import Ragged, compress, rectangular
from sma.spec import FrozenDict
from sma.streams import run_command
from sma.submodule import SubModuleSpec

MODELS = ("mlp", "conv")
RATES = (0.0, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Size:
    """The batch, `(rows, length, width)`."""

    rows: int
    length: int
    width: int


def block_spec(model: str, width: int) -> LayerSpec:
    """A pre-norm block whose only part is routed: a gated MLP as large as an ungated one of hidden size 4 D, or a
    convolution.
    """
    part: SubModuleSpec = GatedMLPSpec(hidden_size=8 * round(width / 3)) if model == "mlp" else ConvSpec(kernel_size=4)
    return LayerSpec(modules=FrozenDict(part=part), bypass="none", activation="none", norm=LayerNormSpec(place="pre"))


class Unrouted(nn.Module):
    """The same block with the sub-module on every token, or with none."""

    def __init__(self, layer: RoutedLayer, *, dense: bool) -> None:
        super().__init__()
        if layer.norm is None or layer.routed is None:
            raise SystemExit("the dense baseline needs a norm and a routed sub-module")
        self.norm = layer.norm
        self.part = layer.routed.submodules["part"] if dense else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Run the parts on all tokens."""
        hidden = self.norm(x_BLD)
        if self.part is not None:
            hidden = self.part(rectangular(hidden))[0].unflatten(0, x_BLD.shape[:2])
        return x_BLD + hidden


def hidden_of(layer: RoutedLayer, x_BLD: Tensor) -> Tensor:
    """Output of a routed block."""
    output: Tensor = layer(x_BLD).hidden
    return output


def results_of(part: nn.Module, tokens: Ragged, values: Tensor) -> Tensor:
    """Output of a sub-module for tokens with these values."""
    results: Tensor = part(tokens.with_values(values))[0]
    return results


def step(program: Callable[[Tensor], Tensor], module: nn.Module, values: Tensor) -> Callable[[], None]:
    """One forward and backward, with gradients of the input and of all parameters."""
    leaf = values.detach().clone().requires_grad_()
    incoming = torch.randn_like(leaf)

    def run() -> None:
        program(leaf).backward(incoming)
        leaf.grad = None
        module.zero_grad()

    return run


def steps(model: str, size: Size, device: str) -> tuple[dict[tuple[str, float], Callable[[], None]], dict[float, int]]:
    """Steps by name and rate, and the number of active tokens by rate."""
    torch.manual_seed(0)
    x = torch.randn(size.rows, size.length, size.width, device=device)
    layer = block_spec(model, size.width).build(size.width).to(device)
    if layer.routed is None:
        raise SystemExit("the block routes nothing")
    part = layer.routed.submodules["part"]
    dense, without = (Unrouted(layer, dense=choice) for choice in (True, False))
    calls = {("dense", 1.0): step(dense, dense, x), ("without", 0.0): step(without, without, x)}
    active = {}
    for rate in RATES:
        routed = block_spec(model, size.width).build(size.width).to(device)
        set_rate(routed, x, rate)
        mask = cast(Decision, routed(x).decision).active[..., 0]
        active[rate] = int(mask.sum())
        calls["routed", rate] = step(partial(hidden_of, routed), routed, x)
        tokens = compress(x, mask)
        calls["gathered", rate] = step(partial(results_of, part, tokens), part, tokens.values)
    return calls, active


def measure(model: str, size: Size, device: str, rounds: int) -> list[dict[str, Any]]:
    """Measure all points of a model."""
    calls, active = steps(model, size, device)
    take_turns(list(calls.values()), device, rounds=2)
    times = take_turns(list(calls.values()), device, rounds)
    median = {name: 1e3 * statistics.median(found) for name, found in zip(calls, times, strict=True)}
    dense, without = median["dense", 1.0], median["without", 0.0]
    points = []
    for rate in RATES:
        routed, gathered, share = (
            median["routed", rate],
            median["gathered", rate],
            active[rate] / (size.rows * size.length),
        )
        points.append(
            {
                "model": model,
                "rate": rate,
                "milliseconds": round(routed, 3),
                "overhead_milliseconds": round(routed - gathered - without, 3),
                "skip_efficiency": round((dense - routed) / ((1 - share) * (dense - without)), 3)
                if share < 1
                else None,
                "active_tokens": active[rate],
                "dense_milliseconds": round(dense, 3),
                "without_milliseconds": round(without, 3),
                "gathered_milliseconds": round(gathered, 3),
            }
        )
    return points


def main() -> None:
    """Measure every model and print its points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", action="append", choices=MODELS, help="only this model; may be repeated")
    parser.add_argument("--rounds", type=int, default=25, help="number of measurements per point (default: 25)")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch; default 8")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row; default 1,024")
    parser.add_argument("--width", type=int, default=256, help="channels of a token; default 256")
    options = parser.parse_args()
    size = Size(options.rows, options.length, options.width)
    points = []
    for model in options.model or MODELS:
        points += measure(model, size, options.device, options.rounds)
        print(model, "done", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(points, indent=1))
        return
    columns = (
        "milliseconds",
        "overhead_milliseconds",
        "dense_milliseconds",
        "without_milliseconds",
        "gathered_milliseconds",
    )
    heads = ("ms", "overhead", "dense", "without", "gathered")
    print(f"{'model':6} {'rate':>5} {'tokens':>7} {' '.join(f'{head:>9}' for head in heads)} {'skip eff.':>9}")
    for point in points:
        skip = "" if point["skip_efficiency"] is None else f"{point['skip_efficiency']:.2f}"
        figures = " ".join(f"{point[column]:9.2f}" for column in columns)
        print(f"{point['model']:6} {point['rate']:5.2f} {point['active_tokens']:7} {figures} {skip:>9}")


if __name__ == "__main__":
    sys.exit(run_command(main))
