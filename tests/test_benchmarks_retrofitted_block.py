"""Benchmark of a retrofitted block: its rates, and its figures for given times."""

import pytest
import torch

from benchmarks import retrofitted_block
from benchmarks.retrofitted_block import RATES, Block, measure, routed_block


@pytest.mark.parametrize("rate", RATES)
def test_a_block_has_the_requested_rate(rate: float) -> None:
    torch.manual_seed(0)
    assert routed_block(Block(8), torch.randn(2, 100, 8), rate) == pytest.approx(rate)


def test_efficiency_is_the_saved_time_over_the_time_of_the_skipped_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"dense": 1.0, "without": 0.1, 0.1: 0.25, 0.25: 0.325, 0.5: 0.55, 0.75: 1.0, 1.0: 1.1}

    def turns(calls: list[object], rounds: int) -> list[list[float]]:
        assert len(calls) == len(times)
        return [[9.0, each, 0.0] for each in times.values()]

    monkeypatch.setattr(retrofitted_block, "processor_times", turns)
    points = measure(1, 100, 8, "cpu", rounds=3)
    for mode in ("forward", "training"):
        assert [point[f"{mode}_milliseconds"] for point in points] == [1e3 * times[rate] for rate in RATES]
        # Saved over skippable time: 0.75 / 0.81, 0.675 / 0.675, 0.45 / 0.45, 0 / 0.225.
        assert [point[f"{mode}_skip_efficiency"] for point in points] == [0.926, 1.0, 1.0, 0.0, None]
