"""The task Image: CIFAR-10 in grey, pixel by pixel."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.model import ModelSpec
from sma.recipes.data.batch import collate
from sma.recipes.data.cifar import CLASSES, SIDE, CifarSettings, load_cifar
from sma.recipes.tasks.contract import ClassificationTask, TaskData, check_reads_numbers
from sma.spec import register


@register
class ImageTask(ClassificationTask):
    """Grey photographs of 32x32 pixels, read pixel by pixel; the answer is one of ten classes.

    Or handwritten digits, enlarged to that size; then it is the digit.
    """

    kind: Literal["image"] = "image"
    data: CifarSettings = Field(
        default=CifarSettings(), description="where the images come from, and how they are split"
    )

    @property
    def classes(self) -> int:
        return len(CLASSES)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes, in their order."""
        return tuple(map(str, range(len(CLASSES)))) if self.data.source == "digits" else CLASSES

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_reads_numbers(model, "grey values")

    @property
    def least_length(self) -> int:
        return SIDE * SIDE

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = load_cifar(self.data, folder, progress=progress)
        return TaskData(
            *made[:3], made.hashes, collate, made.show, class_names=self.class_names, image_shape=(SIDE, SIDE)
        )
