"""Data sets larger than the disk or the memory are refused before any part of them is created."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from sma.errors import DataError, SpecError
from sma.recipes.io.generated import check_disk
from sma.recipes.tasks.batch import UNSCORED
from sma.recipes.tasks.language.task import LanguageTask
from sma.recipes.tasks.listops.expressions import prepare_listops
from sma.recipes.tasks.listops.trees import ListOpsSettings, generate_lines
from sma.recipes.tasks.pathfinder.images import PathfinderSettings, PathXSettings, prepare_pathfinder
from sma.recipes.tasks.recall import RecallSettings, make_recall
from sma.recipes.tasks.speech.clips import SpeechSettings, load_speech

MANY = 10**12


@pytest.mark.parametrize("changes", [{"train": MANY}, {"validation": MANY}, {"test": 10**18}], ids=str)
@pytest.mark.parametrize(
    ("settings", "prepare"),
    [
        pytest.param(ListOpsSettings(), prepare_listops, id="listops"),
        pytest.param(PathfinderSettings(), prepare_pathfinder, id="pathfinder"),
        pytest.param(PathXSettings(), prepare_pathfinder, id="pathx"),
        pytest.param(RecallSettings(), lambda settings, folder, **_: make_recall(settings), id="recall"),
    ],
)
def test_more_samples_than_fit_are_refused_and_leave_nothing(settings, prepare, changes, tmp_path):
    with pytest.raises(
        DataError,
        match=r"needs (about 10\^[0-9]+|[0-9,]+) bytes.*(are free|can address); .*(lower|make room)",
    ):
        prepare(settings.replace(**changes), tmp_path / "data", workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"length": MANY}, {"length": MANY, "queries_from": MANY - 100}], ids=str)
def test_samples_of_recall_longer_than_the_memory_are_refused(changes):
    with pytest.raises(
        DataError, match=r"the task recall needs .* bytes.*; lower train, validation, test or length of task\.data"
    ):
        make_recall(RecallSettings(**changes))


def test_segments_longer_than_the_memory_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"a row of task\.segment=1,[0,]+ needs .* bytes.*; lower task\.segment"):
        LanguageTask(segment=MANY).prepare(tmp_path, progress=False)


@pytest.mark.parametrize("clips", [MANY, 10**18])
def test_more_synthetic_clips_than_fit_are_refused(clips, tmp_path):
    with pytest.raises(DataError, match=r"a data set of 1,[0,]+ clips needs .* bytes.*; lower task\.data\.clips"):
        load_speech(SpeechSettings(source="synthetic", clips=clips), tmp_path)


def test_disk_space_is_checked_before_the_folder_is_created_and_not_for_existing_data(tmp_path, monkeypatch):
    settings = PathfinderSettings(train=3, validation=1, test=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 1025 - 1))
        complaint = (
            r"Pathfinder of 5 images needs 5,125 bytes in .*data/pathfinder-.*, and 5,124 bytes are free; "
            r"make room there or choose"
        )
        with pytest.raises(DataError, match=complaint):
            prepare_pathfinder(settings, tmp_path / "data", workers=1, progress=False)
        assert list(tmp_path.iterdir()) == []
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 1025))
        made = prepare_pathfinder(settings, tmp_path / "data", workers=1, progress=False)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        assert prepare_pathfinder(settings, tmp_path / "data", workers=1, progress=False).hashes == made.hashes


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ListOpsSettings(train=20, validation=1, test=1), id="paper"),
        pytest.param(
            ListOpsSettings(min_length=0, max_length=30, max_depth=4, train=20, validation=1, test=1), id="short"
        ),
        pytest.param(
            ListOpsSettings(min_length=2, max_length=9, min_arity=1, max_arity=1, train=9, validation=1, test=1),
            id="unary",
        ),
    ],
)
def test_estimate_never_exceeds_the_written_size(settings):
    written = sum(len(line) for _, line in generate_lines(settings, workers=1))
    assert settings.total * settings.bytes_each <= written


@pytest.mark.parametrize("name", ["max_length", "max_depth", "max_arity"])
def test_excessive_bounds_of_expressions_are_refused(name):
    with pytest.raises(SpecError, match=rf"{name}=1000000000000 must be at most 1000000"):
        ListOpsSettings(**{"min_arity": 1, "max_arity": 1, name: MANY})


@pytest.mark.parametrize(("length", "queries_from"), [(256, 96), (257, 96), (700, 400)])
def test_queries_name_earlier_keys_in_samples_of_any_length(length, queries_from):
    data = make_recall(RecallSettings(length=length, queries_from=queries_from, train=20, validation=1, test=1))
    for number in range(20):
        ids, targets = data.train[number]
        where = (targets != UNSCORED).nonzero().flatten()
        assert len(where) == 8
        assert int(where.min()) >= queries_from
        seen = {int(ids[at]): int(ids[at + 1]) for at in range(queries_from - 1) if 16 <= ids[at] < 48}
        assert [seen[int(ids[at])] for at in where] == targets[where].tolist()


def test_positions_of_short_samples_are_kept_and_hashed_as_bytes():
    data = make_recall(RecallSettings(train=2, validation=1, test=1))
    assert data.train.queries.dtype == torch.uint8
    assert (
        make_recall(RecallSettings(length=300, queries_from=200, train=2, validation=1, test=1)).train.queries.dtype
        == torch.int32
    )


def test_missing_folder_has_the_free_space_of_its_disk(tmp_path):
    check_disk(tmp_path / "a" / "b", 1, "something small")
    with pytest.raises(
        DataError,
        match=r"something large needs about 10\^29 bytes in .*b, and [0-9,]+ bytes \(.* GiB\) are free; make room",
    ):
        check_disk(tmp_path / "a" / "b", 10**30, "something large")
