"""Archives: tar and zip, unpacked whole or not at all, with nothing that leaves the folder.

Reference:
    Python documentation, "tarfile: Extraction filters" (PEP 706).
"""

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from sma.errors import DataError
from sma.recipes.data.drafts import draft_folder

_BROKEN = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)
_BLOCK = 1 << 20


def unpack(archive: str | Path, folder: str | Path, *, members: Callable[[str], bool] | None = None) -> Path:
    """Unpack a tar (plain, gzip, bzip2, xz) or a zip into `folder`, and return it.

    The files are written to a new folder beside it, which gets its name when all of them are there: a folder that exists is whole, and is
    returned as it is. Modes and owners are not taken over. Links among the wanted files are refused, those that stay inside too: no data
    set here has any.

    Args:
        archive: the file; its content, not its name, says what it is.
        folder: the folder to make.
        members: says by a name in the archive, with `/` between folders, whether that file is wanted; None: all are.

    Raises:
        DataError: the archive cannot be read, is truncated or damaged, holds none of the files, or has one twice; one of them is no plain
            file, or any member leaves the folder; or the folder cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(folder.parent, folder.name) as draft:
            with _broken(archive):
                extract = _unzip if _is_zip(archive) else _untar
                count = extract(archive, draft, members or (lambda name: True))
            if not count:
                raise DataError(f"{archive} holds none of the files that are looked for; is it the right archive?")
            try:
                os.rename(draft, folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    except OSError as error:
        raise DataError(f"cannot unpack {archive} into {folder}: {error.strerror or error}; make room there or choose another") from error
    return folder


@contextmanager
def _broken(archive: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        why = str(error).partition(":\n")[0] or type(error).__name__  # tarfile goes on with a line for every compression it tried
        raise DataError(f"{archive} is truncated, damaged, or no tar or zip ({why}); delete it and get it again") from error


def _is_zip(archive: Path) -> bool:
    """By its first bytes: the directory of a zip stands at its end, which a truncated one lacks."""
    with archive.open("rb") as file:
        return file.read(2) == b"PK"


def _untar(archive: Path, draft: Path, wanted: Callable[[str], bool]) -> int:
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            place = _inside(archive, member.name)
            if member.isdir() or not wanted(place.as_posix()):
                continue
            if not member.isreg():
                what = "a link" if member.issym() or member.islnk() else "a device or something else that is no file"
                raise DataError(f"{archive}: member {member.name!r} is {what}; only plain files are unpacked, so nothing was")
            source = tar.extractfile(member)
            if source is None:
                raise tarfile.ReadError(f"no content of {member.name}")
            with source:
                _copy(archive, source, draft / place, member.size, member.name)
            count += 1
        _check_end(tar)
    return count


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise where the archive stops between two members: iterating over it ends there without a word, and a whole one ends in zeros.

    Reading on to the last byte has the compression check what it keeps at the end: lengths and a checksum.
    """
    if tar.fileobj is not None:
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")
        while tar.fileobj.read(_BLOCK):
            pass


def _inside(archive: Path, name: str) -> PurePosixPath:
    """The place of a member below the folder; refuses one that leaves it, on any system."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive or "\0" in name:
        raise DataError(f"{archive}: member {name!r} would be written outside of the folder; nothing was unpacked")
    return path


def _copy(archive: Path, source: IO[bytes], target: Path, size: int, name: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise DataError(f"{archive}: member {name!r} is there twice, and which is meant cannot be known; get the archive again")
    with target.open("xb") as file:
        shutil.copyfileobj(source, file, _BLOCK)
        if file.tell() != size:
            raise EOFError(f"{name} has {file.tell():,} of {size:,} bytes")


def _unzip(archive: Path, draft: Path, wanted: Callable[[str], bool]) -> int:
    count = 0
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            place = _inside(archive, member.filename)
            if member.is_dir() or not wanted(place.as_posix()):
                continue
            mode = stat.S_IFMT(member.external_attr >> 16)  # 0 where the zip was not made by Unix
            if mode not in (0, stat.S_IFREG):
                what = "a link" if stat.S_ISLNK(mode) else "a device or something else that is no file"
                raise DataError(f"{archive}: member {member.filename!r} is {what}; only plain files are unpacked, so nothing was")
            try:
                source = file.open(member)
            except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed in a way that Python cannot unpack
                raise DataError(f"{archive}: member {member.filename!r} cannot be unpacked: {error}") from error
            with source:
                _copy(archive, source, draft / place, member.file_size, member.filename)
            count += 1
    return count
