"""The task of raw speech."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.speech.clips import NUM_CLASSES, SpeechSettings, load_speech
from sma.recipes.tasks.speech.commands import SAMPLES
from sma.spec import register


@register
class SpeechTask(ClassificationTask):
    """Clips of one second, read sample by sample; the class is one of ten words."""

    kind: Literal["speech"] = "speech"
    data: SpeechSettings = Field(default=SpeechSettings(), description="source of the clips, and their splits")
    numbers: ClassVar[str] = "samples of a sound"

    @property
    def classes(self) -> int:
        return NUM_CLASSES

    @property
    def least_length(self) -> int:
        return SAMPLES // self.data.downsample

    @property
    def least_memory(self) -> int:
        # Two bytes per sample.
        return (self.data.clips or 0) * SAMPLES * 2 if self.data.source == "synthetic" else 0

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        return load_speech(self.data, folder, progress=progress)
