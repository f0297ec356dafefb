"""A trial: a run of the recipes in a Ray process, with a callback that reports to Tune.

The checkpoint of a trial is its run folder. A trial whose process died resumes in its folder like any interrupted run.
"""

import errno
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import ray
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from ray import tune

from sma.errors import CheckpointError, SmaError, parsing, quote
from sma.files import read_file
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.run_folder import write_text
from sma.recipes.tasks.contract import Metric
from sma.recipes.training.objective import load_objective
from sma.recipes.training.run import run_experiment
from sma.recipes.training.stopwatch import Stopwatch
from sma.stats import count_macs
from sma.tune.pulse import Pulse
from sma.tune.scratch import scratch_folder
from sma.tune.sharing import PackedData, unpack_data
from sma.tune.storage import LIMIT, Storage
from sma.tune.sweep import MACS, RATE, TIME, SweepSpec, present_names

HISTORY = "history.json"


class Stopped(Exception):
    """Halving stopped the trial."""


class Unwritable(CheckpointError):
    """The storage of the sweep, or the disk of a scratch folder, cannot be written, so no trial can continue."""


_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}


class TrialReporter(Checkpoint):
    """Reports every evaluation, with the run folder as checkpoint.

    It is a `Checkpoint` because Lightning calls those last, when the checkpoints of the evaluation are in the folder.

    Args:
        spec: the experiment of the trial.
        out: its run folder.
        metric: the metric of the task, by which trials are compared.
        length: average number of tokens of a row, for the count of MACs.
        began: time at which this process started the trial, by `time.time`.
    """

    def __init__(self, spec: ExperimentSpec, out: Path, metric: Metric, length: int, began: float) -> None:
        self.spec, self.out, self.metric, self.length, self.began = spec, out, metric, length, began
        self.history: list[dict[str, float]] = []

    def restore(self) -> None:
        """Restore the history from the run folder.

        Raises:
            CheckpointError: its file is damaged.
        """
        path = self.out / HISTORY
        if not os.path.lexists(path):
            return
        with parsing(repr(str(path)), CheckpointError):
            found = json.loads(read_file(path, LIMIT, CheckpointError))
        if not isinstance(found, list) or not all(_is_evaluation(entry) for entry in found):
            raise CheckpointError(f"{str(path)!r} is damaged: {quote(found)}; expected evaluations with their updates")
        self.history = [present_names(entry) for entry in found]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the measures of the evaluation."""
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        found = {"update": trainer.global_step, self.metric.name: measured[f"val_{self.metric.name}"]}
        if "val_loss" in measured:  # language models have none
            found["loss"] = measured["val_loss"]
        found |= self._cost(measured, "val") | self._speed(trainer, pl_module)
        for name, value in found.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} at update {trainer.global_step} is {value}")
        # A restarted trial may evaluate again what it had evaluated before its process died.
        self.history = [entry for entry in self.history if entry["update"] < found["update"]] + [found]
        write_text(self.out / HISTORY, json.dumps(self.history))
        self.report("running", found)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Report the measures of the best checkpoint, and those of its test.

        Raises:
            CheckpointError: the history lacks the evaluation of the best checkpoint.
            FloatingPointError: a measure is not finite.
        """
        best = next((entry for entry in reversed(self.history) if entry["update"] == summary["best_update"]), None)
        if best is None:
            raise CheckpointError(
                f"{str(self.out / HISTORY)!r} has no evaluation of update {summary['best_update']}, the best one"
            )
        speed = self.history[-1].get(TIME.name)
        test = {f"test_{self.metric.name}": summary[self.metric.key]}
        test["test_rate"] = sum(summary["activation_rate"]) / max(1, len(summary["activation_rate"]))
        for name, value in test.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"the {name} is {value}")
        self.report(
            "finished",
            {**best, **test, **({TIME.name: speed} if speed is not None else {}), "parameters": summary["parameters"]},
        )

    def report(self, status: str, metrics: Mapping[str, float], reason: str = "") -> None:
        """Send a report to the driver.

        Raises:
            Stopped: the driver has stopped the trial.
        """
        message = {
            "status": status,
            "reason": reason,
            "metrics": dict(metrics),
            "history": self.history,
            "update": self.history[-1]["update"] if self.history else 0,
            "busy": time.time() - self.began,
            "began": self.began,
            "host": f"{socket.gethostname()} {ray.get_runtime_context().get_node_id()[:8]}",
            "process": os.getpid(),
        }
        if self.metric.name in metrics:
            message[self.metric.name] = metrics[self.metric.name]
        try:
            tune.report(message, checkpoint=tune.Checkpoint.from_directory(str(self.out)))
        except SystemExit:
            # Another exception, because Lightning handles SystemExit like Ctrl-C.
            raise Stopped from None

    def _cost(self, measured: Mapping[str, float], split: str) -> dict[str, float]:
        """The activation rate and the MACs per token."""
        rates: dict[int, dict[str, float]] = {}
        for name, value in measured.items():
            if name.startswith(f"{split}_rate/"):
                _, layer, module = name.split("/")
                rates.setdefault(int(layer.removeprefix("layer")), {})[module] = min(1.0, max(0.0, value))
        macs = count_macs(self.spec.model, self.length, [rates[layer] for layer in sorted(rates)])
        return {RATE.name: measured.get(f"{split}_rate", 0.0), MACS.name: macs.per_token}

    def _speed(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Time of an update per token in microseconds, since this process started to train."""
        watches: list[Any] = getattr(trainer, "callbacks", [])
        seconds = sum(watch.seconds for watch in watches if isinstance(watch, Stopwatch))
        tokens = int(getattr(module, "tokens_seen", 0))
        return {TIME.name: 1e6 * seconds / tokens} if tokens else {}


def _is_evaluation(entry: Any) -> bool:
    return isinstance(entry, dict) and "update" in entry and all(_is_finite(value) for value in entry.values())


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def run_trial(config: Mapping[str, Any], *, sweep: SweepSpec, data: PackedData, cpus: int, accelerator: str) -> None:
    """Train one trial. Tune calls this function in a Ray process.

    Args:
        config: `number`; `values` by field path; `checkpoint`, the address of the run folder from an earlier driver, or
            None; `pulse`, the key of its heartbeats.
        sweep: the sweep.
        data: the prepared data of its task.
        cpus: threads of the training, unless the experiment sets them.
        accelerator: Lightning's name for the device.
    """
    began = time.time()
    pulse = Pulse(config["pulse"])
    torch.set_num_threads(cpus)
    with scratch_folder() as folder:
        try:
            source = _restore(config, folder)
            pulse.beat()
            train_trial(config, sweep, unpack_data(data), folder, accelerator, began, pulse, source)
        except Stopped:
            raise SystemExit(0) from None  # Ray expects this exit from a stopped trial


def _restore(config: Mapping[str, Any], folder: Path) -> str:
    """Copy the run folder of the trial from its last checkpoint, if there is one; returns the path of its source."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None and config["checkpoint"] is not None:
        kept = Storage(config["checkpoint"])
        if kept.names():  # without the folder the trial starts from the beginning
            checkpoint = tune.Checkpoint(kept.root, kept.files)
    if checkpoint is None:
        return str(folder)
    checkpoint.to_directory(str(folder))
    return str(PurePosixPath(checkpoint.path))


def train_trial(
    config: Mapping[str, Any],
    sweep: SweepSpec,
    data: Any,
    folder: Path,
    accelerator: str,
    began: float,
    pulse: Pulse,
    source: str,
) -> None:
    """Train a trial in a folder and report. A failure of the trial itself is reported, not raised, because a restart
    would repeat it.
    """
    reporter = TrialReporter(sweep.experiment, folder, sweep.experiment.task.metric, 1, began)
    try:
        reporter.restore()
        spec = sweep.trial(config["values"])
        reporter.spec, reporter.length = spec, load_objective(spec.task, data).typical_row
        finished = run_experiment(
            spec, folder, data, resume=True, accelerator=accelerator, progress=False, callbacks=[pulse, reporter]
        )
        reporter.finish(finished.summary)
    except Stopped:
        raise
    except Exception as error:
        _check_writable(error)
        reason = reason_of(error).replace(str(folder), source)  # the scratch folder is removed at the end
        reporter.report("failed", reporter.history[-1] if reporter.history else {}, reason)


def _check_writable(error: BaseException) -> None:
    """Raise another error if a failure comes from the storage, which stops all trials.

    Raises:
        Unwritable: the storage or the local disk cannot be written.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _STORAGE_ERRORS:
            raise Unwritable(
                f"a trial on {socket.gethostname()} cannot write: {' '.join(str(cause).split())[:300]}; "
                "make room, or make the storage writable, and resume with --resume and the folder of the sweep"
            ) from error
        cause = cause.__cause__ or cause.__context__


def reason_of(error: BaseException) -> str:
    """The reason of a failure in one line."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return (
            f"out of memory: {text or type(error).__name__}; lower training.batch_size, or set training.recompute=true"
        )
    return text if isinstance(error, SmaError) else f"{type(error).__name__}: {text}"
