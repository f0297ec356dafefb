"""Classification: training, evaluation, and the whole run."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from sma.errors import DataError
from sma.model import SequenceModel, build
from sma.model_output import ModelOutput
from sma.recipes.experiment import ExperimentSpec, TrainingSpec
from sma.recipes.io.run_folder import EVALUATION, write_text
from sma.recipes.reports.classification import Report, measure
from sma.recipes.reports.confusion import Confusion, check_names
from sma.recipes.tasks.batch import UNSCORED, Batch, asked, where_asked
from sma.recipes.tasks.contract import ClassificationTask, Samples, TaskData
from sma.recipes.training.devices import check_device
from sma.recipes.training.distributed import ALONE, Team
from sma.recipes.training.estimates import check_update_fits
from sma.recipes.training.loop import finish, fit, prepare, rates_by_layer, rates_by_module, writing
from sma.recipes.training.module import Learner, RateMetric
from sma.recipes.training.sampling import UpdateSampler
from sma.recipes.training.trainer import run_test

EVALUATION_BATCH = 200
EVALUATION_TOKENS = 2**17
"""Of a batch at most, so that memory does not grow with the length of the samples."""


class Scores(nn.Module):
    """What is measured on one split: accuracy, and the activation rates of the routed layers.

    Args:
        classes: number of classes.
        layers: the sub-modules of every routed layer.
    """

    def __init__(self, classes: int, layers: Sequence[tuple[str, ...]]) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.rates = RateMetric(layers)

    def update(self, output: ModelOutput, logits: Tensor, batch: Batch) -> None:
        """Count one batch."""
        self.accuracy.update(logits, batch.targets[batch.targets != UNSCORED])
        self.rates.update(output.decisions, batch.valid)

    def compute(self, split: str) -> dict[str, float]:
        """The measures by their logged names; starts afresh."""
        measures = {f"{split}_accuracy": float(self.accuracy.compute())}
        self.accuracy.reset()
        return measures | self.rates.measures(split)


class Classifier(Learner):
    """Cross-entropy, accuracy and activation rates of a `SequenceModel` with a classifying head.

    Args:
        model: what is trained.
        training: optimiser and schedule.
        classes: number of classes.
    """

    monitor, monitor_mode = "val_accuracy", "max"

    def __init__(self, model: SequenceModel, training: TrainingSpec, classes: int) -> None:
        super().__init__(model, training)
        self.fit_scores, self.val_scores, self.test_scores = (Scores(classes, self.module_names) for _ in range(3))
        self.confusion = MulticlassConfusionMatrix(classes)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update; stops with a sentence where an input or the loss is not a number."""
        output, logits, losses = self._run(batch)
        loss = losses.mean()
        self.tokens_seen += int(batch.valid.sum())
        self.fit_scores.update(output, logits, batch)
        self.log("loss", loss.detach(), prog_bar=True, sync_dist=True)
        if (self.global_step + 1) % self.training_spec.log_every == 0:
            measures = self.fit_scores.compute("fit")
            self.log_dict(measures)
            self.log("accuracy", measures["fit_accuracy"], prog_bar=True, logger=False)
            if self.module_names:
                self.log("rate", measures["fit_rate"], prog_bar=True, logger=False)
        self.steer(output.decisions, batch.valid)
        return loss + self.routing_loss(output.decisions, batch.valid, where_asked(losses, batch.targets))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._score(batch, "val", self.val_scores)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score one batch of the test split."""
        logits = self._score(batch, "test", self.test_scores)
        self.confusion.update(logits.argmax(-1), batch.targets[batch.targets != UNSCORED])

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        self.log_dict(self.val_scores.compute("val"))

    def on_test_epoch_start(self) -> None:
        """Count afresh."""
        self.confusion.reset()

    def on_test_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        self.log_dict(self.test_scores.compute("test"))

    def _score(self, batch: Batch, split: str, scores: Scores) -> Tensor:
        output, logits, losses = self._run(batch)
        scores.update(output, logits, batch)
        self.log(f"{split}_loss", losses.mean(), batch_size=len(batch.targets), sync_dist=True)
        return logits

    def loss_of(self, batch: Batch) -> Tensor:
        """The mean loss of the answers of a batch."""
        return self._run(batch)[2].mean()

    def _run(self, batch: Batch) -> tuple[ModelOutput, Tensor, Tensor]:
        check_finite(batch, self.global_step)
        output: ModelOutput = self.model(batch.inputs, batch.valid)
        # An experiment's model has logits, or its spec is not valid.
        logits, targets = asked(cast(Tensor, output.logits), batch.targets)
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        self.check_loss(losses.mean())
        return output, logits, losses


def check_finite(batch: Batch, update: int) -> None:
    """Refuse a batch of real numbers with NaN or infinity in it.

    Raises:
        DataError: the first place that is not a number, by sample and position.
    """
    if not batch.inputs.is_floating_point():
        return
    bad = ~torch.isfinite(batch.inputs)
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        where = f"sample {place[0]} at position {place[1]}"
        raise DataError(
            f"the batch of update {update} has {batch.inputs[place].item()} in {where}; inputs must be finite numbers"
        )


def training_loader(data: TaskData, spec: TrainingSpec, seed: int, done: int, team: Team = ALONE) -> DataLoader[Any]:
    """The batches of a whole training, of which `done` have been trained on; of each what this process of a team
    takes.
    """
    sampler = UpdateSampler(data.train.lengths, spec.batch_size, spec.updates, seed, done, spec.bucket, team)
    return DataLoader(data.train, batch_sampler=sampler, collate_fn=data.collate)  # type: ignore[arg-type]


def evaluation_loader(samples: Samples, data: TaskData, team: Team = ALONE) -> DataLoader[Any]:
    """All samples of a split once, sorted by length; every process of a team takes as many batches as the others, none
    of them empty.
    """
    size = min(EVALUATION_BATCH, max(1, EVALUATION_TOKENS // max(1, int(samples.lengths.max()))))
    parts = team.size * math.ceil(len(samples) / (team.size * size))
    batches = team.part([part.tolist() for part in samples.lengths.argsort(stable=True).tensor_split(parts)])
    return DataLoader(samples, batch_sampler=batches, collate_fn=data.collate)  # type: ignore[arg-type]


class Finished(NamedTuple):
    """What a run leaves: the summary that stands in its folder, and what the report and the figures are made of."""

    summary: dict[str, Any]
    report: Report
    classifier: Classifier


def run_experiment(
    spec: ExperimentSpec,
    out: Path,
    data: TaskData,
    *,
    resume: bool = False,
    accelerator: str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    team: Team = ALONE,
    figures: Callable[[Finished], object] | None = None,
) -> Finished:
    """Train a classifier, evaluate its best checkpoint and write the run folder; see `sma.recipes.training.loop.fit`.

    `figures` is called at the end, before the summary is written, with which a run counts as finished.
    """
    device = check_device(accelerator, spec.precision)
    check_update_fits(spec, device, length=int(data.train.lengths.max()), processes=team.size)
    with writing(out, team):
        return _run(
            spec,
            out,
            data,
            figures,
            team,
            resume=resume,
            accelerator=accelerator,
            progress=progress,
            callbacks=callbacks,
        )


def _run(
    spec: ExperimentSpec,
    out: Path,
    data: TaskData,
    figures: Callable[[Finished], object] | None,
    team: Team,
    **options: Any,
) -> Finished:
    prepare(spec, team)
    task = cast(ClassificationTask, spec.task)
    check_names(data.class_names, task.classes)
    classifier = Classifier(build(spec.model, seed=spec.seed), spec.training, task.classes)
    batches = partial(training_loader, data, spec.training, spec.seed, team=team)
    validation = evaluation_loader(data.validation, data, team)
    fitted = fit(classifier, spec, out, batches, validation, data.hashes, team=team, **options)
    measured = run_test(fitted.trainer, classifier, evaluation_loader(data.test, data, team), team)
    confusion = Confusion.of(classifier.confusion.compute(), data.class_names)
    report = measure(classifier.model, data.test, data)._replace(confusion=confusion)
    results = {
        "test_accuracy": measured["test_accuracy"],
        "test_loss": measured["test_loss"],
        "activation_rate": rates_by_layer(measured, classifier),
        "activation_rates": rates_by_module(measured, classifier),
        "chance": task.chance,
        "majority": report.majority,
        "per_class": confusion.per_class,
        "data": dict(data.hashes),
    }
    evaluation = {"task": task.kind, "test_accuracy": measured["test_accuracy"], "test_loss": measured["test_loss"]}
    if team.writes:
        write_text(out / EVALUATION, json.dumps({**evaluation, **confusion.record()}, indent=1))
    draw = None if figures is None else lambda summary: figures(Finished(summary, report, classifier))
    return Finished(finish(spec, out, classifier, fitted, results, team, draw), report, classifier)
