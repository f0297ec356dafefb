"""Locks between processes, and folders for incomplete data.

A lock ends with the process that holds it, and leaves no file, unlike `filelock.FileLock`, which would leave one in
every folder of data. Windows has no locks of folders, and some network file systems have no locks. There, processes do
not wait for each other, and the drafts of killed processes are not deleted.
"""

import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sma.files import is_open_at, lock_file
from sma.recipes.io.names import plain

PATIENCE = 2.0
"""Time without a message while waiting for a lock, in seconds."""


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Hold the lock of a folder inside the block; yields its handle, or None on Windows.

    Locks are held for moments only. After `PATIENCE` a message is printed, because a stopped process keeps its locks.
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
    """Delete the drafts of killed processes in `folder`, whose lock the caller holds."""
    for path in folder.iterdir():
        if path.name.startswith(f".{name}.") and path.suffix == ".tmp" and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def draft_folder(folder: Path, name: str) -> Iterator[Path]:
    """Yield a new folder `.NAME.….tmp` in `folder`, and delete it afterwards with its remaining files.

    The draft of a killed process has no lock, so `remove_abandoned` deletes it.
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
    """Hold the lock of a file inside the block. It is created if missing, and deleted afterwards if it is empty.

    The holder may move or delete the file; waiting processes then lock the new file at `path`.

    Args:
        path: the file.
        waiting: message that is printed if another process holds the lock.
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
            if is_open_at(path, handle, follow_symlinks=True) and not os.fstat(handle).st_size:
                path.unlink()
        os.close(handle)


def _is_at(path: Path, handle: int, waiting: str) -> bool:
    """Lock an open file; returns whether it is still the file at `path`."""
    locked = lock_file(handle)
    if locked is False:
        if waiting:
            print(waiting, flush=True)
        locked = lock_file(handle, wait=True)
    if locked is None:
        return True
    return is_open_at(path, handle, follow_symlinks=True)


def _is_abandoned(path: Path) -> bool:
    """Whether no process holds the lock of a draft; False if this is unknown."""
    if sys.platform == "win32":
        return False
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return lock_file(handle) is True
        finally:
            os.close(handle)
    return False
