"""One layer, forward + backward: SeqBoat at several activation rates, its dense baseline, its backbone, and a
transformer.

    python -m benchmarks.layer --json

Every point runs in a separate process, for its peak memory. `skip_efficiency` is (T_dense - T(rate)) / ((1 - rate)
(T_dense - T_without)): 1 means that skipping has no overhead.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.products import median_milliseconds, products_milliseconds
from sma.decision import Decision
from sma.layer import LayerSpec, RoutedLayer
from sma.modules.ema import EMASpec
from sma.modules.gau import GAUSpec
from sma.norms import LayerNormSpec
from sma.positions import RelativeBiasSpec
from sma.ragged import rectangular
from sma.routers import SMARouter
from sma.spec import FrozenDict
from sma.streams import run_command

WIDTH = 160
SIZES = ((8, 1024), (2, 4096), (1, 16384))
RATES = (0.0, 0.1, 0.3, 1.0)


def layer_spec(length: int, routed: bool) -> LayerSpec:
    """The paper's layer for Image: Z 96, H 320, N 16, window 128, bidirectional, bias over true distance."""
    gau = GAUSpec(query_size=96, hidden_size=320, window=128, position=RelativeBiasSpec(max_positions=length))
    return LayerSpec(
        backbone=EMASpec(state_size=16),
        modules=FrozenDict(attention=gau) if routed else FrozenDict(),
        norm=LayerNormSpec(place="pre"),
    )


class DenseLayer(nn.Module):
    """The same layer with the sub-module on every token: no router, no compaction, no confidence."""

    def __init__(self, layer: RoutedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Run the parts of the layer on all tokens."""
        layer, frame = self.layer, rectangular(x_BLD)
        if layer.norm is None or layer.bypass is None or layer.routed is None or layer.backbone is None:
            raise SystemExit("the dense baseline needs every part of the layer")
        mixed = nn.functional.silu(layer.backbone(frame.with_values(layer.norm(x_BLD).flatten(0, 1)))[0])
        attended, _ = layer.routed.submodules["attention"](frame.with_values(mixed))
        bypass = nn.functional.linear(mixed, layer.bypass.weight, layer.bypass.bias)
        return nn.functional.silu(x_BLD + (bypass + attended).unflatten(0, x_BLD.shape[:2]))


def set_rate(layer: RoutedLayer, x_BLD: Tensor, rate: float) -> None:
    """Move the router's bias to the quantile of its scores that gives this activation rate."""
    if layer.routed is None or not isinstance(layer.routed.router, SMARouter):
        raise SystemExit("the layer has no SMA router")
    with torch.no_grad():
        decision = cast(Decision, layer(x_BLD).decision)
        margin = (decision.logits[..., 1] - decision.logits[..., 0]).flatten().sort(descending=True).values
        active = round(rate * len(margin))
        edges = torch.cat([margin[:1] + 1, margin, margin[-1:] - 1])
        layer.routed.router.bias[1] -= (edges[active] + edges[active + 1]) / 2


def make(model: str, batch: int, length: int, rate: float, device: str) -> tuple[Callable[[], object], float]:
    """Build a point; returns a step of forward + backward, and the actual activation rate."""
    torch.manual_seed(0)
    x = torch.randn(batch, length, WIDTH, device=device, requires_grad=True)
    module: nn.Module
    real = rate
    if model == "transformer":
        module = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
    else:
        layer = layer_spec(length, routed=model != "without").build(WIDTH).to(device)
        module = DenseLayer(layer) if model == "dense" else layer
        if model == "seqboat":
            set_rate(layer, x, rate)
            real = float(cast(Decision, layer(x.detach()).decision).rate()[0])
    module = module.to(device).train()
    weight = torch.randn_like(x)

    def step() -> None:
        output = module(x)
        hidden = output if isinstance(output, Tensor) else output.hidden
        hidden.backward(weight)
        x.grad = None
        module.zero_grad()

    return step, real


def measure(model: str, batch: int, length: int, rate: float, device: str) -> dict[str, Any]:
    """Measure one point in this process."""
    step, real = make(model, batch, length, rate, device)
    milliseconds = median_milliseconds(step, device)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    products = products_milliseconds(step, device)
    return {
        "model": model,
        "batch": batch,
        "length": length,
        "rate": real,
        "milliseconds": round(milliseconds, 2),
        "peak_gigabytes": round(peak, 3),
        "skip_efficiency": None,
        "products_milliseconds": round(products, 2),
        "times_products": round(milliseconds / products, 2),
    }


def add_skip_efficiency(points: list[dict[str, Any]]) -> None:
    """Add the skip efficiency of the SeqBoat points, from the dense baseline and the backbone of the same size."""
    for point in points:
        same = {
            other["model"]: other
            for other in points
            if (other["batch"], other["length"]) == (point["batch"], point["length"])
        }
        if point["model"] == "seqboat" and point["rate"] < 1 and {"dense", "without"} <= set(same):
            dense, without = same["dense"]["milliseconds"], same["without"]["milliseconds"]
            point["skip_efficiency"] = round(
                (dense - point["milliseconds"]) / ((1 - point["rate"]) * (dense - without)), 3
            )


def main() -> None:
    """Measure every point and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--length", type=int, action="append", help="only the size of this length; may be repeated")
    parser.add_argument(
        "--point", nargs=4, metavar=("MODEL", "BATCH", "LENGTH", "RATE"), help="measure one point in this process"
    )
    options = parser.parse_args()
    if options.point:
        model, batch, length, rate = options.point
        print(json.dumps(measure(model, int(batch), int(length), float(rate), options.device)))
        return
    points = []
    for batch, length in SIZES:
        if options.length and length not in options.length:
            continue
        for model, rate in [
            ("without", 0.0),
            *(("seqboat", rate) for rate in RATES),
            ("dense", 1.0),
            ("transformer", 1.0),
        ]:
            command = [sys.executable, "-m", "benchmarks.layer", "--device", options.device, "--point"]
            done = subprocess.run(
                [*command, model, str(batch), str(length), str(rate)],
                capture_output=True,
                encoding="utf-8",
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{model} at {batch} x {length} failed:\n{done.stderr}")
            points.append(json.loads(done.stdout))
            print(
                f"{model:12} {batch:2} x {length:5}  {points[-1]['milliseconds']:9.1f} ms", file=sys.stderr, flush=True
            )
    add_skip_efficiency(points)
    if options.json:
        print(json.dumps(points, indent=1))
        return
    print(f"{'model':12} {'tokens':>10} {'rate':>6} {'ms':>9} {'GB':>6} {'skip eff.':>9} {'x products':>10}")
    for point in points:
        skip = "" if point["skip_efficiency"] is None else f"{point['skip_efficiency']:.2f}"
        size = f"{point['batch']} x {point['length']}"
        figures = (
            f"{point['milliseconds']:9.1f} {point['peak_gigabytes']:6.2f} {skip:>9} {point['times_products']:10.2f}"
        )
        print(f"{point['model']:12} {size:>10} {point['rate']:6.2f} {figures}")


if __name__ == "__main__":
    sys.exit(run_command(main))
