"""Benchmark of tile sizes without a GPU: a run at toy sizes, and the order of its table."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.results import Results
from benchmarks.tiles import KERNELS, table

pytest.importorskip("triton", reason="triton has no wheel for this platform")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_kernel_is_timed_with_several_tile_sizes(tmp_path: Path) -> None:
    file = tmp_path / "tiles.jsonl"
    command = [sys.executable, "-m", "benchmarks.tiles", "--out", str(file), "--device", "cpu", "--deadline", "200"]
    command += ["--shape", "text", "--first", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    results = Results(tmp_path)
    results.path = file
    lines = results.read()
    assert {line["kind"] for line in lines} == {"tile"}
    assert {line["kernel"] for line in lines} == set(KERNELS)
    assert len(lines) == 2 * 2 * len(KERNELS)  # two dtypes, two tiles
    assert all(line["milliseconds"] > 0 for line in lines if line["dtype"] == "tf32")
    assert sum(line["present"] for line in lines) == 2 * len(KERNELS)
    assert done.stdout.splitlines() == list(table(lines))


def _point(milliseconds: float | None, width: int, **fields: Any) -> dict[str, Any]:
    names = {"kind": "tile", "shape": "text", "dtype": "tf32", "kernel": "attend", "tile": [64, 32, width, 4, 2]}
    numbers = {"milliseconds": milliseconds, "teraflops": milliseconds and 1 / milliseconds, "difference": 1e-4}
    return {**names, **numbers, "registers": 200, "spills": 0, "present": False, **fields}


def test_a_table_lists_the_fastest_tile_sizes_first_and_why_others_fail() -> None:
    points = [
        _point(2.0, 32, present=True),
        _point(None, 64, spills=12),
        _point(0.5, 128),
        _point(None, 256, difference=0.5),
        {"kind": "failed", "reason": "OutOfResources: shared memory"},
    ]
    assert list(table(points))[2:] == [
        "| text | tf32 | attend | 64, 32, 128, 4, 2 | 0.5 | 2 | 200 |  |",
        "| text | tf32 | attend | 64, 32, 32, 4, 2 | 2 | 0.5 | 200 | now |",
        "| text | tf32 | attend | 64, 32, 64, 4, 2 |  |  | 200 | 12 spills |",
        "| text | tf32 | attend | 64, 32, 256, 4, 2 |  |  | 200 | differs by 5.0e-01 |",
    ]
