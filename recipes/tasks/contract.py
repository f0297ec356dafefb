"""What a task is: data in three splits, and what a model must be to learn it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from sma.model import ModelSpec
from sma.recipes.tasks.batch import Batch
from sma.spec import Spec


class Samples(Protocol):
    """A split of a data set: `(inputs, target)` by number, and how long the inputs are."""

    @property
    def lengths(self) -> Tensor:
        """Length of every sample, `(N,)`."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Sample number `index`: a 1-D tensor, or a pair of them; and its target, a class, or one per position."""


class TaskData(NamedTuple):
    """The three splits of a task, and what goes with them.

    Attributes:
        hashes: SHA-256 of every file or split, by name.
        collate: makes a batch of samples.
        show: the text of every position of a sample, for reports and figures.
        class_names: of the classes, in their order; empty: they are called by their numbers.
        image_shape: height and width of the images whose pixels, row after row, are the positions; None: they are no
            pixels.
        sample_rate: of the sound whose samples are the positions, in Hz; None: they are no sound.
    """

    train: Samples
    validation: Samples
    test: Samples
    hashes: Mapping[str, str]
    collate: Callable[[Sequence[tuple[Any, Any]]], Batch]
    show: Callable[[Tensor], list[str]]
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int] | None = None
    sample_rate: int | None = None


class TaskSpec(Spec):
    """Root of the task kinds."""

    family: ClassVar[str] = "task"
    kind: str

    def check_model(self, model: ModelSpec) -> None:
        """Check that a model can learn the task.

        Raises:
            ValueError: what the model lacks.
        """

    @property
    def training_samples(self) -> int | None:
        """Number of training samples, where the spec says it."""
        return None

    @property
    def least_length(self) -> int:
        """Positions of the inputs of a batch, at least."""
        return 1

    @property
    def least_memory(self) -> int:
        """Bytes of the prepared data in memory, at least, as far as the spec says."""
        return 0

    @property
    def least_disk(self) -> int:
        """Bytes of the prepared data in its folder, at least, as far as the spec says."""
        return 0

    def prepare(self, folder: Path, *, progress: bool = True) -> Any:
        """Load or generate the data; `folder` keeps what is generated or downloaded."""
        raise TypeError(f"{type(self).__name__} must define prepare(self, folder, progress)")


class ClassificationTask(TaskSpec):
    """A task whose answer is one of a few classes; `prepare` returns a `TaskData`."""

    rows_per_sample: ClassVar[int] = 1
    """Documents of a sample, each a row of the inputs."""

    @property
    def classes(self) -> int:
        """Number of classes; chance is one in so many."""
        raise TypeError(f"{type(self).__name__} must define classes")

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.classes

    def check_model(self, model: ModelSpec) -> None:
        classes = getattr(model.head_spec, "classes", None)
        if classes is None:
            raise ValueError(
                f"the model kind {model.kind!r} has no head that scores classes; use kind 'sequence_classifier'"
            )
        if classes != self.classes:
            raise ValueError(
                f"model.head.classes={classes} must be {self.classes}, the classes of the task {self.kind!r}"
            )
        if model.rows_per_sample != self.rows_per_sample:
            fitting = "pair_classifier" if self.rows_per_sample == 2 else "sequence_classifier"
            raise ValueError(f"the model kind {model.kind!r} does not fit the task {self.kind!r}; use kind {fitting!r}")


def check_reads_numbers(model: ModelSpec, what: str) -> None:
    """Check that a model takes a real number per position.

    Args:
        model: the model.
        what: what the numbers are, for the message.

    Raises:
        ValueError: its encoder takes something else.
    """
    if model.encoder.reads not in ("numbers", None):
        raise ValueError(f"model.encoder.kind={model.encoder.kind!r} does not read {what}; use kind 'real_number'")
