"""The Pathfinder stimulus: two long dashed contours, short ones that distract, and two discs; do both discs sit on one
contour?

Two contours start near each other and grow in turns, dash by dash; a dash goes straight on or turns, by cos^2 of the
turn, and never comes closer to another dash than their margins allow. Then short contours go wherever there is room.
The discs sit on the first tip of one long contour and on the last tip of the same (label 1) or of the other (label 0),
so neither their places nor their surroundings tell the label: somebody has to follow the contour.

Sample number i of a seed is the same whoever draws it, and whatever is drawn before it.

Reference:
    Linsley et al., "Learning long-range spatial dependencies with horizontal gated recurrent units", arXiv 1805.08315;
    Houtkamp and Roelfsema, "Parallel and serial grouping of image elements in visual perception", 2010. Parameters of
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import UInt8
from pydantic import Field, model_validator

from sma.errors import DataError
from sma.recipes.tasks.pathfinder.stencils import Offset, Stencils, make_stencils, pixels_of
from sma.spec import Spec

GENERATOR_VERSION = 1  # raise it whenever the same settings would give other images
STARTS = 100_000
"""How often two contours are begun before the settings are called impossible."""

_FULL = 0.01  # below this share of free pixels no further distractor is tried


class StimulusSettings(Spec):
    """What a stimulus looks like; lengths in pixels. The defaults are Long Range Arena's for 32 x 32 pixels."""

    size: int = Field(default=32, ge=12, le=512, description="rows, and columns, of an image")
    contour_length: int = Field(default=14, ge=2, le=100, description="dashes of each of the two long contours")
    distractors: int = Field(default=5, ge=0, le=100, description="short contours, where there is room for them")
    distractor_length: int = Field(default=4, ge=1, le=100, description="dashes of each of them")
    dash_length: int = Field(default=2, ge=2, le=20, description="length of a dash")
    dash_thickness: float = Field(
        default=0.5, gt=0.0, le=10.0, description="its thickness; times `antialias` a whole number"
    )
    margins: tuple[int, ...] = Field(
        default=(1,), min_length=1, description="free pixels around a dash; every image has one of these"
    )
    continuity: float = Field(
        default=1.0, ge=1.0, le=10.0, description="how straight contours are: the sharpest turn is 90 degrees / this"
    )
    seed_distance: float = Field(
        default=7.0, gt=0.0, description="from where the first contour begins to where the second does"
    )
    seed_frame: int = Field(
        default=14, ge=0, description="pixels at every side of the image in which the first contour does not begin"
    )
    marker_radius: float = Field(default=1.5, gt=0.0, le=20.0, description="radius of the discs")
    contour_contrast: float = Field(
        default=1.5, gt=0.0, description="of the long contours, times the part of a pixel that is covered"
    )
    distractor_contrast: float = Field(
        default=2.0, gt=0.0, description="the same of the short ones; the discs have 1, the most there is"
    )
    padding: int = Field(
        default=1, ge=0, le=20, description="pixels at every side that stay free of dashes and their margins"
    )
    antialias: int = Field(default=2, ge=1, le=8, description="dashes are drawn so many times larger, and reduced")
    target_retries: int = Field(
        default=4, ge=0, le=1000, description="further places tried for the beginning of the second contour"
    )
    distractor_retries: int = Field(default=4, ge=0, le=1000, description="further attempts at each short contour")
    dash_retries: int = Field(default=2, ge=0, le=1000, description="further attempts at each dash")

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if min(self.margins) < 1 or max(self.margins) > 20:
            raise ValueError(
                f"margins={list(self.margins)} must all be from 1 to 20; "
                "without a margin the dashes of a contour would run together"
            )
        fine = self.dash_thickness * self.antialias
        if fine != round(fine) or fine < 1:
            raise ValueError(
                f"dash_thickness={self.dash_thickness} times antialias={self.antialias} is {fine:g}; "
                "it must be a whole number, at least 1"
            )
        needed = self.dash_length + 2 * max(self.margins) + 2 * self.padding + 2
        if self.size < needed:
            raise ValueError(f"size={self.size} has no room for a dash with its margins; it must be at least {needed}")
        if 2 * self.seed_frame >= self.size:
            raise ValueError(
                f"seed_frame={self.seed_frame} leaves no pixel of size={self.size} to begin in; "
                f"it must be below {self.size / 2:g}"
            )
        return self


class Dash(NamedTuple):
    """A dash of a contour: its ends as (row, column) of the image, and which of the stencils it is."""

    near: Offset
    far: Offset
    pivot: Offset
    direction: int


Contour = tuple[Dash, ...]


class Stimulus(NamedTuple):
    """An image, and what it was drawn from.

    Attributes:
        image: grey values, 0 (background) to 255.
        label: 1 if both discs sit on one contour.
        contours: the two long ones.
        distractors: the short ones.
        discs: middles of the two discs.
        marked: which long contour each of them sits on.
        margin: of this image.
    """

    image: UInt8[np.ndarray, "S S"]
    label: int
    contours: tuple[Contour, Contour]
    distractors: tuple[Contour, ...]
    discs: tuple[Offset, Offset]
    marked: tuple[int, int]
    margin: int


def stencils_of(settings: StimulusSettings, margin: int) -> Stencils:
    """The stencils of the images that have one margin."""
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
        DataError: two contours of this length do not fit into an image, or so seldom that `STARTS` attempts were in
            vain.
    """
    # Of the generator, only random() promises the same numbers in every version of Python.
    uniform = random.Random(f"pathfinder {GENERATOR_VERSION} {seed} {number}").random
    label = int(uniform() < 0.5)
    margin = settings.margins[int(uniform() * len(settings.margins))]
    garden = _Garden(settings, margin, uniform)
    contours = next((found for _ in range(STARTS) if (found := garden.two_contours()) is not None), None)
    if contours is None:
        raise DataError(
            f"two contours of {settings.contour_length} dashes did not fit into {settings.size} x {settings.size} "
            f"pixels in {STARTS:,} attempts (margin {margin}); "
            "lower contour_length, dash_length or continuity, or raise size"
        )
    distractors = garden.distractors()
    first = int(uniform() * 2)
    marked = (first, first if label else 1 - first)
    discs = (contours[marked[0]][0].near, contours[marked[1]][-1].far)
    image = _draw(settings, garden.stencils, contours, distractors, discs)
    return Stimulus(image, label, contours, distractors, discs, marked, margin)


class _Garden:
    """Where contours grow: what is occupied so far, and the source of chance."""

    def __init__(self, settings: StimulusSettings, margin: int, uniform: Callable[[], float]) -> None:
        self.settings, self.uniform = settings, uniform
        self.stencils = stencils_of(settings, margin)
        self.beginnings = _beginnings(settings, margin)
        self.occupied = self.stencils.border

    def two_contours(self) -> tuple[Contour, Contour] | None:
        """Grow both long contours from nothing; None if one of them runs into something."""
        border, uniform = self.stencils.border, self.uniform
        direction = self._any(len(self.beginnings))
        places = self.beginnings[direction]
        if not places:
            return None
        contours = [[self._dash(places[self._any(len(places))], direction)], []]
        tips = [self._footprint(contours[0][0]), 0]
        for _ in range(self.settings.target_retries + 1):
            direction, angle = self._any(len(self.stencils.directions)), 2 * math.pi * uniform()
            offset = self.stencils.directions[direction].near
            y = contours[0][0].near[0] + self.settings.seed_distance * math.sin(angle) - offset[0]
            x = contours[0][0].near[1] + self.settings.seed_distance * math.cos(angle) - offset[1]
            dash = self._dash((round(y), round(x)), direction)
            if self._inside(dash.pivot) and not (border | tips[0]) & (footprint := self._footprint(dash)):
                contours[1].append(dash)
                tips[1] = footprint
                break
        else:
            return None
        # A contour's newest dash is left out of what its next one must not touch: they are neighbours.
        settled = border
        for _ in range(self.settings.contour_length - 1):
            for own, other in ((0, 1), (1, 0)):
                grown = self._next(contours[own][-1], settled | tips[other])
                if grown is None:
                    return None
                contours[own].append(grown)
                settled |= tips[own]
                tips[own] = self._footprint(grown)
        self.occupied = settled | tips[0] | tips[1]
        return tuple(contours[0]), tuple(contours[1])

    def distractors(self) -> tuple[Contour, ...]:
        """Grow short contours while there is room."""
        found: list[Contour] = []
        board = (1 << self.stencils.stride**2) - 1
        for _ in range(self.settings.distractors):
            for _ in range(self.settings.distractor_retries + 1):
                if (board & ~self.occupied).bit_count() < _FULL * self.settings.size**2:
                    return tuple(found)
                if (contour := self._distractor()) is not None:
                    found.append(contour)
                    break
        return tuple(found)

    def _distractor(self) -> Contour | None:
        direction = self._any(len(self.stencils.directions))
        rows, columns = pixels_of(_fitting(self.stencils, direction, self.occupied), self.stencils.stride)
        if not len(rows):
            return None
        chosen, rim = self._any(len(rows)), self.stencils.reach
        dashes = [self._dash((int(rows[chosen]) - rim, int(columns[chosen]) - rim), direction)]
        settled, tip = self.occupied, self._footprint(dashes[0])
        while len(dashes) < self.settings.distractor_length:
            grown = self._next(dashes[-1], settled)
            if grown is None:
                return None
            dashes.append(grown)
            settled |= tip
            tip = self._footprint(grown)
        self.occupied = settled | tip
        return tuple(dashes)

    def _next(self, last: Dash, occupied: int) -> Dash | None:
        """The next dash of a contour, or None where it ends."""
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
        """Of the window around a pivot: the rim is as wide as the window reaches."""
        return pivot[0] * self.stencils.stride + pivot[1]

    def _inside(self, pivot: Offset) -> bool:
        return 0 <= pivot[0] < self.settings.size and 0 <= pivot[1] < self.settings.size

    def _any(self, count: int) -> int:
        return int(self.uniform() * count)


@lru_cache(maxsize=32)
def _beginnings(settings: StimulusSettings, margin: int) -> tuple[list[Offset], ...]:
    """For every direction, the pivots from which the first contour can begin."""
    stencils, frame = stencils_of(settings, margin), settings.seed_frame
    found = []
    for number, direction in enumerate(stencils.directions):
        rows, columns = pixels_of(_fitting(stencils, number, stencils.border), stencils.stride)
        pivots = zip((rows - stencils.reach).tolist(), (columns - stencils.reach).tolist(), strict=True)
        allowed = range(frame, settings.size - frame)
        found.append(
            [(y, x) for y, x in pivots if y + direction.near[0] in allowed and x + direction.near[1] in allowed]
        )
    if not any(found):
        raise DataError(
            f"no dash fits where the first contour may begin; lower seed_frame={frame}, "
            f"dash_length={settings.dash_length} or margin {margin}"
        )
    return tuple(found)


def _fitting(stencils: Stencils, direction: int, occupied: int) -> int:
    """All pivots at which a dash touches nothing that is occupied, as a board."""
    rows, columns = pixels_of(stencils.directions[direction].footprint, stencils.stride)
    blocked = 0
    for offset in (rows * stencils.stride + columns).tolist():
        blocked |= occupied >> offset
    # `blocked` is by the first pixel of the window; a pivot is `reach` rows and columns after it. Outside of the image
    # all is occupied.
    corner = stencils.reach * (stencils.stride + 1)
    everywhere = (1 << (stencils.stride**2 - 2 * corner)) - 1
    return (everywhere & ~blocked) << corner & ~stencils.border


def _draw(
    settings: StimulusSettings,
    stencils: Stencils,
    contours: Sequence[Contour],
    distractors: Sequence[Contour],
    discs: Sequence[Offset],
) -> UInt8[np.ndarray, "S S"]:
    reach = stencils.reach
    canvas = np.zeros((stencils.stride, stencils.stride), dtype=np.float32)

    def lay(picture: np.ndarray, middle: Offset) -> None:
        window = canvas[middle[0] : middle[0] + 2 * reach + 1, middle[1] : middle[1] + 2 * reach + 1]
        np.maximum(window, picture, out=window)

    for group, contrast in ((contours, settings.contour_contrast), (distractors, settings.distractor_contrast)):
        for contour in group:
            for dash in contour:
                lay(np.minimum(contrast * stencils.directions[dash.direction].picture, 1.0), dash.pivot)
    for middle in discs:
        lay(stencils.disc, middle)
    image = canvas[reach:-reach, reach:-reach]
    return np.rint(image * (255 / image.max())).astype(np.uint8)
