"""WAV files: the samples of one channel as 16-bit numbers, whichever program wrote the file.

RIFF, RF64 and BW64 are read, with whole numbers of 8, 16, 24 or 32 bits or floating-point numbers of 32 or 64, in the
plain form or in the extensible one, and with any other chunks around them. 8 and 16 bits are exact, longer numbers are
rounded to 16 bits.

A program that writes to a pipe cannot go back and write how much it wrote. Its header holds 0 or a number near 2 or 4
GiB instead: there the samples go on to the end of the file. Any other size is believed, and a file that is shorter is
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
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")
"""How the identifier of a sub-format goes on after its codec."""

_IN_DS64 = 0xFFFFFFFF
_STREAMED = (range(0x7FFF0000, 0x80010000), range(0xFFFF0000, 1 << 32), range((1 << 63) - (1 << 16), 1 << 64))
"""Sizes that stand for one that was not known when the header was written: sox writes 0x7FFFF000, ffmpeg 0xFFFFFFFF,
Python 0.
"""

_CHUNKS = 10_000
"""Chunks before the samples at most."""


class _Header(NamedTuple):
    """What a file says of its samples: codec, channels, samples per second, bits and bytes of one, and where they begin
    and end.
    """

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
        rate: samples per second that it must have.
        only: number of samples that is wanted; a file with another number is not read any further.

    Returns:
        The samples; None where their number is not `only`.

    Raises:
        DataError: it is no such file, has another rate, more channels or a codec that is not read, or is truncated.
    """
    with open_file(path) as file, parsing(path, hint="get it again"):
        length = os.fstat(file.fileno()).st_size
        header = _read_header(file, length, path)
        what, known = _describe(header)
        if not known or header.channels != 1 or header.rate != rate:
            raise DataError(
                f"{path} has {header.channels} channel(s) of {what} at {header.rate:,} Hz; required are 1 channel, 16 "
                f"bits, {rate:,} Hz (8, 24 and 32 bits are read too): convert it"
            )
        promised = header.size // header.width
        there = min(promised, (length - header.start) // header.width)
        if there < promised:
            raise DataError(
                f"{path} is truncated: it has {there:,} of the {promised:,} samples that its header promises; "
                "get it again"
            )
        if only is not None and there != only:
            return None
        file.seek(header.start)
        content = file.read(there * header.width)
        if len(content) < there * header.width:
            raise DataError(f"{path} is truncated: it became shorter while it was read; get it again")
        return _to_16_bits(content, header, path)


def _read_header(file: BinaryIO, length: int, path: str | Path) -> _Header:
    """Walk through the chunks to the samples."""
    head = file.read(12)
    if head[:4] == b"RIFX" and head[8:] == b"WAVE":
        raise DataError(f"{path} is a big-endian WAV file (RIFX), which is not read; convert it")
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
        _refuse(path, "it does not begin as one" if len(head) == 12 else "it ends too early")
    form: tuple[int, int, int, int, int] | None = None
    large: int | None = None
    for _ in range(_CHUNKS):
        name, size = _next_chunk(file, path)
        start = file.tell()
        if name == b"data":
            if form is None:
                _refuse(path, "its samples come before the chunk 'fmt ' that says what they are")
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
        if size % 2:
            _skip_padding(file)
    _refuse(path, f"it has no samples among its first {_CHUNKS:,} chunks")


def _next_chunk(file: BinaryIO, path: str | Path) -> tuple[bytes, int]:
    head = file.read(8)
    if len(head) < 8:
        _refuse(path, "it ends before its samples")
    return head[:4], struct.unpack("<I", head[4:])[0]


def _skip_padding(file: BinaryIO) -> None:
    """A chunk of an odd size is followed by a byte that does not count, which some programs forget."""
    after = file.read(4)
    file.seek(-len(after) + (after not in (b"data", b"fmt ", b"fact", b"LIST")), os.SEEK_CUR)


def _size_of(size: int, start: int, length: int, ends: int) -> int:
    """Bytes of the samples: what the header says, or all that is there where it could not know."""
    left = length - start
    if size == 0:  # right where the header knows where the file ends
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
                f"{path} has the sub-format {content[24:].hex()}, which is not known; "
                "convert it to plain numbers of 16 bits"
            )
        codec = struct.unpack("<H", content[24:26])[0]
    width = (bits + 7) // 8
    if codec in (_INTEGER, _FLOAT) and channels * width != block:
        _refuse(path, f"{channels} channel(s) of {bits} bits do not make the {block} bytes that its chunk 'fmt ' names")
    return codec, channels, rate, bits, width


def _describe(header: _Header) -> tuple[str, bool]:
    """What the samples are, and whether such samples are read."""
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
            raise DataError(f"{path} has samples that are no finite numbers; get it again")
        return np.rint(32_768 * waves.clip(-1, 1)).clip(-32_768, 32_767).astype("<i2")
    if header.width == 1:  # without a sign, silence is 128
        return ((np.frombuffer(content, dtype=np.uint8).astype("<i2") - 128) * 256).astype("<i2")
    if header.width == 2:
        return np.frombuffer(content, dtype="<i2")
    widened = np.zeros((len(content) // header.width, 4), dtype=np.uint8)
    widened[:, 4 - header.width :] = np.frombuffer(content, dtype=np.uint8).reshape(-1, header.width)
    numbers = widened.view("<i4")[:, 0].astype(np.int64)
    return ((numbers + 0x8000) >> 16).clip(-32_768, 32_767).astype("<i2")


def _refuse(path: str | Path, why: str) -> NoReturn:
    raise DataError(f"{path} is no WAV file of plain samples, or it is truncated ({why}); get it again")
