"""A third-party task: regression, which is neither classification nor language modelling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from sma.model import SequenceModel
from sma.model_output import ModelOutput
from sma.recipes.experiment import TrainingSpec
from sma.recipes.tasks.contract import Metric, TaskSpec
from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext
from sma.recipes.training.measures import RateMetric
from sma.recipes.training.module import TrainingModule
from sma.recipes.training.objective import Objective, Split

LENGTH = 12


class Rows(NamedTuple):
    """Rows of real numbers for three splits, each `(N, L)`."""

    train: Tensor
    validation: Tensor
    test: Tensor
    hashes: Mapping[str, str]


class RowMeanTask(TaskSpec):
    """Predict twice the mean of a row."""

    metric: ClassVar[Metric] = Metric("squared_error", "min", "error")
    objective: ClassVar[str] = "tests.test_recipes.regression:Regression"

    kind: Literal["row_mean"] = "row_mean"
    samples: int = 64

    @property
    def least_length(self) -> int:
        return LENGTH

    def prepare(self, folder: Path, *, progress: bool = True) -> Rows:
        rows = torch.randn(3, self.samples, LENGTH, generator=torch.Generator().manual_seed(0))
        return Rows(*rows, {"rows": f"{self.samples} rows"})


class Scores(nn.Module):
    """Squared error and activation rates of a split."""

    def __init__(self, layers: list[tuple[str, ...]]) -> None:
        super().__init__()
        self.error, self.rates = MeanSquaredError(), RateMetric(layers)


class Regressor(TrainingModule):
    """Training module that minimises the squared error of a classifier's only logit."""

    def __init__(self, model: SequenceModel, training: TrainingSpec) -> None:
        super().__init__(model, training)
        self.scores = nn.ModuleDict({split: Scores(self.module_names) for split in ("val", "test")})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output, loss = self._run(batch)
        self.tokens_seen += batch.numel()
        return loss + self.routing_loss(output.decisions, None, loss.detach().expand(len(batch)))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._run(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._run(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def _run(self, batch: Tensor, split: str | None = None) -> tuple[ModelOutput, Tensor]:
        output: ModelOutput = self.model(batch)
        guesses, targets = cast(Tensor, output.logits)[:, 0], 2 * batch.mean(1)
        loss = (guesses - targets).square().mean()
        self.check_loss(loss)
        if split is not None:
            scores = cast(Scores, self.scores[split])
            scores.error.update(guesses, targets)
            scores.rates.update(output.decisions, torch.ones_like(batch, dtype=torch.bool))
        return output, loss

    def _log(self, split: str) -> None:
        scores = cast(Scores, self.scores[split])
        self.log_dict({f"{split}_squared_error": float(scores.error.compute()), **scores.rates.measures(split)})
        scores.error.reset()


class RegressionReport(NamedTuple):
    """One line of text, and a text file in place of a figure."""

    rows: int

    def describe(self, summary: Mapping[str, Any], out: Path) -> str:
        return f"error {summary['error']:.3f} on {self.rows} rows"

    def draw(self, out: Path, title: str) -> Path:
        (out / "title.txt").write_text(title)
        return out / "title.txt"


class Regression(Objective[RowMeanTask, Rows]):
    """Train with the squared error, and test it."""

    def module(
        self, model: SequenceModel, training: TrainingSpec, distributed: DistributedContext = SINGLE_PROCESS
    ) -> Regressor:
        return Regressor(model, training)

    def training_batches(
        self, training: TrainingSpec, seed: int, done: int = 0, distributed: DistributedContext = SINGLE_PROCESS
    ) -> DataLoader[Any]:
        draws = torch.Generator().manual_seed(seed)
        order = torch.randint(len(self.data.train), (training.updates, training.batch_size), generator=draws)
        return DataLoader(self.data.train, batch_sampler=Batches(order, done, distributed))  # type: ignore[arg-type]

    def evaluation_batches(self, split: Split, distributed: DistributedContext = SINGLE_PROCESS) -> DataLoader[Any]:
        return DataLoader(distributed.shard(getattr(self.data, split)), batch_size=32)  # type: ignore[arg-type]

    @property
    def size(self) -> str:
        return f"{len(self.data.train)} rows"

    def report(self, module: TrainingModule) -> RegressionReport:
        return RegressionReport(len(self.data.test))


class Batches:
    """Row indices of every update after the first `done`; the length counts all updates."""

    def __init__(self, order: Tensor, done: int, distributed: DistributedContext) -> None:
        self.order, self.done, self.distributed = order, done, distributed

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Any:
        return (self.distributed.shard(rows.tolist()) for rows in self.order[self.done :])
