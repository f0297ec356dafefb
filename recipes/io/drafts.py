"""Locks between processes, and folders for what is not finished yet.

A lock ends with the process that holds it, however that process ends, and leaves no file: not `filelock.FileLock`,
which leaves one in every folder of data. Windows cannot lock a folder, and some network file systems cannot lock at
all: there nobody waits for another, and what killed processes leave is not removed.
"""

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sma.files import lock_file
from sma.recipes.io.names import plain

PATIENCE = 2.0
"""Seconds that a lock is waited for in silence."""


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Keep other processes out of `folder`, and yield its handle, or None where folders have none.

    Others hold the lock for moments. Who waits longer is told for what: a process that is stopped keeps its locks.
    """
    if sys.platform == "win32":
        yield None
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + PATIENCE
        while lock_file(handle) is False:
            if time.monotonic() > deadline:
                print(f"another process is writing in {plain(folder)}; waiting for it", file=sys.stderr, flush=True)
                lock_file(handle, wait=True)
                break
            time.sleep(0.05)
        yield handle
    finally:
        os.close(handle)


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove the drafts of a name that killed processes left in `folder`, whose lock the caller has."""
    for path in folder.iterdir():
        if path.name.startswith(f".{name}.") and path.suffix == ".tmp" and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def draft_folder(folder: Path, name: str) -> Iterator[Path]:
    """Yield a new folder `.NAME.….tmp` in `folder`; what is then still in it goes with it.

    A process that is killed leaves its own behind. Its lock is gone, though, so that `remove_abandoned` removes it.
    """
    made = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    with ExitStack() as owner:
        with locked(folder):
            remove_abandoned(folder, name)
            made.mkdir()
            owner.enter_context(locked(made))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def locked_file(path: Path, waiting: str = "") -> Iterator[None]:
    """Keep other processes from `path`, which is made where it is missing, and removed in the end where it is still
    empty.

    Whoever has the lock may move or delete the file: those who waited lock the one that stands there then.

    Args:
        path: the file.
        waiting: printed where another process has the lock.
    """
    if sys.platform == "win32":
        yield
        return
    while not _is_at(path, handle := os.open(path, os.O_RDWR | os.O_CREAT, 0o666), waiting):
        os.close(handle)
    try:
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), path.stat()) and not path.stat().st_size:
                path.unlink()
        os.close(handle)


def _is_at(path: Path, handle: int, waiting: str) -> bool:
    """Lock an open file, and say whether it still stands at `path`."""
    locked = lock_file(handle)
    if locked is False:
        if waiting:
            print(waiting, flush=True)
        locked = lock_file(handle, wait=True)
    if locked is None:
        return True
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


def _is_abandoned(path: Path) -> bool:
    """Whether nobody holds a draft any more; never where that cannot be known."""
    if sys.platform == "win32":
        return False
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return lock_file(handle) is True
        finally:
            os.close(handle)
    return False
