"""The contract of a task: data in three splits, requirements on the model, the metric, and the objective."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from sma.errors import SpecError
from sma.model import ModelSpec
from sma.recipes.tasks.batch import Batch, collate
from sma.spec import Spec

SPLITS = ("train", "validation", "test")


class Samples(Protocol):
    """A split of a data set: `(inputs, target)` by index, and the lengths of the inputs."""

    @property
    def lengths(self) -> Tensor:
        """Length of every sample, `(N,)`."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The inputs of a sample, a 1-D tensor or a pair of them, and its target, a class or one per position."""


class TaskData(NamedTuple):
    """The three splits of a task, and functions and facts for their use.

    Attributes:
        train: training split.
        validation: validation split.
        test: test split.
        hashes: SHA-256 of every file or split, by name.
        collate: function that makes a batch of samples.
        show: function that returns the text of every position of a sample, for reports and figures.
        class_names: names of the classes, in their order; empty if they have only numbers.
        image_shape: height and width of images whose pixels, row after row, are the positions; None for other inputs.
        sample_rate: sample rate of sounds whose samples are the positions, in Hz; None for other inputs.
        roles: role of a position by the first character of its text; empty if positions have no roles.
        group: function that returns the group of a sample from the texts of its positions; reports then have the
            accuracy of every group. None if samples have no groups.
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
    roles: Mapping[str, str] = MappingProxyType({})
    group: Callable[[Sequence[str]], str] | None = None

    def __repr__(self) -> str:
        """One line: the number of samples of each split, and the facts that are known."""
        known = ("class_names", "image_shape", "sample_rate")
        facts = [f"{name}={getattr(self, name)!r}" for name in known if getattr(self, name)]
        return f"TaskData({', '.join([*(f'{split}={len(getattr(self, split))}' for split in SPLITS), *facts])})"

    @classmethod
    def of(
        cls,
        splits: Iterable[Any],
        show: Callable[[Tensor], list[str]],
        *,
        hashes: Mapping[str, str] | None = None,
        collate: Callable[[Sequence[Any]], Batch] = collate,
        **facts: Any,
    ) -> "TaskData":
        """Make the data of its three splits, in the order of `SPLITS`; `hashes` defaults to the `sha256` of each."""
        train, validation, test = splits
        hashes = hashes or {name: split.sha256 for name, split in zip(SPLITS, (train, validation, test), strict=True)}
        return cls(train, validation, test, hashes, collate, show, **facts)


class Metric(NamedTuple):
    """The measure by which models of a task are compared.

    Attributes:
        name: name in the logs, after `val_` and `test_`.
        mode: `max` if higher values are better, `min` if lower ones are.
        key: key of its value on the test split in `summary.json`.
        percent: whether its values are fractions that are shown in percent.
    """

    name: str
    mode: Literal["max", "min"]
    key: str
    percent: bool = False

    def headline(self, value: float) -> str:
        """A value on the test split for titles, such as `test accuracy 57.0%`."""
        label = self.name.replace("_", " ")
        return f"test {label} {value:.1%}" if self.percent else f"{value:.3f} {label}"

    def digits(self, value: float) -> str:
        """A value with enough digits for the comparison of two runs."""
        return f"{value:.4%}" if self.percent else f"{value:.6f}"

    def difference(self, value: float) -> str:
        """The difference of two values, with its sign."""
        return f"{100 * value:+.4f} points" if self.percent else f"{value:+.6f}"


class TaskSpec(Spec):
    """Base class of the task kinds.

    Attributes:
        metric: the measure by which models of the task are compared.
        objective: the subclass of `sma.recipes.training.objective.Objective` that trains and tests its models, as
            `package.module:Class`. It is imported when a model is trained, so that tasks do not import Lightning.
    """

    family: ClassVar[str] = "task"
    metric: ClassVar[Metric]
    objective: ClassVar[str]
    kind: str

    def check_trainable(self) -> None:
        """Check that models of the task can be trained, evaluated and swept.

        Raises:
            SpecError: the class lacks its metric or its objective.
        """
        missing = [name for name in ("metric", "objective") if not hasattr(type(self), name)]
        if missing:
            name = type(self).__name__
            raise SpecError(
                f"the task {self.kind!r} cannot be trained, evaluated or swept: {name} lacks {' and '.join(missing)}; "
                f"set {name}.metric to a Metric and {name}.objective to the class that trains it, "
                "such as 'package.module:Class'"
            )

    def check_model(self, model: ModelSpec) -> None:
        """Check that a model can learn the task.

        Raises:
            ValueError: it cannot; the message has the requirement that is not met.
        """

    @property
    def training_samples(self) -> int | None:
        """Number of training samples; None if the spec does not determine it."""
        return None

    @property
    def carries_state(self) -> bool:
        """Whether a training batch continues from the state of the last one, so that no active token may be skipped."""
        return False

    @property
    def least_length(self) -> int:
        """Lower bound of the number of positions of a batch, from the spec."""
        return 1

    @property
    def least_memory(self) -> int:
        """Lower bound of the size of the prepared data in memory, in bytes, from the spec."""
        return 0

    @property
    def least_disk(self) -> int:
        """Lower bound of the size of the prepared data in its folder, in bytes, from the spec."""
        return 0

    def prepare(self, folder: Path, *, progress: bool = True) -> Any:
        """Load or generate the data. Generated and downloaded files are kept in `folder`."""
        raise TypeError(f"{type(self).__name__} must define prepare(self, folder, progress)")


class ClassificationTask(TaskSpec):
    """A task of classification. `prepare` returns a `TaskData`."""

    metric: ClassVar[Metric] = Metric("accuracy", "max", "test_accuracy", percent=True)
    objective: ClassVar[str] = "sma.recipes.training.classification:Classification"

    rows_per_sample: ClassVar[int] = 1
    """Number of documents of a sample, each of which is a row of the inputs."""

    numbers: ClassVar[str] = ""
    """Noun for the real numbers that the model reads, one per position; empty if it reads token ids."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        raise TypeError(f"{type(self).__name__} must define classes")

    @property
    def chance(self) -> float:
        """Accuracy of a uniformly random prediction."""
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
        if self.numbers and model.encoder.reads not in ("numbers", None):
            raise ValueError(
                f"model.encoder.kind={model.encoder.kind!r} does not read {self.numbers}; use kind 'real_number'"
            )
