from hypothesis import given
from hypothesis import strategies as st

from sma.tune.pareto import beats, front

POINTS = st.integers(1, 3).flatmap(lambda size: st.lists(st.tuples(*[st.integers(0, 4)] * size), max_size=12))


@given(POINTS)
def test_front_is_what_no_point_beats(points: list[tuple[int, ...]]) -> None:
    slow = [place for place, point in enumerate(points) if not any(beats(other, point) for other in points)]
    assert front(points) == slow


def test_equal_points_stand_side_by_side() -> None:
    assert front([(1, 2), (1, 2), (2, 1), (2, 2)]) == [0, 1, 2]
