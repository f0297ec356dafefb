"""Shared data: prepared once, and read by all trials of a machine from the same memory."""

import io
import pickle
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from ray import cloudpickle
from torch import Tensor


class PackedData(NamedTuple):
    """An object, and its tensors as arrays, which Ray's object store shares without copies.

    Attributes:
        head: the object, pickled without its tensors.
        arrays: the array of every tensor.
    """

    head: bytes
    arrays: list[np.ndarray[Any, Any]]

    @property
    def num_bytes(self) -> int:
        """Total size, in bytes."""
        return len(self.head) + sum(array.nbytes for array in self.arrays)


class _Pickler(cloudpickle.CloudPickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.arrays: list[np.ndarray[Any, Any]] = []
        self.indices: dict[int, int] = {}
        self.kept: list[Any] = []

    def persistent_id(self, value: Any) -> tuple[str, int] | None:
        array = _as_array(value)
        if array is None:
            return None
        if id(value) not in self.indices:
            self.indices[id(value)] = len(self.arrays)
            self.kept.append(value)  # so that no other object gets its id
            self.arrays.append(array)
        return "tensor" if isinstance(value, Tensor) else "array", self.indices[id(value)]


def _as_array(value: Any) -> np.ndarray[Any, Any] | None:
    """The array of a plain tensor or array, in memory or on disk; None for other values, which are pickled."""
    if isinstance(value, np.ndarray):
        return None if value.dtype.hasobject or value.dtype.names else np.ascontiguousarray(value)
    if type(value) is not Tensor or value.device.type != "cpu" or value.layout != torch.strided or value.requires_grad:
        return None
    return (
        None if value.dtype == torch.bfloat16 or value.is_quantized or value.is_conj() else value.contiguous().numpy()
    )


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: PackedData) -> None:
        super().__init__(io.BytesIO(packed.head))
        self.arrays = packed.arrays

    def persistent_load(self, identity: tuple[str, int]) -> Any:
        kind, index = identity
        if kind == "array":
            return self.arrays[index]
        with warnings.catch_warnings():
            # The memory of the store is read-only, and data is never written.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.from_numpy(self.arrays[index])


def pack_data(value: Any) -> PackedData:
    """Separate the tensors from an object."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return PackedData(file.getvalue(), pickler.arrays)


def unpack_data(packed: PackedData) -> Any:
    """Restore the object. Its tensors are views of the arrays and must not be modified."""
    return _Unpickler(packed).load()
