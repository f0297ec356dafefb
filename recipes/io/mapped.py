"""Arrays on the disk, mapped into memory, that are sent to other processes as the path of their file."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from sma.errors import DataError, parsing
from sma.files import check_file


class Mapped(np.memmap[Any, Any]):
    """An array on the disk. It is pickled as the path of its file; a slice is pickled as its content."""

    _file: tuple[Any, ...] | None = None  # set for the whole array only, not for arrays derived from it

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return found.view(np.ndarray) if isinstance(found, Mapped) else found

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        # Results of computations are plain arrays or scalars, as for the base class.
        plain = np.asarray(array)
        return plain[()] if return_scalar or not plain.ndim else plain

    def __reduce__(self) -> Any:
        return super().__reduce__() if self._file is None else (_reopened, self._file)


def map_file(path: Path, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Mapped:
    """Map a file into memory, copy-on-write. Only the pages that are read take memory.

    Args:
        path: the file.
        dtype: dtype of the array.
        shape: shape of the array, which must fill the rest of the file.
        offset: number of bytes before the array.

    Raises:
        DataError: the file does not exist, or has another size.
    """
    size = check_file(path)
    needed = offset + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=object))
    if size != needed:
        raise DataError(
            f"{path} has {size:,} bytes, and {needed:,} are required for numbers of the shape {shape}; "
            "delete it, and download or generate it again"
        )
    with parsing(path):
        # Copy-on-write, because torch warns about read-only memory. The data is never written.
        whole = (
            Mapped(path, dtype=dtype, mode="c", offset=offset, shape=(needed - offset) // np.dtype(dtype).itemsize)
            .reshape(shape)
            .view(Mapped)
        )
        found = os.stat(path)
    whole._file = (path.absolute(), dtype, shape, offset, found.st_size, found.st_mtime_ns)
    return whole


def _reopened(path: Path, dtype: str, shape: tuple[int, ...], offset: int, size: int, written: int) -> Mapped:
    array = map_file(path, dtype, shape, offset)
    if array._file is not None and array._file[-2:] != (size, written):
        raise DataError(f"{path} was replaced after another process had opened it; start again")
    return array
