"""Confusion matrices: shares and tables against loops over answers."""

import matplotlib.image
import pytest
import torch

from sma.errors import DataError
from sma.recipes.reports.confusion import Confusion, check_names

TRUTH = [0, 0, 0, 1, 1, 3, 3, 3, 3]
ANSWER = [0, 0, 1, 1, 1, 0, 0, 3, 2]


def _counts(truth, answer, classes):
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for right, given in zip(truth, answer, strict=True):
        counts[right, given] += 1
    return counts


@pytest.fixture
def confusion():
    return Confusion.of(_counts(TRUTH, ANSWER, 4), ("yes", "no", "up", "down"))


def test_accuracy_per_class_is_the_share_of_correct_answers(confusion):
    for place, name in enumerate(confusion.names):
        answers = [given for right, given in zip(TRUTH, ANSWER, strict=True) if right == place]
        assert confusion.per_class[name] == (answers.count(place) / len(answers) if answers else None)
    assert confusion.samples == 9
    assert confusion.per_class["up"] is None


def test_classes_without_names_are_numbered():
    assert Confusion.of(torch.eye(3, dtype=torch.int64), ()).per_class == {"0": 1.0, "1": 1.0, "2": 1.0}


def test_record_contains_only_json_types(confusion):
    assert confusion.record() == {
        "per_class": {"yes": 2 / 3, "no": 1.0, "up": None, "down": 0.25},
        "classes": ["yes", "no", "up", "down"],
        "confusion": [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [2, 0, 1, 1]],
    }


def test_table_has_a_row_per_class_and_every_count_in_its_column(confusion):
    head, *rows = confusion.table().splitlines()
    assert [row.split() for row in rows] == [
        ["yes", "66.7%", "2", "1", "·", "·"],
        ["no", "100.0%", "·", "2", "·", "·"],
        ["up", "-", "·", "·", "·", "·"],
        ["down", "25.0%", "2", "·", "1", "1"],
    ]
    assert head.split() == ["class", "accuracy", "answered", "yes", "no", "up", "down"]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_table_of_many_classes_lists_the_worst_and_their_confusions():
    counts = 10 * torch.eye(30, dtype=torch.int64)
    counts[7, 7], counts[7, 2], counts[7, 3] = 4, 5, 1
    counts[11, 11], counts[11, 12] = 0, 10
    counts[20] = 0
    head, *rows = Confusion.of(counts, ()).table().splitlines()
    assert head.split()[:3] == ["class", "accuracy", "samples"]
    assert rows[0].split() == ["11", "0.0%", "10", "12", "(10)"]
    assert rows[1].split() == ["7", "40.0%", "10", "2", "(5)"]
    assert rows[2].endswith("nothing else")
    assert (len(rows), rows[-1]) == (21, "and 10 more classes")


def test_table_of_odd_names_keeps_its_columns():
    names = ("a\nb", "x" * 300, "caf\udce9", "$x_$ {a} [red]")
    counts = _counts(TRUTH, ANSWER, 4)
    assert len({len(line) for line in Confusion.of(counts, names).table().split("\n")}) == 1
    assert Confusion.of(counts, names).table().isprintable() is False  # the table has several lines
    assert all(line.isprintable() for line in Confusion.of(counts, names).table().split("\n"))
    many = Confusion.of(torch.eye(30, dtype=torch.int64).flip(0), tuple(f"{place}\n$_$" for place in range(30))).table()
    assert len(many.split("\n")) == 22


def test_figure_of_odd_names_is_drawn(tmp_path):
    confusion = Confusion.of(_counts(TRUTH, ANSWER, 4), ("a $x_$ b", "x" * 300, "caf\udce9", "🙂"))
    assert confusion.draw(tmp_path / "confusion.png", "a $x_$ b{c}").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(
            ["a", "b"], "the data names 2 classes and the task has 3; give every class a name, or none", id="too few"
        ),
        pytest.param(
            ["", "b", ""], "the data gives the name '' to two classes; give every class its own name", id="twice"
        ),
    ],
)
def test_missing_and_duplicate_class_names_are_refused(names, message):
    with pytest.raises(DataError, match=message):
        check_names(names, 3)


def test_no_names_and_different_names_are_accepted():
    check_names([], 3)
    check_names(["a", "b", ""], 3)


@pytest.mark.parametrize("classes", [2, 30])
def test_figure_is_not_blank(tmp_path, classes):
    counts = torch.eye(classes, dtype=torch.int64)
    path = Confusion.of(counts, ()).draw(tmp_path / "confusion.png", "the title")
    image = matplotlib.image.imread(path)
    assert image[..., :3].std() > 0.1
    other = matplotlib.image.imread(Confusion.of(counts.flip(0), ()).draw(tmp_path / "other.png", "the title"))
    assert image.shape != other.shape or (image != other).any()
