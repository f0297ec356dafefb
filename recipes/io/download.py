"""Downloads: resumed after interruptions, checked against a hash, and completed atomically.

The bytes are written to `NAME.part` beside the final path, and the length, ETag and date of the file to
`NAME.part.json`. The next call requests only the rest, on condition that the file has not changed. A server without
ranges, or with another file, sends the complete file. `NAME` is created when all bytes are there and the hash is right.
The downloader of `torch.hub` is not used, because it restarts after every interruption, which is too slow for archives
of several gigabytes.
"""

import http.client
import json
import os
import re
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sma.errors import DataError, parsing, quote, reason
from sma.files import check_file, read_file
from sma.recipes.io.drafts import locked_file
from sma.recipes.io.generated import check_disk, digest_of
from sma.recipes.io.progress import Counter

_BLOCK = 1 << 20
_SECONDS = 30.0  # time limit for a server that sends nothing
_ATTEMPTS = 5  # consecutive failures with fewer than `_SLOW` bytes each before the download fails
# An attempt fails if the server sends fewer bytes in this time; `_SECONDS` alone would accept one byte at a time.
_SLOW = 1 << 16
_SLOW_SECONDS = 60.0
_NOTES = 1 << 16  # maximum bytes of the notes
_PAUSE = 1.0  # seconds before the second attempt, doubled before each further one


class _Retry(Exception):
    """A failure of the connection after which another attempt may succeed."""


def fetch(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    most: int | None = None,
    progress: bool = True,
) -> Path:
    """Return `path`, after downloading the file from `url` if it does not exist.

    The hash of an existing file is checked too. Only one process at a time downloads to a path; the others wait for it.

    Args:
        url: URL of the file, http or https.
        path: path of the file; its folder is created if missing.
        sha256: SHA-256 of the file, in hexadecimal digits; None accepts any.
        md5: MD5 of the file, if no better hash is published; None accepts any.
        most: maximum bytes of the file; None: the free space.
        progress: whether to show a progress bar.

    Raises:
        DataError: the server cannot be reached, or does not send the file, or sends a longer one; the disk is full; or
            the hash is wrong. The bytes so far are kept, and the next call resumes after them, unless the file is too
            long or has a wrong hash.
    """
    path = Path(path)
    wanted = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    with _disk_errors(path):
        if _exists(path, url, wanted):
            return path
    if not url.startswith(("http://", "https://")):
        raise DataError(f"cannot download {quote(url)}: the address must begin with http:// or https://")
    part, notes = (path.with_name(path.name + suffix) for suffix in (".part", ".part.json"))
    waiting = f"another process downloads {path.name}; waiting for it" if progress else ""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(part.stat().st_mode):  # cannot be locked
                check_file(part)
        with locked_file(part, waiting):
            if _exists(path, url, wanted):  # another process may have been first
                return path
            if notes.exists():
                check_file(notes)
            _Download(url, part, notes, most).run(progress)
            try:
                _check(
                    part,
                    wanted,
                    f"{url} sent an unexpected file, so {path} was not written; try again, or get the file elsewhere",
                )
            except DataError:
                _restart(part, notes)
                raise
            os.replace(part, path)
            notes.unlink(missing_ok=True)
    return path


def _exists(path: Path, url: str, wanted: Mapping[str, str]) -> bool:
    if path.exists():
        _check(path, wanted, f"{path} is not the file at {url}; move it away to download it again")
        return True
    return False


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; "
            "make room there or choose another folder (the next call resumes the download)"
        ) from error


class _Download:
    """The download of one file, in one or more requests."""

    def __init__(self, url: str, part: Path, notes: Path, most: int | None) -> None:
        self.url, self.part, self.notes, self.most = url, part, notes, most
        self.hint = f"put the file at {part.with_suffix('')} yourself"

    def run(self, progress: bool) -> None:
        """Download the complete file."""
        failures = 0
        with Counter(self.part.stem, None, shown=progress, in_bytes=True) as counter:
            while True:
                before = _size(self.part)
                try:
                    self._request(counter)
                    return
                except _Retry as error:
                    failures = failures + 1 if _size(self.part) < before + _SLOW else 1
                    if failures >= _ATTEMPTS:
                        raise DataError(
                            f"cannot download {self.url}: {error} (after {failures} attempts, with "
                            f"{_size(self.part):,} bytes here); check the network and call again, or {self.hint}"
                        ) from error
                    time.sleep(_PAUSE * 2 ** (failures - 1))

    def _request(self, counter: Counter) -> None:
        """Request the missing bytes once, and append them.

        Raises:
            _Retry: the connection ended too early.
        """
        known = _read_notes(self.notes, self.url)
        here = _size(self.part) if known else 0
        if here and here == known.get("length"):
            return
        # Accept-Encoding, because the bytes of the file are hashed and counted, not those of a compressed form.
        headers = {"User-Agent": "sparse-modular-activation", "Accept-Encoding": "identity"}
        if here:
            headers |= {"Range": f"bytes={here}-", "If-Range": known["validator"]}
        with self._open(headers) as reply:
            start, total = _range_of(reply, here, known.get("length"))
            if start is None:
                _restart(self.part, self.notes)
                raise _Retry("the file changed on the server, or its answer has the wrong range")
            if start == 0:
                _restart(self.part, self.notes)
            if total is not None:
                self._check_length(total)
                check_disk(self.part.parent, total - start, f"the rest of {self.url}" if start else self.url)
            if start == 0:
                _write_notes(self.notes, self.url, reply.headers, total)
            counter.restart(start, total)
            self._append(reply, counter)
        if total is not None and _size(self.part) != total:
            if _size(self.part) > total:
                _restart(self.part, self.notes)
            raise _Retry(f"the connection ended before byte {total:,}")

    def _open(self, headers: Mapping[str, str]) -> Any:
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url, headers=dict(headers)), timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            status = f"the server answers {error.code} {reason(ValueError(error.reason))}"
            error.close()
            if error.code == 416:  # the file is shorter than the bytes so far
                _restart(self.part, self.notes)
            if error.code in (408, 416, 429) or error.code >= 500:
                raise _Retry(status) from error
            raise DataError(
                f"cannot download {self.url}: {status}; look for a newer address, or {self.hint}"
            ) from error
        except Exception as error:  # of the network, the response or the URL
            inner = getattr(error, "reason", error)
            raise _Retry(reason(inner) if isinstance(inner, Exception) else str(inner)) from error

    def _check_length(self, length: int) -> None:
        if self.most is not None and length > self.most:
            _restart(self.part, self.notes)
            raise DataError(
                f"cannot download {self.url}: the server sends more than {self.most:,} bytes, the maximum of the file; "
                f"look for a newer address, or {self.hint}"
            )

    def _append(self, reply: Any, counter: Counter) -> None:
        began, received = time.monotonic(), 0
        with self.part.open("ab") as file:
            while True:
                try:
                    block = reply.read1(_BLOCK)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    file.write(getattr(error, "partial", b""))
                    raise _Retry(reason(error)) from error
                if not block:
                    break
                file.write(block)
                self._check_length(file.tell())
                counter.advance(len(block))
                received += len(block)
                if (waited := time.monotonic() - began) > _SLOW_SECONDS:
                    if received < _SLOW:
                        raise _Retry(f"the server sent only {received:,} bytes in {waited:.0f} seconds")
                    began, received = time.monotonic(), 0
            file.flush()
            os.fsync(file.fileno())


def _range_of(reply: Any, here: int, length: int | None) -> tuple[int | None, int | None]:
    """Return the position in the file of the first byte of a response, and the length of the file.

    The position is None if the response does not continue the bytes so far.
    """
    if reply.status == 206:
        pattern = r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)"
        found = re.fullmatch(pattern, reply.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != here:
            return None, None
        total = length if found[2] == "*" else int(found[2])
        return (here if length in (None, total) else None), total
    size = re.fullmatch(r"[0-9]{1,18}", reply.headers.get("Content-Length") or "")
    return 0, int(size[0]) if size else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _restart(part: Path, notes: Path) -> None:
    """Delete the bytes so far; the file is kept, because it holds the lock."""
    part.write_bytes(b"")
    notes.unlink(missing_ok=True)


def _write_notes(notes: Path, url: str, headers: Any, total: int | None) -> None:
    """Write the identity of the file, without which a later call cannot resume."""
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    if _is_validator(validator):
        notes.write_text(json.dumps({"url": url, "validator": validator, "length": total}), encoding="utf-8")


def _read_notes(notes: Path, url: str) -> dict[str, Any]:
    with suppress(DataError), parsing(notes):
        known = json.loads(read_file(notes, _NOTES))
        if isinstance(known, dict) and known.get("url") == url and _is_validator(known.get("validator")):
            return known
    return {}


def _is_validator(value: object) -> bool:
    """Whether a value is valid in the header of a request."""
    return isinstance(value, str) and value.isascii() and value.isprintable()


def _check(path: Path, wanted: Mapping[str, str], otherwise: str) -> None:
    for name, value in wanted.items():
        if (found := digest_of(path, name)) != value:
            raise DataError(f"{otherwise}: its {name} is {found}, expected {value}")
