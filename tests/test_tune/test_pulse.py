"""Detection of processes without heartbeats, with a simulated clock."""

import pytest

from sma.tune.pulse import Listener


class World:
    """A simulated clock and the heartbeats."""

    def __init__(self, limit: float = 10.0) -> None:
        self.now, self.heartbeats = 0.0, {"a": b"0"}
        self.listener = Listener(limit, self.heartbeats.get, lambda: self.now)

    def silent(self, now: float, heartbeat: bytes | None = None, process: str = "one") -> bool:
        self.now = now
        if heartbeat is not None:
            self.heartbeats["a"] = heartbeat
        return self.listener.silent("a", process)


def test_a_process_is_silent_if_its_heartbeat_does_not_change_for_longer_than_the_limit() -> None:
    world = World()
    assert [world.silent(now) for now in (0.0, 9.0, 10.0, 10.5)] == [False, False, False, True]
    assert [world.silent(11.0, b"1"), world.silent(20.0), world.silent(21.5)] == [False, False, True]


def test_the_time_restarts_for_a_new_process_and_after_a_restart() -> None:
    world = World()
    assert [world.silent(0.0), world.silent(50.0, process="other"), world.silent(55.0, process="other")] == [False] * 3
    assert world.silent(61.0, process="other")
    world.listener.restart("a")
    assert not world.silent(62.0, process="other")


def test_a_process_without_any_heartbeat_is_silent_too() -> None:
    world = World()
    world.heartbeats.clear()
    assert [world.silent(0.0), world.silent(11.0)] == [False, True]


@pytest.mark.parametrize(("limit", "times"), [(1800.0, [0.0, 1.9, 2.1]), (2.0, [0.0, 0.4, 0.6])])
def test_heartbeats_are_checked_at_intervals(limit: float, times: list[float]) -> None:
    world = World(limit)
    checked = []
    for world.now in times:
        checked.append(world.listener.due)
    assert checked == [True, False, True]
