"""Training and evaluation of a classifier by Lightning."""

from collections.abc import Sequence
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from sma.decision import Decision
from sma.errors import DataError
from sma.model import ModelOutput, SequenceModel
from sma.recipes.data.batch import Batch
from sma.recipes.experiment import TrainingSpec
from sma.recipes.sampling import UpdateSampler
from sma.recipes.tasks import Samples, TaskData
from sma.stats import RateCount, count_rates

EVALUATION_BATCH = 200


class RateMetric(Metric):
    """Activation rate of every sub-module of every routed layer, over all batches and all ranks.

    Args:
        layers: the sub-modules of every routed layer.
    """

    active: Tensor
    valid: Tensor

    def __init__(self, layers: Sequence[tuple[str, ...]]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        names = {name for layer in layers for name in layer}
        self.add_state("active", torch.zeros(len(self.layers), len(names), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("valid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, decisions: Sequence[Decision], valid: Tensor) -> None:
        """Count one batch."""
        count = count_rates(decisions, valid)
        self.active += count.active
        self.valid += count.valid.to(self.valid.device)

    def compute(self) -> Tensor:
        """The rates, as `RateCount.rates`."""
        return RateCount(self.active, self.valid, self.layers).rates

    def by_name(self) -> dict[str, float]:
        """The rates by what they are logged as: `layer0/attention`."""
        rows = RateCount(self.active, self.valid, self.layers).by_layer()
        return {f"layer{place}/{name}": rate for place, row in enumerate(rows) for name, rate in row.items()}


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
        self.accuracy.update(logits, batch.targets)
        self.rates.update(output.decisions, batch.valid)

    def compute(self, split: str) -> dict[str, float]:
        """The measures by their logged names; starts afresh."""
        measures = {f"{split}_accuracy": float(self.accuracy.compute())}
        with self.rates.sync_context():
            rates = self.rates.by_name()
        if rates:
            measures[f"{split}_rate"] = sum(rates.values()) / len(rates)
        self.accuracy.reset()
        self.rates.reset()
        return measures | {f"{split}_rate/{name}": rate for name, rate in rates.items()}


class Classifier(lightning.LightningModule):
    """Cross-entropy, accuracy and activation rates of a `SequenceModel` with a classifying head.

    Args:
        model: what is trained.
        training: optimiser and schedule.
        classes: number of classes.
    """

    def __init__(self, model: SequenceModel, training: TrainingSpec, classes: int) -> None:
        super().__init__()
        self.model = model
        self.training_spec = training
        self.module_names = [tuple(layer.spec.modules) for layer in model.routed_layers if layer.routed is not None]
        self.fit_scores, self.val_scores, self.test_scores = (Scores(classes, self.module_names) for _ in range(3))
        self.tokens_seen = 0

    def configure_optimizers(self) -> Any:
        """Adam with decoupled decay, and the schedule, per update."""
        spec = self.training_spec
        fused = self.trainer.precision.endswith("true")  # a fused optimiser scales by itself, which Lightning's clipping refuses
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=spec.learning_rate, betas=spec.betas, eps=spec.epsilon, weight_decay=spec.weight_decay, fused=fused
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: spec.learning_rate_at(step) / spec.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update; stops with a sentence where an input or the loss is not a number."""
        output, logits, loss = self._run(batch)
        self.tokens_seen += int(batch.valid.sum())
        self.fit_scores.update(output, logits, batch)
        self.log("loss", loss.detach(), prog_bar=True)
        if (self.global_step + 1) % self.training_spec.log_every == 0:
            measures = self.fit_scores.compute("fit")
            self.log_dict(measures)
            self.log("accuracy", measures["fit_accuracy"], prog_bar=True, logger=False)
            if self.module_names:
                self.log("rate", measures["fit_rate"], prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self._score(batch, "val", self.val_scores)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score one batch of the test split."""
        self._score(batch, "test", self.test_scores)

    def on_validation_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        self.log_dict(self.val_scores.compute("val"))

    def on_test_epoch_end(self) -> None:
        """Log the measures of the whole split."""
        self.log_dict(self.test_scores.compute("test"))

    def _score(self, batch: Batch, split: str, scores: Scores) -> None:
        output, logits, loss = self._run(batch)
        scores.update(output, logits, batch)
        self.log(f"{split}_loss", loss, batch_size=len(batch.targets))

    def _run(self, batch: Batch) -> tuple[ModelOutput, Tensor, Tensor]:
        check_finite(batch, self.global_step)
        output: ModelOutput = self.model(batch.inputs, batch.valid)
        logits = cast(Tensor, output.logits)  # an experiment's model has a head, or its spec would not be valid
        loss = nn.functional.cross_entropy(logits, batch.targets)
        # In evaluation too: weights that an update has just broken must not replace the last good checkpoint.
        if not torch.isfinite(loss):
            raise DataError(
                f"the loss of update {self.global_step} is {loss.item()}; the last checkpoint is still good: "
                "start a new run with a lower training.learning_rate or another seed"
            )
        return output, logits, loss


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
        raise DataError(f"the batch of update {update} has {batch.inputs[place].item()} in {where}; inputs must be finite numbers")


def training_loader(data: TaskData, spec: TrainingSpec, seed: int, done: int) -> DataLoader[Any]:
    """The batches of a whole training, of which `done` have been trained on."""
    sampler = UpdateSampler(data.train.lengths, spec.batch_size, spec.updates, seed, done, spec.bucket)
    return DataLoader(data.train, batch_sampler=sampler, collate_fn=data.collate)  # type: ignore[arg-type]


def evaluation_loader(samples: Samples, data: TaskData) -> DataLoader[Any]:
    """All samples of a split once, sorted by length."""
    batches = [part.tolist() for part in samples.lengths.argsort(stable=True).split(EVALUATION_BATCH)]
    return DataLoader(samples, batch_sampler=batches, collate_fn=data.collate)  # type: ignore[arg-type]
