"""Processor time of layers and tiny presets at two commits of this repository, measured alternately in one run.

python -m benchmarks.commits b2648a0 HEAD --rounds 3
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from sma.streams import run_command

POINTS = (
    *("seqboat 2 4096 0.1", "seqboat 2 4096 0.3", "seqboat 2 4096 1.0", "seqboat 8 1024 0.3"),
    *("preset listops_tiny", "preset image_tiny", "preset language_tiny"),
)
"""Kind, rows, tokens and activation rate of a layer of `benchmarks.layer`; or a preset, with 8 rows of 256 tokens."""

# Runs in the trees of both commits, so it imports only names that both have.
PROGRAM = """
import json, statistics, sys, time
import torch
torch.set_num_threads(1)
kind, *rest = sys.argv[1].split()
if kind == "preset":
    from sma.model import build
    from sma.recipes.experiment import load_experiment
    from sma.recipes.studies.efficiency import random_rows
    torch.manual_seed(0)
    model = build(load_experiment(rest[0]).model, seed=0).train()
    inputs = random_rows(model, 8, 256)
    def step():
        output = model(inputs)
        scores = output.pooled if output.logits is None else output.logits
        scores.square().mean().backward()
        model.zero_grad()
else:
    from benchmarks.layer import make
    step, _ = make(kind, int(rest[0]), int(rest[1]), float(rest[2]), "cpu")
for _ in range(3):
    step()
times, until = [], time.perf_counter() + float(sys.argv[2])
while len(times) < 3 or (len(times) < 60 and time.perf_counter() < until):
    since = time.process_time()
    step()
    times.append(1e3 * (time.process_time() - since))
print(json.dumps(min(times)))
"""


def milliseconds(tree: Path, point: str, seconds: float) -> float:
    """Minimum processor time of forward + backward of a point at a commit, in milliseconds."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, point, str(seconds)]
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, check=True)
    found: float = json.loads(done.stdout)
    return found


def unpack(commit: str, folder: Path) -> Path:
    """Extract the files of a commit into a folder with its name."""
    tree = folder / commit.replace("/", "_")
    tree.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(
            f"error: git gives no files of {commit!r}; give a commit, and run this in the repository: "
            f"{archive.stderr.decode(errors='replace').strip()}"
        )
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Processor time of layers and tiny presets at two commits.")
    parser.add_argument("before", help="a commit, such as b2648a0")
    parser.add_argument("after", help="a commit, such as HEAD")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements per point (default: 3)")
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of a measurement (default: 6)")
    parser.add_argument("--points", default=",".join(POINTS), help="points, separated by commas (default: all)")
    options = parser.parse_args()
    commits, points = (options.before, options.after), options.points.split(",")
    best: dict[tuple[str, int], float] = defaultdict(lambda: float("inf"))
    with tempfile.TemporaryDirectory() as folder:
        trees = [unpack(commit, Path(folder) / str(number)) for number, commit in enumerate(commits)]
        for turn in range(options.rounds):
            for point in points:
                for number in (0, 1) if turn % 2 == 0 else (1, 0):
                    spent = milliseconds(trees[number], point, options.seconds)
                    best[point, number] = min(best[point, number], spent)
    print("| point | before, ms | after, ms | ratio |\n|---|---|---|---|")
    for point in points:
        before, after = best[point, 0], best[point, 1]
        print(f"| {point} | {before:.1f} | {after:.1f} | {after / before:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
