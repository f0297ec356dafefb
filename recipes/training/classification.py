"""The objective of classification: one class per sample, or per scored position."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from sma.capacity import Capacity
from sma.errors import DataError, SpecError
from sma.model import SequenceModel
from sma.model_output import ModelOutput
from sma.recipes.experiment import TrainingSpec
from sma.recipes.reports.classification import ClassificationReport, measure_activation
from sma.recipes.reports.confusion import Confusion, check_names
from sma.recipes.tasks.batch import Batch, Padded, scored_losses, select_scored
from sma.recipes.tasks.contract import ClassificationTask, Samples, TaskData
from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext
from sma.recipes.training.measures import Average, Measures, Scores, overflow_of
from sma.recipes.training.module import ScoredModule, TrainingModule
from sma.recipes.training.objective import Objective, Split
from sma.recipes.training.sampling import UpdateSampler
from sma.stats import count_rates

EVALUATION_BATCH = 200
EVALUATION_TOKENS = 2**17
"""Maximum number of positions in a batch, which bounds the memory for long samples."""

_MAX_CLASSES = 1024
"""Maximum number of classes of a confusion matrix; one of 8,192 tokens would have 512 MB."""


class Classifier(ScoredModule):
    """Cross-entropy, accuracy and activation rates of a `SequenceModel` with a classifying head.

    Args:
        model: the model.
        training: optimiser and schedule.
        classes: number of classes.
    """

    def __init__(self, model: SequenceModel, training: TrainingSpec, classes: int) -> None:
        super().__init__(model, training, "accuracy", lambda: Average(torch.int64))
        self.confusion = MulticlassConfusionMatrix(classes) if classes <= _MAX_CLASSES else None

    def compute(self, batch: Batch, capacity: Capacity | None) -> tuple[Tensor, Measures]:
        """Compute the loss and the measures of an update, and update the budget controller."""
        output, losses, measures = self._run(batch, capacity)
        self.steer(output.decisions, batch.valid)
        return measures.loss + self.routing_loss(output.decisions, batch.valid, losses), measures

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._score(batch, "val", self.val_scores)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score one batch of the test split."""
        output = self._score(batch, "test", self.test_scores)
        if self.confusion is not None:
            logits, targets = select_scored(cast(Tensor, output.logits), batch.targets)
            self.confusion.update(logits.argmax(-1), targets)

    def on_test_epoch_start(self) -> None:
        """Reset the confusion matrix."""
        if self.confusion is not None:
            self.confusion.reset()

    def _score(self, batch: Batch, split: str, scores: Scores) -> ModelOutput:
        output, _, measures = self._run(batch)
        self.check_loss(measures.loss)
        scores.add(measures)
        self.log(f"{split}_loss", measures.loss, batch_size=len(batch.targets), sync_dist=True)
        return output

    def _run(self, batch: Batch, capacity: Capacity | None = None) -> tuple[ModelOutput, Tensor, Measures]:
        output: ModelOutput = self.model(batch.inputs, batch.valid, capacity=capacity)
        # The spec of an experiment is valid only if its model has a head, so there are logits.
        logits = cast(Tensor, output.logits)
        losses, scored = scored_losses(logits, batch.targets)
        count, right = scored.sum(), ((logits.argmax(-1) == batch.targets) & scored).sum()
        rates, overflow = count_rates(output.decisions, batch.valid), overflow_of(output.decisions)
        return output, losses, Measures(losses.sum() / count, rates, (right, count), batch.valid.sum(), overflow)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check the inputs, where the host can look at them without waiting for a device."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        check_finite(batch, self.global_step)
        return batch


def check_finite(batch: Batch, update: int) -> None:
    """Check that a batch of real numbers is finite.

    Raises:
        DataError: a value is not finite; the message has the sample and the position of the first one.
    """
    if not batch.inputs.is_floating_point():
        return
    bad = ~torch.isfinite(batch.inputs)
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        where = f"sample {index[0]} at position {index[1]}"
        raise DataError(
            f"the batch of update {update} has {batch.inputs[index].item()} in {where}; inputs must be finite numbers"
        )


class Classification(Objective[ClassificationTask, TaskData]):
    """Trains classifiers by cross-entropy and tests their accuracy."""

    measured = ("test_loss",)

    def __init__(self, task: ClassificationTask, data: TaskData) -> None:
        super().__init__(task, data)
        check_names(data.class_names, task.classes)

    def module(
        self, model: SequenceModel, training: TrainingSpec, distributed: DistributedContext = SINGLE_PROCESS
    ) -> Classifier:
        return Classifier(model, training, self.task.classes)

    def training_batches(
        self, training: TrainingSpec, seed: int, done: int = 0, distributed: DistributedContext = SINGLE_PROCESS
    ) -> DataLoader[Any]:
        """See `UpdateSampler`."""
        samples, collate = self.data.train, self.data.collate
        if training.graph:  # there is one graph per length
            collate = Padded(collate, self.longest_row)
        sampler = UpdateSampler(
            samples.lengths, training.batch_size, training.updates, seed, done, training.bucket, distributed
        )
        return DataLoader(samples, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]

    def evaluation_batches(self, split: Split, distributed: DistributedContext = SINGLE_PROCESS) -> DataLoader[Any]:
        """All samples of a split once, sorted by length. No batch is empty."""
        samples: Samples = getattr(self.data, split)
        size = min(EVALUATION_BATCH, max(1, EVALUATION_TOKENS // max(1, int(samples.lengths.max()))))
        parts = distributed.world_size * math.ceil(len(samples) / (distributed.world_size * size))
        order = samples.lengths.argsort(stable=True)
        batches = distributed.shard([part.tolist() for part in order.tensor_split(parts)])
        return DataLoader(samples, batch_sampler=batches, collate_fn=self.data.collate)  # type: ignore[arg-type]

    @property
    def size(self) -> str:
        return f"{len(self.data.train):,} samples"

    @property
    def longest_row(self) -> int:
        return int(self.data.train.lengths.max())

    @property
    def typical_row(self) -> int:
        return max(1, round(float(self.data.validation.lengths.double().mean())))

    def check_shards(self, batch_size: int, distributed: DistributedContext) -> None:
        distributed.check_batch_size(min(batch_size, len(self.data.train)))
        workers = distributed.world_size
        for name, split in (("validation", self.data.validation), ("test", self.data.test)):
            if len(split) < workers:
                raise SpecError(f"the {name} split has {len(split)} samples for {workers} workers; lower --workers")

    def report(self, module: TrainingModule) -> ClassificationReport:
        measured = measure_activation(module.model, self.data.test, self.data)
        training = module.training_spec
        return measured._replace(
            confusion=self.breakdown(module),
            routing=measured.routing._replace(budget=training.budget, policy=training.losses.policy > 0),
        )

    def results(self, report: ClassificationReport, measures: Mapping[str, float]) -> dict[str, Any]:
        per_class = {} if report.confusion is None else report.confusion.per_class
        data = super().results(report, measures)
        roles = {"rates_by_role": report.rates_by_role} if report.roles else {}
        shares = {"chance": self.task.chance, "majority": report.majority, "without_layer": list(report.without_layer)}
        groups = {"by_group": dict(report.by_group)} if report.by_group else {}
        return {**shares, "per_class": per_class, **roles, **groups, **data}

    def breakdown(self, module: TrainingModule) -> Confusion | None:
        confusion = cast(Classifier, module).confusion
        return None if confusion is None else Confusion.of(confusion.compute(), self.data.class_names)

    def tested(self, module: TrainingModule) -> str:
        breakdown = self.breakdown(module)
        return super().tested(module) if breakdown is None else f"{breakdown.samples:,} answers"
