"""The line that shows how much of a task is done: in a terminal, in a notebook and in files."""

import io
import itertools
import sys
from types import SimpleNamespace

import pytest

from sma.recipes.io import progress
from sma.recipes.io.progress import Counter, bar, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def seconds(monkeypatch):
    """A clock that advances a second whenever it is read."""
    now = itertools.count()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(now))))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3599.6, "1:00:00"), (7322, "2:02:02")])
def test_durations_are_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("done", "filled"), [(0, 0), (1, 0), (50, 8), (99, 15), (100, 16)])
def test_the_bar_is_full_only_at_the_end(done, filled):
    assert bar(done, 100) == f"[{'#' * filled}{'.' * (16 - filled)}]"


def count(**options):
    with Counter("ListOps", 4000, **options) as counter:
        for _ in range(4):
            counter.advance(1000)


def test_a_terminal_gets_one_line_that_is_replaced(monkeypatch, seconds):
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    count()
    text = output.getvalue()
    assert (text.count("\n"), text[-1]) == (1, "\n")
    frames = [frame.rstrip() for frame in text.split("\r")[1:]]
    assert frames[0] == "[................] ListOps: 0 of 4,000"
    assert frames[1].startswith("[####............] ListOps: 1,000 of 4,000, 0:")
    assert frames[1].endswith(" left")
    assert frames[-1] == "[################] ListOps: 4,000 of 4,000"


def test_a_file_gets_a_line_at_the_end(monkeypatch, seconds):
    monkeypatch.setattr(sys, "stdout", output := io.StringIO())
    count()
    assert output.getvalue() == "[################] ListOps: 4,000 of 4,000\n"


def test_a_notebook_gets_one_output_that_is_replaced(monkeypatch, seconds):
    shown = []

    class Cell:
        def show(self, text):
            shown.append(text)

        def end(self):
            shown.append(None)

    monkeypatch.setattr(sys, "stdout", output := io.StringIO())
    monkeypatch.setattr(progress, "in_place", Cell)
    count()
    assert output.getvalue() == ""
    assert shown[-2:] == ["[################] ListOps: 4,000 of 4,000", None]


def test_nothing_is_shown_when_switched_off(monkeypatch, seconds):
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    count(shown=False)
    assert output.getvalue() == ""


def test_a_failure_ends_the_line_of_a_terminal_and_adds_none_to_a_file(monkeypatch, seconds):
    for stream, expected in ((Terminal(), "\n"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(ValueError, match="broken"), Counter("ListOps", 4000):
            raise ValueError("broken")
        assert stream.getvalue()[-1:] == expected


@pytest.mark.parametrize(
    ("start", "total", "text"),
    [
        pytest.param(0, 84_100_000, "[#...............] a.tar.gz: 8.4 of 84.1 MB, 0:09 left", id="whole"),
        pytest.param(42_050_000, 84_100_000, "[#########.......] a.tar.gz: 50.5 of 84.1 MB, 0:04 left", id="resumed"),
        pytest.param(0, None, "a.tar.gz: 8.4 MB", id="unknown-length"),
    ],
)
def test_bytes_are_shown_in_megabytes_and_a_resumed_download_estimates_from_its_own_speed(
    monkeypatch, start, total, text
):
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    with Counter("a.tar.gz", None, in_bytes=True) as counter:
        counter.restart(start, total)
        now = 1.0
        counter.advance(8_410_000)
    assert text in [frame.rstrip() for frame in output.getvalue().split("\r")]


def test_a_terminal_is_refreshed_at_most_twice_a_second(monkeypatch):
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 9.0))
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    with Counter("ListOps", 1000) as counter:
        for _ in range(1000):
            counter.advance(1)
    assert output.getvalue().count("\r") == 2  # the first and the last item
