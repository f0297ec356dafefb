"""Pathfinder and Path-X: do two discs sit on one dashed contour? Generated, or read from Long Range Arena's release."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from sma.recipes.io.generated import copy_folder
from sma.recipes.io.workers import in_order
from sma.recipes.tasks.grey import Chunk, GreyData, cached_grey
from sma.recipes.tasks.pathfinder.release import find_release, list_release, read_images, split_records
from sma.recipes.tasks.pathfinder.stimulus import GENERATOR_VERSION, StimulusSettings, draw_stimulus

CLASSES = ("two contours", "one contour")
"""Where the discs sit, by label."""

_CHUNK = 64
_READER_VERSION = 1  # raise it whenever the same files would give other bytes
_GREY: dict[str, Any] = {"classes": len(CLASSES), "mean": 0.5, "std": 0.5}


class PathfinderSettings(StimulusSettings):
    """Which images of Pathfinder: 32 x 32 pixels, and Long Range Arena's stimulus if nothing else is said."""

    source: Literal["generated", "release"] = Field(
        default="generated",
        description="draw the images, or read those of Long Range Arena's release, for which only `size` counts",
    )
    download: bool = Field(
        default=False,
        description="with source=release: get the release, 7.7 GB, where the data folder does not hold it",
    )
    train: int = Field(default=160_000, ge=1, description="images to train on")
    validation: int = Field(default=20_000, ge=1, description="images to validate on")
    test: int = Field(default=20_000, ge=1, description="images to test on")
    seed: int = Field(default=0, ge=0, description="of the images")

    @model_validator(mode="after")
    def _is_released(self) -> Self:
        if self.source == "release" and self.size not in (32, 64, 128, 256):
            raise ValueError(
                f"size={self.size} is not in the release, which has 32, 64, 128 and 256; "
                "take one of these, or source=generated"
            )
        return self


class PathXSettings(PathfinderSettings):
    """Which images of Path-X: 128 x 128 pixels, and Long Range Arena's stimulus if nothing else is said."""

    size: int = Field(default=128, ge=12, le=512, description="rows, and columns, of an image")
    distractors: int = Field(default=8, ge=0, le=100, description="short contours, where there is room for them")
    dash_length: int = Field(default=5, ge=2, le=20, description="length of a dash")
    dash_thickness: float = Field(
        default=1.5, gt=0.0, le=10.0, description="its thickness; times `antialias` a whole number"
    )
    margins: tuple[int, ...] = Field(
        default=(2, 3), min_length=1, description="free pixels around a dash; every image has one of these"
    )
    continuity: float = Field(
        default=1.8, ge=1.0, le=10.0, description="how straight contours are: the sharpest turn is 90 degrees / this"
    )
    seed_distance: float = Field(
        default=20.0, gt=0.0, description="from where the first contour begins to where the second does"
    )
    seed_frame: int = Field(
        default=40, ge=0, description="pixels at every side of the image in which the first contour does not begin"
    )
    marker_radius: float = Field(default=3.0, gt=0.0, le=20.0, description="radius of the discs")
    contour_contrast: float = Field(
        default=0.9, gt=0.0, description="of the long contours, times the part of a pixel that is covered"
    )
    distractor_contrast: float = Field(
        default=0.9, gt=0.0, description="the same of the short ones; the discs have 1, the most there is"
    )


def prepare_pathfinder(
    settings: PathfinderSettings, folder: str | Path, *, workers: int | None = None, progress: bool = True
) -> GreyData:
    """Return the images that `settings` ask for; pixels are (x / 255 - 0.5) / 0.5.

    Generated images depend on the settings alone, not on the number of processes. They are kept in a folder of their
    own below `folder`, as are the decoded images of a release (in the default data folder, where `folder` cannot be
    written).

    Args:
        settings: what to draw, or that a release is to be read, which is looked for in `folder` (see `find_release`)
            and split 80/10/10.
        folder: where data is kept between runs.
        workers: processes that draw or decode; None: one per core that this process may use.
        progress: whether to show a bar.

    Raises:
        DataError: there is no release in the folder, or a broken file in it; the images cannot be drawn or kept.
    """
    return (_generated if settings.source == "generated" else _released)(settings, Path(folder), workers, progress)


def _generated(settings: PathfinderSettings, folder: Path, workers: int | None, progress: bool) -> GreyData:
    sizes = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    firsts = {"train": 0, "validation": settings.train, "test": settings.train + settings.validation}

    def chunks(split: str) -> Iterator[Chunk]:
        last = firsts[split] + sizes[split]
        numbers = (range(first, min(first + _CHUNK, last)) for first in range(firsts[split], last, _CHUNK))
        return in_order(partial(draw_chunk, settings, settings.seed), numbers, workers=workers)

    others = {"download"}  # decides nothing here
    recipe = {
        "generator": "pathfinder",
        "version": GENERATOR_VERSION,
        "settings": settings.model_dump(mode="json", exclude=others),
    }
    place = folder / f"pathfinder-{_fingerprint([settings.model_dump_json(exclude=others)])}"
    return cached_grey(
        place,
        recipe,
        sizes=sizes,
        pixels=settings.size**2,
        chunks=chunks,
        title="Pathfinder",
        progress=progress,
        **_GREY,
    )


def draw_chunk(settings: StimulusSettings, seed: int, numbers: Iterable[int]) -> Chunk:
    """Draw some samples of a seed."""
    stimuli = [draw_stimulus(settings, seed, number) for number in numbers]
    images = np.stack([stimulus.image.reshape(-1) for stimulus in stimuli])
    return images, np.array([stimulus.label for stimulus in stimuli], dtype=np.uint8)


def _released(settings: PathfinderSettings, folder: Path, workers: int | None, progress: bool) -> GreyData:
    root = find_release(folder, settings.size, download=settings.download, progress=progress)
    records = list_release(root)
    parts = split_records(records)
    sizes = {split: len(part) for split, part in parts.items()}

    def chunks(split: str) -> Iterator[Chunk]:
        groups = [parts[split][first : first + _CHUNK] for first in range(0, sizes[split], _CHUNK)]
        with closing(in_order(partial(read_images, root, settings.size), groups, workers=workers)) as images:
            for grey, group in zip(images, groups, strict=True):
                yield grey, np.array([record.label for record in group], dtype=np.uint8)

    listing = _fingerprint(f"{record.path} {record.bytes} {record.written} {record.label}\n" for record in records)
    recipe = {"reader": "pathfinder", "version": _READER_VERSION, "size": settings.size, "listing": listing}
    place = copy_folder(folder, f"pathfinder{settings.size}-release-{listing}")
    title = f"Pathfinder {settings.size} px"
    return cached_grey(
        place, recipe, sizes=sizes, pixels=settings.size**2, chunks=chunks, title=title, progress=progress, **_GREY
    )


def _fingerprint(texts: Iterable[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode())
    return total.hexdigest()[:12]
