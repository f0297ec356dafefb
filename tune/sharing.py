"""Data that is prepared once and read by all trials of a machine from the same memory."""

import io
import pickle
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from ray import cloudpickle
from torch import Tensor


class PackedData(NamedTuple):
    """An object, and its tensors as arrays, which Ray's object store gives to its readers without a copy.

    Attributes:
        head: the object, pickled without its tensors.
        arrays: one for each tensor.
    """

    head: bytes
    arrays: list[np.ndarray[Any, Any]]

    @property
    def num_bytes(self) -> int:
        """Of all of it."""
        return len(self.head) + sum(array.nbytes for array in self.arrays)


class _Pickler(cloudpickle.CloudPickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.arrays: list[np.ndarray[Any, Any]] = []
        self.places: dict[int, int] = {}
        self.kept: list[Any] = []

    def persistent_id(self, value: Any) -> tuple[str, int] | None:
        array = _as_array(value)
        if array is None:
            return None
        if id(value) not in self.places:
            self.places[id(value)] = len(self.arrays)
            self.kept.append(value)  # so that no other object gets its id
            self.arrays.append(array)
        return "tensor" if isinstance(value, Tensor) else "array", self.places[id(value)]


def _as_array(value: Any) -> np.ndarray[Any, Any] | None:
    """Plain tensors, arrays and arrays on disk; None for everything else, which is pickled as usual."""
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
        kind, place = identity
        if kind == "array":
            return self.arrays[place]
        with warnings.catch_warnings():
            # The store's memory is read-only, and nobody writes into data.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.from_numpy(self.arrays[place])


def pack_data(value: Any) -> PackedData:
    """Take the tensors out of an object."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return PackedData(file.getvalue(), pickler.arrays)


def unpack_data(packed: PackedData) -> Any:
    """The object again; its tensors are views of the arrays and must not be written."""
    return _Unpickler(packed).load()
