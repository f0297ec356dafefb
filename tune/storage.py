"""The folder of a sweep, on this machine or behind a URI."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from sma.errors import CheckpointError, SmaError, parsing, quote, reason
from sma.files import read_file, write_atomically
from sma.recipes.io.claims import LOCK, run_lock
from sma.recipes.io.folders import check_run_folder, expand

PATIENCE = 30.0
"""Timeout of the first access to a URI, in seconds; pyarrow itself retries for minutes."""

LIMIT = 64 * 2**20
"""Maximum size of a file that is read, in bytes."""


class Storage:
    """A folder, on this machine or behind a URI, whose files are read and written as a whole.

    Args:
        location: a path, or a URI such as `s3://bucket/sweep`.

    Raises:
        CheckpointError: pyarrow does not support the URI, or the server does not answer.
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
                f"cannot use the storage {self.location!r}: {reason(error)}; give a folder or a URI for pyarrow"
            ) from error

    @property
    def folder(self) -> Path | None:
        """The folder in the file system of this machine; None for a URI elsewhere."""
        return Path(self.root) if isinstance(self.files, LocalFileSystem) else None

    @contextmanager
    def locked(self, name: str = LOCK) -> Iterator[None]:
        """Hold the lock of the folder. A URI cannot be locked.

        Args:
            name: name of the lock: `DRIVER` for a process whose workers write the folder.

        Raises:
            CheckpointError: another process holds the lock, or the folder cannot be written. The message has the host
                and the process id of the other process.
        """
        if self.folder is None:
            yield
            return
        with run_lock(self.folder, name=name):
            yield

    def check_writable(self) -> None:
        """Write a file and remove it.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self.write("writable.tmp", b"")
        with self._writing("writable.tmp"):
            self.files.delete_file(self._path("writable.tmp"))

    def write(self, name: str, content: bytes | str) -> None:
        """Write a file atomically. Object stores guarantee this.

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
        """The content of a file; None if it does not exist.

        Raises:
            CheckpointError: it cannot be read, is not a regular file, or is longer than `LIMIT`.
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
                f"{self.address(name)!r} has more than {LIMIT:,} bytes; no file of this kind is so long"
            )
        return content

    def read_json(
        self, name: str, hint: str = "", is_valid: Callable[[Any], bool] = lambda found: True, required: str = ""
    ) -> Any:
        """The content of a JSON file; None if it does not exist or is null.

        Args:
            name: name of the file.
            hint: remedy for a damaged file, for the error message.
            is_valid: whether the content is as required.
            required: the requirement, for the error message.

        Raises:
            CheckpointError: the file is not JSON, or its content is not as required.
        """
        content = self.read(name)
        with parsing(repr(self.address(name)), CheckpointError, hint):
            found = None if content is None else json.loads(content, parse_constant=_finite, parse_float=_finite)
        if found is not None and not is_valid(found):
            hint = f"; {hint}" if hint else ""
            raise CheckpointError(f"{self.address(name)!r} is damaged: {quote(found)}; required {required}{hint}")
        return found

    def names(self, folder: str = "") -> list[str]:
        """The sorted names of the files and folders in a folder; none if it does not exist.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            found = self.files.get_file_info(FileSelector(self._path(folder), allow_not_found=True))
        except (ArrowException, OSError) as error:
            raise CheckpointError(f"cannot read the folder {self.address(folder)!r}: {reason(error)}") from error
        return sorted(PurePosixPath(entry.path).name for entry in found if entry.type != FileType.NotFound)

    def remove(self, folder: str) -> None:
        """Remove a folder and its content, if it exists.

        Raises:
            CheckpointError: it cannot be removed.
        """
        with self._writing(folder):
            if self.files.get_file_info(self._path(folder)).type == FileType.Directory:
                self.files.delete_dir(self._path(folder))

    def relative(self, path: str) -> str:
        """A path of the file system, relative to this folder."""
        return str(PurePosixPath(path).relative_to(self.root))

    def address(self, name: str) -> str:
        """The path or the URI of a file, for messages."""
        return f"{self.location.rstrip('/')}/{name}" if name else self.location

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


def _finite(text: str) -> float:
    """Parse a finite number. JSON has no NaN and no infinity, although Python reads and writes them."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


_PROBE = (
    "import sys; from pyarrow.fs import FileSystem; "
    "files, root = FileSystem.from_uri(sys.argv[1]); files.get_file_info(root)"
)


def _check_answer(location: str) -> None:
    """Check in another process that a URI answers: pyarrow retries for minutes, and blocks the exit of its process.

    Raises:
        CheckpointError: nothing answers. Other errors are raised by the first real access.
    """
    try:
        subprocess.run([sys.executable, "-c", _PROBE, location], timeout=PATIENCE, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"the storage {location!r} has not answered for {PATIENCE:g} s; "
            "check the address, the network and the credentials"
        ) from None
