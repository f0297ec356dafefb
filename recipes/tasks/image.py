"""CIFAR-10 in grey: 60,000 photographs of 32 x 32 pixels in 10 classes, row after row. The image task of the Long
Range Arena.

The files are those of the binary version: six files of 10,000 records. A record is a byte for the class, then 1,024
bytes each of red, green and blue. The Python version is not read, because it is pickled, and unpickling can run any
code.

Reference:
    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
    https://www.cs.toronto.edu/~kriz/cifar.html.
    Grey as Tay et al., "Long Range Arena", arXiv 2011.04006: ITU-R 601-2 luma.
"""

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from pydantic import Field

from sma.errors import DataError, parsing
from sma.files import open_file
from sma.recipes.io.hub import from_hub
from sma.recipes.io.published import published_folder
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.digits import SIDE as DIGIT_SIDE
from sma.recipes.tasks.digits import DigitsSettings, read_digits, split_digits
from sma.recipes.tasks.grey import GreyDataset
from sma.spec import Spec, register

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
RECORDS = 10_000
"""Number of records of every file."""

TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
FOLDER = "cifar-10-batches-bin"
ARCHIVE = "cifar-10-binary.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # the page of the data set gives no better hash
HUB = "uoft-cs/cifar10"

_PICKLED = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
_PIXELS = SIDE * SIDE
_RECORD = 1 + 3 * _PIXELS
_MEAN, _STD = 0.48, 0.24

Images = tuple[UInt8[np.ndarray, "N 1024"], UInt8[np.ndarray, " N"]]


class CifarSettings(Spec):
    """The source of CIFAR-10, and the split of its training images. The same settings give the same splits."""

    source: Literal["binary", "hub", "digits"] = Field(
        default="binary",
        description="binary: the files of the binary version; hub: the Hugging Face Hub, through the package "
        "`datasets`; digits: for trials of the pipeline, scikit-learn's handwritten digits, each pixel enlarged to "
        "4 x 4, 1,438 training and validation images and 359 test images",
    )
    download: bool = Field(default=False, description="download the binary version (170 MB) if it is not found")
    validation: int = Field(
        default=5_000, ge=1, lt=5 * RECORDS, description="number of training images in the validation split"
    )
    seed: int = Field(default=42, ge=0, lt=2**31, description="seed of the split")


def load_cifar(settings: CifarSettings, folder: str | Path, *, progress: bool = True) -> TaskData:
    """Return the grey images in three splits of 45,000, 5,000 and 10,000; pixels are (x / 255 - 0.48) / 0.24.

    Args:
        settings: source and split.
        folder: the data folder, with `cifar-10-batches-bin`, or with `cifar-10-binary.tar.gz`, which is unpacked.
        progress: whether to show a progress bar of the download.

    Raises:
        DataError: the data is not found, or a file is damaged; the message has the file.
    """
    if settings.source == "digits":
        train, test = _from_digits()
    elif settings.source == "hub":
        train, test = _from_hub(Path(folder))
    else:
        train, test = _from_files(settings, Path(folder), progress)
    if settings.validation >= len(train[1]):
        raise DataError(
            f"validation={settings.validation} leaves none of the {len(train[1])} training images to train on; lower it"
        )
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(settings.seed)).numpy()
    kept = len(order) - settings.validation
    splits = [*(tuple(part[numbers] for part in train) for numbers in (order[:kept], order[kept:])), test]
    datasets = [GreyDataset(pixels, targets, _MEAN, _STD, 255) for pixels, targets in splits]
    names = tuple(map(str, range(len(CLASSES)))) if settings.source == "digits" else CLASSES
    return TaskData.of(datasets, datasets[0].show, class_names=names, image_shape=(SIDE, SIDE))


def read_batch(path: Path) -> Images:
    """Read one file of the binary version; returns grey pixels and classes.

    Raises:
        DataError: the file cannot be read, has another size, or has a class above 9; the message has the file and the
            record.
    """
    with open_file(path) as file, parsing(path):
        size = os.fstat(file.fileno()).st_size
        if size != RECORDS * _RECORD:
            raise DataError(
                f"{path} has {size:,} bytes; {RECORDS * _RECORD:,} are required, {RECORDS:,} records of {_RECORD:,}: "
                f"it is truncated or not a file of the binary version; delete it and unpack {ARCHIVE} again"
            )
        records = np.frombuffer(file.read(size), dtype=np.uint8).reshape(RECORDS, _RECORD)
    _check_classes(records[:, 0], str(path))
    return to_grey(records[:, 1:].reshape(RECORDS, 3, _PIXELS)), records[:, 0].copy()


def to_grey(colours: UInt8[np.ndarray, "N 3 L"]) -> UInt8[np.ndarray, "N L"]:
    """Return grey values, equal to those of Pillow's mode L: 0.299 R + 0.587 G + 0.114 B, with 16-bit fixed-point
    coefficients, rounded.

    Shape:
        `(N, 3, L)` in, `(N, L)` out.
    """
    red, green, blue = (colours[:, part].astype(np.uint32) for part in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)


def _from_files(settings: CifarSettings, folder: Path, progress: bool) -> tuple[Images, Images]:
    unpacked = folder / ARCHIVE.removesuffix(".tar.gz")
    missing = (
        f"there is neither {FOLDER} (with {TRAIN_FILES[0]} to {TRAIN_FILES[-1]} and {TEST_FILE}) "
        f"nor {ARCHIVE} in {folder}"
    )
    for name in _PICKLED:
        if os.path.exists(folder / name):  # unlike Path.exists, false for invalid names
            missing += f" but {name}, which is not read, because unpickling it could run any code"
    source = published_folder(
        [folder / FOLDER, unpacked / FOLDER],
        [folder / ARCHIVE],
        unpacked,
        url=URL,
        md5=MD5,
        archive_most=1 << 28,  # the archive has 170 MB
        files_most=(len(TRAIN_FILES) + 1) * RECORDS * _RECORD,
        missing=missing,
        members=lambda name: name.rpartition("/")[2] in (*TRAIN_FILES, TEST_FILE),
        download=settings.download,
        progress=progress,
    )
    parts = [read_batch(source / name) for name in TRAIN_FILES]
    train = np.concatenate([pixels for pixels, _ in parts]), np.concatenate([targets for _, targets in parts])
    return train, read_batch(source / TEST_FILE)


def _from_digits() -> tuple[Images, Images]:
    pixels, targets = read_digits()
    train, validation, test = split_digits(targets, DigitsSettings())
    factor = SIDE // DIGIT_SIDE
    images = (pixels.astype(np.uint16) * 255 // 16).astype(np.uint8).reshape(-1, DIGIT_SIDE, DIGIT_SIDE)
    grey = images.repeat(factor, 1).repeat(factor, 2).reshape(-1, _PIXELS)
    train = np.concatenate([train, validation])
    return (grey[train], targets[train]), (grey[test], targets[test])


def _from_hub(folder: Path) -> tuple[Images, Images]:
    found = from_hub(HUB, folder, otherwise="binary")
    with parsing(f"the data set {HUB} of the Hub", hint="set task.data.source=binary"):
        return _decoded(found, "train"), _decoded(found, "test")


def _decoded(found: Any, split: str) -> Images:
    rows = found[split]
    colours, targets = np.empty((len(rows), 3, _PIXELS), dtype=np.uint8), np.empty(len(rows), dtype=np.int64)
    for number, row in enumerate(rows):
        picture = np.asarray(row["img"])
        if picture.shape != (SIDE, SIDE, 3) or picture.dtype != np.uint8:
            raise DataError(
                f"image {number} of the split {split!r} of {HUB} has shape {picture.shape} and dtype {picture.dtype}; "
                f"({SIDE}, {SIDE}, 3) and uint8 are required"
            )
        colours[number] = picture.reshape(_PIXELS, 3).T
        targets[number] = row["label"]
    _check_classes(targets, f"the split {split!r} of {HUB}")
    return to_grey(colours), targets.astype(np.uint8)


def _check_classes(targets: Integer[np.ndarray, " N"], where: str) -> None:
    bad = np.flatnonzero((targets < 0) | (targets >= len(CLASSES)))
    if len(bad):
        raise DataError(
            f"{where}: record {bad[0]} has the class {targets[bad[0]]}; "
            f"classes are 0 to {len(CLASSES) - 1}, so the data is damaged"
        )


@register
class ImageTask(ClassificationTask):
    """Grey photographs of 32x32 pixels, read pixel by pixel; the class is one of ten kinds of objects.

    With `source=digits`, handwritten digits enlarged to that size; the class is the digit.
    """

    kind: Literal["image"] = "image"
    data: CifarSettings = Field(default=CifarSettings(), description="source of the images, and their splits")
    numbers: ClassVar[str] = "grey values"

    @property
    def classes(self) -> int:
        return len(CLASSES)

    @property
    def least_length(self) -> int:
        return SIDE * SIDE

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        return load_cifar(self.data, folder, progress=progress)
