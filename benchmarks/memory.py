"""Peak memory of one training step of a preset's model: forward and backward of one batch at full size.

    python -m benchmarks.memory --preset pathx_paper --length 16384 --json

The figure is the peak memory of the process, Python and torch included.
"""

import argparse
import json
import resource
import sys
import time

import torch

from sma.model import build
from sma.recipes.experiment import load_experiment
from sma.recipes.studies.efficiency import random_rows
from sma.streams import run_command


def measure(preset: str, length: int, batch: int, recompute: bool) -> dict[str, float | int | str]:
    """Run one step on random rows; returns its peak memory and time."""
    spec = load_experiment(preset)
    model = build(spec.model, seed=0).train().recompute_activations(recompute)
    inputs = random_rows(model, batch, length)
    since = time.perf_counter()
    output = model(inputs)
    scores = output.pooled if output.logits is None else output.logits
    scores.square().mean().backward()
    rates = [float(rate) for decision in output.decisions for rate in decision.rate()]
    return {
        "preset": preset,
        "parameters": spec.model.num_parameters(),
        "batch": batch,
        "length": length,
        "recompute": recompute,
        "activation_rate": round(sum(rates) / max(1, len(rates)), 3),
        "seconds": round(time.perf_counter() - since, 1),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure one point and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pathx_paper", help="preset with the model")
    parser.add_argument("--length", type=int, default=16384, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows, or pairs of rows")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args()
    point = measure(options.preset, options.length, options.batch, options.recompute)
    print(json.dumps(point) if options.json else "\n".join(f"{name:16} {value}" for name, value in point.items()))


if __name__ == "__main__":
    sys.exit(run_command(main))
