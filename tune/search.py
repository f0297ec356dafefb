"""Which values the next trial gets, and which trials are stopped."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sma.tune.pareto import beats
from sma.tune.records import TrialRecord
from sma.tune.space import Fixed, starting_code
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec


class Search(Searcher):
    """Trial 0 is the experiment as it is; the others come from Optuna's tree-structured Parzen estimator over all objectives.

    What is known of earlier trials stands in their records, from which an interrupted sweep goes on: finished trials are told to
    the estimator, unfinished ones are handed out again with the values they had, before any number without a record is drawn anew.

    A trial that halving stopped is told as one that was pruned: worse than all finished ones. What it measured is not told, because at
    another update it means something else.

    Args:
        sweep: the sweep.
        storage: its folder.
        records: of the trials that there were.

    Reference:
        Ozaki et al., "Multiobjective tree-structured Parzen estimator", JAIR 73, 2022.
    """

    def __init__(self, sweep: SweepSpec, storage: Storage, records: Sequence[TrialRecord] = ()) -> None:
        super().__init__()
        self.sweep, self.storage = sweep, storage
        self.unfinished = [record for record in records if record.status == "running"]
        known = {record.number for record in records}
        self.missing = [number for number in range(sweep.samples) if number not in known]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Other draws than those of the driver before: with the same ones it would propose its first trials again.
            seed = (sweep.seed + 1_000_003 * sum(number + 1 for number in known)) % 2**32
            startup = max(4, sweep.samples // 3)
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        directions: list[Literal["maximize", "minimize"]] = [
            "maximize" if measure.mode == "max" else "minimize" for measure in sweep.measures
        ]
        self.study = optuna.create_study(directions=directions, sampler=sampler)
        self.asked: dict[int, optuna.Trial] = {}
        self.numbers: dict[str, int] = {}
        for record in records:
            self._ask_again(record)
            if record.status != "running":
                self._tell(record.number, record.status, record.metrics)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The values of the next trial, which Ray calls `trial_id`; Ray asks as often as it needs a trial."""
        if self.unfinished:
            record = self.unfinished.pop(0)
        elif self.missing:
            record = self._new(self.missing.pop(0))
        else:
            finished: Any = Searcher.FINISHED  # a word, which Ray's own annotation forgets
            return cast(None, finished)
        self.numbers[trial_id] = record.number
        checkpoint = None if record.checkpoint is None else self.storage.address(record.checkpoint)
        return {"number": record.number, "values": record.values, "checkpoint": checkpoint}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn what came out."""
        found = result or {}
        # One that is still running by its own account was stopped.
        status = "failed" if error else {"running": "stopped"}.get(found.get("status", ""), found.get("status", "failed"))
        self._tell(self.numbers[trial_id], status, measured_in(found))

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: with several objectives the estimator learns from ends only."""

    def save(self, checkpoint_path: str) -> None:
        """Write nothing worth reading: the records are what a sweep goes on from."""
        Path(checkpoint_path).write_text("see the records of the sweep\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to read."""

    def _new(self, number: int) -> TrialRecord:
        """Values for a trial that there never was, or none for trial 0."""
        seed = self.sweep.experiment.seed
        if number == 0:
            record = TrialRecord(0, {}, seed)
            self._ask_again(record)
            return record
        trial = self.study.ask()
        self.asked[number] = trial
        return TrialRecord(number, {path: distribution.draw(trial, path) for path, distribution in self.sweep.space.items()}, seed)

    def _ask_again(self, record: TrialRecord) -> None:
        """Make the study know a trial with certain values, if its space has them: trial 0 may lie outside."""
        codes: dict[str, Any] = {}
        for path, distribution in self.sweep.space.items():
            if isinstance(distribution, Fixed):
                continue
            first = record.number == 0
            codes[path] = (
                starting_code(self.sweep.experiment, path, distribution) if first else distribution.encode(record.values.get(path))
            )
        if None in codes.values():
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.enqueue_trial(codes)
        trial = self.study.ask()
        for path, distribution in self.sweep.space.items():
            distribution.draw(trial, path)
        self.asked[record.number] = trial

    def _tell(self, number: int, status: str, metrics: dict[str, Any]) -> None:
        trial = self.asked.pop(number, None)
        if trial is None:
            return
        # A measure that is missing is none.
        values = [float(math.nan if (value := metrics.get(measure.name)) is None else value) for measure in self.sweep.measures]
        if status == "failed" or not all(map(math.isfinite, values)):
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif status == "stopped":
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, values)


def measured_in(result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a report as searchers and schedulers get it: Ray joins the keys of nested dictionaries with slashes."""
    return {name.removeprefix("metrics/"): value for name, value in result.items() if name.startswith("metrics/")}


class Halving(FIFOScheduler):
    """Successive halving by the objectives at equal updates; never stops trial 0, which the others are compared with.

    At every rung a trial is as good as few trials of this rung beat it, by which a trial is beaten that is nowhere better and somewhere
    worse. It goes on if no more than one in `reduction` of the others are better; so does any that none beats.

    Args:
        sweep: the sweep.
        records: of the trials that there were.
    """

    def __init__(self, sweep: SweepSpec, records: Sequence[TrialRecord] = ()) -> None:
        super().__init__()
        self.sweep = sweep
        self.reduction = sweep.stopping.reduction if sweep.stopping is not None else 2.0
        self.rungs: dict[float, dict[int, list[float]]] = {}
        rung = float(sweep.grace)
        while rung < sweep.updates:
            self.rungs[rung] = {}
            rung *= self.reduction
        for record in records:
            if record.status != "running":
                for entry in record.history:
                    self._is_weak(record.number, entry)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        number: int = trial.config["number"]
        # At the last update a test is all that is left, and the end of it is the end of the trial.
        if result["update"] >= self.sweep.updates or result["status"] != "running":
            return str(TrialScheduler.CONTINUE)
        weak = self._is_weak(number, measured_in(result))
        return str(TrialScheduler.STOP if weak and number != 0 else TrialScheduler.CONTINUE)

    def _is_weak(self, number: int, measured: Mapping[str, float]) -> bool:
        """Put a trial on the rung that it has come to; whether too many are better there."""
        found = self.rungs.get(max((rung for rung in self.rungs if rung <= measured["update"]), default=math.inf))
        if found is None or number in found:
            return False
        found[number] = [measure.oriented(measured) for measure in self.sweep.measures]
        beaten = {one: sum(beats(other, point) for other in found.values()) for one, point in found.items()}
        better = sum(count < beaten[number] for count in beaten.values())
        return better > max(0.0, (len(found) - 2) / self.reduction)


def quiet() -> None:
    """Ray's own words about trials are left out: the table says them."""
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
