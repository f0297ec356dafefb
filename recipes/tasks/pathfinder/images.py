"""The images of Pathfinder and Path-X, generated or read from the release of the Long Range Arena."""

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from sma.recipes.io.generated import copy_folder
from sma.recipes.io.workers import in_order
from sma.recipes.tasks.contract import SPLITS, TaskData
from sma.recipes.tasks.grey import Chunk, cached_grey
from sma.recipes.tasks.pathfinder.release import find_release, list_release, read_images, split_records
from sma.recipes.tasks.pathfinder.stimulus import GENERATOR_VERSION, StimulusSettings, draw_stimulus

CLASSES = ("two contours", "one contour")
"""Number of contours with a disc, by label."""

_CHUNK = 64
_READER_VERSION = 1  # raise it whenever the same files would give other bytes


class PathfinderSettings(StimulusSettings):
    """Settings of the images of Pathfinder. The defaults are those of the Long Range Arena, of 32 x 32 pixels."""

    source: Literal["generated", "release"] = Field(
        default="generated",
        description="generate the images, or read the release of the Long Range Arena, which depends on `size` only",
    )
    download: bool = Field(
        default=False,
        description="with source=release: download the release, 7.7 GB, if it is not in the data folder",
    )
    train: int = Field(default=160_000, ge=1, description="number of training images")
    validation: int = Field(default=20_000, ge=1, description="number of validation images")
    test: int = Field(default=20_000, ge=1, description="number of test images")
    seed: int = Field(default=0, ge=0, description="seed of the images")

    @model_validator(mode="after")
    def _is_released(self) -> Self:
        if self.source == "release" and self.size not in (32, 64, 128, 256):
            raise ValueError(
                f"size={self.size} is not in the release, which has 32, 64, 128 and 256; "
                "take one of these, or source=generated"
            )
        return self


_FIELDS = PathfinderSettings.model_fields


class PathXSettings(PathfinderSettings):
    """Settings of the images of Path-X. The defaults are those of the Long Range Arena, of 128 x 128 pixels."""

    size: Annotated[int, _FIELDS["size"]] = 128
    distractors: Annotated[int, _FIELDS["distractors"]] = 8
    dash_length: Annotated[int, _FIELDS["dash_length"]] = 5
    dash_thickness: Annotated[float, _FIELDS["dash_thickness"]] = 1.5
    margins: Annotated[tuple[int, ...], _FIELDS["margins"]] = (2, 3)
    continuity: Annotated[float, _FIELDS["continuity"]] = 1.8
    seed_distance: Annotated[float, _FIELDS["seed_distance"]] = 20.0
    seed_frame: Annotated[int, _FIELDS["seed_frame"]] = 40
    marker_radius: Annotated[float, _FIELDS["marker_radius"]] = 3.0
    contour_contrast: Annotated[float, _FIELDS["contour_contrast"]] = 0.9
    distractor_contrast: Annotated[float, _FIELDS["distractor_contrast"]] = 0.9


def prepare_pathfinder(
    settings: PathfinderSettings, folder: str | Path, *, workers: int | None = None, progress: bool = True
) -> TaskData:
    """Return the images of the settings; pixels are (x / 255 - 0.5) / 0.5.

    Generated images depend on the settings only, not on the number of processes. They are kept in their own folder in
    `folder`, as are the decoded images of a release, which are kept in the default data folder if `folder` cannot be
    written.

    Args:
        settings: settings of the generator, or of the release, which is searched for in `folder` (see `find_release`)
            and split 80/10/10.
        folder: the data folder.
        workers: number of processes that generate or decode images; None: one per core that this process may use.
        progress: whether to show a progress bar.

    Raises:
        DataError: the release is not in the folder, or has a damaged file; or the images cannot be generated or kept.
    """
    folder, size = Path(folder), settings.size
    groups: Mapping[str, Sequence[Any]]
    decode: Callable[[Any], Chunk]
    if settings.source == "generated":
        title, unused = "Pathfinder", {"download"}
        recipe = {
            "generator": "pathfinder",
            "version": GENERATOR_VERSION,
            "settings": settings.model_dump(mode="json", exclude=unused),
        }
        cache = folder / f"pathfinder-{_fingerprint([settings.model_dump_json(exclude=unused)])}"
        ends = list(accumulate((settings.train, settings.validation, settings.test), initial=0))
        groups = {split: range(first, last) for split, (first, last) in zip(SPLITS, pairwise(ends), strict=True)}
        decode = partial(draw_chunk, settings, settings.seed)
    else:
        root = find_release(folder, size, download=settings.download, progress=progress)
        records = list_release(root)
        listing = _fingerprint(f"{record.path} {record.bytes} {record.written} {record.label}\n" for record in records)
        title = f"Pathfinder {size} px"
        recipe = {"reader": "pathfinder", "version": _READER_VERSION, "size": size, "listing": listing}
        cache = copy_folder(folder, f"pathfinder{size}-release-{listing}")
        groups, decode = split_records(records), partial(read_images, root, size)

    def chunks(split: str) -> Generator[Chunk, None, None]:
        group = groups[split]
        items = (group[first : first + _CHUNK] for first in range(0, len(group), _CHUNK))
        return in_order(decode, items, workers=workers)

    return cached_grey(
        cache,
        recipe,
        sizes={split: len(group) for split, group in groups.items()},
        side=size,
        class_names=CLASSES,
        chunks=chunks,
        mean=0.5,
        std=0.5,
        title=title,
        progress=progress,
    )


def draw_chunk(settings: StimulusSettings, seed: int, numbers: Iterable[int]) -> Chunk:
    """Draw the samples of a seed that have these numbers."""
    stimuli = [draw_stimulus(settings, seed, number) for number in numbers]
    images = np.stack([stimulus.image.reshape(-1) for stimulus in stimuli])
    return images, np.array([stimulus.label for stimulus in stimuli], dtype=np.uint8)


def _fingerprint(texts: Iterable[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:12]
