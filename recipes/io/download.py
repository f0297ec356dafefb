"""Downloads: resumed where they stopped, checked against a hash, and written whole or not at all.

Bytes go to `NAME.part` beside the final place, and what the server said about the file (length, ETag, date) to
`NAME.part.json`. The next call asks for the rest alone, on condition that the file is still the same one; a server that
knows no ranges, or has another file by now, sends all of it. `NAME` appears when every byte is there and the hash fits.
`torch.hub` has a downloader too; it begins anew after every break, which archives of some gigabytes cannot afford.
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from sma.errors import DataError, parsing, quote, reason
from sma.files import check_file, open_file, read_file
from sma.recipes.io.drafts import locked_file
from sma.recipes.io.generated import check_disk

_BLOCK = 1 << 20
_SECONDS = 30.0
"""How long a silent server is waited for."""

_ATTEMPTS = 5
"""Failures in a row, none of which brought `_SLOW` bytes, before giving up."""

_SLOW = 1 << 16
_SLOW_SECONDS = 60.0
"""A server that sends fewer bytes in so many seconds is given up: `_SECONDS` alone would wait for one byte after the
other.
"""

_NOTES = 1 << 16
"""Bytes of the notes at most."""

_PAUSE = 1.0
"""Seconds before the second attempt; twice as many before each further one."""


class _Again(Exception):
    """The connection failed in a way that another attempt may mend."""


def fetch(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    most: int | None = None,
    progress: bool = True,
) -> Path:
    """Return `path`, downloading it from `url` first unless it is there.

    A file that is there already is hashed too, if a hash is given. One process at a time downloads to one path; the
    others wait for it.

    Args:
        url: http or https.
        path: where the file shall be; its folder is made if missing.
        sha256: what the file must have, in hexadecimal digits; None takes any.
        md5: the same, for files whose publisher gives no better hash.
        most: bytes that it may have; None: as many as there is room for.
        progress: whether to show a bar.

    Raises:
        DataError: the server cannot be reached, does not give the file or gives more than that, the disk is full, or
            the hash is another one. What was downloaded so far stays, so that the next call goes on from there; only a
            file that is too long or has a wrong hash does not.
    """
    path = Path(path)
    wanted = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    with _disk_errors(path):
        if _is_there(path, url, wanted):
            return path
    if not url.startswith(("http://", "https://")):
        raise DataError(f"cannot download {quote(url)}: the address must begin with http:// or https://")
    part = path.with_name(path.name + ".part")
    notes = path.with_name(path.name + ".part.json")
    waiting = f"another process downloads {path.name}; waiting for it" if progress else ""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for place in (part, notes):
            if place.exists():
                check_file(place)
        with locked_file(part, waiting):
            if _is_there(path, url, wanted):  # by now, through another process
                return path
            _Download(url, part, notes, most).run(progress)
            try:
                _check(
                    part,
                    wanted,
                    f"{url} gave another file than expected, so {path} was not written; "
                    "try again, or get the file elsewhere",
                )
            except DataError:
                _forget(part, notes)
                raise
            os.replace(part, path)
            notes.unlink(missing_ok=True)
    return path


def _is_there(path: Path, url: str, wanted: Mapping[str, str]) -> bool:
    if path.exists():
        _check(path, wanted, f"{path} is not the file that {url} should give; move it away to download it again")
        return True
    return False


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}; "
            "make room there or choose another folder (the next call goes on from what was downloaded)"
        ) from error


class _Download:
    """One file on its way, in as many requests as that takes."""

    def __init__(self, url: str, part: Path, notes: Path, most: int | None) -> None:
        self.url, self.part, self.notes, self.most = url, part, notes, most
        self.yourself = f"put the file at {part.with_name(part.name.removesuffix('.part'))} yourself"

    def run(self, progress: bool) -> None:
        """Bring the file to its full length."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        failures = 0
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task(self.part.name.removesuffix(".part"), total=None)
            while True:
                before = _size(self.part)
                try:
                    self._request(bar, task)
                    return
                except _Again as error:
                    failures = failures + 1 if _size(self.part) < before + _SLOW else 1
                    if failures >= _ATTEMPTS:
                        raise DataError(
                            f"cannot download {self.url}: {error} (after {failures} attempts, with "
                            f"{_size(self.part):,} bytes here); check the network and call again, or {self.yourself}"
                        ) from error
                    time.sleep(_PAUSE * 2 ** (failures - 1))

    def _request(self, bar: Progress, task: Any) -> None:
        """Ask once for what is missing, and append it; raise `_Again` where it ends too early."""
        known = _read_notes(self.notes, self.url)
        here = _size(self.part) if known else 0
        if here and here == known.get("length"):
            return
        # Accept-Encoding: the bytes of the file itself are hashed and counted, not a compressed form of them.
        headers = {"User-Agent": "sparse-modular-activation", "Accept-Encoding": "identity"}
        if here:
            headers |= {"Range": f"bytes={here}-", "If-Range": known["validator"]}
        with self._open(headers) as reply:
            start, total = _place(reply, here, known.get("length"))
            if start is None:
                _forget(self.part, self.notes)
                raise _Again("the file changed on the server, or its answer has the wrong range")
            if start == 0:
                _forget(self.part, self.notes)
            self._check_room(start, total)
            if start == 0:
                _write_notes(self.notes, self.url, reply.headers, total)
            bar.update(task, completed=start, total=total)
            self._append(reply, bar, task)
        if total is not None and _size(self.part) != total:
            if _size(self.part) > total:
                _forget(self.part, self.notes)
            raise _Again(f"the connection ended before byte {total:,}")

    def _open(self, headers: Mapping[str, str]) -> Any:
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url, headers=dict(headers)), timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            says = f"the server answers {error.code} {reason(ValueError(error.reason))}"
            error.close()
            if error.code == 416:  # what is here is longer than the file
                _forget(self.part, self.notes)
            if error.code in (408, 416, 429) or error.code >= 500:
                raise _Again(says) from error
            raise DataError(
                f"cannot download {self.url}: {says}; look for a newer address, or {self.yourself}"
            ) from error
        except Exception as error:  # of the network, of the answer, or of an address that is none
            inner = getattr(error, "reason", error)
            raise _Again(reason(inner) if isinstance(inner, Exception) else str(inner)) from error

    def _check_room(self, start: int, total: int | None) -> None:
        """Refuse a file that is longer than it can be, or than the disk is large, before it comes."""
        if total is None:
            return
        self._check_length(total)
        check_disk(self.part.parent, total - start, f"the rest of {self.url}" if start else self.url)

    def _check_length(self, length: int) -> None:
        if self.most is not None and length > self.most:
            _forget(self.part, self.notes)
            raise DataError(
                f"cannot download {self.url}: the server gives more than the {self.most:,} bytes that the file can "
                f"have; look for a newer address, or {self.yourself}"
            )

    def _append(self, reply: Any, bar: Progress, task: Any) -> None:
        began, received = time.monotonic(), 0
        with self.part.open("ab") as file:
            while True:
                try:
                    block = reply.read1(_BLOCK)
                except (OSError, ValueError, http.client.HTTPException) as error:
                    file.write(getattr(error, "partial", b""))
                    raise _Again(reason(error)) from error
                if not block:
                    break
                file.write(block)
                self._check_length(file.tell())
                bar.advance(task, len(block))
                received += len(block)
                if (waited := time.monotonic() - began) > _SLOW_SECONDS:
                    if received < _SLOW:
                        raise _Again(f"the server sent only {received:,} bytes in {waited:.0f} seconds")
                    began, received = time.monotonic(), 0
            file.flush()
            os.fsync(file.fileno())


def _place(reply: Any, here: int, length: int | None) -> tuple[int | None, int | None]:
    """Where in the file the answer begins, and how long the file is; None in the first place if it does not fit what is
    here.
    """
    if reply.status == 206:
        found = re.fullmatch(
            r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", reply.headers.get("Content-Range", "")
        )
        if found is None or int(found[1]) != here:
            return None, None
        total = length if found[2] == "*" else int(found[2])
        return (here if length in (None, total) else None), total
    size = re.fullmatch(r"[0-9]{1,18}", reply.headers.get("Content-Length") or "")
    return 0, int(size[0]) if size else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(part: Path, notes: Path) -> None:
    """Begin anew; the file stays, for it carries the lock."""
    part.write_bytes(b"")
    notes.unlink(missing_ok=True)


def _write_notes(notes: Path, url: str, headers: Any, total: int | None) -> None:
    """Note what identifies the file; without that, a later call could not know that the rest belongs to it, and starts
    again.
    """
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
    """Whether something can stand in the header of a request."""
    return isinstance(value, str) and value.isascii() and value.isprintable()


def _check(path: Path, wanted: Mapping[str, str], otherwise: str) -> None:
    if not wanted:
        return
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in wanted}
    with open_file(path) as file, parsing(path):
        while block := file.read(_BLOCK):
            for total in hashes.values():
                total.update(block)
    for name, value in wanted.items():
        if (found := hashes[name].hexdigest()) != value:
            raise DataError(f"{otherwise}: its {name} is {found}, expected {value}")
