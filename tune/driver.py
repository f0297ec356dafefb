"""The driver of a sweep: prepares the data, runs the trials, records their reports, and resumes interrupted sweeps."""

import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from sma.errors import SmaError, reason
from sma.tune.cluster import ResourceSpec, check_resources, cluster
from sma.tune.lifeline import follow
from sma.tune.ray_settings import TUNE, ray_settings
from sma.tune.records import load_records
from sma.tune.search import Halving, Search, quiet
from sma.tune.sharing import pack_data
from sma.tune.storage import Storage
from sma.tune.sweep import SweepSpec
from sma.tune.sweep_folder import add_driver, driver_folder
from sma.tune.sweep_results import write_results
from sma.tune.trial import run_trial
from sma.tune.watch import Recorder


def run_sweep(
    sweep: SweepSpec,
    storage: Storage,
    resources: ResourceSpec | None = None,
    *,
    data_folder: Path,
    progress: bool = True,
) -> dict[str, Any]:
    """Run the unfinished trials of a sweep, and write its results; returns the summary.

    Args:
        sweep: the sweep that `start_sweep` wrote into the folder, or `load_sweep` read from it.
        storage: the folder.
        resources: resources of a trial; None: one core, and a GPU if the machines have any.
        data_folder: folder in which data is kept between runs.
        progress: whether to show progress bars and a table of the trials.

    Raises:
        SmaError: the sweep cannot run; the message is for the user.
    """
    resources = resources or ResourceSpec()
    with storage.locked(), ray_settings(TUNE):
        return _run_trials(sweep, storage, resources, data_folder, progress)


def _run_trials(
    sweep: SweepSpec, storage: Storage, resources: ResourceSpec, data_folder: Path, progress: bool
) -> dict[str, Any]:
    records = load_records(storage, sweep)
    if len(records) == sweep.samples and all(record.status != "running" for record in records):
        return write_results(sweep, storage)
    check_resources(resources, sweep.samples)
    data = pack_data(sweep.experiment.task.prepare(data_folder, progress=progress))
    began = time.time()
    with cluster(resources, sweep.samples, data.num_bytes) as slots:
        quiet()
        number = add_driver(storage, slots, began)
        trainable = tune.with_parameters(
            run_trial, sweep=sweep, data=data, cpus=slots.cpus, accelerator=slots.accelerator
        )
        with Recorder(
            sweep, storage, records, began, progress, f"{slots.cpus} CPUs and {slots.gpus:g} GPUs"
        ) as recorder:
            tuner = tune.Tuner(
                tune.with_resources(trainable, {"cpu": slots.cpus, "gpu": slots.gpus}),
                tune_config=tune.TuneConfig(
                    search_alg=Search(sweep, storage, records, recorder.pulse_key),
                    scheduler=Halving(sweep, records) if sweep.stopping is not None else FIFOScheduler(),
                    num_samples=sweep.samples - sum(record.status != "running" for record in records),
                    max_concurrent_trials=slots.concurrent,
                    reuse_actors=True,
                    trial_name_creator=_trial_name,
                    trial_dirname_creator=_trial_name,
                ),
                run_config=tune.RunConfig(
                    # Every driver has its own folder, because Tune numbers the checkpoints from 0.
                    name=driver_folder(number),
                    # The path in the file system, because a URI would have to be escaped.
                    storage_path=storage.root,
                    storage_filesystem=storage.files,
                    failure_config=tune.FailureConfig(max_failures=sweep.restarts),
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                    callbacks=[recorder],
                    verbose=0,
                ),
            )
            try:
                follow(tuner.fit, recorder.look)
            except (SmaError, MemoryError):
                raise
            except Exception as error:  # Tune raises many kinds of exceptions
                raise SmaError(
                    f"the sweep ended: {type(error).__name__}: {reason(error)}; "
                    "its records are kept; resume it with --resume"
                ) from error
    return write_results(sweep, storage)


def _trial_name(trial: Trial) -> str:
    return f"{trial.config['number']:04d}"
