"""Grey images read pixel by pixel: one array of bytes per split on the disk, looked into where a sample is asked for.

Every split is two `.npy` files, `NAME_images.npy` (N, pixels) and `NAME_labels.npy` (N,), both uint8. They are mapped into memory, so that
a data set may be larger than it, and read without pickle.
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

from sma.recipes.data.files import HashedFile, cached_files

SPLITS = ("train", "validation", "test")
GREYS = 255
"""The grey value of white."""


class GreyDataset(Dataset[tuple[Tensor, int]]):
    """Images as `(pixels, target)`: standardised numbers (x / 255 - mean) / std of shape `(L,)`, row after row, and the class.

    Args:
        pixels: grey values.
        targets: the classes.
        mean: what is subtracted from grey values between 0 and 1.
        std: what they are then divided by.
    """

    def __init__(self, pixels: UInt8[np.ndarray, "N L"], targets: UInt8[np.ndarray, " N"], mean: float, std: float) -> None:
        self.pixels, self.targets, self.mean, self.std = pixels, targets, mean, std

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, " L"], int]:
        number = range(len(self))[index]
        grey = torch.from_numpy(self.pixels[number].astype(np.float32))  # a copy: the map cannot be written
        return (grey / GREYS - self.mean) / self.std, int(self.targets[number])

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Pixels of every image."""
        return torch.full((len(self),), self.pixels.shape[1])


class GreyData(NamedTuple):
    """The three splits, and the SHA-256 of every file they are read from, by name."""

    train: GreyDataset
    validation: GreyDataset
    test: GreyDataset
    hashes: dict[str, str]

    def show(self, pixels: Float[Tensor, " L"]) -> list[str]:
        """The grey value of every standardised pixel, `0` to `255`."""
        return [str(round(value)) for value in ((pixels.double() * self.train.std + self.train.mean) * GREYS).tolist()]


Chunk = tuple[UInt8[np.ndarray, "n L"], UInt8[np.ndarray, " n"]]
"""Some images and their classes."""


def cached_grey(
    folder: Path,
    recipe: Mapping[str, Any],
    *,
    sizes: Mapping[str, int],
    pixels: int,
    chunks: Callable[[str], Iterable[Chunk]],
    mean: float,
    std: float,
    title: str,
    progress: bool = True,
) -> GreyData:
    """Return the data set that `folder` holds, made first where it does not; see `cached_files`.

    Args:
        folder: a folder for this data alone.
        recipe: all that decides what the files contain.
        sizes: images of every split, by `SPLITS`.
        pixels: of an image.
        chunks: yields the images of a split, `sizes[split]` of them in all. What can be closed is closed.
        mean, std: see `GreyDataset`.
        title: of the bar.
        progress: whether to show it.

    Raises:
        DataError: the folder holds other data or a changed file, or cannot be written.
    """
    names = [f"{split}_{part}.npy" for split in SPLITS for part in ("images", "labels")]

    def write(files: Mapping[str, HashedFile]) -> None:
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # No thread of the bar's own is alive when processes are forked.
        with Progress(*columns, auto_refresh=False, disable=not progress) as bar:
            task = bar.add_task(title, total=sum(sizes.values()))
            for split in SPLITS:
                images, labels = files[f"{split}_images.npy"], files[f"{split}_labels.npy"]
                _write_header(images, (sizes[split], pixels))
                _write_header(labels, (sizes[split],))
                with closing(_iterate(chunks(split))) as parts:
                    for grey, targets in parts:
                        images.write(np.ascontiguousarray(grey).tobytes())
                        labels.write(targets.tobytes())
                        bar.update(task, advance=len(targets), refresh=True)

    hashes = cached_files(folder, recipe, names, write)
    train, validation, test = (
        GreyDataset(
            np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False),
            np.load(folder / f"{split}_labels.npy", allow_pickle=False),
            mean,
            std,
        )
        for split in SPLITS
    )
    return GreyData(train, validation, test, hashes)


def _iterate(chunks: Iterable[Chunk]) -> Generator[Chunk, None, None]:
    yield from chunks  # closing this closes a generator that it delegates to


def _write_header(file: HashedFile, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
