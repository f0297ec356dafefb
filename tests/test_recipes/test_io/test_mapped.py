"""Memory-mapped arrays are pickled as the path of their file, and otherwise behave like plain arrays."""

import multiprocessing
import os
import pickle

import numpy as np
import pytest
from torch.utils.data import DataLoader

from sma.errors import DataError
from sma.recipes.io.mapped import Mapped, map_file
from sma.recipes.tasks.batch import collate
from sma.recipes.tasks.pathfinder.images import PathfinderSettings, prepare_pathfinder
from sma.recipes.tasks.retrieval import AANSettings, load_aan
from sma.recipes.tasks.speech.clips import SpeechSettings, load_speech
from tests.test_recipes.test_tasks.test_aan import release
from tests.test_recipes.tiny_speech import write_corpus

NUMBERS = np.arange(3_000_000, dtype="<i2").reshape(-1, 1000)


@pytest.fixture
def mapped(tmp_path):
    (tmp_path / "numbers").write_bytes(b"head" + NUMBERS.tobytes())
    return map_file(tmp_path / "numbers", "<i2", NUMBERS.shape, 4)


def test_array_is_pickled_as_its_path_and_restored_unchanged(mapped):
    pickled = pickle.dumps(mapped)
    assert len(pickled) < 1000
    found = pickle.loads(pickled)
    assert isinstance(found, Mapped)
    assert found.filename == mapped.filename
    assert np.array_equal(found, NUMBERS)
    assert len(pickle.dumps(found)) < 1000


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda array: array[10:20], id="slice"),
        pytest.param(lambda array: array[:, ::7], id="stride"),
        pytest.param(lambda array: array[[3, 1]], id="numbers"),
        pytest.param(lambda array: array[5], id="row"),
        pytest.param(lambda array: array.reshape(-1)[:50], id="reshaped"),
        pytest.param(lambda array: array.reshape(1000, -1), id="whole in another shape"),
        pytest.param(lambda array: array.astype(np.float64), id="converted"),
        pytest.param(lambda array: array.copy(), id="copy"),
        pytest.param(lambda array: array + 1, id="sum"),
        pytest.param(lambda array: array.max(), id="number"),
        pytest.param(lambda array: array[0, 0], id="element"),
    ],
)
def test_part_of_an_array_is_pickled_by_value(mapped, part):
    found, expected = pickle.loads(pickle.dumps(part(mapped))), part(NUMBERS)
    assert np.array_equal(found, expected)
    assert found.dtype == expected.dtype


def test_computed_arrays_are_not_memory_mapped(mapped):
    for computed in (mapped + 1, mapped.mean(0), np.maximum(mapped, 0), mapped[3]):
        assert type(computed) is np.ndarray
    assert type(mapped.sum()) is type(NUMBERS.sum())


def test_replaced_file_is_refused(mapped):
    pickled = pickle.dumps(mapped)
    os.utime(mapped.filename, ns=(1, 1))
    with pytest.raises(DataError, match=r"numbers was replaced after another process had opened it; start again"):
        pickle.loads(pickled)
    os.truncate(mapped.filename, 100)
    with pytest.raises(
        DataError, match=r"numbers has 100 bytes, and 6,000,004 are required for numbers of the shape \(3000, 1000\)"
    ):
        pickle.loads(pickled)


def test_file_of_another_size_is_refused_however_large_the_shape(tmp_path):
    (tmp_path / "numbers").write_bytes(bytes(8))
    with pytest.raises(DataError, match=r"numbers has 8 bytes, and 2,000,000,000,000,000,000,000,000 are required for"):
        map_file(tmp_path / "numbers", "<i2", (10**12, 10**12))


def make_pathfinder(folder):
    return prepare_pathfinder(
        PathfinderSettings(train=40, validation=1, test=1), folder, workers=1, progress=False
    ).train


def make_speech(folder):
    write_corpus(folder)
    return load_speech(SpeechSettings(), folder, progress=False).train


def make_aan(folder):
    release(folder / "tsv_data")
    return load_aan(AANSettings(), folder, progress=False).train


@pytest.mark.parametrize(("make", "name"), [(make_pathfinder, "pixels"), (make_speech, "clips"), (make_aan, "content")])
def test_data_sets_on_disk_are_pickled_by_path(make, name, tmp_path):
    data = make(tmp_path)
    assert len(pickle.dumps(getattr(data, name))) < 1000
    found = pickle.loads(pickle.dumps(data))
    assert len(found) == len(data)
    assert str(found[0]) == str(data[0])


@pytest.mark.slow
def test_spawned_workers_read_the_same_batches(tmp_path):
    data = make_pathfinder(tmp_path)
    context = multiprocessing.get_context("spawn")
    workers = DataLoader(data, 8, collate_fn=collate, num_workers=1, multiprocessing_context=context)
    for found, expected in zip(workers, DataLoader(data, 8, collate_fn=collate), strict=True):
        assert found.inputs.equal(expected.inputs)
        assert found.targets.equal(expected.targets)
