from hypothesis import given
from hypothesis import strategies as st

from sma.tune.pareto import dominates, front

POINTS = st.integers(1, 3).flatmap(lambda size: st.lists(st.tuples(*[st.integers(0, 4)] * size), max_size=12))


@given(POINTS)
def test_the_front_has_all_points_that_no_point_dominates(points: list[tuple[int, ...]]) -> None:
    slow = [index for index, point in enumerate(points) if not any(dominates(other, point) for other in points)]
    assert front(points) == slow


def test_equal_points_are_all_on_the_front() -> None:
    assert front([(1, 2), (1, 2), (2, 1), (2, 2)]) == [0, 1, 2]
