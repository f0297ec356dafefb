"""Locks of folders: waited for, and not in silence."""

import fcntl
import os
import threading

import pytest

from sma.recipes.io import drafts
from sma.recipes.io.drafts import locked


@pytest.mark.parametrize("patience", [0.0, 60.0], ids=["told", "in silence"])
def test_a_lock_is_waited_for_and_a_long_wait_is_told(tmp_path, monkeypatch, capsys, patience):
    monkeypatch.setattr(drafts, "PATIENCE", patience)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, (other,)).start()
    with locked(tmp_path) as handle:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(other)  # it was let go before
        assert handle is not None
    told = f"another process is writing in {tmp_path}; waiting for it\n"
    assert capsys.readouterr().err == ("" if patience else told)
