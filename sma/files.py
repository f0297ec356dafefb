"""Files: read with bounds, written whole or not at all."""

import os
import secrets
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from filelock import lock_descriptor

from sma.errors import DataError, SmaError, quote, reason

DRAFT = ".draft"
"""How the name of a file ends that is being written, and of one whose writer was killed."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_file(path: str | Path, error: type[SmaError] = DataError) -> BufferedReader:
    """Open a plain file for reading; its handle has a size (`os.fstat`), which a pipe or a device has not.

    Raises:
        SmaError: `error`: there is none, it cannot be read, or it is a pipe, a device or a folder. Nothing is waited
            for.
    """
    try:
        # Without blocking: opening a pipe waits for its writer.
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        )
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {_shown(path)}: {reason(cause)}") from cause
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
        raise error(f"cannot read {_shown(path)}: {reason(cause)}") from cause
    _check_plain(path, found.st_mode, error)
    return found.st_size


def _shown(path: str | Path) -> str:
    """A path whole, if it can be one."""
    return repr(str(path)) if len(str(path)) <= 4096 else quote(str(path))


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
        raise error(
            f"{str(path)!r} is longer than {limit:,} bytes, which no file of this kind is; is it the right one?"
        )
    return content


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path` in one step.

    Whatever goes wrong, `path` holds its old content or the whole new one, and the temporary file is gone. A process
    that is killed leaves its own behind, without the lock that it had on it: the next call for the same path, by
    whichever process, removes it. A new file has the mode that the process gives its files (umask), one that is
    replaced keeps its own.
    """
    _remove_abandoned(path.parent, f".{path.name}.")
    temporary, handle = _locked_draft(path)
    try:
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        write(temporary)  # which may put a file of its own there, as some libraries do
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # some file systems have no modes; last, because the file may be for reading only
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
    """A new draft beside `path`, and its open file, which holds the lock that says that it is being written."""
    while True:
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{DRAFT}")
        # Not tempfile: its files are private, and what the umask would have made of them is not known.
        handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            # Between these two steps another process may have taken it for abandoned.
            if lock_file(handle) is False or not _stands_at(draft, handle):
                os.close(handle)
                continue
        except BaseException:
            os.close(handle)
            draft.unlink(missing_ok=True)
            raise
        return draft, handle


def lock_file(handle: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed or its process ends, however that ends.

    Args:
        handle: of the file or folder.
        wait: until no other process has it locked.

    Returns:
        whether it is locked now; None on Windows, where a lock would keep the holder's other handles out too, and
            where the file system has no locks.
    """
    if sys.platform == "win32":
        return None
    try:
        return lock_descriptor(handle, blocking=wait)
    except OSError:
        return None


def _stands_at(path: Path, handle: int) -> bool:
    """Whether a path still names the file that is open, and is no link to it."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    return False


def _remove_abandoned(folder: Path, prefix: str, alone: bool = False) -> None:
    """Delete the drafts whose names begin like this and that nobody writes any more; where that cannot be known, none
    unless alone.
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
                        if (locked or (alone and locked is None)) and _stands_at(draft, handle):
                            draft.unlink()
                    finally:
                        os.close(handle)


def remove_drafts(folder: Path) -> None:
    """Delete what killed processes left half-written in a folder; what another process is writing stays.

    Where files cannot be locked, no other process may be writing into the folder.
    """
    _remove_abandoned(folder, ".", alone=True)
