"""Tasks: what a recipe learns, and where its data comes from."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field
from torch import Tensor

from sma.recipes.data.batch import Batch, collate
from sma.recipes.data.listops import ListOpsSettings, decode, prepare_listops
from sma.spec import Spec, register


class Samples(Protocol):
    """A split of a data set: `(inputs, target)` by number, and how long the inputs are."""

    @property
    def lengths(self) -> Tensor:
        """Length of every sample, `(N,)`."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Sample number `index`."""


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
    collate: Callable[[Sequence[tuple[Tensor, int]]], Batch]
    show: Callable[[Tensor], list[str]]


class TaskSpec(Spec):
    """Root of the task kinds."""

    family: ClassVar[str] = "task"
    kind: str

    @property
    def classes(self) -> int:
        """Number of classes; chance is one in so many."""
        raise TypeError(f"{type(self).__name__} must define classes")

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        """Load or generate the data; `folder` keeps what is generated or downloaded."""
        raise TypeError(f"{type(self).__name__} must define prepare(self, folder, progress)")


@register
class ListOpsTask(TaskSpec):
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
