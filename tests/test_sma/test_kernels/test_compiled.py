"""Kernels compile for GPUs that are not present: no spills, tensor cores, shared memory within the limit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")

# Kernels without a matrix product.
WITHOUT_PRODUCTS = ("lay_out_gradients", "lay_out_values")


def compiled(*options: str) -> list[dict[str, Any]]:
    """The rows that `python -m benchmarks.compiled` prints, in a process that compiles instead of interpreting."""
    command = [sys.executable, "-m", "benchmarks.compiled", "--json", *options]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[3], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert rows
    return rows


def assert_fits(rows: list[dict[str, Any]], shared_memory: int) -> None:
    """Assert that compiled kernels neither spill nor exceed the shared memory, and that products use tensor cores."""
    assert [row for row in rows if row["stack"] or row["spills"]] == []
    assert [row for row in rows if row["shared_memory"] > shared_memory] == []
    assert [row for row in rows if not row["tensor"] and row["kernel"] not in WITHOUT_PRODUCTS] == []


TASKS = ("image", "language", "listops", "pathfinder", "pathx", "retrieval", "speech", "text")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("card", "dtypes", "tasks", "shared_memory"),
    [
        pytest.param("90", ("tf32", "bf16"), TASKS, 232_448, id="hopper"),
        pytest.param("80", ("bf16",), ("image", "language"), 166_912, id="ampere"),
    ],
)
def test_attention_of_every_task_compiles_without_spills(
    card: str, dtypes: tuple[str, ...], tasks: tuple[str, ...], shared_memory: int
) -> None:
    options = [word for task in tasks for word in ("--preset", f"{task}_paper")]
    options += [word for dtype in dtypes for word in ("--dtype", dtype)]
    assert_fits(compiled("--operator", "windowed_attention", "--card", card, *options), shared_memory)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_attention_in_exact_float32_compiles() -> None:
    rows = compiled("--operator", "windowed_attention", "--card", "90", "--preset", "text_paper", "--dtype", "ieee")
    assert {row["kernel"] for row in rows} > {"attend", "grad_queries", "grad_keys", "grad_values"}
    assert not any(row["tensor"] for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_kernel_that_places_tokens_compiles_without_spills() -> None:
    rows = compiled("--operator", "placing", "--card", "90", "--card", "80")
    assert {row["kernel"] for row in rows} == {"place_tokens"}
    assert [row for row in rows if row["stack"] or row["spills"] or row["atomics"]] == []
