"""Folders that one process at a time may write.

The lock is the kernel's (`flock`, as for data in the making): it ends with its process, however that ends, so that no
lock is ever stale. The file `.lock` that carries it names the holder for the refusal of others, and nothing is decided
by what it says: the same host name can stand for several machines. Windows and some network file systems cannot lock;
there a warning stands in for the lock.
"""

import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from sma.errors import CheckpointError, quote, reason
from sma.files import DRAFT, lock_file, stands_at
from sma.recipes.io.names import shell_word

log = logging.getLogger("sma.recipes")

LOCK = ".lock"
"""The file by which a folder is locked; it is there while a process has the lock, and after one was killed."""

DRIVER = ".driver.lock"
"""The same of a process that has others write the folder: they hold the lock of the folder itself."""

_FLAGS = os.O_RDWR | os.O_CREAT | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW"))

_POLL = 0.1
"""Seconds between two looks at a lock that is waited for."""

_held: dict[tuple[int, int, int, str], int] = {}
"""How often the locks of this process are held, by thread, device and inode of the folder, and name."""

_handles: set[int] = set()
"""The open files by which they are held."""


@contextmanager
def run_lock(folder: Path, *, wait: float = 0.0, name: str = LOCK) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing. The thread that holds it may take it again.

    Args:
        folder: what is going to be written.
        wait: seconds to wait for another process that ends.
        name: of the lock, `LOCK` or `DRIVER`.

    Raises:
        CheckpointError: another process or thread holds it, named by host and process id, or the folder cannot be
            written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {str(folder)!r}: {reason(error)}; the folder must be writable") from error
    key = threading.get_ident(), found.st_dev, found.st_ino, name
    if _held.get(key, 0):
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    handle = _acquire(folder, name, time.monotonic() + wait)
    _held[key] = 1
    try:
        yield
    finally:
        _held.pop(key, None)
        if handle in _handles:  # it is not in a process that was forked meanwhile
            with suppress(OSError):
                if stands_at(folder / name, handle):
                    (folder / name).unlink()
            _handles.remove(handle)
            os.close(handle)


def _forget() -> None:
    """Leave the locks to the process that forked this one: with its end they are to end."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def claim_folder(path: Path, *, numbered: bool = False) -> Iterator[Path]:
    """Take a folder that is empty or not there for something new, and hold its lock; yields the folder.

    Of several processes that ask for the same one at once, one gets it. A folder that was made here and is still empty
    in the end is removed, with the folders above it that were made.

    Args:
        path: the folder.
        numbered: where there is something of this name, take the name with `-2`, `-3`, … after it.

    Raises:
        CheckpointError: it is not empty, another process has it, or it cannot be made.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    folder, new = _make(path, numbered)
    try:
        with run_lock(folder):
            if not is_empty(folder):
                again = f"--resume {shell_word(folder)}"
                raise CheckpointError(
                    f"the folder {str(folder)!r} is not empty; "
                    f"give another --out, or {again} to go on with the run in it"
                )
            yield folder
    finally:
        with suppress(OSError):  # a folder that holds anything is not removed
            for each in [folder, *made] if new else ():
                each.rmdir()


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but locks and drafts that killed processes left."""
    return all(path.name in (LOCK, DRIVER) or path.name.endswith(DRAFT) for path in folder.iterdir())


def _make(path: Path, numbered: bool) -> tuple[Path, bool]:
    """A folder of this name, and whether it is new; making one is a single step, also for several machines."""
    folder, number = path, 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot make the folder {str(path)!r}: {_reason(error)}; give another folder") from error
    while True:
        try:
            folder.mkdir()
            return folder, True
        except FileExistsError as error:
            if not numbered:
                if path.is_dir():
                    return path, False
                raise CheckpointError(f"{str(path)!r} is no folder; give another --out") from error
            number += 1
            folder = path.with_name(f"{path.name}-{number}")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot make the folder {str(folder)!r}: {reason(error)}; give another folder"
            ) from error


def _reason(error: Exception) -> str:
    """Why a folder cannot be made; a file in the place of the folder above it is named."""
    if isinstance(error, FileExistsError) and error.filename is not None:
        return f"{str(error.filename)!r} is no folder"
    return reason(error)


def _acquire(folder: Path, name: str, until: float) -> int | None:
    """An open and locked file of this name; None where there are no locks."""
    path = folder / name
    while True:
        handle = _open(path)
        try:
            locked = lock_file(handle)
            # Otherwise the one who had the lock has removed it: another file is in its place.
            if locked and stands_at(path, handle):
                _sign(handle)
                _handles.add(handle)
                return handle
            if locked is False and time.monotonic() >= until:
                raise CheckpointError(
                    f"the folder {str(folder)!r} is being written by {_holder(handle)}; "
                    "wait for it or end it, or give another folder"
                )
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if locked is None:
            path.unlink(missing_ok=True)
            what = f"{str(folder)!r} cannot be locked, its file system has no locks"
            log.warning(f"warning: {what}; make sure that no other process writes this folder")
            return None
        if locked is False:
            time.sleep(_POLL)


def _open(path: Path) -> int:
    """The open file of a lock. It is written to, so that a link must not lead to a file of another name."""
    try:
        if path.is_symlink():
            raise CheckpointError(f"{str(path)!r} is no plain file; delete it")
        handle = os.open(path, _FLAGS, 0o666)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {reason(error)}; the folder must be writable") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise CheckpointError(f"{str(path)!r} is no plain file; delete it")
    return handle


def _sign(handle: int) -> None:
    """Leave the name of the holder; where the disk is full the lock holds without it."""
    own = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(own).encode(), 0)


def _holder(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(found['process'])} on {quote(str(found['host']))} since {quote(str(found['since']))}"
    except Exception:  # whatever stands there
        return "another process"
