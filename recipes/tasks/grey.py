"""Grey images read pixel by pixel: one array of bytes per split on the disk, from which samples are read on demand.

Every split has two `.npy` files, `NAME_images.npy` (N, pixels) and `NAME_labels.npy` (N,), both uint8. They are mapped
into memory, so a data set may be larger than the memory, and read without pickle.
"""

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import DataError, parsing, quote
from sma.files import open_file
from sma.memory import check_memory
from sma.recipes.io.generated import HashedFile, cached_files
from sma.recipes.io.mapped import Mapped, map_file
from sma.recipes.io.progress import Counter
from sma.recipes.tasks.contract import SPLITS, TaskData


class GreyDataset(Dataset[tuple[Tensor, int]]):
    """Images as `(pixels, target)`: pixels (x / scale - mean) / std of shape `(L,)`, row after row, and the class.

    Args:
        pixels: grey values x.
        targets: the classes.
        mean: mean of the standardisation.
        std: standard deviation of the standardisation.
        scale: divisor of the grey values.
    """

    def __init__(
        self, pixels: UInt8[np.ndarray, "N L"], targets: UInt8[np.ndarray, " N"], mean: float, std: float, scale: int
    ) -> None:
        self.pixels, self.targets, self.mean, self.std, self.scale = pixels, targets, mean, std, scale

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, " L"], int]:
        number = range(len(self))[index]
        grey = torch.from_numpy(self.pixels[number].astype(np.float32))  # a copy: the map cannot be written
        return (grey / self.scale - self.mean) / self.std, int(self.targets[number])

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Number of pixels of every image."""
        return torch.full((len(self),), self.pixels.shape[1])

    @property
    def sha256(self) -> str:
        """SHA-256 of the grey values, a byte each, image after image, followed by the classes, a byte each."""
        return hashlib.sha256(self.pixels.tobytes() + self.targets.tobytes()).hexdigest()

    def show(self, pixels: Float[Tensor, " L"]) -> list[str]:
        """The grey value of every standardised pixel."""
        return [str(round(value)) for value in ((pixels.double() * self.std + self.mean) * self.scale).tolist()]


_AGAIN = "delete {} to generate it again"
_HEADER = 10_000  # bytes, as numpy reads at most

Chunk = tuple[UInt8[np.ndarray, "n L"], UInt8[np.ndarray, " n"]]
"""Some images and their classes."""


def cached_grey(
    folder: Path,
    recipe: Mapping[str, Any],
    *,
    sizes: Mapping[str, int],
    side: int,
    class_names: tuple[str, ...],
    chunks: Callable[[str], Generator[Chunk, None, None]],
    mean: float,
    std: float,
    title: str,
    progress: bool = True,
) -> TaskData:
    """Return the data set in `folder`, after generating it if it is not there; see `cached_files`.

    Args:
        folder: a folder for this data alone.
        recipe: everything that determines the content of the files.
        sizes: number of images of every split, by `SPLITS`.
        side: height and width of an image, in pixels.
        class_names: names of the classes, in their order.
        chunks: function that yields the images of a split, `sizes[split]` of them in all.
        mean, std: see `GreyDataset`; the scale is 255.
        title: title of the progress bar.
        progress: whether to show the bar.

    Raises:
        DataError: the folder holds other data or a changed file, has too little space, or cannot be written; or the
            memory is too small.
    """
    total, pixels = sum(sizes.values()), side**2
    # Labels and lengths.
    check_memory(9 * total, f"{title} of {total:,} images", error=DataError, hint="lower the number of images")
    names = [f"{split}_{part}.npy" for split in SPLITS for part in ("images", "labels")]

    def write(files: Mapping[str, HashedFile]) -> None:
        with Counter(title, total, shown=progress) as counter:
            for split in SPLITS:
                images, labels = files[f"{split}_images.npy"], files[f"{split}_labels.npy"]
                _write_header(images, (sizes[split], pixels))
                _write_header(labels, (sizes[split],))
                with closing(chunks(split)) as made:
                    for grey, targets in made:
                        images.write(np.ascontiguousarray(grey).tobytes())
                        labels.write(targets.tobytes())
                        counter.advance(len(targets))

    hashes = cached_files(
        folder, recipe, names, write, needed=total * (pixels + 1), what=f"{title} of {total:,} images"
    )
    datasets = []
    for split in SPLITS:
        images = read_array(folder / f"{split}_images.npy", (sizes[split], pixels))
        labels = np.array(read_array(folder / f"{split}_labels.npy", (sizes[split],)))
        if labels.max(initial=0) >= len(class_names):
            raise DataError(f"{folder / f'{split}_labels.npy'} has the label {labels.max()}; {_AGAIN.format(folder)}")
        datasets.append(GreyDataset(images, labels, mean, std, 255))
    return TaskData.of(datasets, datasets[0].show, hashes=hashes, class_names=class_names, image_shape=(side, side))


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


def _write_header(file: HashedFile, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
