"""Text as bytes, for causal language modelling: the text that comes with Python, enwik8, or any local file.

A corpus is one run of bytes, cut in order and without gaps: training text, validation text, and the held-out tail,
which is the test.

| corpus | training | validation | test |
|---|---|---|---|
| enwik8, exactly 100,000,000 bytes | first 90 % | next 5 % | last 5 % |
| any other | first 85 % | next 5 % | last 10 % |

Nothing is decoded or cleaned: a token is a byte, 0 to 255.

enwik8 is `enwik8.zip`, 36,445,475 bytes, as it is published, or the file in it. Both hashes stand below; they are those
that several public repositories have, for its page gives none but an MD5 of the file, with which they agree.

Reference:
    Mahoney, "Large Text Compression Benchmark", http://mattmahoney.net/dc/text.html.
"""

import hashlib
import os
import platform
import zipfile
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import torch
from jaxtyping import UInt8
from pydantic import Field, model_validator
from torch import Tensor

from sma.errors import DataError, parsing, quote, reason
from sma.files import open_file
from sma.memory import check_memory
from sma.recipes.io.download import fetch
from sma.recipes.io.folders import expand
from sma.spec import Spec

VOCABULARY_SIZE = 256

ENWIK8 = "enwik8"
ENWIK8_BYTES = 100_000_000
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
ENWIK8_ZIP = "enwik8.zip"
ENWIK8_ZIP_BYTES = 36_445_475
ENWIK8_ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
ENWIK8_URL = f"http://mattmahoney.net/dc/{ENWIK8_ZIP}"
_ENWIK8_HELD_OUT = 0.05
_HELD_OUT = 0.1
_BLOCK = 1 << 20
_FEWEST = 2  # bytes of a split: one to read, one to predict
_WANTED = (
    f"a text file, {ENWIK8} or {ENWIK8_ZIP} ({ENWIK8_URL}; task.data.download=true gets it into the data folder); "
    "leave file out to use the text that comes with Python"
)


class TextSettings(Spec):
    """Which text to read and how to cut it. The same file and settings give the same bytes in the same splits."""

    file: str | None = Field(
        default=None,
        min_length=1,
        description="a local text file, enwik8 or enwik8.zip, read as bytes; a relative path is looked for in the "
        "working folder, then in the data folder; null is the text that comes with Python (pydoc_data.topics)",
    )
    download: bool = Field(
        default=False, description="with file=enwik8 or enwik8.zip: get the zip, 36 MB, where neither is there"
    )
    held_out: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="share of the bytes, at the end, to test on; null is 0.05 for enwik8 and 0.1 otherwise",
    )
    validation: float = Field(
        default=0.05, gt=0.0, lt=1.0, description="share of the bytes, just before the held-out ones, to validate on"
    )
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 that the bytes must have, 64 lower-case hexadecimal digits (of enwik8 inside a zip, "
        "not of the zip); null takes any",
    )

    @model_validator(mode="after")
    def _fits(self) -> "TextSettings":
        held_out = _HELD_OUT if self.held_out is None else self.held_out
        if held_out + self.validation >= 1.0:
            raise ValueError(
                f"held_out={held_out} and validation={self.validation} leave nothing to train on; "
                "their sum must be less than 1"
            )
        if self.download and Path(self.file or "").name not in (ENWIK8, ENWIK8_ZIP):
            raise ValueError(
                f"download=true gets enwik8 alone, and file is {self.file!r}; "
                f"set file={ENWIK8_ZIP}, or leave download out"
            )
        return self


PYTHON_TEXT = TextSettings()
"""The text that comes with Python, 466 KB on Python 3.11: 85 % / 5 % / 10 %."""


class Corpus(NamedTuple):
    """The three splits of a text in their order, its SHA-256 in hexadecimal digits, and its name for reports.

    Shape:
        train, validation, test: `(T,)` each, one byte per token, all of one memory; written one after another they are
            the text.
    """

    train: UInt8[Tensor, " T_train"]
    validation: UInt8[Tensor, " T_validation"]
    test: UInt8[Tensor, " T_test"]
    sha256: str
    name: str

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every split."""
        return {
            split: hashlib.sha256(getattr(self, split).numpy()).hexdigest() for split in ("train", "validation", "test")
        }

    @property
    def before_test(self) -> UInt8[Tensor, " T"]:
        """All bytes before the test split, from which the reference scores are computed."""
        return torch.cat((self.train, self.validation))


def python_text() -> bytes:
    r"""Return the text that comes with Python: the help pages of `pydoc_data.topics` by title, one `\n` between, as
    UTF-8.

    It is the same for everybody who has the same version of Python, and differs between versions: compare results by
    its SHA-256.

    Raises:
        DataError: this Python came without its help pages.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"Python {platform.python_version()} came without pydoc_data.topics, its help pages; "
            "install the whole standard library, or give a text file"
        ) from error
    return "\n".join(topics[title] for title in sorted(topics)).encode()


def load_text(settings: TextSettings = PYTHON_TEXT, folder: Path | None = None, *, progress: bool = True) -> Corpus:
    """Return the text of `settings` as bytes, in its splits.

    A file or a member of a zip of which the name, without its suffix, is `enwik8` must be enwik8. Nothing but a
    download is written.

    Args:
        settings: which text, cut how, and optionally the hash that it must have. A relative path starts at the working
            folder, or else at `folder`; where `enwik8` or `enwik8.zip` is asked for, either is taken.
        folder: the data folder, which a download goes to; None: the working folder.
        progress: show a bar while downloading.

    Raises:
        DataError: the file is missing, cannot be read, is too small to be cut, or has another hash than the one
            required; a zip holds no enwik8 or is damaged; what is named enwik8 has not its 100,000,000 bytes, or other
            ones; the download fails.
    """
    if settings.file is None:
        content = bytearray(python_text())
        name, is_enwik8 = f"pydoc_data.topics of Python {platform.python_version()}", False
    else:
        path = _find(settings.file, folder or Path(), settings.download, progress)
        is_enwik8 = path.suffix.lower() == ".zip" or path.stem == ENWIK8
        content = _read(path, ENWIK8_BYTES if is_enwik8 else None)
        name = ENWIK8 if is_enwik8 else path.name
    sha256 = hashlib.sha256(content).hexdigest()
    if is_enwik8 and sha256 != ENWIK8_SHA256:
        raise DataError(
            f"{ENWIK8} in {path} has the SHA-256 {sha256}; that of {ENWIK8} is {ENWIK8_SHA256}: download it again, or "
            "give a text of your own another name"
        )
    if settings.sha256 not in (None, sha256):
        hint = (
            "another version of Python comes with another text"
            if settings.file is None
            else "the file was changed or is another one"
        )
        raise DataError(
            f"{name} has the SHA-256 {sha256}, and {settings.sha256} is required: {hint}; sha256=null takes any text"
        )
    held_out = settings.held_out or (_ENWIK8_HELD_OUT if is_enwik8 else _HELD_OUT)
    test, validation = round(held_out * len(content)), round(settings.validation * len(content))
    sizes = [len(content) - validation - test, validation, test]
    if min(sizes) < _FEWEST:
        raise DataError(
            f"{name} has {len(content):,} bytes, which gives {sizes[0]} to train on, {validation} to validate on and "
            f"{test} to test on; at least {_FEWEST} each are required: take a longer text"
        )
    train, held_back, tail = torch.frombuffer(content, dtype=torch.uint8).split(sizes)
    return Corpus(train, held_back, tail, sha256, name)


def _find(given: str, folder: Path, download: bool, progress: bool) -> Path:
    """The place of a file, absolute or below the working folder or the data folder; or that of enwik8 once it is
    downloaded.
    """
    try:
        if "\0" in given:  # which is only asked for where the file is opened
            raise ValueError("it has a zero byte")
        path = expand(Path(given))
        names = dict.fromkeys((path.name, ENWIK8, ENWIK8_ZIP) if path.name in (ENWIK8, ENWIK8_ZIP) else (path.name,))
        places = list(dict.fromkeys(parent / name for parent in (path.parent, folder / path.parent) for name in names))
        found = next((place for place in places if place.exists()), None)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, or of a home that is not known
        raise DataError(f"there can be no file {quote(given)}: {reason(error)}; give {_WANTED}") from error
    if found is not None:
        return found
    if download:
        return fetch(
            ENWIK8_URL, folder / ENWIK8_ZIP, sha256=ENWIK8_ZIP_SHA256, most=2 * ENWIK8_ZIP_BYTES, progress=progress
        )
    looked = ", ".join(str(place.absolute()) for place in places)
    raise DataError(f"there is no file {given!r} (looked for {looked}); give {_WANTED}")


def _read(path: Path, size: int | None) -> bytearray:
    """Return the bytes of a file, or of enwik8 in a zip; `size` is what they must be."""
    with open_file(path) as file:
        if path.suffix.lower() == ".zip":
            return _read_zip(path, file, size)
        length = os.fstat(file.fileno()).st_size
        _check_size(path, length, size)
        with parsing(path):
            return _first(file, length)


def _read_zip(path: Path, file: BinaryIO, size: int | None) -> bytearray:
    with (
        parsing(f"{ENWIK8} in {path}", hint="the zip is damaged or of another sort: download it again"),
        zipfile.ZipFile(file) as archive,
    ):
        names = archive.namelist()
        if ENWIK8 not in names:
            held = ", ".join(map(quote, names[:5])) or "nothing"
            raise DataError(f"{path} holds no {ENWIK8!r} but {held}; give {_WANTED}")
        length = archive.getinfo(ENWIK8).file_size
        _check_size(path, length, size)
        with archive.open(ENWIK8) as member:
            return _first(member, length)


def _check_size(path: Path, length: int, size: int | None) -> None:
    """Refuse what is too long, or no enwik8, before any of it is read."""
    if size is not None and length != size:
        raise DataError(
            f"{ENWIK8} in {path} has {length:,} bytes; it must have exactly {size:,}: "
            "download it again, or give a text of your own another name"
        )
    check_memory(length, f"the text {path}", error=DataError, hint="give a shorter one")


def _first(file: IO[bytes], length: int) -> bytearray:
    """Read so many bytes, with one copy in memory; a tensor can be laid over a bytearray, which it may write to."""
    content = bytearray()
    while block := file.read(min(_BLOCK, length - len(content))):
        content += block
    return content
