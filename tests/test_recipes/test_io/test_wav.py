"""WAV files of many programs: streamed, large, extensible, and with other chunks; errors name an unsupported
format.
"""

import os
import re
import struct

import numpy as np
import pytest

from sma.errors import DataError
from sma.recipes.io.wav import read_wav

SAMPLES = np.random.default_rng(0).integers(-32_768, 32_768, 1_000).astype("<i2")
CONTENT = SAMPLES.tobytes()
SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")
UNKNOWN = 0xFFFFFFFF


def form(codec=1, channels=1, rate=16_000, bits=16, block=None):
    block = channels * ((bits + 7) // 8) if block is None else block
    return struct.pack("<HHIIHH", codec, channels, rate, rate * block, block, bits)


def extensible(codec=1, bits=16, subformat=SUBFORMAT):
    return form(0xFFFE, bits=bits) + struct.pack("<HHIH", 22, bits, 4, codec) + subformat


def chunk(name, content, size=None):
    return name + struct.pack("<I", len(content) if size is None else size) + content + bytes(len(content) % 2)


def wav(content=CONTENT, header=None, *, size=None, ends=None, before=b"", after=b"", name=b"RIFF"):
    """A file with these samples; its header states `size` bytes of samples and `ends` bytes in total."""
    body = b"WAVE" + before + chunk(b"fmt ", form() if header is None else header)
    body += b"data" + struct.pack("<I", len(content) if size is None else size) + content + after
    return name + struct.pack("<I", len(body) if ends is None else ends) + body


def rf64(size, name=b"RF64", said=UNKNOWN):
    ds64 = chunk(b"ds64", struct.pack("<QQQI", 0, size, size // 2, 0))
    return wav(size=said, ends=UNKNOWN, before=ds64, name=name)


def read(folder, content, **keywords):
    (folder / "some.wav").write_bytes(content)
    return read_wav(folder / "some.wav", **keywords)


STREAMED = [
    pytest.param(0, 0, id="zeros"),
    pytest.param(0, 36, id="python"),
    pytest.param(UNKNOWN, UNKNOWN, id="ffmpeg"),
    pytest.param(UNKNOWN - 36, UNKNOWN, id="largest"),
    pytest.param(0x7FFFF000, 0x7FFFF024, id="sox"),
    pytest.param(0x80000000, 0x80000024, id="arecord"),
    pytest.param(0x7FFFFFFF - 36, 0x7FFFFFFF, id="signed"),
]


@pytest.mark.parametrize(("size", "ends"), STREAMED)
@pytest.mark.parametrize("before", [b"", chunk(b"LIST", b"INFOISFT\x06\0\0\0Lavf60")], ids=["bare", "LIST"])
def test_samples_of_a_streamed_file_extend_to_its_end(tmp_path, size, ends, before):
    assert np.array_equal(read(tmp_path, wav(size=size, ends=ends, before=before)), SAMPLES)
    assert np.array_equal(read(tmp_path, wav(CONTENT[:-1], size=size, ends=ends, before=before)), SAMPLES[:-1])


def test_file_without_samples_is_read_as_empty(tmp_path):
    assert len(read(tmp_path, wav(b"", after=chunk(b"LIST", b"INFO")))) == 0
    assert len(read(tmp_path, wav(b""))) == 0


@pytest.mark.parametrize("ends", [0, 1, 36, 99_999, UNKNOWN])
def test_samples_are_read_whatever_file_size_the_header_states(tmp_path, ends):
    assert np.array_equal(read(tmp_path, wav(ends=ends, after=chunk(b"LIST", b"INFO"))), SAMPLES)


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
@pytest.mark.parametrize("size", [len(CONTENT), 0, 2**64 - 1], ids=["known", "zero", "unknown"])
def test_rf64_is_read_with_its_own_sizes(tmp_path, name, size):
    assert np.array_equal(read(tmp_path, rf64(size, name)), SAMPLES)


def test_rf64_that_states_more_samples_than_it_has_is_truncated(tmp_path):
    with pytest.raises(
        DataError,
        match=r"some\.wav is truncated: it has 1,000 of the 2,147,483,648,000 samples in its header",
    ):
        read(tmp_path, rf64(2**32 * 1000))


@pytest.mark.parametrize("missing", [1, 2, 999, 2_000])
def test_file_with_fewer_bytes_than_a_plausible_header_states_is_truncated(tmp_path, missing):
    with pytest.raises(
        DataError,
        match=rf"is truncated: it has {(2000 - missing) // 2:,} of the 1,000 samples in its header",
    ):
        read(tmp_path, wav()[: -missing or None])


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(chunk(b"JUNK", bytes(28)), id="JUNK"),
        pytest.param(chunk(b"bext", b"abc"), id="odd size and its padding"),
        pytest.param(chunk(b"note", b"abc")[:-1], id="odd size without padding"),
        pytest.param(
            chunk(b"fact", struct.pack("<I", 1000)) + chunk(b"LIST", b"INFO") + chunk(b"JUNK", b""), id="several"
        ),
    ],
)
def test_other_chunks_around_the_samples_are_skipped(tmp_path, before):
    assert np.array_equal(read(tmp_path, wav(before=before)), SAMPLES)
    assert np.array_equal(read(tmp_path, wav(after=before)), SAMPLES)
    assert np.array_equal(read(tmp_path, wav(size=UNKNOWN, before=before)), SAMPLES)


WIDE = SAMPLES.astype(np.int32) * 65_536
FORMATS = [
    pytest.param(form(), CONTENT, SAMPLES, id="16"),
    pytest.param(form(bits=12), CONTENT, SAMPLES, id="12 of 16, left-justified"),
    pytest.param(form(bits=8), bytes(range(256)), (np.arange(256) - 128) * 256, id="8"),
    pytest.param(form(bits=24), WIDE.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes(), SAMPLES, id="24"),
    pytest.param(form(bits=32), WIDE.tobytes(), SAMPLES, id="32"),
    pytest.param(form(3, bits=32), (SAMPLES / 32_768).astype("<f4").tobytes(), SAMPLES, id="float32"),
    pytest.param(form(3, bits=64), (SAMPLES / 32_768).astype("<f8").tobytes(), SAMPLES, id="float64"),
]


@pytest.mark.parametrize(("header", "content", "expected"), FORMATS)
def test_other_sample_widths_give_the_same_samples(tmp_path, header, content, expected):
    found = read(tmp_path, wav(content, header))
    assert found.dtype == np.dtype("<i2")
    assert np.array_equal(found, expected)


def test_wider_samples_are_rounded_and_never_wrap(tmp_path):
    numbers = np.array([0x7FFFFFFF, -0x80000000, 0x7FFF, 0x8000, -0x8001], dtype="<i4")
    assert read(tmp_path, wav(numbers.tobytes(), form(bits=32))).tolist() == [32_767, -32_768, 0, 1, -1]
    loud = np.array([1.5, -1.5, 1.0, -1.0, 0.4 / 32_768, 0.6 / 32_768], dtype="<f4")
    assert read(tmp_path, wav(loud.tobytes(), form(3, bits=32))).tolist() == [32_767, -32_768, 32_767, -32_768, 0, 1]


def test_extensible_form_is_read_by_its_sub_format(tmp_path):
    assert np.array_equal(read(tmp_path, wav(header=extensible())), SAMPLES)
    assert np.array_equal(read(tmp_path, wav((SAMPLES / 32_768).astype("<f4").tobytes(), extensible(3, 32))), SAMPLES)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            wav(header=form(channels=2)),
            r"has 2 channel\(s\) of 16 bits at 16,000 Hz; expected 1 channel",
            id="stereo",
        ),
        pytest.param(wav(header=form(rate=44_100)), r"has 1 channel\(s\) of 16 bits at 44,100 Hz; expected", id="rate"),
        pytest.param(
            wav(header=form(6, bits=8)), r"has 1 channel\(s\) of A-law samples at 16,000 Hz; expected", id="A-law"
        ),
        pytest.param(wav(header=form(0x55, bits=0)), r"has 1 channel\(s\) of MP3 samples at", id="MP3"),
        pytest.param(wav(header=extensible(7, 8)), r"of mu-law samples at", id="extensible mu-law"),
        pytest.param(wav(header=form(0x1234)), r"of samples of the unknown codec 0x1234 at", id="unknown"),
        pytest.param(wav(header=form(bits=64)), r"of 64 bits at", id="64 bits"),
        pytest.param(wav(header=form(bits=0)), r"of 0 bits at", id="0 bits"),
        pytest.param(wav(header=form(3, bits=16)), r"of floating-point numbers of 16 bits at", id="float16"),
        pytest.param(
            wav(header=extensible(subformat=bytes(14))),
            r"has the unknown sub-format 0100(00)+;",
            id="sub-format",
        ),
        pytest.param(wav(name=b"RIFX"), r"is a big-endian WAV file \(RIFX\), which is not read; convert it", id="RIFX"),
        pytest.param(
            wav(header=form(block=4)),
            r"1 channel\(s\) of 16 bits do not have the 4 bytes of its chunk 'fmt '",
            id="block",
        ),
        pytest.param(
            wav(header=form()[:15]),
            r"or it is truncated \(its chunk 'fmt ' has 15 bytes, fewer than 16\)",
            id="short fmt",
        ),
        pytest.param(wav(header=extensible()[:39]), r"fewer than the 40 of the extensible form", id="short extensible"),
        pytest.param(wav(before=chunk(b"data", b"")), r"its samples come before the chunk 'fmt '", id="samples first"),
        pytest.param(wav()[:36], r"it is truncated \(it ends before its samples\)", id="no samples"),
        pytest.param(
            wav(before=chunk(b"LI\xffT", b"", 2**31)),
            r"its chunk b'LI\\xffT' of 2,147,483,648 bytes ends after the file",
            id="long chunk",
        ),
        pytest.param(
            wav(before=chunk(b"JUNK", b"") * 20_000), r"it has no samples among its first 10,000 chunks", id="chunks"
        ),
        pytest.param(
            wav(np.float32([0, np.nan]).tobytes(), form(3, bits=32)),
            r"has non-finite samples",
            id="NaN",
        ),
    ],
)
def test_error_names_the_unsupported_format(tmp_path, content, complaint):
    with pytest.raises(DataError, match=r"some\.wav .*" + complaint):
        read(tmp_path, content)


def test_file_with_another_number_of_samples_than_wanted_is_not_read(tmp_path):
    assert np.array_equal(read(tmp_path, wav(), only=1_000), SAMPLES)
    assert read(tmp_path, wav(), only=999) is None
    # A recording of more than an hour, of which only the header is read.
    with (tmp_path / "long.wav").open("wb") as file:
        file.write(wav(b"", size=UNKNOWN, ends=UNKNOWN))
        file.truncate(1 << 40)
    assert read_wav(tmp_path / "long.wav", only=16_000) is None


def test_pipes_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(DataError, match=r"pipe\.wav' is a named pipe; a plain file is required"):
        read_wav(tmp_path / "pipe.wav")
    with pytest.raises(DataError, match=re.escape(f"{str(tmp_path)!r} is a folder; a plain file is required")):
        read_wav(tmp_path)


def test_half_a_missing_sample_is_not_a_truncation(tmp_path):
    assert np.array_equal(read(tmp_path, wav(size=len(CONTENT) + 1)), SAMPLES)
