"""Grey images read pixel by pixel: one array of bytes per split on the disk, from which samples are read on demand.

Every split has two `.npy` files, `NAME_images.npy` (N, pixels) and `NAME_labels.npy` (N,), both uint8. They are mapped
into memory, so a data set may be larger than the memory, and read without pickle.
"""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import DataError, parsing, quote
from sma.files import open_file
from sma.memory import check_memory
from sma.recipes.io.generated import HashedFile, cached_files
from sma.recipes.io.mapped import Mapped, map_file

SPLITS = ("train", "validation", "test")
GREYS = 255
"""The grey value of white."""


class GreyDataset(Dataset[tuple[Tensor, int]]):
    """Images as `(pixels, target)`: pixels (x / 255 - mean) / std of shape `(L,)`, row after row, and the class.

    Args:
        pixels: grey values x.
        targets: the classes.
        mean: mean of the standardisation.
        std: standard deviation of the standardisation.
    """

    def __init__(
        self, pixels: UInt8[np.ndarray, "N L"], targets: UInt8[np.ndarray, " N"], mean: float, std: float
    ) -> None:
        self.pixels, self.targets, self.mean, self.std = pixels, targets, mean, std

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, " L"], int]:
        number = range(len(self))[index]
        grey = torch.from_numpy(self.pixels[number].astype(np.float32))  # a copy: the map cannot be written
        return (grey / GREYS - self.mean) / self.std, int(self.targets[number])

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Number of pixels of every image."""
        return torch.full((len(self),), self.pixels.shape[1])


class GreyData(NamedTuple):
    """The three splits, and the SHA-256 of every file or split, by name."""

    train: GreyDataset
    validation: GreyDataset
    test: GreyDataset
    hashes: dict[str, str]

    def show(self, pixels: Float[Tensor, " L"]) -> list[str]:
        """The grey value of every standardised pixel, `0` to `255`."""
        return [str(round(value)) for value in ((pixels.double() * self.train.std + self.train.mean) * GREYS).tolist()]


_AGAIN = "delete {} to have it made again"
_HEADER = 10_000  # bytes, as numpy reads at most

Chunk = tuple[UInt8[np.ndarray, "n L"], UInt8[np.ndarray, " n"]]
"""Some images and their classes."""


def cached_grey(
    folder: Path,
    recipe: Mapping[str, Any],
    *,
    sizes: Mapping[str, int],
    pixels: int,
    classes: int,
    chunks: Callable[[str], Iterable[Chunk]],
    mean: float,
    std: float,
    title: str,
    progress: bool = True,
) -> GreyData:
    """Return the data set in `folder`, after generating it if it is not there; see `cached_files`.

    Args:
        folder: a folder for this data alone.
        recipe: everything that determines the content of the files.
        sizes: number of images of every split, by `SPLITS`.
        pixels: number of pixels of an image.
        classes: number of classes.
        chunks: function that yields the images of a split, `sizes[split]` of them in all. A generator is closed.
        mean, std: see `GreyDataset`.
        title: title of the progress bar.
        progress: whether to show the bar.

    Raises:
        DataError: the folder holds other data or a changed file, has too little space, or cannot be written; or the
            memory is too small.
    """
    total = sum(sizes.values())
    # Labels and lengths.
    check_memory(9 * total, f"{title} of {total:,} images", error=DataError, hint="ask for fewer images")
    names = [f"{split}_{part}.npy" for split in SPLITS for part in ("images", "labels")]

    def write(files: Mapping[str, HashedFile]) -> None:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Without a thread of the bar, because processes may be forked.
        with Progress(*columns, auto_refresh=False, disable=not progress) as bar:
            task = bar.add_task(title, total=total)
            for split in SPLITS:
                images, labels = files[f"{split}_images.npy"], files[f"{split}_labels.npy"]
                _write_header(images, (sizes[split], pixels))
                _write_header(labels, (sizes[split],))
                with closing(_iterate(chunks(split))) as parts:
                    for grey, targets in parts:
                        images.write(np.ascontiguousarray(grey).tobytes())
                        labels.write(targets.tobytes())
                        bar.update(task, advance=len(targets), refresh=True)

    hashes = cached_files(
        folder, recipe, names, write, needed=total * (pixels + 1), what=f"{title} of {total:,} images"
    )
    datasets = []
    for split in SPLITS:
        images = read_array(folder / f"{split}_images.npy", (sizes[split], pixels))
        labels = np.array(read_array(folder / f"{split}_labels.npy", (sizes[split],)))
        if labels.max(initial=0) >= classes:
            raise DataError(f"{folder / f'{split}_labels.npy'} has the label {labels.max()}; {_AGAIN.format(folder)}")
        datasets.append(GreyDataset(images, labels, mean, std))
    train, validation, test = datasets
    return GreyData(train, validation, test, hashes)


def read_array(path: Path, shape: tuple[int, ...]) -> Mapped:
    """Map a `.npy` file of bytes into memory.

    Args:
        path: the file.
        shape: required shape of the array.

    Raises:
        DataError: the file is not a `.npy` file, is damaged, or holds an array of another shape or dtype.
    """
    again = _AGAIN.format(path.parent)
    with open_file(path) as file, parsing(path, hint=again):
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        found, by_columns, dtype = readers[np.lib.format.read_magic(file)](file, max_header_size=_HEADER)
        offset = file.tell()
    if found != shape or by_columns or dtype != np.uint8:
        raise DataError(
            f"{path} holds an array of the shape {quote(found)} and the dtype {quote(dtype)}; "
            f"{shape} and uint8 are required: {again}"
        )
    return map_file(path, "u1", shape, offset)


def _iterate(chunks: Iterable[Chunk]) -> Generator[Chunk, None, None]:
    yield from chunks  # closing this closes a generator that it delegates to


def _write_header(file: HashedFile, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
