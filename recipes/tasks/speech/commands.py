"""Speech Commands v0.02: one-second recordings of words, read from its folder or its archive, and kept as one array.

The data folder has one of

| what | where |
|---|---|
| folder | `speech_commands_v0.02/{yes,no,…}/*.wav`, beside them `validation_list.txt` and `testing_list.txt` |
| archive | `speech_commands_v0.02.tar.gz`, 2.3 GiB, from which the ten words are unpacked into that folder |

Of the ten words, the 34,975 clips of exactly 16,000 samples are used; shorter ones are skipped. They are copied into
`speech_commands_v0.02-HASH/`: `clips.int16` (1.1 GB, little-endian, clip after clip, mapped into memory) and
`names.txt`. HASH is a hash of the names, sizes and times of the files, so other or replaced files get another copy. See
`sma.recipes.io.wav` for the supported WAV files.

Reference:
    Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", arXiv 1804.03209.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16

from sma.errors import DataError, quote
from sma.files import check_file, read_file
from sma.recipes.io.generated import HashedFile, cached_files, copy_folder
from sma.recipes.io.mapped import map_file
from sma.recipes.io.progress import Counter
from sma.recipes.io.published import is_visible, published_folder
from sma.recipes.io.wav import read_wav

CLASSES = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SAMPLE_RATE = 16_000
SAMPLES = 16_000
"""Number of samples of a clip: one second."""

NAME = "speech_commands_v0.02"
URL = f"http://download.tensorflow.org/data/{NAME}.tar.gz"
SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"
"""SHA-256 of the archive."""

LISTS = ("validation_list.txt", "testing_list.txt")
_FILES = ("clips.int16", "names.txt")
_LIST = 1 << 26  # maximum bytes of a list of names
_ANY_NAME = "surrogateescape"  # names in a file system need not be UTF-8


class Clips(NamedTuple):
    """All clips, sorted by word and name.

    Attributes:
        samples: the samples of every clip, on the disk.
        names: the names of the clips, such as `yes/0a7c2a8d_nohash_0.wav`.
        lists: the names in the two lists of the publisher, by the name of the list; a missing list is empty.
    """

    samples: Int16[np.ndarray, "N 16000"]
    names: list[str]
    lists: dict[str, frozenset[str]]


def load_clips(folder: Path, *, download: bool = False, progress: bool = True) -> Clips:
    """Return the clips of the ten words that have exactly 16,000 samples.

    Args:
        folder: the data folder. The copy is kept in the default data folder if `folder` cannot be written.
        download: download the archive if nothing is found.
        progress: whether to show progress bars.

    Raises:
        DataError: nothing is found; a word is missing; a file is not a WAV file of one channel at 16 kHz, or is
            truncated; or the copy cannot be written.
    """
    source, archive = folder / NAME, folder / f"{NAME}.tar.gz"
    published_folder(
        [source],
        [archive],
        source,
        url=URL,
        sha256=SHA256,
        archive_most=3 << 30,  # the archive has 2.3 GiB, and the ten words have 1.2 GB
        files_most=2 << 30,
        missing=f"there is no Speech Commands data: neither the folder {source}, "
        f"with {CLASSES[0]}/*.wav and so on, nor the archive {archive}",
        members=_is_wanted,
        download=download,
        progress=progress,
        instead=", or try task.data.source=synthetic",
    )
    files = {name: path for word in CLASSES for name, path in _files_of(source, word)}
    listing = "".join(_entry(name, path) for name, path in files.items())
    fingerprint = hashlib.sha256(listing.encode(errors=_ANY_NAME)).hexdigest()
    recipe = {"generator": "speech_commands", "version": 1, "files": len(files), "listing": fingerprint}
    copy = copy_folder(folder, f"{NAME}-{fingerprint[:12]}")

    def write(outputs: Mapping[str, HashedFile]) -> None:
        samples, names = (outputs[name] for name in _FILES)
        with Counter("Speech Commands", len(files), shown=progress) as counter:
            for name, path in files.items():
                clip = read_wav(path, SAMPLE_RATE, only=SAMPLES)
                if clip is not None:
                    samples.write(clip.tobytes())
                    names.write(f"{name}\n".encode(errors=_ANY_NAME))
                counter.advance(1)

    # In a separate key, because the manifest has a key `files` too.
    cached_files(copy, {"source": recipe}, _FILES, write)
    names = _lines_of(copy / _FILES[1])
    found = {name.split("/")[0] for name in names}
    if found - {*CLASSES, ""}:
        raise DataError(
            f"{copy / _FILES[1]} names other clips than those of the ten words; delete {copy} to recreate it"
        )
    for word in CLASSES:
        if word not in found:
            raise DataError(
                f"no clip of the word {word!r} in {source / word} has exactly {SAMPLES:,} samples; "
                "every word needs some"
            )
    clips = map_file(copy / _FILES[0], "<i2", (len(names), SAMPLES))
    return Clips(clips, names, {name: _read_list(source / name) for name in LISTS})


def _is_wanted(name: str) -> bool:
    parts = name.split("/")
    return name in LISTS or (len(parts) == 2 and parts[0] in CLASSES and parts[1].endswith(".wav"))


def _files_of(source: Path, word: str) -> Iterator[tuple[str, Path]]:
    """The recordings of a word, sorted by name."""
    found = (source / word).glob("*.wav")
    paths = sorted((path for path in found if is_visible(path.name)), key=lambda path: path.name)
    if not paths:
        raise DataError(
            f"there is no recording {source / word}/*.wav; the folder must hold all of the words {', '.join(CLASSES)}"
        )
    return ((f"{word}/{path.name}", path) for path in paths)


def _entry(name: str, path: Path) -> str:
    """Name, size and time of a file, which change if it is replaced."""
    if any(ord(character) < 32 for character in name):
        raise DataError(f"the name of the recording {quote(name)} has control characters; rename it")
    return f"{name} {check_file(path)} {path.stat().st_mtime_ns}\n"


def _lines_of(path: Path) -> list[str]:
    return read_file(path, _LIST).decode(errors=_ANY_NAME).removesuffix("\n").split("\n")


def _read_list(path: Path) -> frozenset[str]:
    return frozenset(line.strip() for line in _lines_of(path)) if path.exists() else frozenset()
