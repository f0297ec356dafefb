"""Tasks: their data, the models that they accept, and errors about missing data."""

import re
import sys
from types import SimpleNamespace

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
from sma.recipes.tasks.listops.expressions import decode
from sma.recipes.tasks.listops.task import ListOpsTask
from sma.recipes.training.run import run_experiment
from sma.spec import dump_spec, kinds, load_spec
from tests.test_recipes.tiny import DATA

ALL = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "digits", "speech", "language", "recall", "mqar")
PIXELS = ("image", "pathfinder", "digits")
NUMBERS = r"model\.encoder\.kind='token_embedding' does not read {}; use kind 'real_number'"
RELEASE = ["task.data.source=release"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return cache, ListOpsTask(data=DATA).prepare(cache, progress=False)


def test_every_position_of_a_sample_has_a_text(prepared):
    _, data = prepared
    batch = data.collate([data.test[number] for number in range(10)])
    for row in range(10):
        texts = data.show(batch.inputs[row][batch.valid[row]])
        assert len(texts) == int(batch.valid[row].sum())
        assert " ".join(texts) == decode(data.test[row][0])


def test_data_of_other_settings_is_kept_in_another_folder(prepared):
    cache, data = prepared
    other = ListOpsTask(data={**DATA, "seed": 1}).prepare(cache, progress=False)
    assert other.hashes != data.hashes
    assert len(list(cache.iterdir())) == 2
    assert ListOpsTask(data=DATA).prepare(cache, progress=False).hashes == data.hashes


def test_error_of_an_unfinished_task_names_what_it_must_define(tmp_path):
    class Unfinished(ClassificationTask):
        kind: str = "unfinished"

    with pytest.raises(TypeError, match="Unfinished must define classes"):
        _ = Unfinished().classes
    with pytest.raises(TypeError, match="Unfinished must define prepare"):
        Unfinished().prepare(tmp_path)


def test_invalid_data_settings_are_refused_at_construction():
    with pytest.raises(SpecError, match="no length lies between min_length=3 and max_length=4"):
        ListOpsTask(data={**DATA, "max_length": 4})


def test_digits_as_images_are_enlarged_and_keep_their_test_split(tmp_path):
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


def test_default_validation_size_of_cifar_is_too_large_for_digits(tmp_path):
    with pytest.raises(
        DataError, match="validation=5000 leaves none of the 1438 training images to train on; lower it"
    ):
        ImageTask(data={"source": "digits"}).prepare(tmp_path)


@pytest.mark.parametrize("task", ALL)
def test_tasks_are_registered_kinds_that_round_trip(task):
    made = load_experiment(f"{task}_tiny").task
    assert kinds("task")[task] is type(made)
    assert load_spec(dump_spec(made), family="task") == made


@pytest.mark.parametrize(
    ("task", "setting", "complaint"),
    [
        *((task, "{kind: token_embedding, vocabulary: 17}", NUMBERS.format("grey values")) for task in PIXELS),
        ("digits", "{kind: linear, features: 64}", r"kind='linear' does not read grey values; use kind 'real_number'"),
        ("speech", "{kind: token_embedding, vocabulary: 17}", NUMBERS.format("samples of a sound")),
        ("text", "{kind: token_embedding, vocabulary: 256}", "encoder.vocabulary=256 must be at least 257: padding"),
        ("text", "{kind: real_number}", r"model\.encoder\.vocabulary=0 must be at least 257"),
    ],
)
def test_model_that_does_not_read_the_inputs_is_refused(task, setting, complaint):
    with pytest.raises(SpecError, match=complaint):
        load_experiment(f"{task}_tiny", [f"encoder={setting}"])


@pytest.mark.parametrize("task", sorted({*ALL} - {"language", "mqar", "recall"}))
def test_model_with_other_classes_is_refused(task):
    with pytest.raises(SpecError, match=rf"head\.classes=99 must be \d+, the classes of the task '{task}'"):
        load_experiment(dump_spec(load_experiment(f"{task}_tiny")), ["head.classes=99"])


def missing_data_error(task, folder, settings):
    """Error message of a task without data, and the settings that it advises."""
    with pytest.raises(DataError) as caught:
        load_experiment(f"{task}_paper", settings).task.prepare(folder, progress=False)
    return str(caught.value), re.findall(r"[\w.]+=[a-z]\w*", str(caught.value))


def test_advice_next_to_pickled_cifar_can_be_followed(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    _, advice = missing_data_error("image", tmp_path, [])
    assert load_experiment("image_paper", advice).task.data.download


@pytest.mark.parametrize(
    ("task", "settings", "complaint"),
    [
        ("listops", ["task.source=released"], r"no listops-1000/ with basic_train\.tsv"),
        ("text", [], r"no IMDB reviews in .*imdb: neither aclImdb/\{train,test\}.* nor aclImdb_v1\.tar\.gz; put"),
        ("retrieval", [], r"no tsv_data/ with new_aan_pairs\.train\.tsv"),
        ("image", [], r"neither cifar-10-batches-bin \(with data_batch_1.bin to .*\) nor cifar-10-binary.tar.gz in"),
        ("pathfinder", RELEASE, r"no pathfinder32/curv_contour_length_14 with imgs/ and metadata/ in .*, nor a"),
        ("pathx", RELEASE, "no pathfinder128/curv_contour_length_14"),
        ("speech", [], r"neither the folder .*speech_commands_v0.02, with yes/\*.wav and so on, nor the archive"),
        ("language", [], "no file 'enwik8.zip'"),
    ],
)
def test_missing_data_is_described_with_advice_that_can_be_followed(task, settings, complaint, tmp_path, monkeypatch):
    def fetch(url, *arguments, **keywords):
        raise DataError(f"asked for {url}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "fetch", fetch)
    monkeypatch.setattr(text, "fetch", fetch)
    said, advice = missing_data_error(task, tmp_path, settings)
    assert re.search(complaint, said)
    assert list(tmp_path.iterdir()) == []
    (download,) = [setting for setting in advice if setting.endswith("download=true")]
    asked, _ = missing_data_error(task, tmp_path, [*settings, download])
    assert asked.removeprefix("asked for ") in said
    for setting in set(advice) - {download}:
        before, after = (load_experiment(f"{task}_paper", chosen) for chosen in (settings, [*settings, setting]))
        assert before.task != after.task


def no_route(*arguments, **keywords):
    raise ConnectionError("no route")


@pytest.mark.parametrize("task", ["text", "image"])
@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        pytest.param(None, "reads .* through the package datasets, which is not installed; pip", id="no package"),
        pytest.param(object(), "cannot get .* from the Hub", id="another package"),
        pytest.param(SimpleNamespace(load_dataset=no_route), "from the Hub: no route; check the", id="no network"),
    ],
)
def test_advice_without_access_to_the_hub_can_be_followed(task, module, complaint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", module)
    hub = "task.data.source=hub"
    said, advice = missing_data_error(task, tmp_path, [hub])
    assert re.search(complaint, said)
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


@pytest.mark.slow
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
    routed = [layer for layer in spec.model.layer_specs if layer.modules]
    assert routed
    assert all(layer.modules["attention"].position.max_positions >= longest for layer in routed)
