"""Bounded reads and atomic writes of files."""

import os
import secrets
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from filelock import lock_descriptor

from sma.errors import DataError, InputError, SmaError, quote, reason

DRAFT = ".draft"
"""Suffix of files that are being written, or whose writer was killed."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_path(value: object, whose: str) -> Path:
    """Check that an argument is a path, and return it.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{whose} got {quote(value)}; expected a path: a string or a pathlib.Path")
    return Path(value)


def open_file(path: str | Path, error: type[SmaError] = DataError) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        SmaError: `error`: it does not exist, cannot be read, or is a pipe, a device or a folder. It never blocks.
    """
    try:
        # Without O_NONBLOCK, the opening of a pipe waits for its writer.
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        )
    except (OSError, ValueError) as cause:
        shown = repr(str(path)) if len(str(path)) <= 4096 else quote(str(path))
        raise error(f"cannot read {shown}: {reason(cause)}") from cause
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise error(
                f"{str(path)!r} is {_KINDS.get(stat.S_IFMT(mode), 'not a plain file')}; a plain file is required"
            )
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_file(path: str | Path, error: type[SmaError] = DataError) -> int:
    """Check that a path names a regular file, for readers that open it themselves, and return its size in bytes.

    Raises:
        SmaError: `error`: it does not exist, or is a pipe, a device or a folder.
    """
    with open_file(path, error) as file:
        return os.fstat(file.fileno()).st_size


def read_file(path: str | Path, limit: int, error: type[SmaError] = DataError) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        SmaError: `error`: it is not a regular file, cannot be read, or is longer.
    """
    with open_file(path, error) as file:
        try:
            content = file.read(limit + 1)
        except OSError as cause:
            raise error(f"cannot read {str(path)!r}: {reason(cause)}") from cause
    if len(content) > limit:
        raise error(
            f"{str(path)!r} is longer than {limit:,} bytes, which no file of this kind is; is it the right one?"
        )
    return content


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path` atomically.

    After an error `path` has its old content, and the temporary file is removed. A killed process leaves its temporary
    file, unlocked, which the next call for the same path in any process removes. A new file has the default mode of the
    process (umask); a replaced one keeps its mode.
    """
    _remove_abandoned(path.parent, f".{path.name}.")
    temporary, handle = _locked_draft(path)
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(path.stat().st_mode)
        write(temporary)  # which may replace the file, as some libraries do
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # some file systems have no modes; last, because the file may become read-only
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
        if sys.platform == "win32":
            os.close(handle)  # an open file cannot be renamed there
            handle = -1
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if handle >= 0:
            os.close(handle)


def _locked_draft(path: Path) -> tuple[Path, int]:
    """Create a draft beside `path`; return it and its open file, which holds a lock while it is being written."""
    while True:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{DRAFT}")
        # Not tempfile, whose files ignore the umask.
        handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            # Before the lock another process may have removed it as abandoned.
            if lock_file(handle) is False or not is_open_at(draft, handle):
                os.close(handle)
                continue
        except BaseException:
            os.close(handle)
            draft.unlink(missing_ok=True)
            raise
        return draft, handle


def lock_file(handle: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed or its process ends.

    Args:
        handle: handle of the file or folder.
        wait: whether to wait until no other process holds the lock.

    Returns:
        whether it is locked now; None on file systems without locks, and on Windows, where a lock would exclude other
            handles of its holder too.
    """
    if sys.platform == "win32":
        return None
    try:
        return lock_descriptor(handle, blocking=wait)
    except OSError:
        return None


def is_open_at(path: Path, handle: int, *, follow_symlinks: bool = False) -> bool:
    """Whether a path still names the open file; another process may move or delete it at any moment."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=follow_symlinks))
    return False


def _remove_abandoned(folder: Path, prefix: str, alone: bool = False) -> None:
    """Delete the drafts with this prefix that no process is writing.

    Where files cannot be locked, drafts are deleted only with `alone`.
    """
    with suppress(OSError):
        found = [path for path in folder.iterdir() if path.name.startswith(prefix) and path.name.endswith(DRAFT)]
        for draft in found:
            with suppress(OSError):
                if sys.platform == "win32":
                    if alone:
                        draft.unlink()
                elif stat.S_ISREG(draft.lstat().st_mode):
                    # For writing, without which network file systems lock nothing.
                    handle = os.open(draft, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
                    try:
                        locked = lock_file(handle)
                        if (locked or (alone and locked is None)) and is_open_at(draft, handle):
                            draft.unlink()
                    finally:
                        os.close(handle)


def remove_drafts(folder: Path) -> None:
    """Delete the drafts of killed processes in a folder, but not those that a process is writing.

    Where files cannot be locked, no other process may write into the folder.
    """
    _remove_abandoned(folder, ".", alone=True)
