"""What one dash of a Pathfinder stimulus covers: its picture, and its footprint as the bits of one whole number.

A board of pixels is a Python integer: the pixel in row y and column x is bit y * stride + x. Whether a dash fits is
then a shift and an AND, where it fits anywhere is one OR per pixel of its footprint, and a board is copied by keeping
it. The board has a rim around the image, as wide as a dash reaches, all of it occupied, so that nothing has to look
where the image ends.

Dashes lie on the grid of pixels: a dash points from its *pivot*, the middle of the gap before it, to a far end on the
circle of radius length + margin around the pivot; the near end is `margin` away from the pivot. The next pivot is
length + 2 margin away.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

Grey = Float32[np.ndarray, "H W"]
Offset = tuple[int, int]


class Direction(NamedTuple):
    """A dash that points one way, relative to its pivot.

    Attributes:
        angle: in which the far end lies, from -pi to pi; rows run downwards.
        near: pixel in which the dash begins.
        far: pixel in which it ends.
        advance: the next pivot.
        footprint: the pixels within `margin` of the dash, as bits of a window whose first pixel is (-reach, -reach).
        beyond: the pixels within `margin` of the far end, the same way.
        picture: the part of every pixel of the window that the dash covers.
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
        reach: pixels that a window extends to each side of its pivot; the width of the rim too.
        stride: pixels of a row of the board.
        border: the occupied pixels of an empty board: rim and padding.
        disc: the picture of a disc, in a window like those of the dashes.
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
    """Draw the stencils once per process; the arguments are those of `StimulusSettings`, `radius` is that of the
    discs.
    """
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


def pixels_of(board: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the set pixels of a board."""
    count = -(-board.bit_length() // 8)
    set_bits = np.unpackbits(np.frombuffer(board.to_bytes(count, "little"), dtype=np.uint8), bitorder="little")
    rows, columns = np.divmod(np.flatnonzero(set_bits), stride)
    return rows, columns


def _circle(radius: int) -> list[Offset]:
    """The pixels that are met by going around the circle in steps of a pixel, by angle."""
    steps = math.ceil(2 * math.pi * radius)
    angles = (2 * math.pi * step / steps for step in range(steps))
    found = {(round(radius * math.sin(angle)), round(radius * math.cos(angle))) for angle in angles}
    return sorted(found, key=lambda offset: math.atan2(*offset))


def _straightness(turn: float, continuity: float) -> float:
    turn = abs(math.remainder(turn, 2 * math.pi))
    # cos(pi/2) is not quite 0 in floating point; a turn that far is never taken.
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
    # Distances to the line from those to its pixels: the windows are small, and this runs once.
    distances = np.hypot(
        y[..., None] - np.broadcast_to(y, line.shape)[line], x[..., None] - np.broadcast_to(x, line.shape)[line]
    )
    footprint = _reduced(distances.min(axis=-1) <= margin, antialias) >= 0.5
    whole_y, whole_x = _fine_grid(reach, 1)
    beyond = np.hypot(whole_y - far[0], whole_x - far[1]) <= margin
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
    """The fine pixels of a line that ends in the origin: as many in each row, or column, whichever it crosses more
    of.
    """
    if abs(unit_y) > abs(unit_x):
        y, x, unit_y, unit_x = x, y, unit_x, unit_y
    back = -x * math.copysign(1.0, unit_x)
    half = 0.5 / antialias
    across = y - x * (unit_y / unit_x) + 1e-9  # a fine pixel exactly on the edge belongs to one side only
    return (
        (back >= -half) & (back <= length * abs(unit_x) + half) & (across >= -thickness / 2) & (across < thickness / 2)
    )


def _fine_grid(reach: int, antialias: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the fine pixels of a window, in whole pixels from the middle of its middle pixel."""
    places = (np.arange((2 * reach + 1) * antialias) + 0.5) / antialias - reach - 0.5
    return places[:, None], places[None, :]


def _reduced(fine: Bool[np.ndarray, "h w"], antialias: int) -> Grey:
    """The share of every pixel that is set."""
    side = len(fine) // antialias
    return fine.reshape(side, antialias, side, antialias).mean(axis=(1, 3), dtype=np.float32)


def _bits(pixels: Bool[np.ndarray, "h w"], stride: int) -> int:
    """The integer of a window or of a whole board."""
    rows = np.zeros((len(pixels), stride), dtype=bool)
    rows[:, : pixels.shape[1]] = pixels
    return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")
