"""The tasks Pathfinder and Path-X."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.pathfinder.images import CLASSES, PathfinderSettings, PathXSettings, prepare_pathfinder
from sma.spec import register


class _ContourTask(ClassificationTask):
    """Images of dashed contours and two discs, read pixel by pixel; the class is whether both discs are on one
    contour.
    """

    data: PathfinderSettings
    numbers: ClassVar[str] = "grey values"

    @property
    def classes(self) -> int:
        return len(CLASSES)

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
        return prepare_pathfinder(self.data, folder, progress=progress)


@register
class PathfinderTask(_ContourTask):
    """Pathfinder: images of 32 x 32 pixels, sequences of 1,024."""

    kind: Literal["pathfinder"] = "pathfinder"
    data: PathfinderSettings = Field(default=PathfinderSettings(), description="source and settings of the images")


@register
class PathXTask(_ContourTask):
    """Path-X: images of 128 x 128 pixels, sequences of 16,384."""

    kind: Literal["pathx"] = "pathx"
    data: PathXSettings = Field(default=PathXSettings(), description="source and settings of the images")
