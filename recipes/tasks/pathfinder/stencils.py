"""Stencils of the dashes of a Pathfinder stimulus: their pictures, and their footprints as bitboards.

A bitboard is a Python integer: the pixel in row y and column x is bit y * stride + x. The test whether a dash fits is a
shift and an AND; the search for all free pivots takes one OR per pixel of its footprint. The bitboard has an occupied
rim around the image, as wide as the reach of a dash, so that the edges of the image need no special case.

Dashes lie on the grid of pixels. A dash points from its *pivot*, the centre of the gap before it, to a far end on the
circle of radius length + margin around the pivot. The distance from the pivot to the near end is `margin`, to the next
pivot length + 2 margin.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

Grey = Float32[np.ndarray, "H W"]
Offset = tuple[int, int]


class Direction(NamedTuple):
    """A dash in one direction, relative to its pivot.

    Attributes:
        angle: angle of the far end, from -pi to pi; rows run downwards.
        near: first pixel of the dash.
        far: last pixel of the dash.
        advance: the next pivot.
        footprint: the pixels within `margin` of the dash, as bits of a window whose first pixel is (-reach, -reach).
        beyond: the pixels within `margin` of the far end, as bits of the same window.
        picture: the fraction of every pixel of the window that the dash covers.
    """

    angle: float
    near: Offset
    far: Offset
    advance: Offset
    footprint: int
    beyond: int
    picture: Grey


class Stencils(NamedTuple):
    """All dashes of one length, thickness and margin, in images of one size.

    Attributes:
        directions: one per pixel of the circle.
        turns: `turns[i][k]`: cos^2(min(continuity * angle between i and k, pi/2)).
        reach: number of pixels of a window on each side of its pivot, and width of the rim.
        stride: number of pixels of a row of the bitboard.
        border: the occupied pixels of an empty bitboard: rim and padding.
        disc: picture of a disc, in a window like those of the dashes.
    """

    directions: tuple[Direction, ...]
    turns: tuple[tuple[float, ...], ...]
    reach: int
    stride: int
    border: int
    disc: Grey


@lru_cache(maxsize=32)
def make_stencils(
    *,
    size: int,
    padding: int,
    antialias: int,
    margin: int,
    length: int,
    thickness: float,
    continuity: float,
    radius: float,
) -> Stencils:
    """Draw the stencils, once per process. The arguments are those of `StimulusSettings`; `radius` is of the discs."""
    reach = max(length + 2 * margin + math.ceil(thickness) + 1, math.ceil(radius) + 1)
    stride = size + 2 * reach
    inside = np.zeros((stride, stride), dtype=bool)
    inside[reach + padding : stride - reach - padding, reach + padding : stride - reach - padding] = True
    directions = tuple(
        _direction(far, reach, stride, antialias, margin, length, thickness) for far in _circle(length + margin)
    )
    turns = tuple(
        tuple(_straightness(one.angle - other.angle, continuity) for other in directions) for one in directions
    )
    y, x = _fine_grid(reach, antialias)
    disc = _reduced(y**2 + x**2 <= radius**2, antialias)
    return Stencils(directions, turns, reach, stride, _bits(~inside, stride), disc)


def pixels_of(bits: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the set pixels of a bitboard."""
    count = -(-bits.bit_length() // 8)
    set_bits = np.unpackbits(np.frombuffer(bits.to_bytes(count, "little"), dtype=np.uint8), bitorder="little")
    return np.divmod(np.flatnonzero(set_bits), stride)


def _circle(radius: int) -> list[Offset]:
    """The pixels of a circle, sampled in steps of a pixel, sorted by angle."""
    steps = math.ceil(2 * math.pi * radius)
    angles = (2 * math.pi * step / steps for step in range(steps))
    found = {(round(radius * math.sin(angle)), round(radius * math.cos(angle))) for angle in angles}
    return sorted(found, key=lambda offset: math.atan2(*offset))


def _straightness(turn: float, continuity: float) -> float:
    turn = abs(math.remainder(turn, 2 * math.pi))
    # The comparison is needed because cos(pi/2) is not exactly 0 in floating point.
    return math.cos(continuity * turn) ** 2 if continuity * turn < math.pi / 2 - 1e-9 else 0.0


def _direction(
    far: Offset, reach: int, stride: int, antialias: int, margin: int, length: int, thickness: float
) -> Direction:
    distance = math.hypot(*far)
    unit_y, unit_x = far[0] / distance, far[1] / distance
    near = (round(far[0] - length * unit_y), round(far[1] - length * unit_x))
    step = length + 2 * margin
    advance = (round(step * unit_y), round(step * unit_x))

    y, x = _fine_grid(reach, antialias)
    line = _line(y - far[0], x - far[1], unit_y, unit_x, antialias, length, thickness)
    # Brute force over all pixels of the line: the windows are small, and this runs once.
    distances = np.hypot(
        y[..., None] - np.broadcast_to(y, line.shape)[line], x[..., None] - np.broadcast_to(x, line.shape)[line]
    )
    footprint = _reduced(distances.min(axis=-1) <= margin, antialias) >= 0.5
    rows, columns = _fine_grid(reach, 1)
    beyond = np.hypot(rows - far[0], columns - far[1]) <= margin
    return Direction(
        angle=math.atan2(unit_y, unit_x),
        near=near,
        far=far,
        advance=advance,
        footprint=_bits(footprint, stride),
        beyond=_bits(beyond, stride),
        picture=_reduced(line, antialias),
    )


def _line(
    y: np.ndarray, x: np.ndarray, unit_y: float, unit_x: float, antialias: int, length: int, thickness: float
) -> Bool[np.ndarray, "h w"]:
    """The fine pixels of a line that ends at the origin, with equally many in each row or column along its main
    direction.
    """
    if abs(unit_y) > abs(unit_x):
        y, x, unit_y, unit_x = x, y, unit_x, unit_y
    back = -x * math.copysign(1.0, unit_x)
    half = 0.5 / antialias
    across = y - x * (unit_y / unit_x) + 1e-9  # a fine pixel exactly on the edge counts on one side only
    return (
        (back >= -half) & (back <= length * abs(unit_x) + half) & (across >= -thickness / 2) & (across < thickness / 2)
    )


def _fine_grid(reach: int, antialias: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the rows and columns of the fine pixels of a window, in pixels from its centre."""
    grid = (np.arange((2 * reach + 1) * antialias) + 0.5) / antialias - reach - 0.5
    return grid[:, None], grid[None, :]


def _reduced(fine: Bool[np.ndarray, "h w"], antialias: int) -> Grey:
    """The fraction of every pixel that is set."""
    side = len(fine) // antialias
    return fine.reshape(side, antialias, side, antialias).mean(axis=(1, 3), dtype=np.float32)


def _bits(pixels: Bool[np.ndarray, "h w"], stride: int) -> int:
    """The bits of a window or of a whole bitboard."""
    rows = np.zeros((len(pixels), stride), dtype=bool)
    rows[:, : pixels.shape[1]] = pixels
    return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")
