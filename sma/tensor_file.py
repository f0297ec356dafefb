"""Files of tensors in the safetensors format: read through one open file, within bounds, and written reproducibly.

The library safetensors opens a file twice, for its header and for its tensors, so a reader can see two files while
another process replaces one. The order of its metadata changes from run to run.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sma.errors import CheckpointError, parsing, quote
from sma.files import open_file
from sma.memory import ADDRESSABLE, check_memory

HEADER = 32 << 20
"""Maximum size of a header in bytes, enough for some 200,000 tensors."""

_METADATA = "__metadata__"
_CODES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: code for code, dtype in _CODES.items()}


@dataclass(frozen=True)
class Entry:
    """Description of a tensor in the header of a file.

    Attributes:
        dtype: dtype of the tensor.
        shape: shape of the tensor.
        start: offset of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} of shape {quote(self.shape)}"


@dataclass(frozen=True)
class TensorFile:
    """An open file of tensors, which stays the same when its path is replaced.

    Attributes:
        path: path from which it was opened.
        metadata: texts by name.
        entries: descriptions of its tensors, by name.
    """

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]
    _file: BufferedReader

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read a tensor; on the meta device only its shape and dtype.

        Raises:
            CheckpointError: the file was truncated since it was opened, or the tensor does not fit into memory.
        """
        entry = self.entries[name]
        if torch.device(device).type == "meta":
            return torch.empty(entry.shape, dtype=entry.dtype, device=device)
        check_memory(
            entry.size, f"{quote(name)} of {self.path}", device="cpu", error=CheckpointError, hint="free some memory"
        )
        content = torch.empty(entry.size, dtype=torch.uint8, device="cpu")
        left = content.numpy().data
        with parsing(self.path, CheckpointError):
            self._file.seek(entry.start)
            while left:
                count = self._file.readinto(left)
                if not count:
                    raise CheckpointError(f"{self.path} was truncated while it was read; save it again")
                left = left[count:]
        return content.view(entry.dtype).reshape(entry.shape).to(device)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a file of tensors and read its header, without allocation of the tensors.

    Raises:
        CheckpointError: the file does not exist or is damaged.
    """
    with open_file(path, CheckpointError) as file:
        with parsing(path, CheckpointError):
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= min(size - 8, HEADER):
                raise _damaged(
                    path, f"of its {size:,} bytes, {length:,} would be its header, which has at most {HEADER:,}"
                )
            text = file.read(length)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError, MemoryError):
            raise _damaged(path, "its header is not JSON") from None
        yield TensorFile(path, *_parsed(path, header, 8 + length, size), file)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or not a safetensors file: {why}")


def _parsed(path: Path, header: Any, start: int, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Check a header, whose tensors must fill the rest of the file without gaps; return metadata and entries."""
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is {quote(header)}, not a mapping")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, f"its metadata is {quote(metadata)}, not a mapping of strings")
    entries, ends = {}, {}
    for name, given in header.items():
        described = isinstance(given, dict) and set(given) == {"dtype", "shape", "data_offsets"}
        if (
            not described
            or not _counts(given["shape"])
            or not _counts(given["data_offsets"])
            or len(given["data_offsets"]) != 2
        ):
            raise _damaged(path, f"it describes {quote(name)} by {quote(given)}")
        dtype = _CODES.get(given["dtype"]) if isinstance(given["dtype"], str) else None
        if dtype is None:
            raise CheckpointError(
                f"{path}: {quote(name)} has the dtype {quote(given['dtype'])}, which is not known; save it in another"
            )
        begin, end = given["data_offsets"]
        entries[name] = Entry(dtype, tuple(given["shape"]), start + begin)
        ends[name] = start + end
    position = start
    for name, entry in sorted(entries.items(), key=lambda pair: (pair[1].start, ends[pair[0]])):
        if entry.start != position or ends[name] != position + entry.size:
            raise _damaged(path, f"{quote(name)}, {entry}, is at bytes {entry.start:,} to {ends[name]:,} of the file")
        position = ends[name]
    if position != size:
        raise _damaged(path, f"it has {size:,} bytes, and its tensors end at {position:,}")
    return metadata, entries


def _counts(value: Any) -> bool:
    """Whether a value is a short list of valid sizes of a tensor."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(number) is int and 0 <= number <= ADDRESSABLE for number in value)
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors, whose bytes do not depend on the order of the mappings, without a sync to disk.

    Raises:
        CheckpointError: the format does not support a dtype, or there are too many tensors.
        OSError: the file cannot be written.
    """
    # Wide dtypes first, as in the library, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
    position = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise CheckpointError(
                f"{name!r} has the dtype {tensor.dtype}, which safetensors does not support; "
                "convert it, such as by model.float()"
            )
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER:
        raise CheckpointError(
            f"{len(tensors):,} tensors have a header of {len(text):,} bytes; at most {HEADER:,} can be read back"
        )
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            # One at a time, so that copies from an accelerator or to contiguous memory are not all held at once.
            tensor = tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
