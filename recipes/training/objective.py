"""The contract between a task and everything that trains, evaluates or sweeps its models."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

from torch.utils.data import DataLoader

from sma.errors import SpecError, reason
from sma.model import SequenceModel
from sma.recipes.experiment import TrainingSpec
from sma.recipes.tasks.contract import TaskSpec
from sma.recipes.training.distributed import SINGLE_PROCESS, DistributedContext
from sma.recipes.training.module import TrainingModule

Split = Literal["validation", "test"]
TaskT = TypeVar("TaskT", bound=TaskSpec)
DataT = TypeVar("DataT")


class Report(Protocol):
    """The text and the figures that report a run."""

    def describe(self, summary: Mapping[str, Any], out: Path) -> str:
        """The results of the run as text.

        Args:
            summary: the content of its `summary.json`.
            out: the run folder.
        """

    def draw(self, out: Path, title: str) -> Path:
        """Draw the figures of the run into its folder; returns the path of the first."""


class Breakdown(Protocol):
    """A breakdown of the result of a test, such as a confusion matrix."""

    @property
    def file(self) -> str:
        """File name of its figure in the run folder."""

    def record(self) -> dict[str, Any]:
        """Its values for `evaluation.json`."""

    def table(self) -> str:
        """A table for the terminal."""

    def draw(self, path: Path, title: str) -> Path:
        """Draw it into a PNG file."""


class Objective(ABC, Generic[TaskT, DataT]):
    """Training and test of the models of a task on its prepared data.

    A task names its objective in `TaskSpec.objective`. Runs, evaluations and sweeps use this interface only, so that a
    new task needs no change in them.

    Args:
        task: the task.
        data: what `task.prepare` returned. Its `hashes` map the names of splits or files to their SHA-256.

    Attributes:
        measured: names of further measures of the test besides the metric of the task. They are logged and recorded in
            `summary.json` under these names, and `--evaluate` compares them.
    """

    measured: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: TaskT, data: DataT) -> None:
        self.task, self.data = task, data

    @abstractmethod
    def module(
        self, model: SequenceModel, training: TrainingSpec, distributed: DistributedContext = SINGLE_PROCESS
    ) -> TrainingModule:
        """The training module of a model. It logs the metric of the task as `val_NAME` and `test_NAME`."""

    @abstractmethod
    def training_batches(
        self, training: TrainingSpec, seed: int, done: int = 0, distributed: DistributedContext = SINGLE_PROCESS
    ) -> DataLoader[Any]:
        """The batches of this rank, one per update, after the first `done` updates.

        The length of the loader is that of the whole training. The order is a function of the seed.
        """

    @abstractmethod
    def evaluation_batches(self, split: Split, distributed: DistributedContext = SINGLE_PROCESS) -> DataLoader[Any]:
        """The batches of a split that this rank evaluates; all ranks get the same number of batches."""

    @abstractmethod
    def report(self, module: TrainingModule) -> Report:
        """The report of a trained and tested model."""

    @property
    @abstractmethod
    def size(self) -> str:
        """Size of the training split as text, such as `4,000 samples`."""

    @property
    def subject(self) -> str:
        """Name of the data set, for titles."""
        return self.task.kind

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256 of every split or file of the data."""
        hashes: Mapping[str, str] = self.data.hashes  # type: ignore[attr-defined]
        return hashes

    @property
    def longest_row(self) -> int:
        """Number of positions of the longest training row, for the estimate of memory."""
        return self.task.least_length

    @property
    def typical_row(self) -> int:
        """Average number of positions of a row, for the count of MACs."""
        return self.task.least_length

    def check_shards(self, batch_size: int, distributed: DistributedContext) -> None:
        """Check that several processes can share the batches and the splits.

        Raises:
            SpecError: a batch or a split is too small.
        """
        distributed.check_batch_size(batch_size)

    def results(self, report: Any, measures: Mapping[str, float]) -> dict[str, Any]:
        """The entries of `summary.json` besides the measures of the test, the activation rates and the costs.

        Args:
            report: the result of `report`.
            measures: all measures of the test by their logged names.
        """
        return {"data": dict(self.hashes)}

    def breakdown(self, module: TrainingModule) -> Breakdown | None:
        """The breakdown of the result of a test; None if the objective has none. All ranks must call it."""
        return None

    def tested(self, module: TrainingModule) -> str:
        """Number and name of the items of a test metric, such as `400 answers`."""
        return "the test split"

    @classmethod
    def recorded(cls, task: TaskSpec) -> dict[str, str]:
        """The logged names of the recorded measures of a test by their keys in `summary.json`, the metric first."""
        return {task.metric.key: f"test_{task.metric.name}"} | {name: name for name in cls.measured}


def objective_class(task: TaskSpec) -> type[Objective[Any, Any]]:
    """The class that trains and tests models of a task.

    Raises:
        SpecError: the task names none, or one that cannot be imported.
    """
    task.check_trainable()
    try:
        found = pkgutil.resolve_name(task.objective)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(
            f"the objective {task.objective!r} of the task {task.kind!r} cannot be imported: {reason(error)}; "
            f"correct {type(task).__name__}.objective, 'package.module:Class'"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise SpecError(
            f"the objective {task.objective!r} of the task {task.kind!r} must be a subclass of "
            f"{Objective.__module__}.{Objective.__name__}"
        )
    return found


def load_objective(task: TaskSpec, data: Any) -> Objective[Any, Any]:
    """The objective of a task on its prepared data.

    Raises:
        SpecError: the task names none, or one that cannot be imported.
    """
    return objective_class(task)(task, data)
