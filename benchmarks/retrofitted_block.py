"""Skip efficiency of a retrofitted feed-forward block: saved time relative to the time of the skipped tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.retrofitted_block --json

A pre-norm block x + mlp(norm(x)) of plain modules, whose MLP `sma.retrofit` routes; the hidden width is four times the
width. `skip_efficiency` is (T_dense - T(rate)) / ((1 - rate) (T_dense - T_without)), with T_dense the block before it
was retrofitted and T_without x + norm(x). 1 means that skipping has no overhead. All points alternate in one process.
The figures are medians over the rounds, of a forward pass in inference mode, and of forward + backward with gradients
of the input and of all parameters. On a CPU they are processor time, which other programs disturb less.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.routing import step
from benchmarks.stream import take_turns
from sma.retrofit import collect_decisions, retrofit
from sma.streams import run_command

RATES = (0.1, 0.25, 0.5, 0.75, 1.0)
MODES = ("forward", "training")


class Block(nn.Module):
    """A pre-norm feed-forward block; without its MLP, x + norm(x)."""

    def __init__(self, width: int, mlp: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        layers = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp: nn.Module = nn.Sequential(*layers) if mlp else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp(self.norm(x))
        return result


@torch.no_grad()
def routed_block(block: nn.Module, x_BLD: Tensor, rate: float) -> float:
    """Route the MLP of a block at a rate on these tokens; returns the actual rate."""
    part = retrofit(block, {"mlp": {"kind": "sma", "gate": "straight_through"}}).parts["mlp"]
    with collect_decisions(block) as before:
        block(x_BLD)
    margins = (before[0].logits[..., 1] - before[0].logits[..., 0]).flatten().sort(descending=True).values
    edges = torch.cat([margins[:1] + 1, margins, margins[-1:] - 1])
    active = round(rate * len(margins))
    part.get_parameter("routed.router.bias")[1] -= (edges[active] + edges[active + 1]) / 2
    with collect_decisions(block) as after:
        block(x_BLD)
    return float(after[0].rate()[0])


def forward(block: nn.Module, x_BLD: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            block(x_BLD)

    return run


def processor_times(calls: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of processor time of each call, round after round."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            began = time.process_time()
            call()
            found.append(time.process_time() - began)
    return times


def measure(rows: int, length: int, width: int, device: str, rounds: int) -> list[dict[str, Any]]:
    """Measure the blocks at all rates."""
    blocks: dict[float | str, nn.Module] = {}
    real = {}
    x = torch.randn(rows, length, width, device=device)
    for key in ("dense", "without", *RATES):
        torch.manual_seed(0)
        blocks[key] = Block(width, mlp=key != "without").to(device)
        if isinstance(key, float):
            real[key] = routed_block(blocks[key], x, key)
    points: list[dict[str, Any]] = [{"rate": rate, "measured_rate": round(real[rate], 4)} for rate in RATES]
    for mode in MODES:
        calls = [forward(block, x) if mode == "forward" else step(block, block, x) for block in blocks.values()]
        timed = partial(take_turns, device=device) if device == "cuda" else processor_times
        timed(calls, rounds=1)
        times = timed(calls, rounds=rounds)
        median = {key: 1e3 * statistics.median(found) for key, found in zip(blocks, times, strict=True)}
        dense, without = median["dense"], median["without"]
        for point in points:
            rate, routed = real[point["rate"]], median[point["rate"]]
            point[f"{mode}_milliseconds"] = round(routed, 2)
            point[f"{mode}_dense_milliseconds"] = round(dense, 2)
            point[f"{mode}_without_milliseconds"] = round(without, 2)
            saved = (1 - rate) * (dense - without)
            point[f"{mode}_skip_efficiency"] = round((dense - routed) / saved, 3) if rate < 1 else None
    return points


def main() -> None:
    """Measure every rate and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15, help="number of measurements per point (default: 15)")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch; default 1")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row; default 4,096")
    parser.add_argument("--width", type=int, default=512, help="channels of a token; default 512")
    options = parser.parse_args()
    points = measure(options.rows, options.length, options.width, options.device, options.rounds)
    if options.json:
        print(json.dumps(points, indent=1))
        return
    print("| rate | forward, ms | skip efficiency | forward + backward, ms | skip efficiency |\n|---|---|---|---|---|")
    for point in points:
        cells = [f"{point['measured_rate']:.2f}"]
        for mode in MODES:
            efficiency = point[f"{mode}_skip_efficiency"]
            cells += [f"{point[f'{mode}_milliseconds']:.1f}", "" if efficiency is None else f"{efficiency:.2f}"]
        print(f"| {' | '.join(cells)} |")
    for name in ("dense", "without"):
        found = [f"{points[0][f'{mode}_{name}_milliseconds']:.1f}" for mode in MODES]
        print(f"| {name} | {found[0]} | | {found[1]} | |")


if __name__ == "__main__":
    sys.exit(run_command(main))
