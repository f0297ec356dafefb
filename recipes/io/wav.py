"""WAV files: the samples of one channel as 16-bit integers.

RIFF, RF64 and BW64 are read, with integers of 8, 16, 24 or 32 bits or floating-point numbers of 32 or 64 bits, in the
plain or the extensible form, with any other chunks. Samples of 8 and 16 bits are exact; others are rounded to 16 bits.
The module `wave` of the standard library reads none of RF64, BW64, floating-point numbers and streamed files.

A program that writes to a pipe cannot write the size of the samples into the header afterwards. Its header has 0 or a
number near 2 or 4 GiB instead, and the samples extend to the end of the file. With any other size, a shorter file is
truncated.

Reference:
    Microsoft, "Multiple Channel Audio Data and WAVE Files", 2007; EBU Tech 3306, "MBWF / RF64", 2009; ITU-R BS.2088.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Int16

from sma.errors import DataError, parsing, quote
from sma.files import open_file

_CODECS = {
    0x0002: "Microsoft ADPCM",
    0x0006: "A-law",
    0x0007: "mu-law",
    0x0011: "IMA ADPCM",
    0x0031: "GSM 6.10",
    0x0050: "MPEG",
    0x0055: "MP3",
    0x00FF: "AAC",
    0x0161: "Windows Media Audio",
    0xF1AC: "FLAC",
}
_INTEGER, _FLOAT, _EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")  # the identifier of a sub-format after its codec
_IN_DS64 = 0xFFFFFFFF
# Sizes of streamed files, unknown when the header was written: sox writes 0x7FFFF000, ffmpeg 0xFFFFFFFF, Python 0.
_STREAMED = (range(0x7FFF0000, 0x80010000), range(0xFFFF0000, 1 << 32), range((1 << 63) - (1 << 16), 1 << 64))
_CHUNKS = 10_000  # maximum number of chunks before the samples


class _Header(NamedTuple):
    """The format of the samples, their position in the file, and their size in bytes; `rate` is in Hz."""

    codec: int
    channels: int
    rate: int
    bits: int
    width: int
    start: int
    size: int


def read_wav(path: str | Path, rate: int = 16_000, *, only: int | None = None) -> Int16[np.ndarray, " S"] | None:
    """Return the samples of a WAV file of one channel, -32,768 to 32,767.

    Args:
        path: the file.
        rate: required sample rate, in Hz.
        only: required number of samples; None: any.

    Returns:
        The samples; None if their number is not `only`.

    Raises:
        DataError: the file is not a WAV file, has another rate, more channels or an unsupported codec, or is truncated.
    """
    with open_file(path) as file, parsing(path, hint="get it again"):
        length = os.fstat(file.fileno()).st_size
        header = _read_header(file, length, path)
        what, known = _describe(header)
        if not known or header.channels != 1 or header.rate != rate:
            raise DataError(
                f"{path} has {header.channels} channel(s) of {what} at {header.rate:,} Hz; expected 1 channel, 16 "
                f"bits, {rate:,} Hz (8, 24 and 32 bits are read too): convert it"
            )
        count, present = header.size // header.width, (length - header.start) // header.width
        if present < count:
            raise DataError(
                f"{path} is truncated: it has {present:,} of the {count:,} samples in its header; get it again"
            )
        if only not in (None, count):
            return None
        file.seek(header.start)
        content = file.read(count * header.width)
        if len(content) < count * header.width:
            raise DataError(f"{path} is truncated: it became shorter while it was read; get it again")
        return _to_16_bits(content, header, path)


def _read_header(file: BinaryIO, length: int, path: str | Path) -> _Header:
    """Read the chunks before the samples."""
    head = file.read(12)
    if head[:4] == b"RIFX" and head[8:] == b"WAVE":
        raise DataError(f"{path} is a big-endian WAV file (RIFX), which is not read; convert it")
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
        _refuse(path, "it has another header" if len(head) == 12 else "it ends too early")
    form: tuple[int, int, int, int, int] | None = None
    large: int | None = None
    for _ in range(_CHUNKS):
        chunk = file.read(8)
        if len(chunk) < 8:
            _refuse(path, "it ends before its samples")
        name, size = struct.unpack("<4sI", chunk)
        start = file.tell()
        if name == b"data":
            if form is None:
                _refuse(path, "its samples come before the chunk 'fmt ' with their format")
            if size == _IN_DS64 and head[:4] != b"RIFF" and large is not None:
                size = large
            ends = 8 + struct.unpack("<I", head[4:8])[0]
            return _Header(*form, start, _size_of(size, start, length, ends))
        if start + size > length:
            _refuse(path, f"its chunk {quote(name)} of {size:,} bytes ends after the file")
        if name == b"fmt ":
            form = _read_form(file.read(min(size, 40)), path)
        elif name == b"ds64" and size >= 16:
            large = struct.unpack("<8xQ", file.read(16))[0]
        file.seek(start + size)
        if size % 2:  # a byte of padding follows, which some programs omit
            after = file.read(4)
            file.seek(-len(after) + (after not in (b"data", b"fmt ", b"fact", b"LIST")), os.SEEK_CUR)
    _refuse(path, f"it has no samples among its first {_CHUNKS:,} chunks")


def _size_of(size: int, start: int, length: int, ends: int) -> int:
    """Bytes of the samples: the size in the header, or the rest of a streamed file; `ends` is the end in the header."""
    left = length - start
    if size == 0:  # correct if the header has the end of the file
        return 0 if ends in (length, length - 1) else left
    return left if size > left and any(size in sizes for sizes in _STREAMED) else size


def _read_form(content: bytes, path: str | Path) -> tuple[int, int, int, int, int]:
    if len(content) < 16:
        _refuse(path, f"its chunk 'fmt ' has {len(content)} bytes, fewer than 16")
    codec, channels, rate, block, bits = struct.unpack("<HHI4xHH", content[:16])
    if codec == _EXTENSIBLE:
        if len(content) < 40:
            _refuse(path, f"its chunk 'fmt ' has {len(content)} bytes, fewer than the 40 of the extensible form")
        if content[26:] != _SUBFORMAT:
            raise DataError(
                f"{path} has the unknown sub-format {content[24:].hex()}; convert it to plain integers of 16 bits"
            )
        codec = struct.unpack("<H", content[24:26])[0]
    width = (bits + 7) // 8
    if codec in (_INTEGER, _FLOAT) and channels * width != block:
        _refuse(path, f"{channels} channel(s) of {bits} bits do not have the {block} bytes of its chunk 'fmt '")
    return codec, channels, rate, bits, width


def _describe(header: _Header) -> tuple[str, bool]:
    """A noun for the samples, and whether they are supported."""
    if header.codec == _INTEGER:
        return f"{header.bits} bits", 1 <= header.width <= 4
    if header.codec == _FLOAT:
        return f"floating-point numbers of {header.bits} bits", header.bits in (32, 64)
    codec = _CODECS.get(header.codec)
    return f"{codec} samples" if codec else f"samples of the unknown codec {header.codec:#06x}", False


def _to_16_bits(content: bytes, header: _Header, path: str | Path) -> Int16[np.ndarray, " S"]:
    if header.codec == _FLOAT:
        waves = np.frombuffer(content, dtype=f"<f{header.width}").astype(np.float64)
        if not np.isfinite(waves).all():
            raise DataError(f"{path} has non-finite samples; get it again")
        return np.rint(32_768 * waves.clip(-1, 1)).clip(-32_768, 32_767).astype("<i2")
    if header.width == 1:  # unsigned, with 128 as zero
        return ((np.frombuffer(content, dtype=np.uint8).astype("<i2") - 128) * 256).astype("<i2")
    if header.width == 2:
        return np.frombuffer(content, dtype="<i2")
    widened = np.zeros((len(content) // header.width, 4), dtype=np.uint8)
    widened[:, 4 - header.width :] = np.frombuffer(content, dtype=np.uint8).reshape(-1, header.width)
    numbers = widened.view("<i4")[:, 0].astype(np.int64)
    return ((numbers + 0x8000) >> 16).clip(-32_768, 32_767).astype("<i2")


def _refuse(path: str | Path, why: str) -> NoReturn:
    raise DataError(f"{path} is not a WAV file of plain samples, or it is truncated ({why}); get it again")
