"""Damaged images and arrays are read or refused with an error."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sma.recipes.io.mapped import map_file
from sma.recipes.tasks import image as cifar
from sma.recipes.tasks.grey import read_array
from sma.recipes.tasks.pathfinder.release import Record, read_images
from tests.test_fuzz.harness import Target, fuzz, mutate

_SIDE = 32


def _png(mode: str, **options: object) -> bytes:
    made = io.BytesIO()
    grey = Image.fromarray(np.arange(_SIDE * _SIDE, dtype=np.uint32).astype(np.uint8).reshape(_SIDE, _SIDE))
    grey.convert(mode).save(made, "PNG", **options)
    return made.getvalue()


_PNGS = [*(_png(mode) for mode in ("L", "L", "L", "1", "P", "LA", "RGB", "RGBA", "I;16")), _png("L", optimize=True)]
_NUMBERS = (0, 1, 31, 33, 70_000, 1 << 31, (1 << 32) - 1)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _make_png(rng: random.Random, folder: Path) -> Path:
    content = rng.choice(_PNGS)
    way = rng.random()
    if way < 0.4:
        content = mutate(rng, content)
    elif way < 0.7:  # a complete header with other values
        fields = [_SIDE, _SIDE, 8, 0, 0, 0, 0]
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(7)
            fields[at] = rng.choice(_NUMBERS) if at < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        content = content[:8] + _chunk(b"IHDR", struct.pack(">IIBBBBB", *fields)) + content[33:]
    else:  # an additional chunk with arbitrary content
        kinds = (
            b"tRNS",
            b"PLTE",
            b"iCCP",
            b"zTXt",
            b"iTXt",
            b"tEXt",
            b"acTL",
            b"fcTL",
            b"fdAT",
            b"IDAT",
            b"eXIf",
            b"pHYs",
            b"ruBY",
            b"cHRM",
        )
        inner = rng.choice(
            (rng.randbytes(rng.randrange(60)), b"a\0\0" + zlib.compress(bytes(1 << 22)), b"a\0\1\0\0\0" + bytes(9), b"")
        )
        content = content[:33] + _chunk(rng.choice(kinds), inner) + content[33:]
    (folder / "x.png").write_bytes(content)
    return folder / "x.png"


def _read_png(path: Path) -> None:
    read_images(path.parent, _SIDE, [Record(path.name, 0, path.stat().st_size, 0)])


def _make_npy(rng: random.Random, folder: Path) -> Path:
    made = io.BytesIO()
    array = np.arange(12).astype(rng.choice((np.uint8, np.uint8, np.int64, np.float32, np.bool_)))
    np.lib.format.write_array(
        made, array.reshape(rng.choice(((3, 4), (12,), (4, 3)))), version=rng.choice(((1, 0), (2, 0), None))
    )
    content = made.getvalue()
    if rng.random() < 0.5:
        content = mutate(rng, content)
    else:
        shape = rng.choice(
            (
                b"(3, 4)",
                b"(10**9,)",
                b"(%d, 4)" % 10**15,
                b"(-3, -4)",
                b"(3.0, 4)",
                b"[3, 4]",
                b"((3,), 4)",
                b"(" * 200,
                b"x",
            )
        )
        kind = rng.choice((b"|u1", b"|O", b"<f8", b"|V4", b"<U9", b"|u1" * 9, b"[('a', 'u1')]", b"\xff"))
        head = b"{'descr': '%s', 'fortran_order': %s, 'shape': %s, }" % (
            kind,
            rng.choice((b"False", b"True", b"None", b"2")),
            shape,
        )
        head = head.ljust(117) + b"\n"
        content = (
            b"\x93NUMPY\1\0"
            + struct.pack("<H", rng.choice((len(head), len(head), 0, 65_535)))
            + head
            + bytes(range(12))
        )
    (folder / "x.npy").write_bytes(content)
    return folder / "x.npy"


def _read_npy(path: Path) -> None:
    array = read_array(path, (3, 4))
    if array.shape != (3, 4) or array.dtype != np.uint8:
        raise RuntimeError(f"read {array.shape} of {array.dtype}")


def _make_bytes(rng: random.Random, folder: Path) -> Path:
    content = bytes(number % 10 for number in range(3 * 3073))
    (folder / "x.bin").write_bytes(mutate(rng, content) if rng.random() < 0.9 else content)
    return folder / "x.bin"


def _read_batch(path: Path) -> None:
    cifar.RECORDS = 3
    cifar.read_batch(path)


def _map(path: Path) -> None:
    map_file(path, "<i2", (1, 3 * 3073 // 2), 1).sum()


PNG, NPY, CIFAR, MAPPED = (
    Target(_make_png, _read_png),
    Target(_make_npy, _read_npy),
    Target(_make_bytes, _read_batch),
    Target(_make_bytes, _map),
)


def _make_any(rng: random.Random, folder: Path) -> tuple[Target, Path]:
    target = rng.choice((PNG, PNG, NPY, CIFAR, MAPPED))
    return target, target.make(rng, folder)


IMAGE = Target(_make_any, lambda given: given[0].read(given[1]))


@pytest.mark.slow
def test_images_and_arrays() -> None:
    counts = fuzz("tests.test_fuzz.test_images:IMAGE", 2500)
    print(counts)
    assert counts.others == {}
    assert counts.named > 0
    assert counts.accepted > 0
