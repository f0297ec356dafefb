"""The task of language modelling."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from sma.memory import check_memory
from sma.model import ModelSpec
from sma.recipes.tasks.contract import Metric, TaskSpec
from sma.recipes.tasks.documents import check_vocabulary
from sma.recipes.tasks.language.corpus import PYTHON_TEXT, VOCABULARY_SIZE, Corpus, TextSettings, load_text
from sma.spec import register


@register
class LanguageTask(TaskSpec):
    """Predict the next byte of a text."""

    metric: ClassVar[Metric] = Metric("bits_per_character", "min", "bits_per_character")
    objective: ClassVar[str] = "sma.recipes.training.language:LanguageModelling"

    kind: Literal["language"] = "language"
    data: TextSettings = Field(default=PYTHON_TEXT, description="the text and its splits")
    segment: int = Field(default=512, ge=1, description="bytes of each row of a batch")
    carry_state: bool = Field(
        default=False,
        description="start every segment from the detached state of the last one; false starts from the initial state",
    )
    window: int = Field(default=8192, ge=1, description="bytes of an evaluation window")
    context: int | None = Field(
        default=None,
        ge=0,
        description="bytes at the start of each window that are not scored, the minimum context of the others; "
        "null streams the whole split through the state, so that the context of a byte is all bytes before it",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.context is not None and self.context >= self.window:
            raise ValueError(f"context={self.context} must be below window={self.window}; else no byte is scored")
        return self

    def check_model(self, model: ModelSpec) -> None:
        if not model.scores_positions:
            raise ValueError(f"the model kind {model.kind!r} does not score the next token; use kind 'language_model'")
        check_vocabulary(model, VOCABULARY_SIZE, "one for every byte")

    @property
    def carries_state(self) -> bool:
        return self.carry_state

    @property
    def least_length(self) -> int:
        return self.segment

    def prepare(self, folder: Path, *, progress: bool = True) -> Corpus:
        # The positions and the bytes of one row, eight bytes each.
        check_memory(16 * self.segment, f"a row of task.segment={self.segment:,}", hint="lower task.segment")
        return load_text(self.data, folder, progress=progress)
