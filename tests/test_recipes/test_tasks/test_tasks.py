"""Tasks: where the data of a recipe comes from."""

import re
import sys

import pytest
import torch

from sma.errors import DataError, SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.io import published
from sma.recipes.tasks import python_text
from sma.recipes.tasks.contract import ClassificationTask
from sma.recipes.tasks.digits import load_digits
from sma.recipes.tasks.image import ImageTask
from sma.recipes.tasks.language import corpus as text
from sma.recipes.tasks.listops import expressions as listops
from sma.recipes.tasks.listops.expressions import FILES, decode, evaluate_expression
from sma.recipes.tasks.listops.task import ListOpsTask
from sma.recipes.training.run import run_experiment
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
    assert data.hashes == {name: listops.digest_of(folder / name) for name in FILES.values()}


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


def test_digits_in_the_place_of_photographs_are_enlarged_and_keep_their_test_images(tmp_path):
    data = ImageTask(data={"source": "digits", "validation": 180}).prepare(tmp_path)
    assert data.class_names == tuple("0123456789")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [1258, 180, 359]
    small = load_digits().test
    assert data.test.targets.tolist() == small.targets.tolist()
    for number in (0, 7, 358):
        image = torch.from_numpy(data.test.pixels[number]).view(8, 4, 8, 4)
        corners = image[:, 0, :, 0]
        assert torch.equal(image, corners[:, None, :, None].expand(8, 4, 8, 4))
        assert corners.flatten().tolist() == [int(grey) * 255 // 16 for grey in small.pixels[number]]
    assert len(set(data.hashes.values())) == 3


def test_validation_share_of_the_photographs_is_too_large_for_the_digits(tmp_path):
    with pytest.raises(
        DataError, match="validation=5000 leaves none of the 1438 training images to train on; lower it"
    ):
        ImageTask(data={"source": "digits"}).prepare(tmp_path)


RELEASED = {
    "listops": ["task.source=released"],
    "text": [],
    "retrieval": [],
    "image": [],
    "pathfinder": ["task.data.source=release"],
    "pathx": ["task.data.source=release"],
    "speech": [],
    "language": [],
}


def what_is_missing(task, folder, settings):
    """What a task says without data, and the settings that it advises."""
    with pytest.raises(DataError) as caught:
        load_experiment(f"{task}_paper", settings).task.prepare(folder, progress=False)
    return str(caught.value), re.findall(r"[\w.]+=[a-z]\w*", str(caught.value))


@pytest.mark.parametrize("task", RELEASED)
def test_advice_for_missing_data_can_be_followed(task, tmp_path, monkeypatch):
    def fetch(url, *arguments, **keywords):
        raise DataError(f"asked for {url}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "fetch", fetch)
    monkeypatch.setattr(text, "fetch", fetch)
    said, advice = what_is_missing(task, tmp_path, RELEASED[task])
    (download,) = [setting for setting in advice if setting.endswith("download=true")]
    asked, _ = what_is_missing(task, tmp_path, [*RELEASED[task], download])
    assert asked.removeprefix("asked for ") in said
    for setting in set(advice) - {download}:
        before, after = (
            load_experiment(f"{task}_paper", settings) for settings in (RELEASED[task], [*RELEASED[task], setting])
        )
        assert before.task != after.task


def test_advice_beside_the_pickled_photographs_can_be_followed(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    _, advice = what_is_missing("image", tmp_path, [])
    assert load_experiment("image_paper", advice).task.data.download


@pytest.mark.parametrize("task", ["text", "image"])
@pytest.mark.parametrize("module", [None, object()], ids=["no package", "another package"])
def test_advice_where_the_hub_cannot_be_had_can_be_followed(task, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", module)
    hub = "task.data.source=hub"
    _, advice = what_is_missing(task, tmp_path, [hub])
    (instead,) = set(advice) - {hub}
    assert load_experiment(f"{task}_paper", [instead]).task == load_experiment(f"{task}_paper").task


FEW = {
    "listops": ["task.data.train=8", "task.data.validation=4", "task.data.test=4"],
    "text": [],
    "retrieval": [],
    "image": [],
    "pathfinder": ["task.data.train=8", "task.data.validation=4", "task.data.test=4"],
    "pathx": ["task.data.train=8", "task.data.validation=4", "task.data.test=4"],
    "digits": [],
}


@pytest.mark.parametrize("task", FEW)
def test_tiny_preset_of_every_task_trains_and_is_evaluated(task, tmp_path, monkeypatch):
    monkeypatch.setattr(python_text, "LIMITS", {"train": 40, "validation": 40, "test": 40})
    quick = [
        "training.updates=1",
        "training.warmup=0",
        "training.batch_size=4",
        "training.evaluate_every=1",
        "training.budget=null",
    ]
    spec = load_experiment(f"{task}_tiny", [*quick, *FEW[task]])
    data = spec.task.prepare(tmp_path, progress=False)
    summary = run_experiment(spec, tmp_path / "run", data, accelerator="cpu", progress=False).summary
    assert summary["task"] == task
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["data"] == dict(data.hashes)
    longest = max(int(split.lengths.max()) for split in (data.train, data.validation, data.test))
    assert spec.model.layer_specs[0].modules["attention"].position.max_positions >= longest
