"""One run of any task: train a model, test its best checkpoint, and write the results into one folder."""

import json
import logging
import random
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from sma.checkpoint import save
from sma.model import build
from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.run_folder import EVALUATION, SUMMARY, write_text
from sma.recipes.reports.figures import attempt
from sma.recipes.training.devices import check_device
from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext
from sma.recipes.training.estimates import check_update_fits
from sma.recipes.training.loop import Fitted, fit, writing
from sma.recipes.training.module import TrainingModule
from sma.recipes.training.objective import Objective, Report, load_objective
from sma.recipes.training.provenance import commit, hardware
from sma.recipes.training.tensorboard import log_finished
from sma.recipes.training.trainer import run_test

log = logging.getLogger("sma.recipes")


class Finished(NamedTuple):
    """A finished run.

    Attributes:
        summary: the content of its `summary.json`.
        report: the text and the figures of the run.
        module: the training module, with the weights of the best checkpoint.
    """

    summary: dict[str, Any]
    report: Report
    module: TrainingModule

    def __repr__(self) -> str:
        measures = [
            f"{name}={value:.4g}" for name, value in self.summary.items() if name.startswith(("test_", "updates"))
        ]
        rates = ", ".join(f"{rate:.3f}" for rate in self.summary["activation_rate"])
        return f"Finished({self.summary['task']}, {', '.join(measures)}, activation_rate=[{rates}])"


def run_experiment(
    spec: ExperimentSpec,
    out: Path,
    data: Any,
    *,
    resume: bool = False,
    accelerator: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    distributed: DistributedContext = SINGLE_PROCESS,
    title: str | None = None,
) -> Finished:
    """Train a model, test its best checkpoint and write the run folder.

    Args:
        spec: the experiment. The objective of its task makes the training module, the batches and the report.
        out: the run folder.
        data: the result of `spec.task.prepare`.
        resume: resume from the last checkpoint of the folder, if there is one; False refuses a folder with a run.
        accelerator: Lightning's name for the device: `auto`, `cpu`, `cuda`.
        progress: whether to show progress.
        callbacks: additional Lightning callbacks.
        distributed: rank and world size, if several processes train the model.
        title: start of the titles of the figures, before the metric and the seed; None draws no figures. They are drawn
            before the summary is written, because a run with a summary is finished and never repeated.

    Raises:
        DataError: a batch or a loss is not finite, or the run began with other data.
        CheckpointError: the folder cannot be written, or holds another or a damaged run; see
            `sma.recipes.training.loop.fit`.
        SpecError: the task has no objective, the device does not exist, or the model does not fit into its memory.
        Preempted: a signal ended the training.
    """
    objective = load_objective(spec.task, data)
    device = check_device(accelerator, spec.precision)
    check_update_fits(spec, device, length=objective.longest_row, processes=distributed.world_size)
    with writing(out, distributed):
        prepare(spec, distributed)
        module = objective.module(build(spec.model, seed=spec.seed), spec.training, distributed)
        fitted = fit(
            module,
            objective,
            spec,
            out,
            resume=resume,
            accelerator=accelerator,
            progress=progress,
            callbacks=callbacks,
            distributed=distributed,
        )
        _warn_of_overflow(module)
        logged = run_test(fitted.trainer, module, objective.evaluation_batches("test", distributed), distributed)
        breakdown, report = objective.breakdown(module), objective.report(module)
        summary = _summary(spec, objective, module, fitted, report, logged)
        if distributed.is_rank_zero:
            measures = {name: summary[name] for name in objective.recorded(spec.task)}
            details = {} if breakdown is None else breakdown.record()
            write_text(out / EVALUATION, json.dumps({"task": spec.task.kind, **measures, **details}, indent=1))
            save(module.model, out / "model")
            if title is not None:
                full = f"{title}: {spec.task.metric.headline(summary[spec.task.metric.key])}, seed {spec.seed}"
                attempt(f"the figure of the run in {out}", lambda: report.draw(out, full))
            results = {**measures, **_mean_rate(summary)}
            log_finished(fitted.trainer, spec, results, sorted(out.glob("*.png")))
            write_text(out / SUMMARY, json.dumps(summary, indent=1))
    return Finished(summary, report, module)


def _mean_rate(summary: Mapping[str, Any]) -> dict[str, float]:
    rates = summary["activation_rate"]
    return {"activation_rate": sum(rates) / len(rates)} if rates else {}


def _warn_of_overflow(module: TrainingModule) -> None:
    overflow, capacity = module.overflow, module.training_spec.effective_capacity
    if overflow is not None and overflow.share > 0.01:
        log.warning(
            f"warning: {overflow.share:.1%} of the activated tokens were beyond training.capacity={capacity:g} and "
            "were skipped; raise it"
        )


def _summary(
    spec: ExperimentSpec,
    objective: Objective[Any, Any],
    module: TrainingModule,
    fitted: Fitted,
    report: Report,
    logged: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `summary.json`: the measures, and their provenance."""
    rates = [
        {name: logged[f"test_rate/layer{layer}/{name}"] for name in names}
        for layer, names in enumerate(module.module_names)
    ]
    overflow = module.overflow
    spent, device = fitted.stopwatch.spent(), fitted.trainer.strategy.root_device.type
    return {
        "task": spec.task.kind,
        **{key: logged[name] for key, name in objective.recorded(spec.task).items()},
        "activation_rate": [sum(layer.values()) / len(layer) for layer in rates],
        "activation_rates": rates,
        **objective.results(report, logged),
        "parameters": spec.model.num_parameters(),
        **({} if overflow is None else {"overflow": overflow.share}),
        "updates": spec.training.updates,
        "best_update": fitted.best_update,
        "seconds": round(spent.elapsed, 1),
        "tokens_per_second": round(spent.tokens / spent.updating) if spent.updating else None,
        "seed": spec.seed,
        "commit": commit(),
        "hardware": hardware(device),
        "device": device,
        "date": datetime.now(UTC).date().isoformat(),
    }


def prepare(spec: ExperimentSpec, distributed: DistributedContext = SINGLE_PROCESS) -> None:
    """Set the seed, the threads and the log levels, before the model is built."""
    _quiet()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    # The weights are drawn from `spec.seed` itself. This seed is for dropout, which must differ between the ranks.
    seed = (spec.seed + 1_000_003 * distributed.rank) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _quiet() -> None:
    """Silence Lightning's messages about its defaults."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "does not have many workers",
        "exists and is not empty",
        "isinstance.treespec, LeafSpec",
        "resuming from a checkpoint that ended before the epoch ended",  # the sampler resumes inside an epoch
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
