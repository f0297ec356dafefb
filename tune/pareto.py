"""The Pareto front."""

from collections.abc import Sequence


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a point dominates another: no coordinate is larger, and at least one is smaller."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the points on the Pareto front, in ascending order. Equal points do not dominate each other.

    The points are visited in lexicographic order, in which a point follows all that dominate it. If any point dominates
    it, one on the front does.

    Args:
        points: points of equal length without NaN; smaller is better.
    """
    kept: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: tuple(points[index])):
        if not any(dominates(points[other], points[index]) for other in kept):
            kept.append(index)
    return sorted(kept)
