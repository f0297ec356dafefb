"""Hardware counters of two kernels by Nsight Compute, where it is installed."""

import shutil
import subprocess
import sys
import time
from functools import partial

from benchmarks.gpu.measure import Bench, products_in
from benchmarks.gpu.results import Record

METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def run(bench: Bench) -> None:
    """Profile the forward kernels of both operators."""
    bench.attempt("counters", partial(_counters, bench))


def _counters(bench: Bench) -> Record:
    bench.require_gpu("Nsight Compute")
    program = shutil.which("ncu")
    if program is None:
        raise RuntimeError("Nsight Compute (ncu) is not installed")
    command = [program, "--clock-control", "none", "--csv", "--kernel-name", "regex:^(attend|results)$"]
    command += ["--launch-count", "2", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-c", f"from {__name__} import launch; launch()"]
    left = max(1.0, bench.until - time.monotonic())
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=left, check=False)
    if done.returncode:
        raise RuntimeError(f"ncu failed: {(done.stdout + done.stderr)[-400:]}")
    return {"csv": [line for line in done.stdout.splitlines() if line.startswith('"')]}


def launch() -> None:
    """Launch the forward kernels of both operators at the size of Text."""
    from pathlib import Path

    import torch

    from benchmarks.gpu.measure import PAPER, build_layer
    from benchmarks.gpu.results import Results
    from sma.kernels import use

    bench = Bench(Results(Path()), "ncu", "cuda", time.monotonic() + 60)
    with use("triton"), products_in("tf32"), torch.no_grad():
        layer, inputs, _ = build_layer(bench, PAPER["text"], 0.3)
        layer(inputs[0])
