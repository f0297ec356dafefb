"""Generated data sets on disk: whole or not used, hashed, and checked each time they are used.

A folder holds the files of one data set and `manifest.json`: what made them (generator, version, settings) and the
SHA-256 of each. Files are written in a draft folder inside, one for every process, so that processes which generate the
same data at the same time do not meet; then they are moved into place under a lock, the manifest first. A manifest
without all its files is a data set that is not complete: whoever asks for it makes it again, so a process may be killed
at any moment.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
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
    with open_file(path) as file, parsing(path):
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Check that there is room on the disk.

    Args:
        folder: where it is needed; may not be there yet.
        needed: bytes, an estimate from below.
        what: needs them; the subject of the sentence, in the singular.

    Raises:
        DataError: how many bytes are needed and how many are free.
    """
    there = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), None)
    with suppress(OSError):
        if there is not None and needed > (free := shutil.disk_usage(there).free):
            raise DataError(
                f"{what} needs {format_bytes(needed)} in {folder}, and {format_bytes(free)} are free; "
                "make room there or choose another folder"
            )


def copy_folder(data: Path, name: str) -> Path:
    """Return the folder for what is made of the files in a data folder: in it, or, where it cannot be written, in the
    default one.

    Args:
        data: the data folder.
        name: of the folder; one that is in `data` already is taken in any case.
    """
    folder = data / name
    if folder.is_dir() or not data.is_dir() or os.access(data, os.W_OK):
        return folder
    elsewhere = cache_folder() / name
    if not elsewhere.is_dir():
        log.warning("%s cannot be written, so what is made of its files is kept in %s", data, elsewhere)
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
    """Return the SHA-256 of every file of a generated data set, making the files first where `folder` does not hold
    them.

    Args:
        folder: where the files are or shall be; made if missing.
        recipe: all that decides what the files contain, as JSON values: generator, version, settings. Kept in the
            manifest.
        names: the files of the data set.
        write: fills the open files it is given, by name.
        needed: bytes that the files will have, an estimate from below.
        what: they are, for the sentence where there is no room for them.

    Raises:
        DataError: `folder` holds data made by another recipe, files that were not made here, or a file that changed
            since it was made; or it cannot be written, or has no room for them.
    """
    try:
        if not (folder / MANIFEST).exists():
            check_disk(folder, needed, what)
        folder.mkdir(parents=True, exist_ok=True)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # the latter for a name that no folder can have
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
        if sha256_of(folder / name) != expected:
            raise DataError(f"{folder / name} was changed since it was generated; delete it to generate it again")
    return hashes


def _unkept(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"cannot keep data in {quote(str(folder), 300)}: {reason(error)}; make room there or choose another folder"
    )


def _is_complete(folder: Path, recipe: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether `folder` holds all that `recipe` makes; raise where it holds something else that generating would
    overwrite.
    """
    present = [name for name in names if (folder / name).exists()]
    if not (folder / MANIFEST).exists():
        if present:
            raise DataError(
                f"{folder} holds {present[0]} but no {MANIFEST}: it was not generated here; "
                "read it as it is, or choose another folder"
            )
        return False
    made_by = {key: value for key, value in _read_manifest(folder).items() if key != "files"}
    asked = json.loads(json.dumps(recipe))
    if made_by != asked:
        changes = ", ".join(itertools.islice(_differences(made_by, asked), 8))
        raise DataError(
            f"{folder} holds data generated otherwise ({changes}); "
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
                # The manifest first: files without one belong to somebody else.
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


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(there.keys() | asked.keys()):
        old, new = there.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            yield f"{key if key in asked else quote(key)} is {quote(old)} there, {quote(new)} asked"
