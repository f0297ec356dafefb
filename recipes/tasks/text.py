"""The task of IMDB reviews, byte by byte."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.model import ModelSpec
from sma.recipes.data.batch import collate
from sma.recipes.data.documents import check_vocabulary, show
from sma.recipes.data.imdb import CLASSES, ImdbSettings, load_imdb
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.spec import register


@register
class TextTask(ClassificationTask):
    """Film reviews, read byte by byte; the answer is whether the writer liked the film.

    Or passages of Python's modules; then it is whether the module is about the internet.
    """

    kind: Literal["text"] = "text"
    data: ImdbSettings = Field(
        default=ImdbSettings(), description="where the reviews come from, and how they are split"
    )

    @property
    def classes(self) -> int:
        return len(CLASSES)

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_vocabulary(model)

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = load_imdb(self.data, folder, progress=progress)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, show, made.class_names)
