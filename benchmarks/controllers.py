"""Comparison of two rules that hold activation rates at a target.

The controller of `sma.budget` moves the score bias of a router by the histogram of its scores. The sign rule is
`score_bias += step * sign(target - rate)`; OLMo-core and DeepSeek-V3 balance experts with it, without a loss.

    OMP_NUM_THREADS=1 python -m benchmarks.controllers --json

Both rules receive the decisions of every update and nothing else. Cases:

- listops, digits: shortened presets `listops_tiny` and `digits_tiny` with a router in every layer.
- drift: one router on random tokens; its log-odds have standard deviation 1 and fall by 3 halfway.
- dead: the same with log-odds of -10, so that no token is active.

`error` is the mean distance of the rate of a batch from the target over the last third of the updates; it includes the
noise of the batch. `settled` is the number of updates (in drift, after the fall) until the mean rate of the last ten
updates stays within 10 % of the target: the median over routers and seeds, null for "never". `accuracy` is the final
validation accuracy. `milliseconds` is the median time of the rule per update. Steps are in log-odds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

import sma
from sma.budget import BudgetController, BudgetSpec, routers_of
from sma.decision import Decision
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.training.objective import Objective, load_objective
from sma.routers import Router, SteerableRouter
from sma.routers.independent import SMARouter, SMARouterSpec
from sma.streams import run_command

TARGETS = (0.1, 0.3, 0.5)
STEPS = (1e-3, 1e-2, 1e-1)
SEEDS = 3
SHORT = {
    "listops": ["task.data.train=6000", "task.data.validation=500", "task.data.test=10", "training.batch_size=16"],
    "digits": ["training.batch_size=16"],
}
UPDATES = {"listops": 160, "digits": 200, "drift": 600, "dead": 1500}


class Rule(Protocol):
    """A rule, called with the decisions of every update."""

    def update(self, decisions: Sequence[Decision], valid: Tensor | None = None) -> None: ...


class SignRule:
    """The sign rule: moves the score bias of every router by a fixed step towards the target, in log-odds."""

    def __init__(self, routers: Sequence[Router], target: float, step: float) -> None:
        self.routers, self.target, self.step = routers, target, step

    @torch.no_grad()
    def update(self, decisions: Sequence[Decision], valid: Tensor | None = None) -> None:
        for router, decision in zip(self.routers, decisions, strict=True):
            if isinstance(router, SteerableRouter):
                router.score_bias += self.step * router.temperature * torch.sign(self.target - decision.rate(valid))


class Trace(NamedTuple):
    """One run: rates by update and layer, milliseconds of the rule per update, final accuracy."""

    rates: Tensor
    milliseconds: float
    accuracy: float | None


def rule_of(name: str, routers: Sequence[Router], target: float) -> Rule:
    if name == "histogram":
        return BudgetController(BudgetSpec(target=target), routers)
    return SignRule(routers, target, float(name.removeprefix("sign ")))


def steered(
    steps: Iterator[tuple[Sequence[Decision], Tensor | None]], rule: Rule, accuracy: Callable[[], float | None]
) -> Trace:
    """Calls a rule after every update."""
    rates, times = [], []
    for decisions, valid in steps:
        rates.append(torch.stack([decision.rate(valid).mean() for decision in decisions]))
        began = time.perf_counter()
        rule.update(decisions, valid)
        times.append(1e3 * (time.perf_counter() - began))
    return Trace(torch.stack(rates).double(), statistics.median(times), accuracy())


@cache
def prepared(case: str) -> tuple[ExperimentSpec, Objective[Any, Any]]:
    """A shortened preset and its data."""
    spec = load_experiment(f"{case}_tiny", SHORT[case])
    with TemporaryDirectory() as folder:
        return spec, load_objective(spec.task, spec.task.prepare(Path(folder), progress=False))


def train(case: str, name: str, target: float, seed: int, updates: int) -> Trace:
    """Train the model of a preset, without its schedule."""
    spec, objective = prepared(case)
    model = sma.build(spec.model, seed=seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.training.learning_rate, weight_decay=0.01)

    def steps() -> Iterator[tuple[Sequence[Decision], Tensor | None]]:
        for _, batch in zip(range(updates), objective.training_batches(spec.training, seed), strict=False):
            output = model(batch.inputs, batch.valid)
            loss = torch.nn.functional.cross_entropy(cast(Tensor, output.logits), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield output.decisions, batch.valid

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        right = [
            cast(Tensor, model(batch.inputs, batch.valid).logits).argmax(-1) == batch.targets
            for batch in objective.evaluation_batches("validation")
        ]
        return float(torch.cat(right).double().mean())

    return steered(steps(), rule_of(name, routers_of(model), target), accuracy)


def shift(router: SMARouter, log_odds: float) -> None:
    with torch.no_grad():
        router.bias[1] += log_odds * router.temperature


def simulate(case: str, name: str, target: float, seed: int, updates: int) -> Trace:
    """Apply a rule to one router on random tokens, without training."""
    torch.manual_seed(seed)
    router = SMARouterSpec().build(16, ["part"])
    with torch.no_grad():
        router.weight.copy_(torch.stack([torch.zeros(16), torch.randn(16)]))
        router.weight.mul_(router.temperature / router.weight.norm())
    shift(router, -10.0 if case == "dead" else 0.0)

    @torch.no_grad()
    def steps() -> Iterator[tuple[Sequence[Decision], Tensor | None]]:
        for update in range(updates):
            if case == "drift" and update == updates // 2:
                shift(router, -3.0)
            yield [router(torch.randn(8, 128, 16), None, None)[0]], None

    return steered(steps(), rule_of(name, [router], target), lambda: None)


def settled(rates: Tensor, target: float) -> int | None:
    """Number of updates until the mean of the last ten rates stays within 10 % of the target."""
    if len(rates) < 10:
        return None
    outside = ((rates.unfold(0, 10, 1).mean(-1) - target).abs() > 0.1 * target).nonzero()
    count = int(outside[-1]) + 11 if len(outside) else 10
    return count if count <= len(rates) else None


def measure(case: str, name: str, target: float, seeds: int, updates: int) -> dict[str, Any]:
    """The figures of one point, over the seeds."""
    run = train if case in SHORT else simulate
    traces = [run(case, name, target, seed, updates) for seed in range(seeds)]
    begin = updates // 2 if case == "drift" else 0
    counts = [settled(rates, target) for trace in traces for rates in trace.rates[begin:].unbind(1)]
    middle = statistics.median(updates + 1 if count is None else count for count in counts)
    accuracies = [trace.accuracy for trace in traces if trace.accuracy is not None]
    errors = [float((trace.rates[-(updates // 3) :] - target).abs().mean()) for trace in traces]
    return {
        "case": case,
        "target": target,
        "rule": name,
        "error": round(statistics.mean(errors), 4),
        "settled": int(middle) if middle <= updates else None,
        "accuracy": round(statistics.mean(accuracies), 4) if accuracies else None,
        "milliseconds": round(statistics.median(trace.milliseconds for trace in traces), 3),
    }


def main() -> None:
    """Measure every point and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--case", action="append", choices=UPDATES, help="only this case; may be repeated")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"number of runs per point (default: {SEEDS})")
    parser.add_argument("--updates", type=int, help="number of updates per run (default: that of the case)")
    options = parser.parse_args()
    points = []
    for case in options.case or UPDATES:
        for target in TARGETS:
            for name in ("histogram", *(f"sign {step:g}" for step in STEPS)):
                points.append(measure(case, name, target, options.seeds, options.updates or UPDATES[case]))
        print(f"{case} done after {time.process_time():.0f} s of processor time", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(points, indent=1))
        return
    print(f"{'case':8} {'target':>6} {'rule':10} {'error':>7} {'settled':>8} {'accuracy':>8} {'ms':>6}")
    for point in points:
        count = "never" if point["settled"] is None else point["settled"]
        accuracy = "" if point["accuracy"] is None else f"{point['accuracy']:.1%}"
        print(
            f"{point['case']:8} {point['target']:6.1f} {point['rule']:10} {point['error']:7.4f} {count:>8} "
            f"{accuracy:>8} {point['milliseconds']:6.2f}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
