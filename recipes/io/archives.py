"""Archives: tar and zip, unpacked atomically, and only into their folder.

The standard library writes the files: `tarfile` with its `data` filter, and `zipfile` with `extract`. This file adds
checks that they lack: limits of size and number, the same rule for names in both formats and on every system
(`zipfile` and the filter rename members instead of refusing them), no links and no duplicates. An archive is unpacked
completely or not at all.

Reference:
    Python documentation, "tarfile: Extraction filters" (PEP 706).
"""

import bz2
import gzip
import lzma
import math
import os
import platform
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NoReturn

from sma.errors import DataError, parsing, quote
from sma.files import open_file
from sma.memory import format_bytes
from sma.recipes.io.drafts import draft_folder

_HINT = "it is truncated, damaged, or not a tar or zip: delete it and get it again"
_BLOCK = 1 << 20

# Limits against archives that are made to fill disks or memory.
_RATIO = 200  # maximum ratio of unpacked to packed bytes
_SPARE = 1 << 26  # bytes added to the maximum, for small archives
_MEMBERS = 20_000_000  # the release of the Long Range Arena has a few million
_FILES = 2_000_000
_AT_ONCE = 1 << 16  # maximum bytes of one read: tarfile reads names and lists of attributes at once
_ATTRIBUTES = 1_000
_NAME, _PART = 1_000, 255  # maximum bytes of a path, and of a name in it, which is the limit of most file systems

# Control characters, and names of devices on Windows, which may have a suffix.
_UNWRITABLE = re.compile(r"[\x00-\x1f]|^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\.|$)", re.IGNORECASE)


def unpack_archive(
    archive: str | Path, folder: str | Path, *, members: Callable[[str], bool] | None = None, most: int | None = None
) -> Path:
    """Unpack a tar (plain, gzip, bzip2, xz) or a zip into `folder`, and return it.

    The files are written to a new folder beside it, which is renamed when it is complete. An existing folder is
    therefore complete, and is returned unchanged. Modes and owners are not set. Links are refused, because no data set
    has any. The sizes in the archive are not trusted: the archive and the files have maximum sizes.

    Args:
        archive: the archive; its format is detected from its content.
        folder: the folder of the unpacked files.
        members: whether a member, given by its name with `/` between folders, is unpacked; None: all are.
        most: maximum total size of the unpacked files, in bytes; None: limited by the disk and the archive.

    Raises:
        DataError: the archive cannot be read, is truncated or damaged, has none of the files, or has one twice, or is
            too large; a file is not a plain file, or has an invalid name; a member is outside of the folder; or the
            folder cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    with _disk_errors(archive, folder):
        if folder.is_dir():
            return folder
    with open_file(archive) as file, _disk_errors(archive, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(folder.parent, folder.name) as draft:
            target = _Target(
                archive, folder, draft, members or (lambda name: True), os.fstat(file.fileno()).st_size, most
            )
            with parsing(archive, hint=_HINT):
                zipped = file.read(2) == b"PK"  # zipfile.is_zipfile is false for a truncated zip
                file.seek(0)
                (_unzip if zipped else _untar)(file, target)
            if not target.files:
                raise DataError(f"{archive} has none of the required files; is it the right archive?")
            try:
                os.rename(draft, folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was first
                    raise
    return folder


@contextmanager
def _disk_errors(archive: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # an error of a decompressor, not of the disk
            raise
        raise DataError(
            f"cannot unpack {archive} into {folder}: {error.strerror or error}; make room there or choose another"
        ) from error


class _Target:
    """The folder of the unpacked files, with their number and size so far, and the limits of both."""

    def __init__(
        self, archive: Path, folder: Path, draft: Path, wanted: Callable[[str], bool], packed: int, most: int | None
    ) -> None:
        self.folder = folder
        self.archive, self.draft, self.wanted, self.most = archive, draft, wanted, most
        self.allowed = _SPARE + _RATIO * packed
        self.members = self.files = self.bytes = 0
        self.free: float = math.inf
        with suppress(OSError):
            self.free = shutil.disk_usage(draft).free

    def path_of(self, name: str) -> PurePosixPath | None:
        """Return the path of a member in the folder; None if the member is not unpacked.

        Raises:
            DataError: the member is outside of the folder, on any system.
        """
        self.members += 1
        if self.members > _MEMBERS:
            self.refuse_size(f"has more than {_MEMBERS:,} members")
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive or "\0" in name:
            raise DataError(
                f"{self.archive}: member {quote(name)} would be written outside of the folder; nothing was unpacked"
            )
        return path if self.wanted(path.as_posix()) else None

    def extract(self, write: Callable[[], object], path: PurePosixPath, size: int, name: str) -> None:
        """Unpack a file, by a call of the library, and check it.

        Args:
            write: function that writes the file.
            path: path of the file in the folder.
            size: size of the file in bytes, as given in the archive.
            name: name of the member.
        """
        self._check_name(path, name)
        self.files += 1
        self.bytes += size
        if self.files > _FILES:
            self.refuse_size(f"has more than {_FILES:,} of the required files")
        if self.most is not None and self.bytes > self.most:
            self.refuse_size(f"has more than {self.most:,} bytes of the required files")
        if self.bytes > self.allowed:
            self.refuse_size(f"unpacks to more than {self.allowed:,} bytes")
        if self.bytes > self.free:
            raise DataError(
                f"cannot unpack {self.archive}: at least {format_bytes(self.bytes)} are needed, "
                f"{format_bytes(int(self.free))} are free; make room there or choose another folder"
            )
        with _disk_errors(self.archive, self.folder):
            target = self.draft / path
            if target.exists():
                raise DataError(
                    f"{self.archive}: member {quote(name)} occurs twice, so its content is ambiguous; "
                    "get the archive again"
                )
            try:
                write()
            except (FileExistsError, NotADirectoryError) as error:
                raise DataError(
                    f"{self.archive}: member {quote(name)} is in a folder that is a file in the archive; {_HINT}"
                ) from error
            if (written := target.stat().st_size) != size:
                raise DataError(
                    f"{self.archive} cannot be read: {quote(name)} has {written:,} of {size:,} bytes; {_HINT}"
                )

    def _check_name(self, path: PurePosixPath, name: str) -> None:
        try:
            lengths = [len(os.fsencode(part)) for part in path.parts]
        except UnicodeError:
            lengths = [_NAME]
        if (
            any(map(_UNWRITABLE.search, path.parts))
            or sum(lengths) + len(lengths) > _NAME
            or max(lengths, default=0) > _PART
        ):
            raise DataError(
                f"{self.archive}: the name of member {quote(name)} is invalid on some systems, which no data set "
                "has: get the archive again"
            )

    def refuse_size(self, what: str) -> NoReturn:
        """Refuse an archive that exceeds a limit."""
        raise DataError(f"{self.archive} {what}, which no data set has; nothing was unpacked: get it again")

    def refuse_kind(self, name: str, link: bool) -> NoReturn:
        """Refuse a member that is not a plain file."""
        what = "a link" if link else "a device or another special file"
        raise DataError(f"{self.archive}: member {quote(name)} is {what}; only archives of plain files are unpacked")


class _Tape:
    """The decompressed bytes of a tar, read once from start to end, with limits of their number and of one read.

    Attributes:
        last: the bytes of the last read.
    """

    def __init__(self, packed: BinaryIO, target: _Target) -> None:
        magic = packed.read(6)
        packed.seek(0)
        openers: dict[bytes, Callable[..., Any]] = {
            b"\x1f\x8b": gzip.open,
            b"BZh": bz2.open,
            b"\xfd7zXZ\0": lzma.open,
            b"]\0\0": lzma.open,
        }
        opener = next((opener for start, opener in openers.items() if magic.startswith(start)), None)
        self._file: Any = opener(packed) if opener else packed
        self._target, self._position, self.last = target, 0, b""

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _AT_ONCE:
            raise tarfile.ReadError(f"a header has {count:,} bytes, and the maximum is {_AT_ONCE:,}")
        self.last = self._file.read(count)
        self._advance(len(self.last))
        return self.last

    def seek(self, position: int) -> None:
        if position < self._position:  # a negative size, which would be an endless loop
            raise tarfile.ReadError("a header has a negative size")
        # At the end of the file the loop ends, and the next read of tarfile finds the end.
        while self._position < position and (skipped := self._file.read(min(_BLOCK, position - self._position))):
            self._advance(len(skipped))

    def tell(self) -> int:
        return self._position

    def _advance(self, count: int) -> None:
        self._position += count
        if self._position > self._target.allowed:
            self._target.refuse_size(f"unpacks to more than {self._target.allowed:,} bytes")


def _untar(file: BinaryIO, target: _Target) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise DataError(
            f"cannot unpack {target.archive}: Python {platform.python_version()} has no filter for data archives; "
            "update Python to 3.11.4 or newer"
        )
    tape = _Tape(file, target)
    # mypy requires a complete file; read, seek and tell are used.
    with tarfile.open(fileobj=tape, mode="r:", errorlevel=2, copybufsize=_AT_ONCE) as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # to save memory
            if len(tar.pax_headers) > _ATTRIBUTES:  # the attributes of all following members
                target.refuse_size(f"has more than {_ATTRIBUTES:,} attributes")
            path = target.path_of(member.name)
            if member.isdir() or path is None:
                continue
            if not member.isreg() or member.sparse is not None:
                target.refuse_kind(member.name, member.issym() or member.islnk())
            name, member.name = member.name, path.as_posix()
            write = partial(tar.extract, member, target.draft, set_attrs=False, filter="data")
            target.extract(write, path, member.size, name)
    # The iteration raises no error if the archive is cut between two members; a complete one ends in zeros.
    if tape.last != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    # The decompressor checks lengths and a checksum at the end of the file.
    while tape.read(_AT_ONCE):
        pass


def _unzip(file: BinaryIO, target: _Target) -> None:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            path = target.path_of(member.filename)
            if member.is_dir() or path is None:
                continue
            mode = stat.S_IFMT(member.external_attr >> 16)  # 0 if the zip was not created on Unix
            if mode not in (0, stat.S_IFREG):
                target.refuse_kind(member.filename, stat.S_ISLNK(mode))
            name, member.filename = member.filename, path.as_posix()
            target.extract(partial(archive.extract, member, target.draft), path, member.file_size, name)
