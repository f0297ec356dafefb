"""The folder of a sweep, on this machine or behind a URI."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from sma.errors import CheckpointError, SmaError, parsing, reason
from sma.files import read_file, write_atomically
from sma.recipes.io.claims import LOCK, run_lock
from sma.recipes.io.folders import check_run_folder, expand

PATIENCE = 30.0
"""Seconds in which a URI must answer at first; pyarrow by itself would try for minutes."""

LIMIT = 64 * 2**20
"""Bytes of a file that is read whole."""


class Storage:
    """A folder of files that are read and written whole.

    Args:
        location: a path, or a URI such as `s3://bucket/sweep`.

    Raises:
        CheckpointError: the URI means nothing to pyarrow, or nothing answers there.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = str(location)
        self.is_local = "://" not in self.location
        folder = expand(Path(location)) if self.is_local else Path()
        check_run_folder(folder)
        try:
            if self.is_local:
                self.location = str(folder.absolute())
                self.files, self.root = LocalFileSystem(), self.location
            else:
                if not self.location.startswith("file:"):
                    _check_answer(self.location)
                self.files, self.root = FileSystem.from_uri(self.location)
        except (ArrowException, OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot use the storage {self.location!r}: {reason(error)}; give a folder or a URI that pyarrow knows"
            ) from error

    @property
    def folder(self) -> Path | None:
        """The folder where it is one of this machine's file system; None behind other URIs."""
        return Path(self.root) if isinstance(self.files, LocalFileSystem) else None

    @contextmanager
    def locked(self, name: str = LOCK) -> Iterator[None]:
        """Be the only process that writes the folder; behind a URI nobody can promise that.

        Args:
            name: `DRIVER` for a process that has others write it.

        Raises:
            CheckpointError: another process writes it, named by host and process id, or it cannot be written.
        """
        if self.folder is None:
            yield
            return
        with run_lock(self.folder, name=name):
            yield

    def check_writable(self) -> None:
        """Write a file and remove it.

        Raises:
            CheckpointError: that failed.
        """
        self.write("writable.tmp", b"")
        with self._writing("writable.tmp"):
            self.files.delete_file(self._path("writable.tmp"))

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file; it appears whole or not at all: object stores promise that anyway.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        data = content.encode() if isinstance(content, str) else content
        path = self._path(name)
        with self._writing(name):
            if self.folder is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(Path(path), lambda draft: draft.write_bytes(data))
                return
            self.files.create_dir(str(PurePosixPath(path).parent), recursive=True)
            with self.files.open_output_stream(path) as stream:
                stream.write(data)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except (ArrowException, OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot write {self.address(name)!r}: {reason(error)}; the storage must be writable and have space"
            ) from error

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.write(name, json.dumps(content, indent=1, allow_nan=False))

    def read(self, name: str) -> bytes | None:
        """The content of a file; None where there is none.

        Raises:
            CheckpointError: it cannot be read, is no plain file or longer than `LIMIT`.
        """
        if self.folder is not None:
            try:
                return read_file(self._path(name), LIMIT, CheckpointError)
            except SmaError as error:
                if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                    return None
                raise
        try:
            with self.files.open_input_stream(self._path(name)) as stream:
                content = bytes(stream.read(LIMIT + 1))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ArrowException, OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.address(name)!r}: {reason(error)}") from error
        if len(content) > LIMIT:
            raise CheckpointError(
                f"{self.address(name)!r} is longer than {LIMIT:,} bytes, which no file of this kind is"
            )
        return content

    def read_json(self, name: str, hint: str = "") -> Any:
        """The content of a JSON file; None where there is none.

        Args:
            name: of the file.
            hint: what to do where it is damaged.

        Raises:
            CheckpointError: it is not JSON.
        """
        content = self.read(name)
        with parsing(repr(self.address(name)), CheckpointError, hint):
            return None if content is None else json.loads(content, parse_constant=_finite, parse_float=_finite)

    def names(self, folder: str = "") -> list[str]:
        """The names of the files and folders in a folder, sorted; none where it is missing.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            found = self.files.get_file_info(FileSelector(self._path(folder), allow_not_found=True))
        except (ArrowException, OSError) as error:
            raise CheckpointError(f"cannot read the folder {self.address(folder)!r}: {reason(error)}") from error
        return sorted(PurePosixPath(entry.path).name for entry in found if entry.type != FileType.NotFound)

    def remove(self, folder: str) -> None:
        """Remove a folder and all in it, if it is there.

        Raises:
            CheckpointError: it cannot be removed.
        """
        with self._writing(folder):
            if self.files.get_file_info(self._path(folder)).type == FileType.Directory:
                self.files.delete_dir(self._path(folder))

    def relative(self, path: str) -> str:
        """A path of the file system, seen from this folder."""
        return str(PurePosixPath(path).relative_to(self.root))

    def address(self, name: str) -> str:
        """How a file is called outside: its path or its URI."""
        return f"{self.location.rstrip('/')}/{name}" if name else self.location

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


def _finite(text: str) -> float:
    """A number, as JSON knows them: NaN and infinity, which Python reads and writes, are none."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


_ASK = (
    "import sys; from pyarrow.fs import FileSystem; "
    "files, root = FileSystem.from_uri(sys.argv[1]); files.get_file_info(root)"
)


def _check_answer(location: str) -> None:
    """Ask in a process of its own: pyarrow tries for minutes, and lets no process end before.

    Raises:
        CheckpointError: nothing answers. What else may be wrong is left to the first real access.
    """
    try:
        subprocess.run([sys.executable, "-c", _ASK, location], timeout=PATIENCE, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"the storage {location!r} has not answered for {PATIENCE:g} s; "
            "check the address, the network and the credentials"
        ) from None
