"""The task of pairs of papers, byte by byte."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from sma import pairs  # noqa: F401 registers the kind of model that reads pairs
from sma.model import ModelSpec
from sma.recipes.data.aan import CLASSES, AANSettings, load_aan
from sma.recipes.data.batch import collate_pairs
from sma.recipes.data.documents import check_vocabulary, show
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.spec import register


@register
class RetrievalTask(ClassificationTask):
    """Two papers, each read byte by byte by the same encoder; the answer is whether one cites the other.

    Or two passages of Python's modules; then it is whether the second goes on where the first ends.
    """

    kind: Literal["retrieval"] = "retrieval"
    data: AANSettings = Field(default=AANSettings(), description="where the pairs come from")

    rows_per_sample: ClassVar[int] = 2

    @property
    def classes(self) -> int:
        return len(CLASSES)

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_vocabulary(model)

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = load_aan(self.data, folder, progress=progress)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate_pairs, show, made.class_names)
