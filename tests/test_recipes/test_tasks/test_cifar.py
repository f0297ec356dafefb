"""CIFAR-10: the binary version and the Hub give the same grey images, and damaged or pickled files are refused."""

import hashlib
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sma.errors import DataError, SpecError
from sma.recipes.io import published
from sma.recipes.tasks import image as cifar
from sma.recipes.tasks.image import (
    ARCHIVE,
    CLASSES,
    FOLDER,
    TEST_FILE,
    TRAIN_FILES,
    CifarSettings,
    load_cifar,
    read_batch,
    to_grey,
)

COUNT = 12
SETTINGS = CifarSettings(validation=10)
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Reduce the files to 12 records."""
    monkeypatch.setattr(cifar, "RECORDS", COUNT)


@pytest.fixture(autouse=True)
def any_archive(monkeypatch):
    """Accept made-up archives: check no hash."""
    monkeypatch.setattr(cifar, "MD5", None)


def make_files(folder):
    """Write the six files; return colours `(N, 32, 32, 3)` and labels by file."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name in (*TRAIN_FILES, TEST_FILE):
        labels, images = (
            rng.integers(0, 10, COUNT, dtype=np.uint8),
            rng.integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8),
        )
        planes = images.transpose(0, 3, 1, 2).reshape(COUNT, -1)
        (folder / name).write_bytes(np.hstack([labels[:, None], planes]).tobytes())
        made[name] = images, labels
    return made


def make_archive(folder):
    make_files(folder / "made" / FOLDER)
    (folder / "made" / FOLDER / "readme.html").write_text("not unpacked")
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        archive.add(folder / "made" / FOLDER, FOLDER)


def make_hub(monkeypatch, made, **changes):
    """Install a stand-in for the package datasets; return the list of its calls."""

    def rows(names):
        return [
            {"img": Image.fromarray(image), "label": int(label)}
            for name in names
            for image, label in zip(*made[name], strict=True)
        ]

    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return {"train": rows(TRAIN_FILES), "test": rows([TEST_FILE]), **changes}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def same(left, right):
    return left.hashes == right.hashes and all(
        np.array_equal(a.pixels, b.pixels) for a, b in zip(left[:3], right[:3], strict=True)
    )


def test_grey_values_equal_those_of_pillow_bit_for_bit():
    values = np.array([0, 1, 2, 3, 27, 63, 64, 100, 127, 128, 129, 200, 253, 254, 255], dtype=np.uint8)
    colours = np.stack(np.meshgrid(values, values, np.arange(256, dtype=np.uint8)), axis=-1).reshape(1, -1, 3)
    expected = np.asarray(Image.fromarray(colours).convert("L"))
    assert np.array_equal(to_grey(colours.transpose(0, 2, 1)), expected)


def test_samples_are_standardised_grey_values_of_pillow(tmp_path):
    made = make_files(tmp_path / FOLDER)
    data = load_cifar(SETTINGS, tmp_path)
    images, labels = made[TEST_FILE]
    assert data.test.lengths.tolist() == [1024] * COUNT
    assert (data.class_names, data.image_shape) == (CLASSES, (32, 32))
    for number in range(COUNT):
        grey = np.asarray(Image.fromarray(images[number]).convert("L"))
        pixels, target = data.test[number]
        assert pixels.dtype == torch.float32
        assert torch.allclose(
            pixels.double(), (torch.from_numpy(grey.reshape(-1).astype(np.float64)) / 255 - 0.48) / 0.24, atol=1e-6
        )
        assert target == labels[number]
        assert data.show(pixels) == [str(value) for value in grey.reshape(-1)]


def test_training_files_are_split_as_torch_does_with_seed_42(tmp_path):
    made = make_files(tmp_path / FOLDER)
    data = load_cifar(SETTINGS, tmp_path)
    grey = [
        np.asarray(Image.fromarray(image).convert("L")).reshape(-1) for name in TRAIN_FILES for image in made[name][0]
    ]
    labels = [int(label) for name in TRAIN_FILES for label in made[name][1]]
    generator = torch.Generator().manual_seed(42)
    parts = torch.utils.data.random_split(range(60), [50, 10], generator=generator)
    for split, part in zip(data[:2], parts, strict=True):
        assert split.targets.tolist() == [labels[number] for number in part]
        assert np.array_equal(split.pixels, np.stack([grey[number] for number in part]))


def test_defaults_hold_out_5000_images_with_seed_42():
    assert (CifarSettings().validation, CifarSettings().seed) == (5000, 42)
    assert len(TRAIN_FILES) == 5
    assert len(CLASSES) == 10


def test_hashes_cover_grey_values_and_classes(tmp_path):
    make_files(tmp_path / FOLDER)
    data = load_cifar(SETTINGS, tmp_path)
    for name, split in zip(SPLITS, data[:3], strict=True):
        assert data.hashes[name] == hashlib.sha256(split.pixels.tobytes() + bytes(split.targets.tolist())).hexdigest()
    assert len(set(data.hashes.values())) == 3


def test_archive_and_folder_give_the_same_data(tmp_path):
    make_archive(tmp_path / "archive")
    make_files(tmp_path / "folder" / FOLDER)
    unpacked = load_cifar(SETTINGS, tmp_path / "archive")
    assert same(unpacked, load_cifar(SETTINGS, tmp_path / "folder"))
    (tmp_path / "archive" / ARCHIVE).unlink()
    assert same(unpacked, load_cifar(SETTINGS, tmp_path / "archive"))  # the unpacked files are kept
    assert list((tmp_path / "archive").rglob("cifar-10-binary/**/*.html")) == []


def test_error_names_an_archive_with_another_layout(tmp_path):
    make_files(tmp_path / "made")
    with tarfile.open(tmp_path / ARCHIVE, "w:gz") as archive:
        archive.add(tmp_path / "made", "data")
    with pytest.raises(
        DataError,
        match=rf"cifar-10-binary, unpacked from .*{ARCHIVE}, has no {FOLDER} where it should be; delete both and",
    ):
        load_cifar(SETTINGS, tmp_path)


def test_download_uses_the_published_url_and_hash(tmp_path, monkeypatch):
    asked = []

    def fetch(url, path, **keywords):
        asked.append((url, path, keywords))
        make_archive(tmp_path)

    monkeypatch.setattr(published, "fetch", fetch)
    monkeypatch.setattr(cifar, "MD5", "published")
    data = load_cifar(CifarSettings(validation=10, download=True), tmp_path, progress=False)
    assert asked == [
        (cifar.URL, tmp_path / ARCHIVE, {"sha256": None, "md5": "published", "most": 1 << 28, "progress": False})
    ]
    assert same(data, load_cifar(SETTINGS, tmp_path))
    assert len(asked) == 1


def test_hub_gives_the_same_data_as_the_files(tmp_path, monkeypatch):
    asked = make_hub(monkeypatch, make_files(tmp_path / FOLDER))
    data = load_cifar(CifarSettings(source="hub", validation=10), tmp_path)
    assert same(data, load_cifar(SETTINGS, tmp_path))
    assert asked == [(("uoft-cs/cifar10",), {"cache_dir": str(tmp_path / "huggingface")})]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"img": Image.new("L", (32, 32)), "label": 1},
            r"image 0 of the split 'test' of uoft-cs/cifar10 has shape \(32, 32\)",
        ),
        (
            {"img": Image.new("RGB", (32, 31)), "label": 1},
            r"has shape \(31, 32, 3\) and dtype uint8; \(32, 32, 3\) and uint8 are required",
        ),
        (
            {"img": Image.new("RGB", (32, 32)), "label": -1},
            r"the split 'test' of uoft-cs/cifar10: record 0 has the class -1",
        ),
    ],
)
def test_invalid_rows_of_the_hub_are_refused(tmp_path, monkeypatch, row, complaint):
    make_hub(monkeypatch, make_files(tmp_path / FOLDER), test=[row])
    with pytest.raises(DataError, match=complaint):
        load_cifar(CifarSettings(source="hub"), tmp_path)


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py"])
def test_pickled_version_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(
        DataError,
        match=rf"nor cifar-10-binary.* but {name}, which is not read, because unpickling .*; put https.*binary",
    ):
        load_cifar(SETTINGS, tmp_path)


@pytest.mark.parametrize("change", [-1, 1], ids=["truncated", "longer"])
def test_file_of_another_size_is_refused_by_name(tmp_path, change):
    make_files(tmp_path / FOLDER)
    path = tmp_path / FOLDER / "data_batch_3.bin"
    path.write_bytes((path.read_bytes() + b"\0")[: COUNT * 3073 + change])
    with pytest.raises(
        DataError,
        match=rf"data_batch_3.bin has {COUNT * 3073 + change:,} bytes; 36,876 are required, 12 records of 3,073",
    ):
        load_cifar(SETTINGS, tmp_path)


def test_missing_file_and_wrong_class_are_refused_by_name(tmp_path):
    make_files(tmp_path / FOLDER)
    path = tmp_path / FOLDER / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    content[5 * 3073] = 10
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"data_batch_2.bin: record 5 has the class 10; classes are 0 to 9, so the data is damaged"
    ):
        read_batch(path)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read '.*data_batch_2.bin': No such file or directory"):
        load_cifar(SETTINGS, tmp_path)


def test_validation_split_that_leaves_no_training_data_is_refused(tmp_path):
    make_files(tmp_path / FOLDER)
    with pytest.raises(DataError, match=r"validation=60 leaves none of the 60 training images to train on; lower it"):
        load_cifar(CifarSettings(validation=60), tmp_path)
    with pytest.raises(SpecError, match="validation"):
        CifarSettings(validation=50_000)
