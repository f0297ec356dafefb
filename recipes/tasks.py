"""Tasks: what a recipe learns, and where its data comes from."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

from pydantic import Field, model_validator
from torch import Tensor

from sma.model import LanguageModelSpec, ModelSpec
from sma.recipes.data import recall
from sma.recipes.data.batch import Batch, collate
from sma.recipes.data.digits import NUM_CLASSES as DIGITS
from sma.recipes.data.digits import DigitsSettings, load_digits
from sma.recipes.data.listops import ListOpsSettings, decode, prepare_listops
from sma.recipes.data.recall import RecallSettings, make_recall
from sma.recipes.data.text import PYTHON_TEXT, VOCABULARY_SIZE, Corpus, TextSettings, load_text
from sma.spec import Spec, register


class Samples(Protocol):
    """A split of a data set: `(inputs, target)` by number, and how long the inputs are."""

    @property
    def lengths(self) -> Tensor:
        """Length of every sample, `(N,)`."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """Sample number `index`; the target is a class, or one per position."""


class TaskData(NamedTuple):
    """The three splits of a task, and what goes with them.

    Attributes:
        hashes: SHA-256 of every file, by name.
        collate: makes a batch of samples.
        show: the text of every position of a sample, for reports and figures.
    """

    train: Samples
    validation: Samples
    test: Samples
    hashes: Mapping[str, str]
    collate: Callable[[Sequence[tuple[Tensor, Any]]], Batch]
    show: Callable[[Tensor], list[str]]


class TaskSpec(Spec):
    """Root of the task kinds."""

    family: ClassVar[str] = "task"
    kind: str

    def check_model(self, model: ModelSpec) -> None:
        """Check that a model can learn the task.

        Raises:
            ValueError: what the model lacks.
        """

    def prepare(self, folder: Path, *, progress: bool = True) -> Any:
        """Load or generate the data; `folder` keeps what is generated or downloaded."""
        raise TypeError(f"{type(self).__name__} must define prepare(self, folder, progress)")


class ClassificationTask(TaskSpec):
    """A task whose answer is one of a few classes; `prepare` returns a `TaskData`."""

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
            raise ValueError(f"the model kind {model.kind!r} has no head that scores classes; use kind 'sequence_classifier'")
        if classes != self.classes:
            raise ValueError(f"model.head.classes={classes} must be {self.classes}, the classes of the task {self.kind!r}")


@register
class ListOpsTask(ClassificationTask):
    """Nested MIN, MAX, MED and SM (sum modulo 10) of digits; the answer is a digit."""

    kind: Literal["listops"] = "listops"
    data: ListOpsSettings = Field(default=ListOpsSettings(), description="which expressions to generate")

    @property
    def classes(self) -> int:
        return 10

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        fingerprint = hashlib.sha256(self.data.model_dump_json().encode()).hexdigest()[:12]
        made = prepare_listops(self.data, folder / f"listops-{fingerprint}", progress=progress)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, lambda ids: decode(ids).split())


@register
class DigitsTask(ClassificationTask):
    """Handwritten digits of 8x8 pixels, read pixel by pixel; the answer is the digit."""

    kind: Literal["digits"] = "digits"
    data: DigitsSettings = Field(default=DigitsSettings(), description="how the images are split")

    @property
    def classes(self) -> int:
        return DIGITS

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        if model.encoder.kind in ("token_embedding", "linear"):
            raise ValueError(f"model.encoder.kind={model.encoder.kind!r} does not read grey values; use kind 'real_number'")

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = load_digits(self.data)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, made.show)


@register
class RecallTask(ClassificationTask):
    """Name the values of keys that were seen before, among distractors."""

    kind: Literal["recall"] = "recall"
    data: RecallSettings = Field(default=RecallSettings(), description="which samples to generate")

    @property
    def classes(self) -> int:
        return self.data.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.data.values

    def check_model(self, model: ModelSpec) -> None:
        if not isinstance(model, LanguageModelSpec):
            raise ValueError(f"the model kind {model.kind!r} has no answer at every position; use kind 'language_model'")
        vocabulary = getattr(model.encoder, "vocabulary", 0)
        if vocabulary != self.classes:
            raise ValueError(f"model.encoder.vocabulary={vocabulary} must be {self.classes}: values, keys and distractors of the task")

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = make_recall(self.data)
        return TaskData(made.train, made.validation, made.test, made.hashes, recall.collate, partial(recall.show, self.data))


@register
class TextTask(TaskSpec):
    """Predict the next byte of a text."""

    kind: Literal["text"] = "text"
    data: TextSettings = Field(default=PYTHON_TEXT, description="which text, and how it is split")
    segment: int = Field(default=512, ge=1, description="bytes of each row of a batch")
    carry_state: bool = Field(
        default=False,
        description="go on from one segment to the next with the state, without its gradient; false starts every segment afresh",
    )
    window: int = Field(default=8192, ge=1, description="bytes that are evaluated at once")
    context: int | None = Field(
        default=None,
        ge=0,
        description="bytes of each window that are only read, so that the others have at least so much before them; null streams the "
        "whole split through the state, so that every byte has all before it",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.context is not None and self.context >= self.window:
            raise ValueError(f"context={self.context} must be below window={self.window}; nothing would be scored")
        return self

    def check_model(self, model: ModelSpec) -> None:
        if not isinstance(model, LanguageModelSpec):
            raise ValueError(f"the model kind {model.kind!r} does not score the next token; use kind 'language_model'")
        vocabulary = getattr(model.encoder, "vocabulary", 0)
        if vocabulary < VOCABULARY_SIZE:
            raise ValueError(f"model.encoder.vocabulary={vocabulary} must be at least {VOCABULARY_SIZE}, one for every byte")

    def prepare(self, folder: Path, *, progress: bool = True) -> Corpus:
        return load_text(self.data)
