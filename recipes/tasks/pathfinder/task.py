"""The tasks Pathfinder and Path-X."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.model import ModelSpec
from sma.recipes.tasks.batch import collate
from sma.recipes.tasks.contract import ClassificationTask, TaskData, check_reads_numbers
from sma.recipes.tasks.pathfinder.images import CLASSES, PathfinderSettings, PathXSettings, prepare_pathfinder
from sma.spec import register


class _ContourTask(ClassificationTask):
    """Two discs in an image of dashed contours, read pixel by pixel; the answer is whether both sit on one contour."""

    data: PathfinderSettings

    @property
    def classes(self) -> int:
        return len(CLASSES)

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_reads_numbers(model, "grey values")

    @property
    def training_samples(self) -> int | None:
        return self.data.train if self.data.source == "generated" else None

    @property
    def least_length(self) -> int:
        return self.data.size**2

    @property
    def least_disk(self) -> int:
        data = self.data
        return (data.train + data.validation + data.test) * data.size**2 if data.source == "generated" else 0

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = prepare_pathfinder(self.data, folder, progress=progress)
        side = self.data.size
        return TaskData(*made[:3], made.hashes, collate, made.show, class_names=CLASSES, image_shape=(side, side))


@register
class PathfinderTask(_ContourTask):
    """Pathfinder: images of 32 x 32 pixels, sequences of 1,024."""

    kind: Literal["pathfinder"] = "pathfinder"
    data: PathfinderSettings = Field(default=PathfinderSettings(), description="which images to generate, or to read")


@register
class PathXTask(_ContourTask):
    """Path-X: images of 128 x 128 pixels, sequences of 16,384."""

    kind: Literal["pathx"] = "pathx"
    data: PathXSettings = Field(default=PathXSettings(), description="which images to generate, or to read")
