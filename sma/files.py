"""Files: read with bounds, written whole or not at all."""

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sma.errors import DataError, SmaError, reason

DRAFT = ".draft"
"""How the name of a file ends that is being written, and of one whose writer was killed."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_file(path: str | Path, error: type[SmaError] = DataError) -> BinaryIO:
    """Open a plain file for reading; its handle has a size (`os.fstat`), which a pipe or a device has not.

    Raises:
        SmaError: `error`: there is none, it cannot be read, or it is a pipe, a device or a folder. Nothing is waited for.
    """
    try:
        # Without blocking: opening a pipe waits for its writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {str(path)!r}: {reason(cause)}") from cause
    try:
        _check_plain(path, os.fstat(handle).st_mode, error)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_file(path: str | Path, error: type[SmaError] = DataError) -> int:
    """Check that a path names a plain file, for readers that open it themselves, and return its size in bytes.

    Raises:
        SmaError: `error`: there is none, or it is a pipe, a device or a folder.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {str(path)!r}: {reason(cause)}") from cause
    _check_plain(path, found.st_mode, error)
    return found.st_size


def _check_plain(path: str | Path, mode: int, error: type[SmaError]) -> None:
    if not stat.S_ISREG(mode):
        raise error(f"{str(path)!r} is {_KINDS.get(stat.S_IFMT(mode), 'no plain file')}; a plain file is required")


def read_file(path: str | Path, limit: int, error: type[SmaError] = DataError) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        SmaError: `error`: it is no plain file, cannot be read, or is longer.
    """
    with open_file(path, error) as file:
        try:
            content = file.read(limit + 1)
        except OSError as cause:
            raise error(f"cannot read {str(path)!r}: {reason(cause)}") from cause
    if len(content) > limit:
        raise error(f"{str(path)!r} is longer than {limit:,} bytes, which no file of this kind is; is it the right one?")
    return content


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path` in one step.

    Whatever goes wrong, `path` holds its old content or the whole new one, and the temporary file is gone, unless the process is
    killed: see `remove_drafts`. A new file has the mode that the process gives its files (umask), one that is replaced keeps its own.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{DRAFT}")
    # Not tempfile: its files are private, and what the umask would have made of them is not known.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        write(temporary)  # which may put a file of its own there, as safetensors does
        with suppress(OSError):  # some file systems have no modes
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_drafts(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder into which no other process is writing."""
    for draft in folder.glob(f".*{DRAFT}"):
        draft.unlink(missing_ok=True)
