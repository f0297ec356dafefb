"""Damaged WAV files are read or refused with an error."""

import random
import struct
from pathlib import Path

import pytest

from sma.recipes.io.wav import read_wav
from tests.test_fuzz.harness import Target, fuzz, mutate
from tests.test_recipes.test_io.test_wav import FORMATS, chunk, extensible, rf64, wav

_VALID = [
    *(wav(parameters.values[1][:400], parameters.values[0]) for parameters in FORMATS),
    wav(header=extensible(), before=chunk(b"LIST", b"INFOISFT\5\0\0\0abcde\0"), after=chunk(b"JUNK", b"abc")),
    rf64(2000),
    wav(size=0xFFFFFFFF, ends=0xFFFFFFFF),
]


def _make(rng: random.Random, folder: Path) -> Path:
    content = rng.choice(_VALID)
    if rng.random() < 0.7:  # where the header is
        head = rng.randrange(12, 80)
        content = mutate(rng, content[:head]) + content[head:]
    else:
        content = mutate(rng, content)
    if rng.random() < 0.2:
        at = rng.randrange(min(60, len(content) + 1))
        content = (
            content[:at]
            + rng.choice((b"data", b"fmt ", b"ds64", b"RIFX"))
            + struct.pack("<I", rng.getrandbits(32))
            + content[at:]
        )
    (folder / "some.wav").write_bytes(content)
    return folder / "some.wav"


WAV = Target(_make, read_wav)


@pytest.mark.slow
def test_recordings() -> None:
    counts = fuzz("tests.test_fuzz.test_audio:WAV", 2000)
    print(counts)
    assert counts.others == {}
    assert counts.named > 0
    assert counts.accepted > 0
