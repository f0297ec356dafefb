"""Text as bytes, for causal language modelling: the help pages of Python, enwik8, or any local file.

A corpus is one sequence of bytes, cut into training text, validation text and test text, in this order.

| corpus | training | validation | test |
|---|---|---|---|
| enwik8, exactly 100,000,000 bytes | first 90 % | next 5 % | last 5 % |
| any other | first 85 % | next 5 % | last 10 % |

The text is not decoded or cleaned: a token is a byte, 0 to 255.

enwik8 is the published `enwik8.zip`, 36,445,475 bytes, or the file in it. Its page has only an MD5 of the file; the
SHA-256 below are those of several public repositories, and agree with it.

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
from sma.recipes.tasks.contract import SPLITS
from sma.spec import Spec
from sma.summary import summary

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
_FEWEST = 2  # minimum bytes of a split: one input and one target
_WANTED = (
    f"a text file, {ENWIK8} or {ENWIK8_ZIP} ({ENWIK8_URL}; task.data.download=true puts it into the data folder); "
    "leave file out to use the help pages of Python"
)


class TextSettings(Spec):
    """The text and its splits, determined by the settings and the file."""

    file: str | None = Field(
        default=None,
        min_length=1,
        description="a local text file, enwik8 or enwik8.zip, read as bytes; a relative path is searched for in the "
        "working folder, then in the data folder; null: the help pages of Python (pydoc_data.topics)",
    )
    download: bool = Field(
        default=False, description="with file=enwik8 or enwik8.zip: download the zip, 36 MB, if neither is found"
    )
    held_out: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="fraction of the bytes in the test split, at the end; null: 0.05 for enwik8, else 0.1",
    )
    validation: float = Field(
        default=0.05, gt=0.0, lt=1.0, description="fraction of the bytes in the validation split, before the test split"
    )
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="required SHA-256 of the bytes, 64 lower-case hexadecimal digits (of enwik8 in a zip, not of the "
        "zip); null accepts any",
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
                f"download=true is for enwik8 only, and file is {self.file!r}; "
                f"set file={ENWIK8_ZIP}, or leave download out"
            )
        return self


PYTHON_TEXT = TextSettings()
"""Settings of the help pages of Python, 466 KB on Python 3.11: 85 % / 5 % / 10 %."""


class Corpus(NamedTuple):
    """The three splits of a text in their order, its SHA-256 in hexadecimal digits, and its name for reports.

    Shape:
        train, validation, test: `(T,)` each, one byte per token, views of the whole text.
    """

    train: UInt8[Tensor, " T_train"]
    validation: UInt8[Tensor, " T_validation"]
    test: UInt8[Tensor, " T_test"]
    sha256: str
    name: str

    def __repr__(self) -> str:
        return summary(self)

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every split."""
        return {split: hashlib.sha256(getattr(self, split).numpy()).hexdigest() for split in SPLITS}

    @property
    def before_test(self) -> UInt8[Tensor, " T"]:
        """All bytes before the test split, from which the reference scores are computed."""
        return torch.cat((self.train, self.validation))


def python_text() -> bytes:
    r"""Return the help pages of Python, `pydoc_data.topics`, sorted by title, joined by `\n`, as UTF-8.

    They differ between versions of Python: compare results by their SHA-256.

    Raises:
        DataError: the installation of Python lacks its help pages.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"Python {platform.python_version()} came without pydoc_data.topics, its help pages; "
            "install the complete standard library, or give a text file"
        ) from error
    return "\n".join(topics[title] for title in sorted(topics)).encode()


def load_text(settings: TextSettings = PYTHON_TEXT, folder: Path | None = None, *, progress: bool = True) -> Corpus:
    """Return the text of the settings as bytes, in its splits.

    A file or a member of a zip whose name without suffix is `enwik8` must be enwik8. Only a download is written.

    Args:
        settings: the text, its splits and its required hash. A relative path is searched for in the working folder,
            then in `folder`. For `enwik8` and `enwik8.zip`, either file is accepted.
        folder: the data folder, and that of a download; None: the working folder.
        progress: whether to show a progress bar of the download.

    Raises:
        DataError: the file is missing, cannot be read, is too small, or has another hash than the required one; a zip
            has no enwik8 or is damaged; a file named enwik8 has another content; or the download fails.
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
            "give your own text another name"
        )
    if settings.sha256 not in (None, sha256):
        cause = "versions of Python differ" if settings.file is None else "the file was changed, or is another one"
        raise DataError(
            f"{name} has the SHA-256 {sha256}, and {settings.sha256} is required: {cause}; sha256=null accepts any text"
        )
    held_out = settings.held_out or (_ENWIK8_HELD_OUT if is_enwik8 else _HELD_OUT)
    test, validation = round(held_out * len(content)), round(settings.validation * len(content))
    sizes = [len(content) - validation - test, validation, test]
    if min(sizes) < _FEWEST:
        raise DataError(
            f"{name} has {len(content):,} bytes, which gives {sizes[0]} for training, {validation} for validation and "
            f"{test} for test; at least {_FEWEST} each are required: give a longer text"
        )
    train, held_back, tail = torch.frombuffer(content, dtype=torch.uint8).split(sizes)
    return Corpus(train, held_back, tail, sha256, name)


def _find(given: str, folder: Path, download: bool, progress: bool) -> Path:
    """The path of a file, absolute or in the working folder or the data folder; or of a download of enwik8."""
    try:
        if "\0" in given:  # Path.exists is false for it
            raise ValueError("it has a zero byte")
        path = expand(Path(given))
        names = dict.fromkeys((path.name, ENWIK8, ENWIK8_ZIP) if path.name in (ENWIK8, ENWIK8_ZIP) else (path.name,))
        paths = list(dict.fromkeys(parent / name for parent in (path.parent, folder / path.parent) for name in names))
        found = next((path for path in paths if path.exists()), None)
    except (OSError, ValueError, RuntimeError) as error:  # such as a name that is too long
        raise DataError(f"there can be no file {quote(given)}: {reason(error)}; give {_WANTED}") from error
    if found is not None:
        return found
    if download:
        return fetch(
            ENWIK8_URL, folder / ENWIK8_ZIP, sha256=ENWIK8_ZIP_SHA256, most=2 * ENWIK8_ZIP_BYTES, progress=progress
        )
    searched = ", ".join(str(path.absolute()) for path in paths)
    raise DataError(f"there is no file {given!r} (looked for {searched}); give {_WANTED}")


def _read(path: Path, size: int | None) -> bytearray:
    """Return the bytes of a file, or of enwik8 in a zip; `size` is their required number."""
    with open_file(path) as file:
        if path.suffix.lower() == ".zip":
            return _read_zip(path, file, size)
        length = os.fstat(file.fileno()).st_size
        _check_size(path, length, size)
        with parsing(path):
            return _first(file, length)


def _read_zip(path: Path, file: BinaryIO, size: int | None) -> bytearray:
    with (
        parsing(f"{ENWIK8} in {path}", hint="the zip is damaged or of another kind: download it again"),
        zipfile.ZipFile(file) as archive,
    ):
        names = archive.namelist()
        if ENWIK8 not in names:
            held = ", ".join(map(quote, names[:5])) or "nothing"
            raise DataError(f"{path} does not hold {ENWIK8!r}, but {held}; give {_WANTED}")
        length = archive.getinfo(ENWIK8).file_size
        _check_size(path, length, size)
        with archive.open(ENWIK8) as member:
            return _first(member, length)


def _check_size(path: Path, length: int, size: int | None) -> None:
    """Check the size of a text before it is read."""
    if size is not None and length != size:
        raise DataError(
            f"{ENWIK8} in {path} has {length:,} bytes; it must have exactly {size:,}: "
            "download it again, or give your own text another name"
        )
    check_memory(length, f"the text {path}", error=DataError, hint="give a shorter one")


def _first(file: IO[bytes], length: int) -> bytearray:
    """Read at most `length` bytes, with one copy in memory; a bytearray, because tensors require writable memory."""
    content = bytearray()
    while block := file.read(min(_BLOCK, length - len(content))):
        content += block
    return content
