"""Files: reads neither block nor are unbounded, and file modes follow the umask."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

import sma.files
from sma.errors import CheckpointError, DataError
from sma.files import check_file, open_file, read_file, remove_drafts, write_atomically


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("fifo", "a named pipe"),
        ("/dev/zero", "a device"),
        (".", "a folder"),
        ("no", "No such file"),
        ("a\0b", "null byte"),
    ],
)
@pytest.mark.parametrize(
    "read", [open_file, check_file, lambda path, error: read_file(path, 9, error)], ids=["open", "check", "read"]
)
def test_a_path_that_is_not_a_plain_file_is_refused_without_blocking(tmp_path, monkeypatch, path, what, read):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    with pytest.raises(CheckpointError, match=what):
        read(path, CheckpointError)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"123")
    assert read_file(tmp_path / "file", 3) == b"123"
    with pytest.raises(DataError, match="longer than 2 bytes"):
        read_file(tmp_path / "file", 2)


def _replaces(path: Path) -> None:
    """Write as safetensors does: create a private file and move it to the path."""
    path.with_suffix(".own").touch(0o600)
    path.with_suffix(".own").replace(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask to keep to")
@pytest.mark.parametrize("write", [lambda path: path.write_text("new"), _replaces], ids=["fills", "replaces"])
@pytest.mark.parametrize("umask", [0o077, 0o002, 0o022])
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path, umask, write):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "new", write)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_a_replaced_file_keeps_its_mode(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "file").chmod(0o640)
    write_atomically(tmp_path / "file", lambda path: path.write_text("new"))
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("write", [lambda path: path.write_text("new"), _replaces], ids=["fills", "replaces"])
def test_a_file_system_without_modes_can_be_written(tmp_path, monkeypatch, write):
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    write_atomically(tmp_path / "file", write)
    assert (tmp_path / "file").exists()


def _drafts(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.endswith(".draft")}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks of this kind")
class TestDrafts:
    @pytest.mark.parametrize(
        "clean", [remove_drafts, lambda folder: write_atomically(folder / "file", lambda path: path.write_text("new"))]
    )
    def test_abandoned_drafts_are_removed_and_drafts_in_use_stay(self, tmp_path, clean):
        (tmp_path / ".file.0.draft").write_text("left by a killed process")
        seen = []

        def write(path: Path) -> None:
            clean(tmp_path)
            seen.append(_drafts(tmp_path))
            path.write_text("mine")

        write_atomically(tmp_path / "file", write)
        assert [len(drafts) for drafts in seen] == [1]
        assert (tmp_path / "file").read_text() == "mine"
        assert _drafts(tmp_path) == set()

    def test_drafts_of_other_files_and_other_paths_stay(self, tmp_path):
        (tmp_path / ".other.0.draft").touch()
        (tmp_path / ".file.link.draft").symlink_to("/dev/zero")
        (tmp_path / ".file.folder.draft").mkdir()
        os.mkfifo(tmp_path / ".file.pipe.draft")
        (tmp_path / ".file").touch()
        before = {path.name for path in tmp_path.iterdir()}
        write_atomically(tmp_path / "file", lambda path: path.write_text("new"))
        assert {path.name for path in tmp_path.iterdir()} == before | {"file"}

    def test_without_locks_files_are_written_and_drafts_stay(self, tmp_path, monkeypatch):
        def refuse(*args: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        (tmp_path / ".file.0.draft").touch()
        write_atomically(tmp_path / "file", lambda path: path.write_text("new"))
        assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.0.draft"}
        remove_drafts(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"file"}

    def test_a_draft_that_is_removed_before_it_is_locked_is_created_again(self, tmp_path, monkeypatch):
        lock, stolen = sma.files.lock_file, []

        def late(handle: int) -> bool | None:
            if not stolen:
                stolen.extend(tmp_path.glob(".*.draft"))
                stolen[0].unlink()
            return lock(handle)

        monkeypatch.setattr("sma.files.lock_file", late)
        write_atomically(tmp_path / "file", lambda path: path.write_text("new"))
        assert len(stolen) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"file"}

    def test_a_read_only_file_is_replaced_and_stays_read_only(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        (tmp_path / "file").chmod(0o440)
        opened = Path.open

        def as_users(path: Path, *args: object, **options: object) -> object:
            assert path.stat().st_mode & 0o200, "a user cannot write this"
            return opened(path, *args, **options)  # type: ignore[call-overload]

        monkeypatch.setattr(Path, "open", as_users)
        write_atomically(tmp_path / "file", lambda path: path.write_bytes(b"new"))
        monkeypatch.undo()
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o440
        assert (tmp_path / "file").read_text() == "new"
