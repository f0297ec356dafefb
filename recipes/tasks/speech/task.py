"""The task of raw speech."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.model import ModelSpec
from sma.recipes.tasks.batch import collate
from sma.recipes.tasks.contract import ClassificationTask, TaskData, check_reads_numbers
from sma.recipes.tasks.speech.clips import NUM_CLASSES, SpeechSettings, load_speech
from sma.recipes.tasks.speech.commands import SAMPLES
from sma.spec import register


@register
class SpeechTask(ClassificationTask):
    """Clips of one second, read sample by sample; the answer is one of ten words."""

    kind: Literal["speech"] = "speech"
    data: SpeechSettings = Field(default=SpeechSettings(), description="which clips, and how they are split")

    @property
    def classes(self) -> int:
        return NUM_CLASSES

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_reads_numbers(model, "samples of a sound")

    @property
    def least_length(self) -> int:
        return SAMPLES // self.data.downsample

    @property
    def least_memory(self) -> int:
        # Two bytes per sample.
        return (self.data.clips or 0) * SAMPLES * 2 if self.data.source == "synthetic" else 0

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = load_speech(self.data, folder, progress=progress)
        return TaskData(
            made.train,
            made.validation,
            made.test,
            made.hashes,
            collate,
            made.show,
            class_names=made.class_names,
            sample_rate=made.sample_rate,
        )
