"""Missing home folders, and where data is kept without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sma.errors import DataError
from sma.recipes.io import folders
from sma.recipes.io.folders import cache_folder, check_run_folder, expand, lend_home
from sma.recipes.seqboat_lra import main
from sma.recipes.tasks.language.corpus import TextSettings, load_text

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without a home folder, as in a container: no `HOME`, and no entry in the user database."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_data_is_kept_below_the_cache_folder_of_the_environment_or_of_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/sparse-modular-activation")
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folder() == tmp_path / ".cache" / "sparse-modular-activation"


def test_without_a_home_data_is_kept_in_the_working_folder(homeless, monkeypatch):
    assert cache_folder() == homeless / ".cache" / "sparse-modular-activation"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/sparse-modular-activation")


def test_home_is_expanded_only_at_the_start_of_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    assert expand(Path("~/a")) == Path("/home/x/a")
    assert expand(Path("a/~/b")) == Path("a/~/b")


@pytest.mark.parametrize("path", ["~no-such-user/x", "~no-such-user"])
def test_home_of_an_unknown_user_gives_an_error_message(path):
    sentence = f"'{path}' begins with the home folder '~no-such-user', which does not exist; give an absolute path"
    with pytest.raises(DataError, match=sentence):
        expand(Path(path))
    with pytest.raises(DataError, match=sentence):
        load_text(TextSettings(file=path))


def test_missing_own_home_gives_an_error_message(homeless):
    with pytest.raises(
        DataError, match="'~/x' begins with the home folder '~', which does not exist; give an absolute path"
    ):
        expand(Path("~/x"))


@pytest.mark.parametrize("option", ["--out", "--data", "--spec", "--resume", "--evaluate"])
def test_every_path_option_reports_an_unknown_home(option, capsys):
    assert main([f"{option}=~no-such-user/x"]) == 2
    err = capsys.readouterr().err
    assert (
        f"{option}='~no-such-user/x': '~no-such-user/x' begins with the home folder '~no-such-user', which does not"
        in err
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        pytest.param(
            "caf\udce9",
            "the path of the run folder .* is not valid Unicode, which TensorBoard requires; choose another",
            id="bytes",
        ),
        pytest.param(
            "x::y",
            "the path of the run folder .*x::y' contains '::', which Lightning reads as a URL; choose another name",
            id="url",
        ),
    ],
)
def test_run_folder_that_its_writers_cannot_use_is_refused_before_anything_is_created(name, sentence, tmp_path, capsys):
    with pytest.raises(DataError, match=sentence):
        check_run_folder(tmp_path / name)
    assert main([f"--out={tmp_path / name}"]) == 2
    assert "error: the path of the run folder" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["שלום 🙂", "a:b", "{x}[y]*", "new\nline", "~x", "%41 $x$"])
def test_run_folder_may_have_any_other_name(name, tmp_path):
    check_run_folder(tmp_path / name)


def test_lent_home_is_not_used_for_data_or_paths(homeless, monkeypatch):
    monkeypatch.setattr(folders, "_lent", [""])
    lend_home()
    lent = Path.home()
    assert lent.is_dir()
    assert cache_folder() == homeless / ".cache" / "sparse-modular-activation"
    with pytest.raises(DataError, match="begins with the home folder '~', which does not exist"):
        expand(Path("~/x"))
    lent.rmdir()


def test_home_of_the_user_is_kept(monkeypatch):
    monkeypatch.setattr(folders, "_lent", [""])
    before = Path.home()
    lend_home()
    assert Path.home() == before
    assert expand(Path("~/x")) == before / "x"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "home", [pytest.param({}, id="none"), pytest.param({"HOME": "/proc/none"}, id="cannot be created")]
)
def test_digits_train_without_a_home(tmp_path, home):
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\n\ndef nobody(uid):\n    raise KeyError(uid)\n\npwd.getpwuid = nobody\n"
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "MPLCONFIGDIR")
    }
    few = ["--set", "training.updates=2", "--set", "training.warmup=1"]
    command = [
        sys.executable,
        "-m",
        "sma.recipes.seqboat_lra",
        "--task",
        "digits",
        "--no-progress",
        "--out",
        "run",
        *few,
    ]
    environment = {**kept, **home, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "activation.png").is_file()
