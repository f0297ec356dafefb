"""Speed and peak memory of a trained model at one length: forward alone, and forward with backward.

python -m sma.recipes.studies.efficiency RUN --length 4096

Prints JSON. Each is measured in a separate process, because the peak memory of a process never falls.
"""

import argparse
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sma.budget import routers_of
from sma.calibration import calibrate
from sma.checkpoint import load
from sma.errors import CheckpointError, SmaError
from sma.model import SequenceModel
from sma.recipes.io.run_folder import SUMMARY
from sma.recipes.reports.comparison import WORKS, Work
from sma.routers import SteerableRouter
from sma.streams import run_command


def efficiency(
    run: Path, length: int, *, batch: int = 1, device: str = "cpu", threads: int | None = None
) -> dict[str, Any]:
    """Measure the model of a finished run on random rows, at the activation rates of the run's test.

    Returns:
        for `inference` and `training`: `milliseconds`, the median of a pass, and `megabytes`, the increase of the peak
        memory over that before the first pass; `device` and `hardware` of the measurement.

    Raises:
        CheckpointError: there is no finished run, or a measurement failed; the message has the last line of its output.
    """
    from sma.recipes.training.provenance import (
        hardware,  # Lightning takes seconds to import, and the measuring processes do not need it
    )

    if not (run / SUMMARY).is_file():
        raise CheckpointError(
            f"there is no finished run in {str(run)!r}: {SUMMARY} is missing; give the folder of a run"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(
            f"{str(run)!r} requires cuda, and torch finds no GPU here; measure it on a machine with a GPU"
        )
    found: dict[str, Any] = {"device": device, "hardware": hardware(device, threads)}
    for work in WORKS:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "sma.recipes.studies.efficiency",
            str(run),
            "--length",
            str(length),
            "--batch",
            str(batch),
        ]
        more = ["--device", device, "--work", work, *(["--threads", str(threads)] if threads else [])]
        done = subprocess.run([*command, *more], capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            raise CheckpointError(
                f"measuring the {work} of {str(run)!r} failed: {done.stderr.strip().splitlines()[-1:]}"
            )
        found[work] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(run: Path, length: int, batch: int, device: str, work: Work, seconds: float = 3.0) -> dict[str, float]:
    """Measure inference or training in this process."""
    torch.manual_seed(0)
    model = load(run / "model").to(device)
    rates = json.loads((run / SUMMARY).read_text(encoding="utf-8"))["activation_rates"]
    inputs = random_rows(model, batch, length)
    _set_rates(model, inputs, rates)
    model.train(work == "training")
    before = _forget_peak(device)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < until:
        since = time.perf_counter()
        if work == "training":
            output = model(inputs)
            scores = output.pooled if output.logits is None else output.logits
            scores.square().mean().backward()
            model.zero_grad()
        else:
            with torch.no_grad():
                model(inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - since)
    return {
        "milliseconds": round(1e3 * statistics.median(times[1:]), 3),
        "megabytes": round((_peak(device) - before) / 1e6, 1),
    }


def random_rows(model: SequenceModel, batch: int, length: int) -> torch.Tensor:
    """Random inputs for the encoder of a model, on its device."""
    return model.encoder.random_inputs(batch * model.spec.rows_per_sample, length)


def _set_rates(model: SequenceModel, inputs: torch.Tensor, rates: list[dict[str, float]]) -> None:
    """Set every sub-module to its activation rate in the test of the run, because random rows have other rates."""
    tokens = inputs.shape[0] * inputs.shape[1]
    routers = routers_of(model)
    if not routers:  # a transformer has no routers
        return
    calibrate(
        model,
        [inputs],
        [
            _targets(layer, tokens) if isinstance(router, SteerableRouter) else {}
            for layer, router in zip(rates, routers, strict=True)
        ],
        passes=32,  # competing sub-modules need more passes
    )


def _targets(rates: dict[str, float], tokens: int) -> dict[str, float]:
    """Valid target rates of a router: at least one token each, scaled to the same sum."""
    wanted = {name: max(rate, 1 / tokens) for name, rate in rates.items()}
    share = sum(rates.values()) / sum(wanted.values()) or 1.0
    return {name: share * rate for name, rate in wanted.items()}


def _forget_peak(device: str) -> float:
    """Reset the peak memory if the system supports it; returns the current memory in bytes.

    Loading a small model takes more memory than its passes, so its peak must not count. Only Linux can reset the peak
    of a process; on other systems a pass is measured only beyond the previous peak.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    if sys.platform == "linux":
        gc.collect()
        # Glibc keeps freed memory, which a pass would reuse.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak(device)


def _peak(device: str) -> float:
    """Peak memory in bytes."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024.0 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def main() -> int:
    """Run the command line; returns the exit code."""
    return run_command(_main)


def _main() -> int:
    parser = argparse.ArgumentParser(description="Speed and peak memory of a trained model on random rows.")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--length", type=int, default=4096, help="number of tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="number of rows, or of pairs of rows")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument(
        "--work", choices=WORKS, help="measure only this one, in this process; default: both, each in its own process"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.work:
            found: dict[str, Any] = measure(options.run, options.length, options.batch, options.device, options.work)
        else:
            found = efficiency(
                options.run, options.length, batch=options.batch, device=options.device, threads=options.threads
            )
    except SmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
