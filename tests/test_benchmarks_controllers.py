"""Benchmark of controllers: its output, the sign rule, and the number of updates until a rate has settled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.controllers import STEPS, TARGETS, UPDATES, SignRule, settled, simulate
from sma.routers.independent import SMARouterSpec

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_small_run_prints_every_point_as_json() -> None:
    command = [sys.executable, "-m", "benchmarks.controllers", "--json", "--seeds", "1", "--updates", "12"]
    points = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    rules = ["histogram", *(f"sign {step:g}" for step in STEPS)]
    assert [(point["case"], point["target"], point["rule"]) for point in points] == [
        (case, target, rule) for case in UPDATES for target in TARGETS for rule in rules
    ]
    assert {key for point in points for key in point} == {
        *("case", "target", "rule", "error", "settled", "accuracy", "milliseconds")
    }


@pytest.mark.parametrize(("target", "sign"), [(0.1, -1), (0.9, 1)])
def test_the_sign_rule_moves_the_log_odds_one_step_towards_the_target(target: float, sign: int) -> None:
    torch.manual_seed(0)
    router = SMARouterSpec().build(8, ["one", "two"])
    control = torch.randn(2, 50, 8)
    before = router(control, None, None)[0]
    SignRule([router], target, 0.25).update([before])
    moved = torch.logit(router(control, None, None)[0].p_on) - torch.logit(before.p_on)
    torch.testing.assert_close(moved, torch.full_like(moved, sign * 0.25), rtol=0, atol=1e-5)


def test_a_rate_has_settled_when_the_mean_of_ten_updates_stays_within_10_percent_of_the_target() -> None:
    rates = torch.tensor([1.0] * 20 + [0.5] * 30, dtype=torch.float64)
    means = [rates[place - 10 : place].mean() for place in range(10, 51)]
    expected = next(place for place in range(10, 51) if all(abs(mean - 0.5) <= 0.05 for mean in means[place - 10 :]))
    assert settled(rates, 0.5) == expected
    assert settled(torch.full((50,), 0.3), 0.3) == 10
    assert settled(rates.flip(0), 0.5) is None


def test_both_rules_bring_a_router_to_its_target() -> None:
    for rule in ("histogram", "sign 0.1"):
        assert simulate("drift", rule, 0.3, seed=0, updates=200).rates[-10:].mean() == pytest.approx(0.3, abs=0.03)
