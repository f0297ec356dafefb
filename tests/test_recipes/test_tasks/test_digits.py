"""Digits: every image is in one split, and splits are stratified by class and reproducible."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from sklearn import datasets

from sma.errors import DataError, SpecError
from sma.recipes.tasks.digits import DigitsSettings, DigitsTask, load_digits, read_digits, split_digits
from sma.spec import kinds

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    """The splits of the default settings."""
    return load_digits()


@pytest.fixture(scope="module")
def numbers():
    """Image indices of the splits of the default settings."""
    return split_digits(read_digits()[1], DigitsSettings())


@pytest.fixture(scope="module")
def images():
    """The data set of scikit-learn."""
    return datasets.load_digits()


def test_every_image_is_in_exactly_one_split(digits, numbers):
    assert sorted(np.concatenate(numbers).tolist()) == list(range(1797))
    assert [len(split) for split in digits[:3]] == [len(part) for part in numbers]


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.2), (0.25, 0.05), (0.013, 0.5)])
@pytest.mark.parametrize("digit", [0, 8])
def test_every_split_has_its_share_of_every_class(images, validation, test, digit):
    made = load_digits(DigitsSettings(validation=validation, test=test))
    count = int((images.target == digit).sum())
    found = [int((split.targets == digit).sum()) for split in made[:3]]
    assert abs(found[1] - validation * count) <= 0.5
    assert abs(found[2] - test * count) <= 0.5
    assert sum(found) == count


def test_samples_are_the_standardised_images_row_by_row(digits, numbers, images):
    grey = images.data[numbers[0]]
    for split, part in zip(digits[:3], numbers, strict=True):
        assert split.lengths.tolist() == [64] * len(split)
        for index in (0, 7, len(split) - 1):
            pixels, target = split[index]
            image = images.images[part[index]]
            expected = [(float(value) - grey.mean()) / grey.std() for row in image for value in row]
            assert pixels.dtype == torch.float32
            assert pixels.tolist() == pytest.approx(expected, abs=1e-5)
            assert target == images.target[part[index]]


def test_training_pixels_have_mean_0_and_deviation_1(digits):
    pixels = torch.stack([digits.train[index][0] for index in range(len(digits.train))]).double()
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-6)
    assert float(pixels.std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_shown_pixels_are_the_grey_values(digits, numbers, images):
    for index in range(0, len(digits.test), 40):
        image = images.data[numbers[2][index]]
        assert digits.show(digits.test[index][0]) == [str(int(value)) for value in image]


def test_equal_seeds_give_equal_splits_and_other_seeds_other_splits(digits):
    again, other = load_digits(DigitsSettings(seed=0)), load_digits(DigitsSettings(seed=1))
    assert again.hashes == digits.hashes
    assert set(other.hashes.values()) & set(digits.hashes.values()) == set()
    assert [len(split) for split in other[:3]] == [len(split) for split in digits[:3]]


def test_hashes_cover_grey_values_and_digits(digits, numbers, images):
    for name, part in zip(SPLITS, numbers, strict=True):
        content = images.data[part].astype(np.uint8).tobytes() + bytes(images.target[part].tolist())
        assert digits.hashes[name] == hashlib.sha256(content).hexdigest()


def test_splits_do_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    load_digits()
    assert torch.equal(torch.get_rng_state(), before)


def test_shares_that_leave_no_training_data_are_refused():
    with pytest.raises(
        SpecError, match=r"validation=0\.5 and test=0\.5 leave nothing to train on; their sum must be at most 0\.99"
    ):
        DigitsSettings(validation=0.5, test=0.5)


def test_split_without_an_image_of_some_class_is_refused():
    with pytest.raises(
        DataError, match=r"a split has no image of digit 0: validation=0\.001 or test=0\.2 is too small"
    ):
        load_digits(DigitsSettings(validation=0.001))


def test_missing_scikit_learn_gives_an_error_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        DataError, match=r"scikit-learn, which is not installed; install it: pip install scikit-learn.*\[recipes\]"
    ):
        load_digits()


def test_task_gives_batches_of_real_numbers(tmp_path):
    task = kinds("task")["digits"]()
    assert isinstance(task, DigitsTask)
    data = task.prepare(tmp_path)
    batch = data.collate([data.test[number] for number in range(5)])
    assert (batch.inputs.shape, batch.inputs.dtype, bool(batch.valid.all())) == ((5, 64), torch.float32, True)
    assert set(data.hashes) == set(SPLITS)
    assert len(data.show(batch.inputs[0])) == 64
    assert list(tmp_path.iterdir()) == []  # nothing is written
