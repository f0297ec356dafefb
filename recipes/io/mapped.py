"""Arrays on the disk, mapped into memory, that go to other processes by the path of their file."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from sma.errors import DataError, parsing
from sma.files import check_file


class Mapped(np.memmap[Any, Any]):
    """An array on the disk. Pickled, it is the path of its file, which is opened again; a part of it is pickled as what
    is in it.
    """

    _file: tuple[Any, ...] | None = None  # of the whole array alone: what is made of it is made without this

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return found.view(np.ndarray) if isinstance(found, Mapped) else found

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        # What is computed is an array or a number like any other, as it is of the base class.
        plain = np.asarray(array)
        return plain[()] if return_scalar or not plain.ndim else plain

    def __reduce__(self) -> Any:
        return super().__reduce__() if self._file is None else (_reopened, self._file)


def map_file(path: Path, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Mapped:
    """Map a file into memory, of which only what is read comes there. It may be written to, which changes no file.

    Args:
        path: the file.
        dtype: of the numbers.
        shape: of the array, which must fill the file.
        offset: bytes before it.

    Raises:
        DataError: the file is not there, or has another size.
    """
    size = check_file(path)
    needed = offset + np.dtype(dtype).itemsize * int(np.prod(shape, dtype=object))
    if size != needed:
        raise DataError(
            f"{path} has {size:,} bytes, and {needed:,} are required for numbers of the shape {shape}; "
            "delete it and get it again"
        )
    with parsing(path):
        # Copy on write, because torch wants memory that it might write to; nothing does.
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
        raise DataError(f"{path} was written anew after another process had opened it; start again")
    return array
