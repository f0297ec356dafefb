"""Benchmark of routing: its output, its figures for measured times, and the equality of its dense baseline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.routing import MODELS, RATES, Size, Unrouted, block_spec, measure
from sma.routers import AlwaysRouterSpec

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"model", "rate", "milliseconds", "overhead_milliseconds", "skip_efficiency"}
MORE = {"active_tokens", "dense_milliseconds", "without_milliseconds", "gathered_milliseconds"}


@pytest.mark.slow
def test_a_small_run_prints_every_point_as_json() -> None:
    small = ["--rows", "2", "--length", "40", "--width", "8", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.routing", "--json", *small]
    points = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert [(point["model"], point["rate"]) for point in points] == [
        (model, rate) for model in MODELS for rate in RATES
    ]
    assert all(set(point) == KEYS | MORE for point in points)


@pytest.mark.parametrize("model", MODELS)
def test_the_figures_follow_from_the_times_and_the_rates_are_exact(model: str) -> None:
    points = measure(model, Size(2, 40, 8), "cpu", rounds=3)
    assert [point["active_tokens"] for point in points] == [0, 8, 24, 80]
    for point in points:
        time, dense, without = (point[key] for key in ("milliseconds", "dense_milliseconds", "without_milliseconds"))
        assert min(time, dense, without, point["gathered_milliseconds"]) > 0
        # Each time is rounded to a microsecond, so a sum of three may differ by a few.
        assert point["overhead_milliseconds"] == pytest.approx(
            time - point["gathered_milliseconds"] - without, abs=0.003
        )
        if point["rate"] == 1:
            assert point["skip_efficiency"] is None
        else:
            saved = point["skip_efficiency"] * (1 - point["active_tokens"] / 80) * (dense - without)
            assert saved == pytest.approx(
                dense - time, abs=0.003 + 0.003 * abs(point["skip_efficiency"]) + 0.001 * abs(dense - without)
            )


@pytest.mark.parametrize("model", MODELS)
def test_the_dense_baseline_equals_the_block_that_routes_every_token(model: str) -> None:
    torch.manual_seed(0)
    layer = block_spec(model, 8).replace(router=AlwaysRouterSpec()).build(8).double()
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    torch.testing.assert_close(Unrouted(layer, dense=True)(x), layer(x).hidden, rtol=0, atol=1e-12)
    assert layer.norm is not None
    torch.testing.assert_close(Unrouted(layer, dense=False)(x), x + layer.norm(x), rtol=0, atol=1e-12)
