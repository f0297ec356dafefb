"""Comparison of two commits: the table of times, and the error for an unknown commit."""

import shutil
from pathlib import Path

import pytest

from benchmarks import commits

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs the repository and git, for the commits"
)
def test_the_table_of_two_commits_has_times_and_their_ratio(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["HEAD", "HEAD", "--rounds", "1", "--seconds", "0", "--points", "seqboat 1 64 0.3,preset digits_tiny"]
    monkeypatch.setattr("sys.argv", ["commits", *arguments])
    assert commits.main() == 0
    head, line, layer, preset = capsys.readouterr().out.splitlines()
    assert head == "| point | before, ms | after, ms | ratio |"
    assert line == "|---|---|---|---|"
    for row, point in ((layer, "seqboat 1 64 0.3"), (preset, "preset digits_tiny")):
        _, name, *numbers, _ = (cell.strip() for cell in row.split("|"))
        assert name == point
        before, after, ratio = map(float, numbers)
        assert before > 0
        assert after > 0
        assert 0.05 < ratio < 20


def test_an_unknown_commit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: git gives no files of 'HEAD'; give a commit, and run this in the"):
        commits.unpack("HEAD", tmp_path / "trees")
