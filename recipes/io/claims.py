"""Folders that one process at a time may write.

The lock is the kernel's, by `filelock` (`flock`; on Windows `LockFileEx`): it ends with its process, however that ends,
so that no lock is ever stale. A child that is forked does not keep it, and the thread that holds it may take it again.
What `filelock` lacks is here: the file `.lock` names its holder for the refusal of others, is removed in the end, and
must be a plain file; where a file system cannot lock, a warning stands in for the lock. Nothing is decided by what the
file says: the same host name can stand for several machines.
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
"""The file by which a folder is locked; it is there while a process has the lock, and after one was killed."""

DRIVER = ".driver.lock"
"""The same of a process that has others write the folder: they hold the lock of the folder itself."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


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
            # Not in a forked process, and not a file that was put there since.
            if lock.lock_counter == 1 and os.path.samestat(own, path.lstat()):
                path.unlink()
        lock.release()


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
                    f"the folder {str(folder)!r} is not empty; give another --out, or {again} to resume the run in it"
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


def _acquire(path: Path, wait: float) -> BaseFileLock | None:
    """The lock of this file, held; None where there are no locks. One object for all of a thread that has it twice."""
    lock = FileLock(path, is_singleton=True, on_acquired=_sign)
    try:
        lock.acquire(timeout=wait, poll_interval=0.1)
    except Timeout:
        raise CheckpointError(
            f"the folder {str(path.parent)!r} is being written by {_holder(path)}; "
            "wait for it or end it, or give another folder"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:  # also of a link
            raise CheckpointError(f"{str(path)!r} is no plain file; delete it") from error
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
    """Leave the name of the holder; where the disk is full the lock holds without it.

    Raises:
        OSError: writing would change a file of another name, or a device.
    """
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise OSError(errno.ELOOP, "no plain file")
    own = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, b" " + json.dumps(own).encode())


def _holder(path: Path) -> str:
    try:
        with open_file(path) as file:
            if sys.platform == "win32":
                file.seek(1)  # the first byte is what is locked, and nobody else can read it
            found = json.loads(file.read(1000))
        return f"process {int(found['process'])} on {quote(str(found['host']))} since {quote(str(found['since']))}"
    except Exception:  # whatever stands there
        return "another process"
