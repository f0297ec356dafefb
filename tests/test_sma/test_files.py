"""Files: nothing waits, nothing grows without a bound, modes are those of the user."""

import os
import stat
import sys
from pathlib import Path

import pytest

from sma.errors import CheckpointError, DataError
from sma.files import check_file, open_file, read_file, write_atomically


@pytest.mark.parametrize(
    ("path", "what"),
    [("fifo", "a named pipe"), ("/dev/zero", "a device"), (".", "a folder"), ("no", "No such file"), ("a\0b", "null byte")],
)
@pytest.mark.parametrize("read", [open_file, check_file, lambda path, error: read_file(path, 9, error)], ids=["open", "check", "read"])
def test_what_is_no_plain_file_is_named_at_once(tmp_path, monkeypatch, path, what, read):
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
    """Writes as safetensors does: a private file of its own, moved to the path."""
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
