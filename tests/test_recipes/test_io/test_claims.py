"""Locks and claims of folders: one process holds a lock, a killed process releases it, and concurrent starts get
separate folders.
"""

import errno
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from sma.errors import CheckpointError
from sma.recipes.io.claims import LOCK, claim_folder, is_empty, run_lock

# Forked, because a new process would first import torch, which the locks do not need.
CONTEXT = multiprocessing.get_context("fork")


def _hold(folder, inside=lambda: None):
    """A process that holds the lock of a folder until it receives a message, and the pipe for this message."""
    ours, theirs = CONTEXT.Pipe()

    def work():
        with run_lock(folder):
            inside()
            theirs.send("held")
            theirs.recv()

    process = CONTEXT.Process(target=work, daemon=True)
    process.start()
    assert ours.poll(60), "the lock was not taken"
    assert ours.recv() == "held"
    return process, ours


def _kill(process):
    process.kill()
    process.join()


def test_refusal_names_host_and_process_of_the_holder(tmp_path):
    holder, pipe = _hold(tmp_path / "run")
    try:
        complaint = (
            rf"'.*run' is being written by process {holder.pid} on '{socket.gethostname()}' since '\d{{4}}-.* UTC'; "
            r"wait for it or"
        )
        with pytest.raises(CheckpointError, match=complaint), run_lock(tmp_path / "run"):
            pytest.fail("two have the lock")
    finally:
        pipe.send("go")
        holder.join()
    with run_lock(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert list((tmp_path / "run").iterdir()) == []


def test_killed_holder_releases_the_lock(tmp_path):
    _kill(_hold(tmp_path)[0])
    assert (tmp_path / LOCK).is_file()
    with run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_children_of_a_killed_holder_do_not_keep_the_lock(tmp_path):
    def fork():
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
        (tmp_path / "child").write_text(str(child), encoding="utf-8")

    _kill(_hold(tmp_path, fork)[0])
    try:
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_run_lock_waits_for_a_holder_that_ends_soon(tmp_path):
    holder, pipe = _hold(tmp_path)
    began = time.monotonic()
    threading.Timer(0.3, pipe.send, ["go"]).start()
    with run_lock(tmp_path, wait=60):
        assert time.monotonic() - began >= 0.3
        holder.join()
    assert holder.exitcode == 0


def test_lock_is_reentrant_in_its_thread_and_refused_in_another(tmp_path):
    found = []

    def other():
        try:
            with run_lock(tmp_path):
                found.append("both")
        except CheckpointError as error:
            found.append(str(error))

    with run_lock(tmp_path):
        with run_lock(tmp_path / "." / ""):
            pass
        assert (tmp_path / LOCK).is_file()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"is being written by process {os.getpid()} on" in found[0]
    with run_lock(tmp_path):
        pass


def test_lock_is_released_when_the_body_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    holder, pipe = _hold(tmp_path)
    pipe.send("go")
    holder.join()
    assert holder.exitcode == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with claim_folder(tmp_path / "run") as folder:
        (folder / "file").touch()
    assert [record.getMessage().startswith("warning: '") for record in caplog.records] == [True]
    assert (
        "cannot be locked, its file system has no locks; make sure that no other process writes this folder"
        in caplog.text
    )
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
@pytest.mark.parametrize("text", [b"", b"\xff\x00", b"[" * 1000, b'{"host": 1}', b'{"process": "x"}', b"7"])
def test_holder_with_an_unreadable_lock_file_is_called_another_process(tmp_path, monkeypatch, text, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    (tmp_path / LOCK).write_bytes(text)
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(CheckpointError, match="is being written by another process; wait"), run_lock(tmp_path):
        pytest.fail("two have the lock")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_lock_path_that_is_not_a_file_gives_an_error_message(tmp_path, kind):
    os.mkfifo(tmp_path / LOCK) if kind == "pipe" else (tmp_path / LOCK).mkdir()
    with (
        pytest.raises(
            CheckpointError, match=r"\.lock' is not a plain file; delete it|cannot write '.*\.lock': Is a directory"
        ),
        run_lock(tmp_path),
    ):
        pytest.fail("locked")


@pytest.mark.parametrize("link", ["to-a-file", "to-nothing", "hard"])
def test_link_at_the_lock_path_is_refused_and_not_followed(tmp_path, link):
    (tmp_path / "run").mkdir()
    victim = tmp_path / "victim"
    if link != "to-nothing":
        victim.write_text("precious", encoding="utf-8")
    os.link(victim, tmp_path / "run" / LOCK) if link == "hard" else (tmp_path / "run" / LOCK).symlink_to(victim)
    with pytest.raises(CheckpointError, match=r"\.lock' is not a plain file; delete it"), run_lock(tmp_path / "run"):
        pytest.fail("locked")
    assert not victim.exists() if link == "to-nothing" else victim.read_text(encoding="utf-8") == "precious"


def test_folder_that_cannot_be_created_gives_an_error_message(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"cannot write '.*run': Not a directory"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pytest.fail("locked")
    with (
        pytest.raises(
            CheckpointError,
            match=r"cannot make the folder '.*run': Not a directory|cannot make the folder '.*run': "
            r"'.*file' is not a folder; give",
        ),
        claim_folder(tmp_path / "file" / "run"),
    ):
        pytest.fail("claimed")
    with pytest.raises(CheckpointError, match=r"file' is not a folder"), claim_folder(tmp_path / "file"):
        pytest.fail("claimed")
    with pytest.raises(CheckpointError, match="embedded null"), claim_folder(tmp_path / "a\0b"):
        pytest.fail("claimed")


def test_claimed_folder_must_be_empty(tmp_path):
    with claim_folder(tmp_path / "run") as folder:
        (folder / "file").touch()
    with (
        pytest.raises(CheckpointError, match=r"run' is not empty; give another --out, or --resume"),
        claim_folder(tmp_path / "run"),
    ):
        pytest.fail("claimed")
    with claim_folder(tmp_path / "run", numbered=True) as other:
        assert other == tmp_path / "run-2"


def test_folder_with_only_the_remains_of_a_killed_start_counts_as_empty(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / ".experiment.yaml.1a2b.draft").touch()
    assert is_empty(tmp_path)
    with claim_folder(tmp_path):
        pass


def test_empty_folder_is_removed_only_if_the_claim_created_it(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(ZeroDivisionError), claim_folder(tmp_path / name):
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def _claim(path, numbered, pipe):
    pipe.recv()
    try:
        with claim_folder(path, numbered=numbered) as folder:
            (folder / "file").open("x").close()
            pipe.send(str(folder))
            pipe.recv()
    except CheckpointError as error:
        pipe.send(f"refused: {error}")


@pytest.mark.parametrize("way", ["numbered", "named"])
def test_concurrent_starts_never_share_a_folder(tmp_path, way):
    pipes = [CONTEXT.Pipe() for _ in range(4)]
    starts = [
        CONTEXT.Process(target=_claim, args=(tmp_path / "run", way == "numbered", theirs), daemon=True)
        for _, theirs in pipes
    ]
    for start in starts:
        start.start()
    for ours, _ in pipes:
        ours.send("start")
    said = [ours.recv() for ours, _ in pipes if ours.poll(60)]
    assert len(said) == 4
    for ours, _ in pipes:
        ours.send("go")
    for start in starts:
        start.join()
    taken = [line for line in said if not line.startswith("refused: ")]
    if way == "numbered":
        assert sorted(taken) == sorted(
            [str(tmp_path / "run"), *(str(tmp_path / f"run-{number}") for number in range(2, 5))]
        )
    else:
        assert taken == [str(tmp_path / "run")]
        assert all("is being written by " in line or "is not empty" in line for line in said if line not in taken)
