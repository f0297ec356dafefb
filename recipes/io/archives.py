"""Archives: tar and zip, unpacked whole or not at all, with nothing that leaves the folder.

The standard library writes the files: `tarfile` through its `data` filter, `zipfile` through `extract`. What is checked
here is what they lack: bounds on size and number, one rule for the names of both formats on every system (`zipfile`
and the filter rename a member that they could refuse), no links at all, no member twice, and all files or none.

Reference:
    Python documentation, "tarfile: Extraction filters" (PEP 706).
"""

import bz2
import gzip
import lzma
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
from typing import BinaryIO, NoReturn

from sma.errors import DataError, parsing, quote
from sma.files import open_file
from sma.memory import format_bytes
from sma.recipes.io.drafts import draft_folder

_HINT = "it is truncated, damaged, or no tar or zip: delete it and get it again"
_BLOCK = 1 << 20

# What no archive of data has, and one that is made to fill disks or memory does.
_RATIO = 200  # bytes that a packed one becomes
_SPARE = 1 << 26  # and more, for small archives
_MEMBERS = 20_000_000  # the release of the Long Range Arena has a few million
_FILES = 2_000_000
_AT_ONCE = 1 << 16  # bytes that are read at once: tarfile reads a name or a list of attributes whole, however long
_ATTRIBUTES = 1_000
_NAME, _PART = 1_000, 255  # bytes of a path, and of a name in it; the latter is the limit of most file systems

_UNWRITABLE = re.compile(r"[\x00-\x1f]|^(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\.|$)", re.IGNORECASE)
"""Control characters, and names that are devices on Windows, whatever their suffix."""


def unpack_archive(
    archive: str | Path, folder: str | Path, *, members: Callable[[str], bool] | None = None, most: int | None = None
) -> Path:
    """Unpack a tar (plain, gzip, bzip2, xz) or a zip into `folder`, and return it.

    The files are written to a new folder beside it, which gets its name when all of them are there: a folder that
    exists is whole, and is returned as it is. Modes and owners are not taken over. Links among the wanted files are
    refused, those that stay inside too: no data set here has any. What an archive says of itself is not believed:
    neither it nor what comes out of it may be larger than is plausible.

    Args:
        archive: the file; its content, not its name, says what it is.
        folder: the folder to make.
        members: says by a name in the archive, with `/` between folders, whether that file is wanted; None: all are.
        most: bytes that the wanted files may have together; None: what the disk and the size of the archive allow.

    Raises:
        DataError: the archive cannot be read, is truncated or damaged, holds none of the files, has one twice, or
            becomes too large; one of them is no plain file or has a name that cannot be written, or any member leaves
            the folder; or the folder cannot be written.
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
                zipped = file.read(2) == b"PK"  # the directory of a zip stands at its end, which a truncated one lacks
                file.seek(0)
                (_unzip if zipped else _untar)(file, target)
            if not target.files:
                raise DataError(f"{archive} holds none of the files that are looked for; is it the right archive?")
            try:
                os.rename(draft, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    return folder


@contextmanager
def _disk_errors(archive: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a decompressor, and no failure of the disk
            raise
        raise DataError(
            f"cannot unpack {archive} into {folder}: {error.strerror or error}; make room there or choose another"
        ) from error


class _Target:
    """Where the wanted files go, how many there are, and how large they may be."""

    def __init__(
        self, archive: Path, folder: Path, draft: Path, wanted: Callable[[str], bool], packed: int, most: int | None
    ) -> None:
        self.folder = folder
        self.archive, self.draft, self.wanted, self.most = archive, draft, wanted, most
        self.allowed = _SPARE + _RATIO * packed
        self.members = self.files = self.bytes = 0
        self.free: int | None = None
        with suppress(OSError):
            self.free = shutil.disk_usage(draft).free

    def place_of(self, name: str) -> PurePosixPath | None:
        """The place of a member below the folder; None where it is not wanted. Refuses one that leaves it, on any
        system.
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

    def extract(self, write: Callable[[], object], place: PurePosixPath, size: int, name: str) -> None:
        """Have the library write a file, of which the archive says that it has `size` bytes."""
        self._check_name(place, name)
        self.files += 1
        self.bytes += size
        if self.files > _FILES:
            self.refuse_size(f"has more than {_FILES:,} of the files that are looked for")
        if self.most is not None and self.bytes > self.most:
            self.refuse_size(f"has more than {self.most:,} bytes of the files that are looked for")
        if self.bytes > self.allowed:
            self.refuse_size(f"unpacks to more than {self.allowed:,} bytes")
        if self.free is not None and self.bytes > self.free:
            raise DataError(
                f"cannot unpack {self.archive}: {format_bytes(self.bytes)} and more are needed, "
                f"{format_bytes(self.free)} are free; make room there or choose another folder"
            )
        with _disk_errors(self.archive, self.folder):
            target = self.draft / place
            if target.exists():
                raise DataError(
                    f"{self.archive}: member {quote(name)} is there twice, and which is meant cannot be known; "
                    "get the archive again"
                )
            try:
                write()
            except (FileExistsError, NotADirectoryError) as error:
                raise DataError(
                    f"{self.archive}: member {quote(name)} lies in a folder that is a file there; {_HINT}"
                ) from error
            if (written := target.stat().st_size) != size:
                raise DataError(
                    f"{self.archive} cannot be read: {quote(name)} has {written:,} of {size:,} bytes; {_HINT}"
                )

    def _check_name(self, place: PurePosixPath, name: str) -> None:
        try:
            lengths = [len(os.fsencode(part)) for part in place.parts]
        except UnicodeError:
            lengths = [_NAME]
        if (
            any(map(_UNWRITABLE.search, place.parts))
            or sum(lengths) + len(lengths) > _NAME
            or max(lengths, default=0) > _PART
        ):
            raise DataError(
                f"{self.archive}: member {quote(name)} has a name that not every system can write; no data set here "
                "has such a one: get the archive again"
            )

    def refuse_size(self, what: str) -> NoReturn:
        """Refuse an archive that holds more than is plausible."""
        raise DataError(f"{self.archive} {what}, which no data set here does; nothing was unpacked: get it again")

    def refuse_kind(self, name: str, link: bool) -> NoReturn:
        """Refuse a member that is no plain file."""
        what = "a link" if link else "a device or something else that is no file"
        raise DataError(
            f"{self.archive}: member {quote(name)} is {what}; only plain files are unpacked, so nothing was"
        )


class _Tape:
    """The unpacked bytes of a tar, read from the beginning to the end, with bounds on all of them and on what is read
    at once.

    Attributes:
        last: what was read last.
    """

    def __init__(self, packed: BinaryIO, target: _Target) -> None:
        magic = packed.read(6)
        packed.seek(0)
        self._file: BinaryIO | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile = packed
        if magic[:2] == b"\x1f\x8b":
            self._file = gzip.GzipFile(fileobj=packed)
        elif magic[:3] == b"BZh":
            self._file = bz2.BZ2File(packed)
        elif magic == b"\xfd7zXZ\0" or magic[:3] == b"]\0\0":
            self._file = lzma.LZMAFile(packed)  # noqa: SIM115  # it keeps nothing open: the file is the caller's
        self._target, self._place = target, 0
        self.last = b""

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _AT_ONCE:
            raise tarfile.ReadError(f"a header of {count:,} bytes, where {_AT_ONCE:,} are the most that is read")
        self.last = self._file.read(count)
        self._advance(self._place + len(self.last))
        return self.last

    def seek(self, place: int) -> None:
        if place < self._place:  # a negative size, which would have it read the same for ever
            raise tarfile.ReadError("a header leads back to where it was")
        while self._place < place:
            skipped = self._file.read(min(_BLOCK, place - self._place))
            if not skipped:
                break  # tarfile reads on, and finds that there is nothing
            self._advance(self._place + len(skipped))

    def tell(self) -> int:
        return self._place

    def _advance(self, place: int) -> None:
        self._place = place
        if place > self._target.allowed:
            self._target.refuse_size(f"unpacks to more than {self._target.allowed:,} bytes")


def _untar(file: BinaryIO, target: _Target) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise DataError(
            f"cannot unpack {target.archive}: Python {platform.python_version()} has no filter for archives of data; "
            "update Python to 3.11.4 or newer"
        )
    tape = _Tape(file, target)
    # It asks for no more than is there.
    with tarfile.open(fileobj=tape, mode="r:", errorlevel=2, copybufsize=_AT_ONCE) as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep them all
            if len(tar.pax_headers) > _ATTRIBUTES:  # which hold for all members that follow
                target.refuse_size(f"has more than {_ATTRIBUTES:,} attributes")
            place = target.place_of(member.name)
            if member.isdir() or place is None:
                continue
            if not member.isreg() or member.sparse is not None:
                target.refuse_kind(member.name, member.issym() or member.islnk())
            name, member.name = member.name, place.as_posix()
            write = partial(tar.extract, member, target.draft, set_attrs=False, filter="data")
            target.extract(write, place, member.size, name)
    # Iterating ends without a word where the archive stops between two members, and a whole one ends in zeros.
    if tape.last != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")
    # Reading on to the last byte has the compression check what it keeps at the end: lengths and a checksum.
    while tape.read(_AT_ONCE):
        pass


def _unzip(file: BinaryIO, target: _Target) -> None:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            place = target.place_of(member.filename)
            if member.is_dir() or place is None:
                continue
            mode = stat.S_IFMT(member.external_attr >> 16)  # 0 where the zip was not made by Unix
            if mode not in (0, stat.S_IFREG):
                target.refuse_kind(member.filename, stat.S_ISLNK(mode))
            name, member.filename = member.filename, place.as_posix()
            target.extract(partial(archive.extract, member, target.draft), place, member.file_size, name)
