"""Which values the next trial gets, and which trials are stopped."""

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from sma.tune.records import TrialRecord
from sma.tune.space import Fixed, value_at
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec


class Search(Searcher):
    """Trial 0 is the experiment as it is; the others come from Optuna's tree-structured Parzen estimator over all objectives.

    What is known of earlier trials stands in their records, from which an interrupted sweep goes on: finished trials are told to
    the estimator, unfinished ones are handed out again with the values they had, before any new one is drawn.

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
        self.next = 1 + max((record.number for record in records), default=-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Other draws than those of the driver before: with the same ones it would propose its first trials again.
            sampler = optuna.samplers.TPESampler(
                seed=sweep.seed + 1_000_003 * self.next, n_startup_trials=max(4, sweep.samples // 3), multivariate=True, constant_liar=True
            )
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
        elif self.next >= self.sweep.samples:
            finished: Any = Searcher.FINISHED  # a word, which Ray's own annotation forgets
            return cast(None, finished)
        else:
            record = self._new(self.next)
            self.next += 1
        self.numbers[trial_id] = record.number
        checkpoint = None if record.checkpoint is None else self.storage.address(record.checkpoint)
        return {"number": record.number, "values": record.values, "checkpoint": checkpoint}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn what came out."""
        found = result or {}
        status = "failed" if error or found.get("status") == "failed" else "finished"
        self._tell(self.numbers[trial_id], status, {measure.name: found.get(f"metrics/{measure.name}") for measure in self.sweep.measures})

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
            value = value_at(self.sweep.experiment, path) if record.number == 0 else record.values.get(path)
            codes[path] = distribution.encode(value)
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
        else:
            self.study.tell(trial, values)


class Halving(ASHAScheduler):
    """Successive halving by the quality at equal updates; never stops trial 0, which the others are compared with.

    Args:
        sweep: the sweep.
        records: of the trials that there were.
    """

    def __init__(self, sweep: SweepSpec, records: Sequence[TrialRecord] = ()) -> None:
        quality, stopping = sweep.quality, sweep.stopping
        super().__init__(
            time_attr="update",
            metric=quality.name,
            mode=quality.mode,
            max_t=sweep.updates,
            grace_period=sweep.grace,
            reduction_factor=stopping.reduction if stopping is not None else 2.0,
        )
        self.updates = sweep.updates
        sign = 1.0 if quality.mode == "max" else -1.0
        for record in records:
            if record.status != "running":
                for entry in record.history:
                    known: Any = _Named(f"record {record.number}")
                    self._brackets[0].on_result(known, int(entry["update"]), sign * entry[quality.name])

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether a trial goes on."""
        # At the last update a test is all that is left, and the end of it is the end of the trial.
        if result["update"] >= self.updates or result["status"] != "running":
            return str(TrialScheduler.CONTINUE)
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE if trial.config["number"] == 0 else decision)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Forget a trial: what it reached stands in the rungs."""
        self._trial_info.pop(trial.trial_id, None)


class _Named:
    """A trial of an earlier driver, to a rung."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


def quiet() -> None:
    """Ray's own words about trials are left out: the table says them."""
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
