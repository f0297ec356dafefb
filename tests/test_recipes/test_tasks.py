"""Tasks: where the data of a recipe comes from."""

import pytest
import torch

from sma.errors import SpecError
from sma.recipes.data import listops
from sma.recipes.data.listops import FILES, decode, evaluate_expression
from sma.recipes.tasks import ClassificationTask, ListOpsTask
from sma.spec import dump_spec, kinds, load_spec
from tests.test_recipes.tiny import DATA


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return cache, ListOpsTask(data=DATA).prepare(cache, progress=False)


def test_tasks_are_kinds_of_a_family():
    assert kinds("task")["listops"] is ListOpsTask
    task = load_spec({"kind": "listops", "data": DATA}, family="task")
    assert load_spec(dump_spec(task), family="task") == task


def test_splits_hold_what_was_asked_for(prepared):
    _, data = prepared
    assert [len(split) for split in (data.train, data.validation, data.test)] == [120, 40, 60]
    for split in (data.train, data.validation, data.test):
        assert split.lengths.tolist() == [len(split[number][0]) for number in range(len(split))]
        assert 3 < int(split.lengths.min()) <= int(split.lengths.max()) < 30


def test_targets_are_the_values_of_the_expressions(prepared):
    task, (_, data) = ListOpsTask(data=DATA), prepared
    for number in range(len(data.test)):
        ids, target = data.test[number]
        assert 0 <= target < task.classes
        assert target == evaluate_expression(decode(ids).split())


def test_every_position_of_a_sample_has_a_text(prepared):
    _, data = prepared
    batch = data.collate([data.test[number] for number in range(10)])
    for row in range(10):
        texts = data.show(batch.inputs[row][batch.valid[row]])
        assert len(texts) == int(batch.valid[row].sum())
        assert " ".join(texts) == decode(data.test[row][0])


def test_hash_of_every_file_is_recorded(prepared):
    cache, data = prepared
    assert set(data.hashes) == set(FILES.values())
    (folder,) = cache.iterdir()
    assert data.hashes == {name: listops.sha256_of(folder / name) for name in FILES.values()}


def test_second_run_reads_the_data_of_the_first(prepared, monkeypatch):
    cache, data = prepared
    monkeypatch.setattr(listops, "generate_lines", None)
    again = ListOpsTask(data=DATA).prepare(cache, progress=False)
    assert again.hashes == data.hashes
    assert torch.equal(again.train.lengths, data.train.lengths)


def test_data_of_other_settings_lies_beside_it(prepared):
    cache, data = prepared
    other = ListOpsTask(data={**DATA, "seed": 1}).prepare(cache, progress=False)
    assert other.hashes != data.hashes
    assert len(list(cache.iterdir())) == 2
    assert ListOpsTask(data=DATA).prepare(cache, progress=False).hashes == data.hashes


def test_unfinished_task_says_what_it_must_define(tmp_path):
    class Unfinished(ClassificationTask):
        kind: str = "unfinished"

    with pytest.raises(TypeError, match="Unfinished must define classes"):
        _ = Unfinished().classes
    with pytest.raises(TypeError, match="Unfinished must define prepare"):
        Unfinished().prepare(tmp_path)


def test_impossible_data_is_refused_before_anything_is_generated():
    with pytest.raises(SpecError, match="no length lies between min_length=3 and max_length=4"):
        ListOpsTask(data={**DATA, "max_length": 4})
