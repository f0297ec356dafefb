"""The release of Pathfinder in the Long Range Arena: folders of PNG images, and text files with their labels.

    pathfinder32/curv_contour_length_14/imgs/BATCH/sample_NUMBER.png
    pathfinder32/curv_contour_length_14/metadata/BATCH.npy

Despite their names, the `.npy` files are text: one line per image, with fields separated by blanks. Field 0 is the
folder, field 1 the file and field 3 the label. Some images of the release are empty files, which are skipped.

Reference:
    Tay et al., "Long Range Arena", arXiv 2011.04006; https://github.com/google-research/long-range-arena.
"""

import io
import re
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sma.errors import DataError, parsing, quote, reason
from sma.files import read_file
from sma.recipes.io.published import is_visible
from sma.recipes.tasks.contract import SPLITS
from sma.recipes.tasks.grey import Chunk
from sma.recipes.tasks.lra import release_folder

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

LEVEL = "curv_contour_length_14"
"""Folder of the level of the Long Range Arena, the hardest of three."""

_SPLIT_SEED = 42
_HELD_OUT = 0.1
_LIST = 1 << 26  # maximum bytes of a list
_IMAGE = 1 << 16  # maximum bytes of an image, plus 4 for each of its pixels


class Record(NamedTuple):
    """An image of the release: its path in the folder of the level, its class, its bytes on the disk, and the time of
    its last change in nanoseconds.
    """

    path: str
    label: int
    bytes: int
    written: int


def find_release(folder: Path, size: int, *, download: bool = False, progress: bool = True) -> Path:
    """Return the folder of the level with images of `size` pixels. From an archive, only this level is unpacked.

    Raises:
        DataError: the folder is not found.
    """
    level = f"pathfinder{size}/{LEVEL}"
    lists = release_folder(
        folder,
        f"{level}/metadata",
        what=f"{level} with imgs/ and metadata/",
        unpacked=f"lra_release_pathfinder{size}",
        members=lambda name: f"/{level}/" in f"/{name}",
        download=download,
        progress=progress,
        instead=", or generate the images: task.data.source=generated",
    )
    return lists.parent


def list_release(root: Path) -> list[Record]:
    """Return the images of a level that are not empty, sorted by the number of their batch, then in the order of its
    list.

    Raises:
        DataError: a list or an image is missing, or a line of a list is broken; the message has the file and the line.
    """
    with parsing(root / "metadata"):
        lists = [path for path in (root / "metadata").iterdir() if path.suffix == ".npy" and is_visible(path.name)]
    for path in lists:
        if not re.fullmatch("[0-9]{1,9}", path.stem):
            raise DataError(f"{path} is not named after the number of a batch, such as 0.npy; move it elsewhere")
    found: list[Record] = []
    for path in sorted(lists, key=lambda path: int(path.stem)):
        found += _read_list(path, root)
    if len(found) < 3:
        raise DataError(f"{root} has {len(found)} images that are not empty; three splits need at least 3")
    return found


def _read_list(path: Path, root: Path) -> list[Record]:
    content = read_file(path, _LIST)
    if not content.isascii() or b"\0" in content:
        raise DataError(
            f"{path} is not text, but the lists of the release are text files despite their names; get the file again"
        )
    found = []
    for number, line in enumerate(content.decode("ascii").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) < 4 or fields[3] not in ("0", "1"):
            raise DataError(
                f"{path}, line {number}: {quote(line, 62)} is not 'folder file number label …', "
                "with blanks between and a label of 0 or 1"
            )
        name = PurePosixPath(fields[0], fields[1])
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{path}, line {number}: {quote(str(name))} leads out of {root}; the list is damaged")
        try:
            image = (root / name).stat()
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}, line {number} names {quote(str(name))}, which cannot be read: {reason(error)}"
            ) from error
        if not stat.S_ISREG(image.st_mode):
            raise DataError(f"{path}, line {number} names {quote(str(name))}, which is not a plain file; get it again")
        if image.st_size:
            found.append(Record(str(name), int(fields[3]), image.st_size, image.st_mtime_ns))
    return found


def split_records(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Split the images at random into 80 % for training and 10 % each for validation and test.

    The split equals that of `torch.utils.data.random_split` with seed 42, which published models were evaluated on.
    """
    held_out = max(1, int(_HELD_OUT * len(records)))
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    splits = order.split([len(records) - 2 * held_out, held_out, held_out])
    return {
        split: [records[number] for number in numbers.tolist()] for split, numbers in zip(SPLITS, splits, strict=True)
    }


def read_images(root: Path, size: int, records: Sequence[Record]) -> Chunk:
    """Decode images, row after row; returns their grey values and labels.

    Raises:
        DataError: a file is damaged or is not a grey image of `size` pixels; the message has the file.
    """
    images = np.empty((len(records), size * size), dtype=np.uint8)
    for row, record in enumerate(records):
        path = root / record.path
        content = read_file(path, _IMAGE + 4 * size * size)
        damaged = parsing(
            path, hint="it is truncated or damaged: get it again, or make it an empty file to leave it out"
        )
        with damaged, _open_png(content) as picture:
            if picture.size != (size, size) or picture.mode != "L":
                width, height = picture.size
                raise DataError(
                    f"{path} is an image of {width} x {height} pixels, mode {picture.mode}; "
                    f"{size} x {size} grey ones are required"
                )
            picture.load()
            images[row] = np.asarray(picture).reshape(-1)
    return images, np.array([record.label for record in records], dtype=np.uint8)


def _open_png(content: bytes) -> "ImageFile":
    from PIL import Image, UnidentifiedImageError  # here, because generated images do not need Pillow

    try:
        return Image.open(io.BytesIO(content), formats=("PNG",))
    except UnidentifiedImageError:  # its message has the address of an object in memory
        raise ValueError("it is not a PNG image") from None
