"""The Pathfinder stimulus: two long dashed contours, short distractors, and two discs on one contour or on two.

Two contours start near each other and grow in turns, dash by dash. The direction of a dash is drawn with a weight of
cos^2 of its turn, and the margins of two dashes never overlap. Then distractors are added where there is room. One disc
is on the first tip of a long contour, the other on the last tip of the same contour (label 1) or of the other one
(label 0). So neither the positions of the discs nor their surroundings determine the label.

Sample i of a seed does not depend on the samples drawn before it.

Reference:
    Linsley et al., "Learning long-range spatial dependencies with horizontal gated recurrent units", arXiv 1805.08315;
    Houtkamp and Roelfsema, "Parallel and serial grouping of image elements in visual perception", 2010. Parameters of
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from itertools import accumulate, chain
from operator import or_
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Integer, UInt8
from pydantic import Field, model_validator

from sma.errors import DataError
from sma.recipes.tasks.pathfinder.stencils import Offset, Stencils, make_stencils, pixels_of
from sma.spec import Spec

GENERATOR_VERSION = 1  # raise it whenever the same settings would give other images
STARTS = 100_000
"""Number of failed attempts at two contours after which the settings are refused."""

_FULL = 0.01  # fraction of free pixels below which no further distractor is drawn


class StimulusSettings(Spec):
    """Settings of a stimulus; lengths in pixels. The defaults are those of the Long Range Arena for 32 x 32 pixels."""

    size: int = Field(default=32, ge=12, le=512, description="height and width of an image")
    contour_length: int = Field(
        default=14, ge=2, le=100, description="number of dashes of each of the two long contours"
    )
    distractors: int = Field(
        default=5, ge=0, le=100, description="maximum number of short contours; fewer if there is no room"
    )
    distractor_length: int = Field(default=4, ge=1, le=100, description="number of dashes of a distractor")
    dash_length: int = Field(default=2, ge=2, le=20, description="length of a dash")
    dash_thickness: float = Field(
        default=0.5, gt=0.0, le=10.0, description="thickness of a dash; its product with `antialias` must be an integer"
    )
    margins: tuple[int, ...] = Field(
        default=(1,), min_length=1, description="margins around a dash; every image has one of these"
    )
    continuity: float = Field(
        default=1.0,
        ge=1.0,
        le=10.0,
        description="straightness of contours: the sharpest turn is 90 degrees / continuity",
    )
    seed_distance: float = Field(
        default=7.0, gt=0.0, description="distance between the starts of the two long contours"
    )
    seed_frame: int = Field(
        default=14, ge=0, description="width of the frame in which the first contour does not start"
    )
    marker_radius: float = Field(default=1.5, gt=0.0, le=20.0, description="radius of the discs")
    contour_contrast: float = Field(
        default=1.5,
        gt=0.0,
        description="grey value of a pixel covered by a long contour; clipped to 1, that of the discs",
    )
    distractor_contrast: float = Field(
        default=2.0, gt=0.0, description="grey value of a pixel covered by a distractor; clipped to 1"
    )
    padding: int = Field(default=1, ge=0, le=20, description="width of the frame without dashes and their margins")
    antialias: int = Field(
        default=2, ge=1, le=8, description="factor of the resolution at which dashes are drawn before they are averaged"
    )
    target_retries: int = Field(
        default=4, ge=0, le=1000, description="maximum number of further attempts at the start of the second contour"
    )
    distractor_retries: int = Field(
        default=4, ge=0, le=1000, description="maximum number of further attempts at each distractor"
    )
    dash_retries: int = Field(default=2, ge=0, le=1000, description="maximum number of further attempts at each dash")

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if min(self.margins) < 1 or max(self.margins) > 20:
            raise ValueError(
                f"margins={list(self.margins)} must all be from 1 to 20; "
                "without a margin the dashes of a contour would touch"
            )
        fine = self.dash_thickness * self.antialias
        if fine != round(fine) or fine < 1:
            raise ValueError(
                f"dash_thickness={self.dash_thickness} times antialias={self.antialias} is {fine:g}; "
                "it must be an integer, at least 1"
            )
        needed = self.dash_length + 2 * max(self.margins) + 2 * self.padding + 2
        if self.size < needed:
            raise ValueError(f"size={self.size} has no room for a dash with its margins; it must be at least {needed}")
        if 2 * self.seed_frame >= self.size:
            raise ValueError(
                f"seed_frame={self.seed_frame} leaves no pixel of size={self.size} for the start; "
                f"it must be below {self.size / 2:g}"
            )
        return self


class Dash(NamedTuple):
    """A dash of a contour: its ends and its pivot, as (row, column) of the image, and the index of its direction."""

    near: Offset
    far: Offset
    pivot: Offset
    direction: int


Contour = tuple[Dash, ...]


class Stimulus(NamedTuple):
    """An image and its components.

    Attributes:
        image: grey values, 0 (background) to 255.
        label: 1 if both discs are on one contour.
        contours: the two long contours.
        distractors: the short contours.
        discs: centres of the two discs.
        marked: index of the long contour under each disc.
        margin: margin of this image.
    """

    image: UInt8[np.ndarray, "S S"]
    label: int
    contours: tuple[Contour, ...]
    distractors: tuple[Contour, ...]
    discs: tuple[Offset, Offset]
    marked: tuple[int, int]
    margin: int


def stencils_of(settings: StimulusSettings, margin: int) -> Stencils:
    """The stencils of the images with one of the margins."""
    return make_stencils(
        size=settings.size,
        padding=settings.padding,
        antialias=settings.antialias,
        margin=margin,
        length=settings.dash_length,
        thickness=settings.dash_thickness,
        continuity=settings.continuity,
        radius=settings.marker_radius,
    )


def draw_stimulus(settings: StimulusSettings, seed: int, number: int) -> Stimulus:
    """Draw sample `number` of a seed.

    Raises:
        DataError: two contours of this length did not fit into the image in `STARTS` attempts.
    """
    # Only random() is guaranteed to return the same numbers in every version of Python.
    uniform = random.Random(f"pathfinder {GENERATOR_VERSION} {seed} {number}").random
    label = int(uniform() < 0.5)
    margin = settings.margins[int(uniform() * len(settings.margins))]
    drawing = _Drawing(settings, margin, uniform)
    contours = next((found for _ in range(STARTS) if (found := drawing.two_contours()) is not None), None)
    if contours is None:
        raise DataError(
            f"two contours of {settings.contour_length} dashes did not fit into {settings.size} x {settings.size} "
            f"pixels in {STARTS:,} attempts (margin {margin}); "
            "lower contour_length, dash_length or continuity, or raise size"
        )
    distractors = drawing.distractors()
    first = int(uniform() * 2)
    marked = (first, first if label else 1 - first)
    discs = (contours[marked[0]][0].near, contours[marked[1]][-1].far)
    image = _draw(settings, drawing.stencils, contours, distractors, discs)
    return Stimulus(image, label, contours, distractors, discs, marked, margin)


class _Drawing:
    """Contours drawn at random: the occupied pixels so far, and the random numbers."""

    def __init__(self, settings: StimulusSettings, margin: int, uniform: Callable[[], float]) -> None:
        self.settings, self.uniform = settings, uniform
        self.stencils = stencils_of(settings, margin)
        self.starts = _starts(settings, margin)
        self.occupied = self.stencils.border

    def two_contours(self) -> tuple[Contour, ...] | None:
        """Draw both long contours; None if one of them cannot be completed."""
        direction = self._any(len(self.starts))
        pivots = self.starts[direction]
        if not pivots:
            return None
        first = self._dash(pivots[self._any(len(pivots))], direction)
        for _ in range(self.settings.target_retries + 1):
            direction, angle = self._any(len(self.stencils.directions)), 2 * math.pi * self.uniform()
            offset = self.stencils.directions[direction].near
            y = first.near[0] + self.settings.seed_distance * math.sin(angle) - offset[0]
            x = first.near[1] + self.settings.seed_distance * math.cos(angle) - offset[1]
            second = self._dash((round(y), round(x)), direction)
            if self._inside(second.pivot) and not (self.occupied | self._footprint(first)) & self._footprint(second):
                return self._grow((first, second), self.settings.contour_length)
        return None

    def distractors(self) -> tuple[Contour, ...]:
        """Draw short contours while there is room."""
        found: list[Contour] = []
        everywhere = (1 << self.stencils.stride**2) - 1
        for _ in range(self.settings.distractors):
            for _ in range(self.settings.distractor_retries + 1):
                if (everywhere & ~self.occupied).bit_count() < _FULL * self.settings.size**2:
                    return tuple(found)
                if (contour := self._distractor()) is not None:
                    found.append(contour)
                    break
        return tuple(found)

    def _distractor(self) -> Contour | None:
        direction = self._any(len(self.stencils.directions))
        pivots = _free_pivots(self.stencils, direction, self.occupied)
        if not len(pivots):
            return None
        y, x = pivots[self._any(len(pivots))].tolist()
        grown = self._grow([self._dash((y, x), direction)], self.settings.distractor_length)
        return grown[0] if grown else None

    def _grow(self, starts: Sequence[Dash], length: int) -> tuple[Contour, ...] | None:
        """Extend contours in turns to `length` dashes, and mark them as occupied; None if one of them has no room."""
        contours, tips, occupied = (
            [[dash] for dash in starts],
            [self._footprint(dash) for dash in starts],
            self.occupied,
        )
        for _ in range(length - 1):
            for own, contour in enumerate(contours):
                # A dash may touch the previous one of its contour, the tip.
                others = [tip for number, tip in enumerate(tips) if number != own]
                dash = self._next(contour[-1], reduce(or_, others, occupied))
                if dash is None:
                    return None
                contour.append(dash)
                occupied |= tips[own]
                tips[own] = self._footprint(dash)
        self.occupied = reduce(or_, tips, occupied)
        return tuple(map(tuple, contours))

    def _next(self, last: Dash, occupied: int) -> Dash | None:
        """The next dash of a contour; None if no direction is free."""
        advance = self.stencils.directions[last.direction].advance
        pivot = (last.pivot[0] + advance[0], last.pivot[1] + advance[1])
        if not self._inside(pivot):
            return None
        window = occupied >> self._shift(pivot)
        straight = self.stencils.turns[last.direction]
        sums = list(
            accumulate(
                weight if weight and not window & direction.beyond else 0.0
                for weight, direction in zip(straight, self.stencils.directions, strict=True)
            )
        )
        if sums[-1] < 1e-4:
            return None
        for _ in range(self.settings.dash_retries + 1):
            aim = self.uniform() * sums[-1]
            chosen = next(number for number, reached in enumerate(sums) if reached > aim)
            if not window & self.stencils.directions[chosen].footprint:
                return self._dash(pivot, chosen)
        return None

    def _dash(self, pivot: Offset, direction: int) -> Dash:
        near, far = self.stencils.directions[direction].near, self.stencils.directions[direction].far
        return Dash((pivot[0] + near[0], pivot[1] + near[1]), (pivot[0] + far[0], pivot[1] + far[1]), pivot, direction)

    def _footprint(self, dash: Dash) -> int:
        return self.stencils.directions[dash.direction].footprint << self._shift(dash.pivot)

    def _shift(self, pivot: Offset) -> int:
        """Shift of the window around a pivot; the rim is as wide as the reach of the window."""
        return pivot[0] * self.stencils.stride + pivot[1]

    def _inside(self, pivot: Offset) -> bool:
        return 0 <= pivot[0] < self.settings.size and 0 <= pivot[1] < self.settings.size

    def _any(self, count: int) -> int:
        return int(self.uniform() * count)


@lru_cache(maxsize=32)
def _starts(settings: StimulusSettings, margin: int) -> tuple[list[Offset], ...]:
    """For every direction, the possible pivots of the first dash."""
    stencils, frame = stencils_of(settings, margin), settings.seed_frame
    found = []
    for number, direction in enumerate(stencils.directions):
        pivots = _free_pivots(stencils, number, stencils.border)
        near = pivots + direction.near
        inside = ((near >= frame) & (near < settings.size - frame)).all(axis=1)
        found.append([(y, x) for y, x in pivots[inside].tolist()])
    if not any(found):
        raise DataError(
            f"no dash fits where the first contour may start; lower seed_frame={frame}, "
            f"dash_length={settings.dash_length} or margin {margin}"
        )
    return tuple(found)


def _free_pivots(stencils: Stencils, direction: int, occupied: int) -> Integer[np.ndarray, "P 2"]:
    """All pivots at which a dash touches no occupied pixel."""
    rows, columns = pixels_of(stencils.directions[direction].footprint, stencils.stride)
    blocked = 0
    for offset in (rows * stencils.stride + columns).tolist():
        blocked |= occupied >> offset
    # Bit i of `blocked` is the window whose first pixel is i; its pivot is `reach` rows and columns further. All pixels
    # outside of the image are occupied.
    corner = stencils.reach * (stencils.stride + 1)
    everywhere = (1 << (stencils.stride**2 - 2 * corner)) - 1
    free = (everywhere & ~blocked) << corner & ~stencils.border
    return np.stack(pixels_of(free, stencils.stride), axis=1) - stencils.reach


def _draw(
    settings: StimulusSettings,
    stencils: Stencils,
    contours: Sequence[Contour],
    distractors: Sequence[Contour],
    discs: Sequence[Offset],
) -> UInt8[np.ndarray, "S S"]:
    reach = stencils.reach
    canvas = np.zeros((stencils.stride, stencils.stride), dtype=np.float32)

    pictures = [(stencils.disc, centre) for centre in discs]
    for group, contrast in ((contours, settings.contour_contrast), (distractors, settings.distractor_contrast)):
        pictures += [
            (np.minimum(contrast * stencils.directions[dash.direction].picture, 1.0), dash.pivot)
            for dash in chain.from_iterable(group)
        ]
    for picture, (row, column) in pictures:
        window = canvas[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
        np.maximum(window, picture, out=window)
    image = canvas[reach:-reach, reach:-reach]
    return np.rint(image * (255 / image.max())).astype(np.uint8)
