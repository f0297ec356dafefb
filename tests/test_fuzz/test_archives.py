"""Damaged and forged archives are unpacked completely or refused with an error; no file is written elsewhere."""

import bz2
import gzip
import hashlib
import io
import lzma
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sma.errors import DataError
from sma.recipes.io.archives import unpack_archive
from sma.recipes.tasks.language import corpus as text
from sma.recipes.tasks.language.corpus import TextSettings, load_text
from tests.test_fuzz.harness import Target, fuzz, mutate

_FILES = {"set/a.txt": b"some text " * 60, "set/b.txt": b"", "set/deeper/c.bin": bytes(range(256)) * 3}
_LONG = "set/" + "long" * 50 + ".txt"
_NUMBERS = (b"0", b"-1", b"x", b"99999999999999999999", b"\xff", b"1e9", b"0,1", b"")


def _tar(form: int) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as tar:
        names = {} if form == tarfile.USTAR_FORMAT else {_LONG: b"x", "set/\xe9.txt": b"y"}
        for name, content in {**_FILES, **names}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "of no use", "mtime": "1.5"}
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


def _zip(method: int) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as file:
        for name, content in {**_FILES, "enwik8": b"wiki" * 500}.items():
            with file.open(name, "w", force_zip64=name.endswith("bin")) as member:
                member.write(content)
    return made.getvalue()


_TARS = [_tar(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)]
_ZIPS = [_zip(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)]
_PACKERS: list[Callable[[bytes], bytes]] = [
    bytes,
    partial(gzip.compress, compresslevel=1),
    bz2.compress,
    partial(lzma.compress, preset=0),
]


def _forge_header(rng: random.Random, tar: bytearray) -> None:
    """Change a field of a header and correct the checksum, so that the reader accepts the header."""
    heads = [at for at in range(0, len(tar), 512) if tar[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(heads)
    field, length = rng.choice(
        ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155), (386, 96), (482, 30))
    )
    size = rng.choice((0, 1, 512, 1 << 20, 1 << 33, 1 << 60))
    tar[at + field : at + field + length] = rng.choice(
        (
            rng.randbytes(length),
            b"%0*o\0" % (length - 1, size % 8 ** max(length - 1, 1)),
            rng.choice((-512, -1, 1 << 40)).to_bytes(max(length, 8), "big", signed=True)[:length],
            bytes([rng.choice(b"0123456789LKSxgXVMND\0\xff")]) * length,
            b"../".ljust(length, b"x"),
        )
    )[:length].ljust(length, b"\0")
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])


def _forge_attributes(rng: random.Random) -> bytes:
    """A tar with invalid pax attributes."""
    keys = (
        "GNU.sparse.map",
        "GNU.sparse.size",
        "GNU.sparse.major",
        "GNU.sparse.minor",
        "GNU.sparse.realsize",
        "GNU.sparse.name",
    )
    lines = b""
    for key in rng.sample(
        (*keys, "size", "path", "linkpath", "hdrcharset", "mtime", "GNU.sparse.numblocks", "GNU.sparse.offset"), 4
    ):
        value = rng.choice((*_NUMBERS, b"1", b"set/x\0y", b"\n" * 9, b"BINARY", b"x" * 5000))
        line = b" %s=%s\n" % (key.encode(), value)
        lines += b"%d%s" % (rng.choice((len(line) + 2, len(line) + 3, 0, 10**9)), line)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        head = tarfile.TarInfo("pax")
        head.type, head.size = rng.choice((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)), len(lines)
        tar.addfile(head, io.BytesIO(lines))
        member = tarfile.TarInfo("set/a.txt")
        member.size = 1024
        tar.addfile(member, io.BytesIO(rng.choice(_NUMBERS).ljust(1024, rng.choice((b"\n", b"\0", b"1")))))
    return made.getvalue()


def _make_tar(rng: random.Random, folder: Path) -> Path:
    tar = bytearray(rng.choice(_TARS))
    way = rng.random()
    if way < 0.5:
        for _ in range(rng.randint(1, 2)):
            _forge_header(rng, tar)
    elif way < 0.75:
        tar[:] = _forge_attributes(rng)
    else:
        tar[:] = mutate(rng, bytes(tar))
    packed = rng.choice(_PACKERS)(bytes(tar))
    (folder / "archive").write_bytes(mutate(rng, packed) if rng.random() < 0.3 else packed)
    return folder / "archive"


def _make_zip(rng: random.Random, folder: Path) -> Path:
    content = bytearray(rng.choice(_ZIPS))
    if rng.random() < 0.7:  # a field of a header, of the directory or of the end record
        marks = [
            at
            for mark in (b"PK\1\2", b"PK\3\4", b"PK\5\6")
            for at in range(len(content))
            if content[at : at + 4] == mark
        ]
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(marks) + rng.randrange(4, 46)
            width, sign = rng.choice(((1, "B"), (2, "<H"), (4, "<I")))
            content[at : at + width] = struct.pack(
                sign, rng.choice((0, 1, rng.getrandbits(8 * width), (1 << 8 * width) - 1))
            )
    else:
        content[:] = mutate(rng, bytes(content))
    (folder / "enwik8.zip").write_bytes(content)
    return folder / "enwik8.zip"


def _unpack(path: Path) -> None:
    """Unpack; raise if a refused archive leaves files behind or an accepted one writes outside the folder."""
    before = {path.parent, path}
    try:
        unpack_archive(path, path.parent / "out")
    except DataError:
        if {path.parent, *path.parent.rglob("*")} != before:
            raise RuntimeError(f"left {[found.name for found in path.parent.iterdir()]}") from None
        raise
    if {found.name for found in path.parent.iterdir()} != {path.name, "out"}:
        raise RuntimeError(f"wrote {[found.name for found in path.parent.iterdir()]}")


def _load_enwik8(path: Path) -> None:
    text.ENWIK8_BYTES, text.ENWIK8_SHA256 = 2000, hashlib.sha256(b"wiki" * 500).hexdigest()
    load_text(TextSettings(file=str(path)))


TAR = Target(_make_tar, _unpack)
ZIP = Target(_make_zip, _unpack)
ENWIK8 = Target(_make_zip, _load_enwik8)


def _make_any(rng: random.Random, folder: Path) -> tuple[Target, Path]:
    target = rng.choice((TAR, TAR, ZIP, ENWIK8))
    return target, target.make(rng, folder)


ARCHIVE = Target(_make_any, lambda given: given[0].read(given[1]))


@pytest.mark.slow
def test_archives() -> None:
    counts = fuzz("tests.test_fuzz.test_archives:ARCHIVE", 2000)
    print(counts)
    assert counts.others == {}
    assert counts.named > 0
    assert counts.accepted > 0
