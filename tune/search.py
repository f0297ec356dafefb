"""Which values the next trial gets, and which trials are stopped.

Optuna draws. Not through Ray's `OptunaSearch`, whose draws depend on all that the process drew before, so that a sweep
that was interrupted would draw others; and halving is not Ray's ASHA, which compares trials by one metric alone.
"""

import logging
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sma.tune.pareto import beats
from sma.tune.records import TrialRecord
from sma.tune.space import starting_code
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec


class Search(Searcher):
    """Trial 0 is the experiment as it is; the others come from Optuna's tree-structured Parzen estimator over all
    objectives.

    The values of a trial are a function of the search seed, its number, the results that are known when it is drawn,
    and the values of the trials that then run: of nothing else that this process has done before. The first ones, a
    third of all and four at least, are drawn at random, by seed and number alone. So a sweep that was interrupted draws
    what it would have drawn.

    What is known of earlier trials stands in their records, from which an interrupted sweep goes on: finished trials
    are told to the estimator, unfinished ones are handed out again with the values they had, before any number without
    a record is drawn.

    A trial that halving stopped is told as one that was pruned: worse than all finished ones. What it measured is not
    told, because at another update it means something else. A failed trial is not told, nor is trial 0 where it lies
    outside of the space.

    Args:
        sweep: the sweep.
        storage: its folder.
        records: of the trials that there were.
        pulse_key: under which a trial leaves its signs of life.

    Reference:
        Ozaki et al., "Multiobjective tree-structured Parzen estimator", JAIR 73, 2022.
    """

    def __init__(
        self,
        sweep: SweepSpec,
        storage: Storage,
        records: Sequence[TrialRecord] = (),
        pulse_key: Callable[[int], str] = str,
    ) -> None:
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep, self.storage, self.pulse_key = sweep, storage, pulse_key
        self.unfinished = [record for record in records if record.status == "running"]
        # Copies: what is known changes when Ray tells this object of it, whoever else keeps the records.
        self.known = {record.number: replace(record) for record in records}
        self.missing = [number for number in range(sweep.samples) if number not in self.known]
        self.startup = max(4, sweep.samples // 3)
        self.numbers: dict[str, int] = {}
        self._directions: list[Literal["maximize", "minimize"]] = [
            "maximize" if measure.mode == "max" else "minimize" for measure in sweep.measures
        ]
        self._distributions = self._ask_for_distributions()
        self._start = {path: starting_code(sweep.experiment, path, sweep.space[path]) for path in self._distributions}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The values of the next trial, which Ray calls `trial_id`; Ray asks as often as it needs a trial."""
        if self.unfinished:
            record = self.unfinished.pop(0)
        elif self.missing:
            record = self._new(self.missing.pop(0))
        else:
            finished: Any = Searcher.FINISHED  # a word, which Ray's own annotation forgets
            return cast(None, finished)
        self.known.setdefault(record.number, replace(record))
        self.numbers[trial_id] = record.number
        checkpoint = None if record.checkpoint is None else self.storage.address(record.checkpoint)
        return {
            "number": record.number,
            "values": record.values,
            "checkpoint": checkpoint,
            "pulse": self.pulse_key(record.number),
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn what came out."""
        found, record = result or {}, self.known[self.numbers[trial_id]]
        # One that is still running by its own account was stopped.
        status = {"running": "stopped"}.get(found.get("status", ""), found.get("status", "failed"))
        record.status, record.metrics = "failed" if error else status, measured_in(found)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: with several objectives the estimator learns from ends only."""

    def save(self, checkpoint_path: str) -> None:
        """Write nothing worth reading: the records are what a sweep goes on from."""
        Path(checkpoint_path).write_text("see the records of the sweep\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to read."""

    def study(self, number: int) -> optuna.Study:
        """What the estimator knows when it draws the values of a trial."""
        seed = random.Random(f"{self.sweep.seed}:{number}").getrandbits(32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
            if number >= self.startup:
                sampler = optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=self.startup, multivariate=True, constant_liar=True
                )
        study = optuna.create_study(directions=self._directions, sampler=sampler)
        for _, record in sorted(self.known.items()):
            trial = self._told(record)
            if trial is not None:
                study.add_trial(trial)
        return study

    def _new(self, number: int) -> TrialRecord:
        """Values for a trial that there never was, or none for trial 0."""
        trial = self.study(number).ask() if number else None
        values = (
            {}
            if trial is None
            else {path: distribution.draw(trial, path) for path, distribution in self.sweep.space.items()}
        )
        return TrialRecord(number, values, self.sweep.experiment.seed)

    def _told(self, record: TrialRecord) -> optuna.trial.FrozenTrial | None:
        """A trial as Optuna knows it; None where it has nothing to teach."""
        codes: dict[str, Any] = {}
        for path in self._distributions:
            codes[path] = (
                self._start[path] if record.number == 0 else self.sweep.space[path].encode(record.values.get(path))
            )
        # A measure that is missing is none.
        values = [
            float(math.nan if (value := record.metrics.get(measure.name)) is None else value)
            for measure in self.sweep.measures
        ]
        finished = record.status == "finished"
        if None in codes.values() or record.status == "failed" or (finished and not all(map(math.isfinite, values))):
            return None
        return optuna.trial.create_trial(
            state=_STATES[record.status],
            params=codes,
            distributions=self._distributions,
            values=values if finished else None,
        )

    def _ask_for_distributions(self) -> dict[str, Any]:
        """Optuna's own distributions of the paths that are searched: a space asks for numbers and does not say from
        what.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = optuna.create_study(directions=self._directions, sampler=optuna.samplers.RandomSampler(0)).ask()
        for path, distribution in self.sweep.space.items():
            distribution.draw(trial, path)
        return dict(trial.distributions)


_STATES = {
    "running": optuna.trial.TrialState.RUNNING,
    "finished": optuna.trial.TrialState.COMPLETE,
    "stopped": optuna.trial.TrialState.PRUNED,
}


def measured_in(result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a report as searchers and schedulers get it: Ray joins the keys of nested dictionaries with
    slashes.
    """
    return {name.removeprefix("metrics/"): value for name, value in result.items() if name.startswith("metrics/")}


class Halving(FIFOScheduler):
    """Successive halving by the objectives at equal updates; never stops trial 0, which the others are compared with.

    At every rung a trial is as good as few trials of this rung beat it, by which a trial is beaten that is nowhere
    better and somewhere worse. It goes on if no more than one in `reduction` of the others are better; so does any that
    none beats.

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
        # Its errors are tracebacks of trials, whose reasons stand in the records.
        logging.getLogger(name).setLevel(logging.CRITICAL)
