"""Generated data sets on disk: written whole or not at all, hashed, and checked each time they are used.

A folder holds the files of one data set and `manifest.json`: what made them (generator, version, settings) and the SHA-256 of each.
Files are written beside their final place under names of their own, so that processes which generate the same data at the same time do
not meet; then they are moved into place under a lock, the manifest last. Only a process killed from outside leaves its `.*.tmp` files
behind; they are never read.
"""

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sma.errors import DataError

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


class HashedFile:
    """A file being written, and the SHA-256 of what was written so far."""

    def __init__(self, path: Path):
        self._hash = hashlib.sha256()
        self._file = path.open("xb", buffering=_BLOCK)

    def write(self, content: bytes) -> None:
        """Append `content`."""
        self._hash.update(content)
        self._file.write(content)

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; only what `sync` saw is promised to be there."""
        with suppress(OSError):
            self._file.close()

    @property
    def sha256(self) -> str:
        """The hash, in hexadecimal digits."""
        return self._hash.hexdigest()


Writer = Callable[[Mapping[str, HashedFile]], None]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits.

    Raises:
        DataError: the file cannot be read.
    """
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                total.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return total.hexdigest()


def cached_files(folder: Path, recipe: Mapping[str, Any], names: Sequence[str], write: Writer) -> dict[str, str]:
    """Return the SHA-256 of every file of a generated data set, making the files first where `folder` does not hold them.

    Args:
        folder: where the files are or shall be; made if missing.
        recipe: all that decides what the files contain, as JSON values: generator, version, settings. Kept in the manifest.
        names: the files of the data set.
        write: fills the open files it is given, by name.

    Raises:
        DataError: `folder` holds data made by another recipe, files that were not made here, or a file that changed since it was
            made; or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            complete = _is_complete(folder, recipe, names)
        if not complete:
            _generate(folder, recipe, names, write)
    except OSError as error:
        raise DataError(f"cannot keep data in {folder}: {error.strerror or error}; make room there or choose another folder") from error
    hashes = {name: str(_read_manifest(folder)["files"].get(name)) for name in names}
    for name, expected in hashes.items():
        if sha256_of(folder / name) != expected:
            raise DataError(f"{folder / name} was changed since it was generated; delete it to generate it again")
    return hashes


def _is_complete(folder: Path, recipe: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether `folder` holds all that `recipe` makes; raise where it holds something else that generating would overwrite."""
    present = [name for name in names if (folder / name).exists()]
    if not (folder / MANIFEST).exists():
        if present:
            raise DataError(
                f"{folder} holds {present[0]} but no {MANIFEST}: it was not generated here; read it as it is, or choose another folder"
            )
        return False
    made_by = {key: value for key, value in _read_manifest(folder).items() if key != "files"}
    asked = json.loads(json.dumps(recipe))
    if made_by != asked:
        changes = ", ".join(_differences(made_by, asked))
        raise DataError(f"{folder} holds data generated otherwise ({changes}); choose another folder, or delete it to generate it again")
    return len(present) == len(names)


def _generate(folder: Path, recipe: Mapping[str, Any], names: Sequence[str], write: Writer) -> None:
    stamp = f"{os.getpid()}-{secrets.token_hex(4)}"
    drafts = {name: folder / f".{name}.{stamp}.tmp" for name in [*names, MANIFEST]}
    files: dict[str, HashedFile] = {}
    try:
        for name, draft in drafts.items():
            files[name] = HashedFile(draft)
        write({name: files[name] for name in names})
        manifest = {**recipe, "files": {name: files[name].sha256 for name in names}}
        files[MANIFEST].write(json.dumps(manifest, indent=2).encode() + b"\n")
        for file in files.values():
            file.sync()
            file.close()
        with _locked(folder) as handle:
            if not _is_complete(folder, recipe, names):  # another process may have been first
                _publish(folder, drafts)
                if handle is not None:
                    os.fsync(handle)
    finally:
        for file in files.values():
            file.close()
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _publish(folder: Path, drafts: Mapping[str, Path]) -> None:
    """Move the finished drafts into place, in their order, all of them or none."""
    reached: list[Path] = []
    try:
        for name, draft in drafts.items():
            reached.append(folder / name)
            os.replace(draft, folder / name)
    except BaseException:
        for path in reached:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """Keep other processes out of `folder` and yield its handle. The lock ends with the process, however it ends, and leaves no file.

    Windows cannot lock a folder, some network file systems cannot lock at all: there, processes with the same settings still write the
    same bytes, and only processes with different settings in one folder can meet.
    """
    if sys.platform == "win32":
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; delete {folder} to generate it again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{path} does not list the files of a data set; delete {folder} to generate it again")
    return manifest


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(there.keys() | asked.keys()):
        old, new = there.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield f"{key} is {old!r} there, {new!r} asked"
