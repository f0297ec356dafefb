"""Downloads from a local server: with and without ranges, with broken connections, and with a changed file."""

import hashlib
import http.server
import multiprocessing
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from sma.errors import DataError
from sma.recipes.io import download
from sma.recipes.io.download import fetch

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Server:
    """State of the server: its file, its behaviour, and the requested ranges."""

    content: bytes = CONTENT
    etag: str | None = '"one"'
    ranges: bool = True
    length: bool = True
    status: int = 200
    breaks_after: list[int] = field(default_factory=list)  # bytes of each answer before the connection breaks
    asked: list[str | None] = field(default_factory=list)
    address: str = ""
    waits: threading.Event | None = None  # ends the pause after the first bytes of an answer
    drips: bool = False
    more: dict[str, str] = field(default_factory=dict)  # additional headers
    answer: bytes | None = None  # raw bytes that replace the whole answer

    def reply(self, handler):
        self.asked.append(handler.headers.get("Range"))
        if self.answer is not None:
            handler.wfile.write(self.answer)
            return
        start, status = 0, self.status
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range") or "")
        if wanted and self.ranges and handler.headers.get("If-Range") == self.etag:
            start, status = int(wanted[1]), 206
        if start > len(self.content):
            status = 416
        handler.send_response(status)
        if self.etag:
            handler.send_header("ETag", self.etag)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.length:
            handler.send_header("Content-Length", str(len(self.content) - start))
        for name, value in self.more.items():
            handler.send_header(name, value)
        handler.end_headers()
        if status in (200, 206):
            if self.waits:
                handler.wfile.write(self.content[start : start + 1000])
                handler.wfile.flush()
                self.waits.wait(30)
                start += 1000
            end = start + self.breaks_after.pop(0) if self.breaks_after else None
            while self.drips and start < len(self.content):
                try:
                    handler.wfile.write(self.content[start : start + 1])
                except ConnectionError:
                    return
                start += 1
                time.sleep(0.002)
            handler.wfile.write(self.content[start:end])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    made = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            made.reply(self)

        def log_message(self, *arguments):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.address = f"http://127.0.0.1:{running.server_address[1]}/file"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    running.shutdown()
    running.server_close()
    thread.join()


def get(server, path, **hashes):
    return fetch(server.address, path, progress=False, **hashes)


def interrupted(server, path, at=100_000, monkeypatch=None):
    """Start a download that fails after `at` bytes, and clear the requests."""
    server.breaks_after = [at] + [0] * 10
    with pytest.raises(DataError, match="with 100,000 bytes here"):
        get(server, path)
    server.breaks_after, server.asked = [], []


@pytest.mark.parametrize("hashes", [{}, {"sha256": SHA256}, {"md5": MD5.upper()}, {"sha256": SHA256, "md5": MD5}])
def test_file_is_downloaded_completely(server, tmp_path, hashes):
    path = tmp_path / "new" / "folder" / "file"
    assert get(server, path, **hashes) == path
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_bar_is_drawn(server, tmp_path, capsys):
    fetch(server.address, tmp_path / "file")
    assert "file" in capsys.readouterr().out


def test_existing_file_is_not_downloaded_again(server, tmp_path):
    get(server, tmp_path / "file")
    get(server, tmp_path / "file", sha256=SHA256)
    assert server.asked == [None]


def test_existing_file_with_another_hash_gives_an_error_and_is_kept(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    mine = hashlib.sha256(b"mine").hexdigest()
    with pytest.raises(
        DataError, match=rf"file is not the file at http.*; move it away.*: its sha256 is {mine}, expected {SHA256}"
    ):
        get(server, tmp_path / "file", sha256=SHA256)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert server.asked == []


def test_broken_downloads_resume_at_the_first_missing_byte(server, tmp_path):
    server.breaks_after = [100_000, 50_000, 0, 1]
    assert get(server, tmp_path / "file", sha256=SHA256).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-", "bytes=150001-"]


@pytest.mark.parametrize(
    ("changes", "requests"),
    [
        pytest.param({}, 1, id="same file"),
        pytest.param({"ranges": False}, 1, id="no ranges"),
        pytest.param({"content": CONTENT[::-1], "etag": '"two"'}, 1, id="another file"),
        pytest.param({"content": CONTENT + b"more"}, 2, id="another length"),
        pytest.param({"content": CONTENT[:1000]}, 2, id="shorter than the bytes so far"),
    ],
)
def test_next_call_resumes_if_the_server_still_has_the_file(server, tmp_path, changes, requests):
    interrupted(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    vars(server).update(changes)
    assert get(server, tmp_path / "file").read_bytes() == server.content
    assert server.asked == ["bytes=100000-", None][:requests]


def test_download_from_another_address_starts_anew(server, tmp_path):
    interrupted(server, tmp_path / "file")
    assert fetch(server.address + "?other", tmp_path / "file", progress=False).read_bytes() == CONTENT
    assert server.asked == [None]


def test_download_without_an_etag_restarts_from_the_beginning(server, tmp_path):
    server.etag = None
    server.breaks_after = [100_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [None, None]


def test_file_without_a_content_length_is_downloaded(server, tmp_path):
    server.length = False
    assert get(server, tmp_path / "file", sha256=SHA256).read_bytes() == CONTENT


def test_complete_part_file_is_not_requested_again(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            download.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(DataError, match="No space left on device"):
            get(server, tmp_path / "file")
    assert get(server, tmp_path / "file", sha256=SHA256).read_bytes() == CONTENT
    assert server.asked == [None]


def test_wrong_hash_is_reported_with_the_expected_one_and_leaves_nothing(server, tmp_path):
    with pytest.raises(
        DataError, match=rf"sent an unexpected file, so .*: its sha256 is {SHA256}, expected {'0' * 64}"
    ):
        get(server, tmp_path / "file", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_on_the_server_fails_without_a_retry(server, tmp_path):
    server.status = 404
    with pytest.raises(
        DataError, match=r"cannot download http.*: the server answers 404 Not Found; .* put the file at .*file yourself"
    ):
        get(server, tmp_path / "file")
    assert len(server.asked) == 1


def test_request_to_a_busy_server_is_retried_a_few_times(server, tmp_path):
    server.status = 503
    with pytest.raises(
        DataError, match=r"the server answers 503 Service Unavailable \(after 5 attempts, with 0 bytes here\)"
    ):
        get(server, tmp_path / "file")
    assert len(server.asked) == 5


def test_missing_network_gives_an_error_message(server, tmp_path, monkeypatch):
    # Port 1 is reserved, and nothing listens on it.
    with pytest.raises(
        DataError, match=r"cannot download http://127\.0\.0\.1:1/file: .*refused.*; check the network and call again"
    ):
        fetch("http://127.0.0.1:1/file", tmp_path / "file", progress=False)


def test_other_kinds_of_addresses_are_refused(tmp_path):
    with pytest.raises(
        DataError, match="cannot download 'file:///etc/passwd': the address must begin with http:// or https://"
    ):
        fetch("file:///etc/passwd", tmp_path / "file")


def test_full_disk_gives_an_error_message_and_keeps_the_bytes(server, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download.os, "fsync", full)
        with pytest.raises(
            DataError, match=r"cannot write .*file: No space left on device; make room there .*the next call resumes"
        ):
            get(server, tmp_path / "file")
    assert get(server, tmp_path / "file", sha256=SHA256).read_bytes() == CONTENT
    assert server.asked == [None]


def test_concurrent_calls_download_once(server, tmp_path, capsys):
    server.waits, said, end = threading.Event(), "", time.monotonic() + 30
    with ThreadPoolExecutor(3) as pool:
        downloads = [pool.submit(fetch, server.address, tmp_path / "file", sha256=SHA256) for _ in range(3)]
        while said.count("another process downloads file; waiting for it\n") < 2 and time.monotonic() < end:
            time.sleep(0.01)
            said += capsys.readouterr().out
        server.waits.set()
        assert [download.result(30).read_bytes() for download in downloads] == [CONTENT] * 3
    assert server.asked == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_killed_download_does_not_block_the_next_call(server, tmp_path):
    server.waits = threading.Event()
    process = multiprocessing.get_context("fork").Process(target=get, args=(server, tmp_path / "file"))
    process.start()
    while not server.asked:
        time.sleep(0.01)
    process.kill()
    process.join()
    server.waits.set()
    server.waits = None
    assert get(server, tmp_path / "file", sha256=SHA256).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_folder_at_the_path_of_the_file_is_refused(server, tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(DataError, match=r"file' is a folder; a plain file is required"):
        get(server, tmp_path / "file", sha256=SHA256)


def test_announced_length_above_the_maximum_is_refused_before_the_download(server, tmp_path):
    with pytest.raises(
        DataError,
        match=r"the server sends more than 1,000 bytes, the maximum of the file; look for a newer address, or",
    ):
        get(server, tmp_path / "file", most=1000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("breaks", [[], [200_000]], ids=["at once", "after a break"])
def test_download_of_unknown_length_stops_at_the_maximum(server, tmp_path, breaks):
    server.length, server.breaks_after = False, breaks
    with pytest.raises(DataError, match=r"the server sends more than 100,000 bytes, the maximum of the file"):
        get(server, tmp_path / "file", most=100_000)
    assert list(tmp_path.iterdir()) == []
    server.breaks_after = []
    assert get(server, tmp_path / "file", most=len(CONTENT)).read_bytes() == CONTENT


def test_file_larger_than_the_free_space_is_refused_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        DataError,
        match=r"http.*/file needs 512,000 bytes in .*, and 1,000 bytes are free; make room there or choose another",
    ):
        get(server, tmp_path / "file")


def test_download_from_a_very_slow_server_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_SLOW_SECONDS", 0.02)
    server.drips = True
    with pytest.raises(
        DataError, match=r"cannot download .*: the server sent only [0-9,]+ bytes in 0 seconds \(after 5 attempts"
    ):
        get(server, tmp_path / "file")


def test_download_whose_connection_breaks_after_every_byte_is_given_up(server, tmp_path):
    server.breaks_after = [1] * 100
    with pytest.raises(
        DataError, match=r"the connection ended before byte 512,000 \(after 5 attempts, with 5 bytes here\)"
    ):
        get(server, tmp_path / "file")


@pytest.mark.parametrize("length", ["x", "-5", "1" * 5000, "²"])
def test_invalid_content_length_counts_as_unknown(server, tmp_path, length):
    server.length, server.more = False, {"Content-Length": length}
    assert get(server, tmp_path / "file", most=len(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "answer", [b"", b"\0\xff" * 100 + b"\r\n\r\n", b"HTTP/1.1 200\r\n" + b"x" * 100_000, b"HTTP/1.1 999 \xff\r\n\r\n"]
)
def test_invalid_http_answer_gives_an_error_message(server, tmp_path, answer):
    server.answer = answer
    with pytest.raises(
        DataError, match=r"cannot download http://127\.0\.0\.1.*; (check the network|look for a newer)"
    ) as caught:
        get(server, tmp_path / "file")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "notes",
    [
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"url": "URL", "validator": "a\\r\\nX: y"}', id="validator of two lines"),
        pytest.param(b'{"url": "URL", "validator": 7}', id="validator that is a number"),
        pytest.param(b'{"url": "URL", "validator": "\\"one\\"", "length": "many"}', id="length that is a word"),
        pytest.param(b"\xff", id="no text"),
    ],
)
def test_damaged_resume_notes_are_ignored(server, tmp_path, notes):
    interrupted(server, tmp_path / "file")
    (tmp_path / "file.part.json").write_bytes(notes.replace(b"URL", server.address.encode()))
    assert get(server, tmp_path / "file", sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["file", "file.part", "file.part.json"])
def test_pipe_at_the_path_of_any_file_is_refused_at_once(server, tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}' is a named pipe; a plain file is required"):
        get(server, tmp_path / "file", sha256=SHA256)
