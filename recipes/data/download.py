"""Downloads: resumed where they stopped, checked against a hash, and written whole or not at all.

Bytes go to `NAME.part` beside the final place, and what the server said about the file (length, ETag, date) to `NAME.part.json`. The next
call asks for the rest alone, on condition that the file is still the same one; a server that knows no ranges, or has another file by
now, sends all of it. `NAME` appears when every byte is there and the hash fits.
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

from sma.errors import DataError
from sma.recipes.data.drafts import locked_file

_BLOCK = 1 << 20
_SECONDS = 30.0
"""How long a silent server is waited for."""

_ATTEMPTS = 5
"""Failures in a row, none of which brought a byte, before giving up."""

_PAUSE = 1.0
"""Seconds before the second attempt; twice as many before each further one."""


class _Again(Exception):
    """The connection failed in a way that another attempt may mend."""


def fetch(url: str, path: str | Path, *, sha256: str | None = None, md5: str | None = None, progress: bool = True) -> Path:
    """Return `path`, downloading it from `url` first unless it is there.

    A file that is there already is hashed too, if a hash is given. One process at a time downloads to one path; the others wait for it.

    Args:
        url: http or https.
        path: where the file shall be; its folder is made if missing.
        sha256: what the file must have, in hexadecimal digits; None takes any.
        md5: the same, for files whose publisher gives no better hash.
        progress: whether to show a bar.

    Raises:
        DataError: the server cannot be reached or does not give the file, the disk is full, or the hash is another one. What was
            downloaded so far stays, so that the next call goes on from there; only a complete file with a wrong hash does not.
    """
    path = Path(path)
    wanted = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    if _is_there(path, url, wanted):
        return path
    if not url.startswith(("http://", "https://")):
        raise DataError(f"cannot download {url!r}: the address must begin with http:// or https://")
    part = path.with_name(path.name + ".part")
    notes = path.with_name(path.name + ".part.json")
    waiting = f"another process downloads {path.name}; waiting for it" if progress else ""
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(part, waiting):
            if _is_there(path, url, wanted):  # by now, through another process
                return path
            _download(url, part, notes, progress)
            try:
                _check(
                    part, wanted, f"{url} gave another file than expected, so {path} was not written; try again, or get the file elsewhere"
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
            f"cannot write {path}: {error.strerror or error}; make room there or choose another folder (the next call goes on from what "
            "was downloaded)"
        ) from error


def _download(url: str, part: Path, notes: Path, progress: bool) -> None:
    """Bring `part` to its full length, in as many requests as that takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    failures = 0
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(part.name.removesuffix(".part"), total=None)
        while True:
            before = _size(part)
            try:
                _request(url, part, notes, bar, task)
                return
            except _Again as error:
                failures = failures + 1 if _size(part) <= before else 1
                if failures >= _ATTEMPTS:
                    raise DataError(
                        f"cannot download {url}: {error} (after {failures} attempts, with {_size(part):,} bytes here); check the network "
                        f"and call again, or put the file at {part.with_name(part.name.removesuffix('.part'))} yourself"
                    ) from error
                time.sleep(_PAUSE * 2 ** (failures - 1))


def _request(url: str, part: Path, notes: Path, bar: Progress, task: Any) -> None:
    """Ask once for what is missing, and append it; raise `_Again` where it ends too early."""
    known = _read_notes(notes, url)
    here = _size(part) if known else 0
    if here and here == known.get("length"):
        return
    # Accept-Encoding: the bytes of the file itself are hashed and counted, not a compressed form of them.
    headers = {"User-Agent": "sparse-modular-activation", "Accept-Encoding": "identity"}
    if here:
        headers |= {"Range": f"bytes={here}-", "If-Range": known["validator"]}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_SECONDS) as reply:
            start, total = _place(reply, here, known.get("length"))
            if start is None:
                _forget(part, notes)
                raise _Again("the file changed on the server, or its answer has the wrong range")
            if start == 0:
                _forget(part, notes)
                _write_notes(notes, url, reply.headers, total)
            bar.update(task, completed=start, total=total)
            _append(reply, part, bar, task)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is here is longer than the file
            _forget(part, notes)
        if error.code in (408, 416, 429) or error.code >= 500:
            raise _Again(f"the server answers {error.code} {error.reason}") from error
        raise DataError(
            f"cannot download {url}: the server answers {error.code} {error.reason}; look for a newer address, or put the file at "
            f"{part.with_name(part.name.removesuffix('.part'))} yourself"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        raise _Again(str(getattr(error, "reason", error) or type(error).__name__)) from error
    if total is not None and _size(part) != total:
        if _size(part) > total:
            _forget(part, notes)
        raise _Again(f"the connection ended before byte {total:,}")


def _place(reply: Any, here: int, length: int | None) -> tuple[int | None, int | None]:
    """Where in the file the answer begins, and how long the file is; None in the first place if it does not fit what is here."""
    if reply.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != here:
            return None, None
        total = length if found[2] == "*" else int(found[2])
        return (here if length in (None, total) else None), total
    size = reply.headers.get("Content-Length")
    return 0, int(size) if size is not None else None


def _append(reply: Any, part: Path, bar: Progress, task: Any) -> None:
    with part.open("ab") as file:
        while True:
            try:
                block = reply.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                received = getattr(error, "partial", b"")
                file.write(received)
                raise _Again(str(error) or type(error).__name__) from error
            if not block:
                break
            file.write(block)
            bar.advance(task, len(block))
        file.flush()
        os.fsync(file.fileno())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _forget(part: Path, notes: Path) -> None:
    """Begin anew; the file stays, for it carries the lock."""
    part.write_bytes(b"")
    notes.unlink(missing_ok=True)


def _write_notes(notes: Path, url: str, headers: Any, total: int | None) -> None:
    """Note what identifies the file; without that, a later call could not know that the rest belongs to it, and starts again."""
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    if validator:
        notes.write_text(json.dumps({"url": url, "validator": validator, "length": total}), encoding="utf-8")


def _read_notes(notes: Path, url: str) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        known = json.loads(notes.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.get("url") == url and isinstance(known.get("validator"), str):
            return known
    return {}


def _check(path: Path, wanted: Mapping[str, str], otherwise: str) -> None:
    if not wanted:
        return
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in wanted}
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                for total in hashes.values():
                    total.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    for name, value in wanted.items():
        if (found := hashes[name].hexdigest()) != value:
            raise DataError(f"{otherwise}: its {name} is {found}, expected {value}")
