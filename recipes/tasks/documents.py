"""Documents as bytes: ids, vocabulary, and their display.

The id of a byte is its value plus one, and 0 is padding: 257 ids, those of the Long Range Arena's byte encoder.
"""

import hashlib
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from sma.model import ModelSpec

VOCABULARY_SIZE = 257
"""Padding, and 256 bytes."""


def check_vocabulary(
    model: ModelSpec, required: int = VOCABULARY_SIZE, what: str = "padding, and one for every byte"
) -> None:
    """Check that a model has an embedding for every id.

    Raises:
        ValueError: its vocabulary is too small.
    """
    vocabulary = getattr(model.encoder, "vocabulary", 0)
    if vocabulary < required:
        raise ValueError(f"model.encoder.vocabulary={vocabulary} must be at least {required}: {what}")


def ids_of(content: UInt8[np.ndarray, " L"]) -> Int64[Tensor, " L"]:
    """The ids of some bytes."""
    return torch.from_numpy(content.astype(np.int64) + 1)


def bytes_of(ids: Int64[Tensor, " L"]) -> bytes:
    """The bytes of some ids; padding is skipped."""
    return bytes((ids[ids > 0] - 1).tolist())


def show(ids: Int64[Tensor, " L"]) -> list[str]:
    r"""A text for every id: the character of printable ASCII, `␣` for a blank, `\xNN` for any other byte."""
    return ["␣" if byte == 32 else chr(byte) if 32 < byte < 127 else f"\\x{byte:02x}" for byte in (ids - 1).tolist()]


class DocumentDataset(Dataset[tuple[Tensor, int]]):
    """Documents as `(ids, target)`: int64 ids of shape `(L,)`, and the class.

    Args:
        content: bytes of all documents, concatenated.
        offsets: document i is `content[offsets[i]:offsets[i + 1]]`.
        targets: the classes.
    """

    first_id: ClassVar[int] = 1
    """Id of the byte 0."""

    def __init__(
        self, content: UInt8[np.ndarray, " T"], offsets: Int64[Tensor, " N_plus_1"], targets: Int64[Tensor, " N"]
    ) -> None:
        self.content, self.offsets, self.targets = content, offsets, targets

    @classmethod
    def of(cls, documents: Iterable[tuple[bytes, int]]) -> "DocumentDataset":
        """Make a data set from documents and their classes."""
        contents, targets = zip(*documents, strict=True)
        offsets = torch.tensor([0, *map(len, contents)]).cumsum(0)
        content = np.frombuffer(b"".join(contents), dtype=np.uint8)
        return cls(content, offsets, torch.tensor(targets, dtype=torch.int64))

    def select(self, numbers: Int64[Tensor, " M"]) -> "DocumentDataset":
        """Some of the documents, in the order of their numbers."""
        content = [self.content[:0], *(self.content[self._slice(number)] for number in numbers.tolist())]
        offsets = torch.cat([numbers.new_zeros(1), self.lengths[numbers].cumsum(0)])
        return DocumentDataset(np.concatenate(content), offsets, self.targets[numbers])

    def _slice(self, number: int) -> slice:
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Int64[Tensor, " L"], int]:
        number = range(len(self))[index]
        content = self.content[self._slice(number)].astype(np.int64)
        return torch.from_numpy(content + self.first_id), int(self.targets[number])

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Number of bytes of every document."""
        return self.offsets.diff()

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes of all documents, their lengths (8 bytes each, little-endian) and their classes (a byte
        each), concatenated.
        """
        return _sha256(self.content, self.lengths, self.targets)


class PairDataset(Dataset[tuple[tuple[Tensor, Tensor], int]]):
    """Pairs of documents as `((first, second), target)`: int64 ids of shape `(L,)` each, and the class.

    Args:
        content: bytes of all documents, such as a file mapped into memory.
        spans: start and end of the first document and of the second one in it, `(N, 4)`.
        targets: the classes.
    """

    def __init__(
        self, content: UInt8[np.ndarray, " T"], spans: Int64[Tensor, "N 4"], targets: Int64[Tensor, " N"]
    ) -> None:
        self.content, self.spans, self.targets = content, spans, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[tuple[Int64[Tensor, " L1"], Int64[Tensor, " L2"]], int]:
        number = range(len(self))[index]
        first, end, second, last = self.spans[number].tolist()
        return (ids_of(self.content[first:end]), ids_of(self.content[second:last])), int(self.targets[number])

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Number of bytes of the longer document of every pair."""
        return (self.spans[:, 1::2] - self.spans[:, 0::2]).amax(1)

    @property
    def sha256(self) -> str:
        """SHA-256 of the content, the spans (8 bytes each, little-endian) and the classes (a byte each)."""
        return _sha256(self.content, self.spans, self.targets)


def _sha256(content: UInt8[np.ndarray, " T"], numbers: Int64[Tensor, "*N"], targets: Int64[Tensor, " N"]) -> str:
    total = hashlib.sha256(content.tobytes())
    total.update(numbers.numpy().astype("<i8").tobytes() + targets.numpy().astype(np.uint8).tobytes())
    return total.hexdigest()
