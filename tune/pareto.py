"""Which points nothing beats."""

from collections.abc import Sequence


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a point is nowhere worse than another and somewhere better; less is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """The places of the points that no other point beats, in their order: the Pareto front.

    Points that are equal do not beat each other. One pass over the points sorted by their coordinates: what beats a
    point comes before it, and if anything does, something on the front does.

    Args:
        points: of equal length, less is better, no NaN.
    """
    kept: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: tuple(points[place])):
        if not any(beats(points[other], points[place]) for other in kept):
            kept.append(place)
    return sorted(kept)
