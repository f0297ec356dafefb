"""The task of associative recall in noise."""

from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.model import LanguageModelSpec, ModelSpec
from sma.recipes.data.recall import RecallSettings, collate, make_recall, show
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.spec import register


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
            raise ValueError(
                f"the model kind {model.kind!r} has no answer at every position; use kind 'language_model'"
            )
        vocabulary = getattr(model.encoder, "vocabulary", 0)
        if vocabulary != self.classes:
            raise ValueError(
                f"model.encoder.vocabulary={vocabulary} must be {self.classes}: "
                "values, keys and distractors of the task"
            )

    @property
    def training_samples(self) -> int | None:
        return self.data.train

    @property
    def least_length(self) -> int:
        return self.data.length

    @property
    def least_memory(self) -> int:
        # A split is drawn at once, in numbers of 8 bytes.
        return 8 * max(self.data.train, self.data.validation, self.data.test) * self.data.length

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = make_recall(self.data)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, partial(show, self.data))
