"""Folders with exclusive access for one process at a time.

The lock is that of the kernel, through `filelock` (`flock`; on Windows `LockFileEx`). It ends with its process, so it
is never stale. A forked child does not hold it, and the thread that holds it can acquire it again. This file adds what
`filelock` lacks: the file `.lock` contains the name of its holder for error messages, is deleted afterwards, and must
be a plain file; on a file system without locks, a warning is logged instead. The content of the file has no effect on
the lock, because several machines can have the same host name.
"""

import errno
import json
import logging
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from sma.errors import CheckpointError, quote, reason
from sma.files import DRAFT, open_file
from sma.recipes.io.names import shell_word

log = logging.getLogger("sma.recipes")

LOCK = ".lock"
"""File name of the lock of a folder; the file exists while a process holds the lock, and after a process was killed."""

DRIVER = ".driver.lock"
"""File name of the lock of a process whose children write the folder, and hold `LOCK`."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def run_lock(folder: Path, *, wait: float = 0.0, name: str = LOCK) -> Iterator[None]:
    """Hold the lock of a folder inside the block. The thread that holds it can acquire it again.

    Args:
        folder: the folder; created if missing.
        wait: maximum time to wait for another process, in seconds.
        name: name of the lock, `LOCK` or `DRIVER`.

    Raises:
        CheckpointError: another process or thread holds the lock, or the folder cannot be written. The message has the
            host and the process id of the holder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {str(folder)!r}: {reason(error)}; the folder must be writable") from error
    path = folder / name
    lock = _acquire(path, wait)
    if lock is None:
        yield
        return
    own = path.lstat()
    try:
        yield
    finally:
        with suppress(OSError):
            # A forked process does not delete the file, and another file of this name is kept.
            if lock.lock_counter == 1 and os.path.samestat(own, path.lstat()):
                path.unlink()
        lock.release()


@contextmanager
def claim_folder(path: Path, *, numbered: bool = False) -> Iterator[Path]:
    """Create a folder, or use an empty one, and hold its lock inside the block; yields the folder.

    Only one of several concurrent processes gets the folder. If it was created here and is still empty afterwards, it
    is deleted with its created parents.

    Args:
        path: the folder.
        numbered: whether to append `-2`, `-3`, … if the path exists.

    Raises:
        CheckpointError: the folder is not empty, is locked by another process, or cannot be created.
    """
    parents = [parent for parent in path.parents if not parent.exists()]
    folder, new = _create(path, numbered)
    try:
        with run_lock(folder):
            if not is_empty(folder):
                again = f"--resume {shell_word(folder)}"
                raise CheckpointError(
                    f"the folder {str(folder)!r} is not empty; give another --out, or {again} to resume the run in it"
                )
            yield folder
    finally:
        with suppress(OSError):  # a folder that is not empty is kept
            for each in [folder, *parents] if new else ():
                each.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether a folder has no files except locks and drafts of killed processes."""
    return all(path.name in (LOCK, DRIVER) or path.name.endswith(DRAFT) for path in folder.iterdir())


def _create(path: Path, numbered: bool) -> tuple[Path, bool]:
    """Return a folder of this name, and whether it is new; `mkdir` is atomic, also between machines."""
    folder, number = path, 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                return folder, True
            except FileExistsError:
                if not numbered and path.is_dir():
                    return path, False
                if not numbered:
                    raise
                number += 1
                folder = path.with_name(f"{path.name}-{number}")
    except (OSError, ValueError) as error:
        file = error.filename if isinstance(error, FileExistsError) else None
        why = reason(error) if file is None else f"{str(file)!r} is not a folder"
        raise CheckpointError(f"cannot make the folder {str(folder)!r}: {why}; give another folder") from error


def _acquire(path: Path, wait: float) -> BaseFileLock | None:
    """Acquire the lock of a file; None if the file system has no locks. A thread gets the same object twice."""
    lock = FileLock(path, is_singleton=True, on_acquired=_sign)
    try:
        lock.acquire(timeout=wait, poll_interval=0.1)
    except Timeout:
        raise CheckpointError(
            f"the folder {str(path.parent)!r} is being written by {_holder(path)}; "
            "wait for it or end it, or give another folder"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:  # raised by `_sign`, and by the system for a link
            raise CheckpointError(f"{str(path)!r} is not a plain file; delete it") from error
        if error.errno not in _NO_LOCKS:
            raise CheckpointError(
                f"cannot write {str(path)!r}: {reason(error)}; the folder must be writable"
            ) from error
        path.unlink(missing_ok=True)
        what = f"{str(path.parent)!r} cannot be locked, its file system has no locks"
        log.warning(f"warning: {what}; make sure that no other process writes this folder")
        return None
    return lock


def _sign(handle: int) -> None:
    """Write the name of the holder; if the disk is full, the lock is valid without it.

    Raises:
        OSError: the file is a device, or has another name too.
    """
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise OSError(errno.ELOOP, "not a plain file")
    own = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, b" " + json.dumps(own).encode())


def _holder(path: Path) -> str:
    try:
        with open_file(path) as file:
            if sys.platform == "win32":
                file.seek(1)  # the first byte is locked, and cannot be read by others
            found = json.loads(file.read(1000))
        return f"process {int(found['process'])} on {quote(str(found['host']))} since {quote(str(found['since']))}"
    except Exception:  # the content may be anything
        return "another process"
