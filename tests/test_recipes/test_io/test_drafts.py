"""Locks of folders and files: a long wait is announced, and there is one holder even if a file is moved or deleted."""

import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sma.recipes.io import drafts
from sma.recipes.io.drafts import locked, locked_file


@pytest.mark.parametrize("patience", [0.0, 60.0], ids=["announced", "silent"])
def test_locked_waits_and_announces_a_long_wait(tmp_path, monkeypatch, capsys, patience):
    monkeypatch.setattr(drafts, "PATIENCE", patience)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, (other,)).start()
    with locked(tmp_path) as handle:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other)  # it was released before
        assert handle is not None
    told = f"another process is writing in {tmp_path}; waiting for it\n"
    assert capsys.readouterr().err == ("" if patience else told)


@pytest.mark.parametrize("moved", [True, False], ids=["moved by its holder", "deleted as empty"])
def test_lock_of_a_file_has_one_holder_while_the_file_is_moved_or_deleted(tmp_path, moved):
    path, holders, most = tmp_path / "file", [], []

    def hold(worker):
        for turn in range(300):
            with locked_file(path):
                holders.append(worker)
                most.append(len(holders))
                holders.remove(worker)
                if moved:  # from here on another process may hold the next file
                    os.replace(path, tmp_path / f"kept {worker} {turn}")

    with ThreadPoolExecutor(4) as pool:
        for worker in [pool.submit(hold, worker) for worker in range(4)]:
            worker.result()
    assert most == [1] * 1200
    assert len(list(tmp_path.iterdir())) == (1200 if moved else 0)
