"""Tar files with hand-written headers: none makes the reader use unbounded time, memory or disk space."""

import bz2
import gzip
import lzma
import os

import pytest

from sma.errors import DataError
from sma.recipes.io import archives
from sma.recipes.io.archives import unpack_archive


def raw_header(name=b"set/a", size=0, kind=b"0", prefix=b"", encoded=None):
    """A tar header with the given fields."""
    field = b"%011o\0" % size if encoded is None else encoded
    head = (
        name.ljust(100, b"\0")[:100]
        + b"0000644\0" * 3
        + field
        + b"00000000000\0"
        + b" " * 8
        + kind
        + bytes(100)
        + b"ustar\x0000"
    )
    head = head + bytes(80) + prefix.ljust(155, b"\0") + bytes(12)
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def written(path, *parts):
    path.write_bytes(b"".join(parts))
    return path


def pax(**records):
    """A pax header with attributes, as used for long names."""
    content = b""
    for key, value in records.items():
        record = f" {key.replace('_', '.')}={value}\n".encode()
        length = len(record)
        while length != len(str(length)) + len(record):
            length = len(str(length)) + len(record)
        content += str(length).encode() + record
    return raw_header(b"pax", len(content), b"x") + content + bytes(-len(content) % 512)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"], ids=["name", "link", "pax", "global pax"])
def test_overlong_headers_are_refused_without_reading_them(kind, tmp_path):
    with gzip.open(tmp_path / "archive", "wb", compresslevel=1) as file:
        file.write(raw_header(b"long", 3 << 30, kind))
        file.write(b"x" * (1 << 22))
    with pytest.raises(
        DataError,
        match=r"archive cannot be read: a header has 3,221,225,472 bytes, and the maximum is 65,536",
    ):
        unpack_archive(tmp_path / "archive", tmp_path / "out")


def test_negative_size_does_not_loop_forever(tmp_path):
    minus = (-1536).to_bytes(12, "big", signed=True)
    archive = written(tmp_path / "archive", raw_header(b"a", 0), raw_header(b"b", encoded=minus), bytes(10_240))
    with pytest.raises(DataError, match=r"archive cannot be read: .*; it is truncated, damaged, or not a tar or zip"):
        unpack_archive(archive, tmp_path / "out")


@pytest.mark.parametrize("claimed", [10**15, 10])
def test_sparse_members_are_refused(claimed, tmp_path):
    attributes = pax(GNU_sparse_major=1, GNU_sparse_minor=0, GNU_sparse_name="set/a", GNU_sparse_realsize=claimed)
    archive = written(
        tmp_path / "archive", attributes, raw_header(b"set/a", 512), b"0\n".ljust(512, b"\0"), bytes(1024)
    )
    with pytest.raises(
        DataError, match=r"member 'set/a' is a device or another special file; only archives of plain files"
    ):
        unpack_archive(archive, tmp_path / "out")


@pytest.mark.parametrize("records", [{"GNU_sparse_map": "a,b"}, {"GNU_sparse_size": "x", "GNU_sparse_map": "0,1"}])
def test_non_numeric_attributes_give_an_error_message(records, tmp_path):
    archive = written(tmp_path / "archive", pax(**records), raw_header(b"set/a", 0), bytes(10_240))
    with pytest.raises(DataError, match=r"archive cannot be read: .*; it is truncated"):
        unpack_archive(archive, tmp_path / "out")


def test_total_number_of_attributes_is_limited(tmp_path):
    records = [pax(**{f"key{number}": "x" for number in range(start, start + 100)}) for start in range(0, 1100, 100)]
    headers = [
        raw_header(b"pax", int(record[124:135], 8), b"g") + record[512:] + raw_header(b"a%d" % n)
        for n, record in enumerate(records)
    ]
    archive = written(tmp_path / "archive", *headers, bytes(10_240))
    with pytest.raises(
        DataError, match=r"archive has more than 1,000 attributes, which no data set has; nothing was unpacked"
    ):
        unpack_archive(archive, tmp_path / "out")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
@pytest.mark.parametrize("wanted", [True, False])
def test_tar_that_unpacks_to_far_more_than_its_size_is_refused(pack, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_SPARE", 1 << 20)
    archive = written(tmp_path / "archive", pack(raw_header(b"set/a", 1 << 25) + bytes(1 << 25) + bytes(10_240)))
    with pytest.raises(
        DataError,
        match=r"archive unpacks to more than [0-9,]+ bytes, which no data set has; nothing was unpacked",
    ):
        unpack_archive(archive, tmp_path / "out", members=lambda name: wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_data_after_the_end_of_a_tar_is_read_only_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_SPARE", 1 << 20)
    archive = written(tmp_path / "archive", gzip.compress(raw_header(b"set/a", 0) + bytes(1 << 25)))
    with pytest.raises(DataError, match=r"archive unpacks to more than [0-9,]+ bytes"):
        unpack_archive(archive, tmp_path / "out")


def test_non_utf_8_name_is_kept_unchanged(tmp_path):
    archive = written(tmp_path / "archive", raw_header(b"set/\xff.txt", 0), bytes(10_240))
    folder = unpack_archive(archive, tmp_path / "out")
    assert os.listdir(os.fsencode(folder / "set")) == [b"\xff.txt"]
