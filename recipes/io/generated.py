"""Generated data sets on disk: complete or not used, and checked against their hashes at every use.

A folder holds the files of one data set and `manifest.json` with the generator, its version and settings, and the
SHA-256 of every file. Every process writes its files into its own draft folder, so concurrent processes do not
interfere. Then the files are moved to their final paths under a lock, the manifest first. A manifest without all its
files marks an incomplete data set, which is generated again, so a process may be killed at any time.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from sma.errors import DataError, parsing, quote, reason
from sma.files import open_file, read_file
from sma.memory import format_bytes
from sma.recipes.io.drafts import draft_folder, locked, remove_abandoned
from sma.recipes.io.folders import cache_folder

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_BLOCK = 1 << 20
_MANIFEST_BYTES = 1 << 20
_DRAFT = "draft"


class HashedFile:
    """A file opened for writing, and the SHA-256 of its content so far."""

    def __init__(self, path: Path):
        self._hash = hashlib.sha256()
        self._file = path.open("xb", buffering=_BLOCK)

    def write(self, content: bytes) -> None:
        """Append `content`."""
        self._hash.update(content)
        self._file.write(content)

    def sync(self) -> None:
        """Flush the content to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Only content before the last `sync` is sure to be on the disk."""
        with suppress(OSError):
            self._file.close()

    @property
    def sha256(self) -> str:
        """The hash, in hexadecimal digits."""
        return self._hash.hexdigest()


Writer = Callable[[Mapping[str, HashedFile]], None]


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """Return the hash of a file in hexadecimal digits.

    Raises:
        DataError: the file cannot be read.
    """
    with open_file(path) as file, parsing(path):
        return hashlib.file_digest(file, partial(hashlib.new, algorithm, usedforsecurity=False)).hexdigest()


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Check that there is enough space on the disk.

    Args:
        folder: the folder in which the space is needed; it need not exist yet.
        needed: lower bound of the required bytes.
        what: subject of the error message, in the singular.

    Raises:
        DataError: there is too little space; the message has the required and the free bytes.
    """
    existing = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), None)
    with suppress(OSError):
        if existing is not None and needed > (free := shutil.disk_usage(existing).free):
            raise DataError(
                f"{what} needs {format_bytes(needed)} in {folder}, and {format_bytes(free)} are free; "
                "make room there or choose another folder"
            )


def copy_folder(data: Path, name: str) -> Path:
    """Return the folder for files derived from a data folder: in it, or in the default one if it cannot be written.

    Args:
        data: the data folder.
        name: name of the folder. An existing one in `data` is always used.
    """
    folder = data / name
    if folder.is_dir() or not data.is_dir() or os.access(data, os.W_OK):
        return folder
    elsewhere = cache_folder() / name
    if not elsewhere.is_dir():
        log.warning("%s cannot be written, so files derived from it are kept in %s", data, elsewhere)
    return elsewhere


def cached_files(
    folder: Path,
    recipe: Mapping[str, Any],
    names: Sequence[str],
    write: Writer,
    *,
    needed: int = 0,
    what: str = "the data set",
) -> dict[str, str]:
    """Return the SHA-256 of every file of a generated data set, after generating it if `folder` does not hold it.

    Args:
        folder: folder of the files; created if missing.
        recipe: everything that determines the content of the files, as JSON values: generator, version, settings. It is
            kept in the manifest.
        names: names of the files.
        write: function that writes the files, which it gets open, by name.
        needed: lower bound of the size of the files, in bytes.
        what: noun for the data set, for the error message.

    Raises:
        DataError: `folder` holds data of another recipe, files that were not generated here, or a file that changed
            since its generation; or it cannot be written, or has too little space.
    """
    try:
        if not (folder / MANIFEST).exists():
            check_disk(folder, needed, what)
        folder.mkdir(parents=True, exist_ok=True)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError for a path with a zero byte
        raise _unkept(folder, error) from error
    try:
        with locked(folder):
            remove_abandoned(folder, _DRAFT)
            complete = _is_complete(folder, recipe, names)
        if not complete:
            _generate(folder, recipe, names, write)
    except OSError as error:
        raise _unkept(folder, error) from error
    hashes = {name: str(_read_manifest(folder)["files"].get(name)) for name in names}
    for name, expected in hashes.items():
        if digest_of(folder / name) != expected:
            raise DataError(f"{folder / name} was changed since it was generated; delete it to generate it again")
    return hashes


def _unkept(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"cannot keep data in {quote(str(folder), 300)}: {reason(error)}; make room there or choose another folder"
    )


def _is_complete(folder: Path, recipe: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether `folder` holds all files of `recipe`; raises if it holds other files that would be overwritten."""
    present = [name for name in names if (folder / name).exists()]
    if not (folder / MANIFEST).exists():
        if present:
            raise DataError(
                f"{folder} holds {present[0]} but no {MANIFEST}: it was not generated here; "
                "read it as it is, or choose another folder"
            )
        return False
    made_by = {key: value for key, value in _read_manifest(folder).items() if key != "files"}
    required = json.loads(json.dumps(recipe))
    if made_by != required:
        changes = ", ".join(itertools.islice(_differences(made_by, required), 8))
        raise DataError(
            f"{folder} holds data generated with other settings ({changes}); "
            "choose another folder, or delete it to generate it again"
        )
    return len(present) == len(names)


def _generate(folder: Path, recipe: Mapping[str, Any], names: Sequence[str], write: Writer) -> None:
    with draft_folder(folder, _DRAFT) as draft:
        files: dict[str, HashedFile] = {}
        try:
            for name in (MANIFEST, *names):
                files[name] = HashedFile(draft / name)
            write({name: files[name] for name in names})
            manifest = {**recipe, "files": {name: files[name].sha256 for name in names}}
            files[MANIFEST].write(json.dumps(manifest, indent=2).encode() + b"\n")
            for file in files.values():
                file.sync()
        finally:
            for file in files.values():
                file.close()
        with locked(folder) as handle:
            if not _is_complete(folder, recipe, names):  # another process may have been first
                # The manifest first, because files without one count as not generated here.
                for name in files:
                    os.replace(draft / name, folder / name)
                if handle is not None:
                    os.fsync(handle)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    with parsing(path, hint=f"delete {folder} to generate it again"):
        manifest = json.loads(read_file(path, _MANIFEST_BYTES))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{path} does not list the files of a data set; delete {folder} to generate it again")
    return manifest


def _differences(found: Mapping[str, Any], required: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(found.keys() | required.keys()):
        old, new = found.get(key), required.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield f"{key if key in required else quote(key)} is {quote(old)} there, {quote(new)} is required"
