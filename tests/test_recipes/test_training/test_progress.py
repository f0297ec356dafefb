"""The line that shows the progress of a training: in a terminal and in files."""

import io
import itertools
import re
import sys
from types import SimpleNamespace

import pytest

from sma.recipes.training import progress
from sma.recipes.training.progress import Progress, evaluated, progress_text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        pytest.param((0, 60, None, {}), "update 0 of 60", id="nothing-is-known"),
        pytest.param((20, 4000, 35.0, {"loss": 2.3}), "update 20 of 4,000, 0:35 left: loss 2.300", id="midway"),
        pytest.param((60, 60, 0.0, {"a": 1.0, "b": 0.25}), "update 60 of 60: a 1.000, b 0.250", id="end"),
    ],
)
def test_a_line_has_updates_time_left_and_measures(arguments, text):
    assert progress_text(*arguments) == text


def test_an_evaluation_shows_the_means_of_the_split_and_no_layers():
    logged = {"loss": 1.5, "val_accuracy": 0.5, "val_bits_per_byte": 2.0, "val_rate/layer0/a": 0.1, "fit_rate": 0.2}
    assert evaluated(logged) == {"loss": 1.5, "validation accuracy": 0.5, "validation bits per byte": 2.0}


def trainer(update, **measures):
    return SimpleNamespace(
        global_step=update,
        is_global_zero=True,
        progress_bar_metrics=measures,
        callback_metrics={f"val_{name}": value for name, value in measures.items()},
    )


def follow(updates, evaluate_every):
    """Show a training whose every update takes a second."""
    shown = Progress(updates)
    shown.on_train_start(trainer(0), None)
    for update in range(1, updates + 1):
        shown.on_train_batch_end(trainer(update, accuracy=0.5), None, None, None, update - 1)
        if update % evaluate_every == 0:
            shown.on_validation_start(trainer(update, accuracy=0.5), None)
            shown.on_validation_end(trainer(update, accuracy=0.5), None)
    shown.on_train_end(trainer(updates, accuracy=0.5), None)


@pytest.fixture
def seconds(monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))


def test_a_file_gets_a_line_per_evaluation(monkeypatch, seconds):
    monkeypatch.setattr(sys, "stdout", output := io.StringIO())
    follow(6, 2)
    lines = output.getvalue().splitlines()
    assert [re.sub(r", \d+:\d\d left", "", line) for line in lines] == [
        f"update {update} of 6: validation accuracy 0.500" for update in (2, 4, 6)
    ]


def test_a_terminal_gets_one_line_that_is_replaced(monkeypatch, seconds):
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    follow(6, 3)
    text = output.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    frames = text.rstrip("\n").split("\r")[1:]
    assert all(len(frame) < 60 for frame in frames)
    assert frames[0] == "[................] update 0 of 6"
    assert frames[-1].rstrip() == "[################] update 6 of 6: accuracy 0.500"
    assert [frame.rstrip() for frame in frames if "evaluating" in frame] == [
        "[########........] update 3 of 6, evaluating",
        "[################] update 6 of 6, evaluating",
    ]
    for before, after in itertools.pairwise(frames):
        assert not after or len(after) >= len(before.rstrip()), "the end of the longer line would stay"


def test_a_warning_after_an_evaluation_has_its_own_line(monkeypatch, seconds):
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    shown = Progress(6)
    shown.on_train_start(trainer(0), None)
    shown.on_validation_start(trainer(3), None)
    shown.on_validation_end(trainer(3), None)
    *_, evaluating, blank, cursor = output.getvalue().split("\r")
    assert evaluating == "[########........] update 3 of 6, evaluating"
    assert (blank, cursor) == (" " * len(evaluating), "")


def test_a_terminal_is_refreshed_at_most_twice_a_second(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    follow(1000, 5000)
    assert output.getvalue().count("\r") == 2  # the first and the last update


def test_a_test_shows_its_batches_and_leaves_no_line(monkeypatch, seconds):
    testing = trainer(0)
    testing.num_test_batches = [4]
    for output in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", output)
        shown = Progress()
        shown.on_test_start(testing, None)
        for batch in range(4):
            shown.on_test_batch_end(testing, None, None, None, batch)
        shown.on_test_end(testing, None)
        frames = [frame.rstrip() for frame in output.getvalue().split("\r")]
        assert "[########........] testing: batch 2 of 4" in frames or not output.isatty()
        assert frames[-1] == ""
    assert output.getvalue() == ""


def test_an_interrupted_training_ends_its_line(monkeypatch, seconds):
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    shown = Progress(6)
    shown.on_train_start(trainer(0), None)
    shown.on_exception(trainer(1), None, KeyboardInterrupt())
    assert output.getvalue().endswith("\n")


def test_other_ranks_show_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", output := Terminal())
    shown, other = Progress(6), trainer(0)
    other.is_global_zero = False
    for event in (shown.on_train_start, shown.on_validation_end, shown.on_train_end):
        event(other, None)
    assert output.getvalue() == ""
