"""The values of the next trial, and the decision which trials are stopped.

Optuna draws the values. Ray's `OptunaSearch` is not used, because its draws depend on all earlier draws of the process,
so a resumed sweep would draw other values. Ray's ASHA is not used, because it compares trials by one metric alone.
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

from sma.tune.pareto import dominates
from sma.tune.records import TrialRecord
from sma.tune.space import random_trials, starting_code
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec


class Search(Searcher):
    """Draws the values of trials by Optuna's tree-structured Parzen estimator over all objectives.

    Trial 0 is the unchanged experiment. The first third of the trials, at least four, are drawn at random from the seed
    and the number. The values of a later trial are a function of the search seed, its number, the known results, and
    the values of the running trials. So a resumed sweep draws the values that the interrupted one would have drawn.

    A resumed sweep reads earlier trials from their records. Finished trials are added to the estimator. Unfinished ones
    run again with their values, before new values are drawn.

    A trial that halving stopped is added as pruned, which is worse than all finished ones; its measures are left out,
    because those of different updates are not comparable. Failed trials are not added, nor is trial 0 if it lies
    outside the space.

    Args:
        sweep: the sweep.
        storage: its folder.
        records: records of earlier trials.
        pulse_key: a function from the number of a trial to the key of its heartbeats.

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
        self.sweep, self.storage, self.pulse_key = sweep, storage, pulse_key
        self.unfinished = [record for record in records if record.status == "running"]
        # Copies, because the results here change only when Ray reports them, and the driver shares the records.
        self.known = {record.number: replace(record) for record in records}
        self.missing = [number for number in range(sweep.samples) if number not in self.known]
        self.startup = max(4, sweep.samples // 3)
        self.numbers: dict[str, int] = {}
        self._directions: list[Literal["maximize", "minimize"]] = [
            "maximize" if measure.mode == "max" else "minimize" for measure in sweep.measures
        ]
        trial = next(random_trials())
        for path, distribution in sweep.space.items():
            distribution.draw(trial, path)
        # The trial has recorded Optuna's distributions of the searched paths.
        self._distributions = dict(trial.distributions)
        self._start = {path: starting_code(sweep.experiment, path, sweep.space[path]) for path in self._distributions}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The configuration of the next trial, which has the name `trial_id` in Ray."""
        if self.unfinished:
            record = self.unfinished.pop(0)
        elif self.missing:
            record = self._new(self.missing.pop(0))
        else:
            finished: Any = Searcher.FINISHED  # a string, which Ray's annotation lacks
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
        """Store the result of a trial."""
        found, record = result or {}, self.known[self.numbers[trial_id]]
        # A trial whose last report has the status `running` was stopped.
        status = {"running": "stopped"}.get(found.get("status", ""), found.get("status", "failed"))
        record.status, record.metrics = "failed" if error else status, measured_in(found)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: with several objectives the estimator uses final results only."""

    def save(self, checkpoint_path: str) -> None:
        """Write a placeholder, because a sweep resumes from its records."""
        Path(checkpoint_path).write_text("see the records of the sweep\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, because a sweep resumes from its records."""

    def study(self, number: int) -> optuna.Study:
        """The study from which the values of a trial are drawn, with all known results."""
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
            trial = self._frozen(record)
            if trial is not None:
                study.add_trial(trial)
        return study

    def _new(self, number: int) -> TrialRecord:
        """A record with values for a new trial; without values for trial 0."""
        space = self.sweep.space if number else {}
        trial = self.study(number).ask()
        values = {path: distribution.draw(trial, path) for path, distribution in space.items()}
        return TrialRecord(number, values, self.sweep.experiment.seed)

    def _frozen(self, record: TrialRecord) -> optuna.trial.FrozenTrial | None:
        """A trial in Optuna's format; None if the estimator cannot use it."""
        drawn = {path: self.sweep.space[path].encode(record.values.get(path)) for path in self._distributions}
        codes: dict[str, Any] = drawn if record.number else self._start
        # A missing measure becomes NaN.
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


_STATES = {
    "running": optuna.trial.TrialState.RUNNING,
    "finished": optuna.trial.TrialState.COMPLETE,
    "stopped": optuna.trial.TrialState.PRUNED,
}


def measured_in(result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a report in Ray's format, in which the keys of nested dictionaries are joined by slashes."""
    return {name.removeprefix("metrics/"): value for name, value in result.items() if name.startswith("metrics/")}


class Halving(FIFOScheduler):
    """Successive halving by the objectives at equal updates. Trial 0, the reference, is never stopped.

    Trials at a rung are ranked by the number of trials of this rung that dominate them. A trial continues if at most
    one in `reduction` of the others has a better rank, or if none dominates it.

    Args:
        sweep: the sweep.
        records: records of earlier trials.
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
                self._ranks_low(record.number, entry)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """The decision whether a trial continues."""
        number: int = trial.config["number"]
        # After the last update only the test is left.
        if result["update"] >= self.sweep.updates or result["status"] != "running":
            return str(TrialScheduler.CONTINUE)
        ranks_low = self._ranks_low(number, measured_in(result))
        return str(TrialScheduler.STOP if ranks_low and number != 0 else TrialScheduler.CONTINUE)

    def _ranks_low(self, number: int, measured: Mapping[str, float]) -> bool:
        """Add a trial to the rung that it has reached; returns whether too many trials of the rung rank better."""
        found = self.rungs.get(max((rung for rung in self.rungs if rung <= measured["update"]), default=math.inf))
        if found is None or number in found:
            return False
        found[number] = [measure.oriented(measured) for measure in self.sweep.measures]
        ranks = {one: sum(dominates(other, point) for other in found.values()) for one, point in found.items()}
        better = sum(rank < ranks[number] for rank in ranks.values())
        return better > max(0.0, (len(found) - 2) / self.reduction)


def quiet() -> None:
    """Silence Ray's messages about trials, because the table replaces them."""
    for name in ("ray.tune", "ray.train", "ray.air"):
        # Ray's errors are tracebacks of trials. Their reasons are in the records.
        logging.getLogger(name).setLevel(logging.CRITICAL)
