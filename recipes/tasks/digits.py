"""The task of scikit-learn's handwritten digits."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.model import ModelSpec
from sma.recipes.data.batch import collate
from sma.recipes.data.digits import NUM_CLASSES, DigitsSettings, load_digits
from sma.recipes.tasks.contract import ClassificationTask, TaskData, check_reads_numbers
from sma.spec import register


@register
class DigitsTask(ClassificationTask):
    """Handwritten digits of 8x8 pixels, read pixel by pixel; the answer is the digit."""

    kind: Literal["digits"] = "digits"
    data: DigitsSettings = Field(default=DigitsSettings(), description="how the images are split")

    @property
    def classes(self) -> int:
        return NUM_CLASSES

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_reads_numbers(model, "grey values")

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = load_digits(self.data)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, made.show, image_shape=(8, 8))
