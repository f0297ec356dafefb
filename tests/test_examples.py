"""The third-party distribution in examples/: conformance of its parts, and its kinds after an installation."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_docs import BLOCK, console_steps

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "sma_shift"

# Runs in a separate process, because its kinds would stay registered in the process of the tests.
CONFORMS = """
from sma import build, load_spec
from sma.testing import check_router, check_submodule
from sma_shift.novelty import NoveltyRouterSpec
from sma_shift.token_shift import TokenShiftSpec

check_submodule(TokenShiftSpec(hidden_size=3), effort=2)
check_router(NoveltyRouterSpec(), effort=2)
build(load_spec("model.yaml"))
"""


def run(words: list[str], folder: Path, search_path: Path | str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(search_path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )


def command(line: str, folder: Path, search_path: Path | str = "") -> subprocess.CompletedProcess[str]:
    return run(["-m", "sma", *line.split()], folder, search_path)


@pytest.mark.slow
def test_its_parts_pass_the_conformance_kit_without_an_installation(folder: Path):
    done = run(["-c", CONFORMS], folder, EXAMPLE / "src")
    assert done.returncode == 0, done.stderr


def test_every_file_that_registers_a_kind_is_an_entry_point():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    files = (EXAMPLE / "src").rglob("*.py")
    registering = {
        f"sma_shift.{path.stem}" for path in files if "@register" in path.read_text(encoding="utf-8").splitlines()
    }
    assert project["entry-points"]["sma.plugins"] == {name: name for name in registering}


def test_the_page_shows_the_entry_points_of_the_example():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (shown,) = [text for language, text in BLOCK.findall(page) if language == "toml"]
    assert shown.strip() in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example without its source, so that only the installed package can be imported."""
    copy = tmp_path_factory.mktemp("example")
    for name in ("model.yaml", "README.md"):
        shutil.copy(EXAMPLE / name, copy / name)
    shutil.copytree(EXAMPLE / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed example, built from a copy, because setuptools writes next to the source."""
    copy, target = tmp_path_factory.mktemp("source") / "sma_shift", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--target",
        str(target),
        str(copy),
    ]
    done = run(install, copy, "")
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_its_own_tests_pass_after_an_installation(folder: Path, site: Path):
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "tests"], folder, site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_commands_of_its_readme_have_the_output_in_the_readme(folder: Path, site: Path):
    blocks = [
        text
        for language, text in BLOCK.findall((folder / "README.md").read_text(encoding="utf-8"))
        if language == "console"
    ]
    steps = [step for text in blocks for step in console_steps(text)]
    assert len(steps) >= 3
    for line, expected in steps:
        done = command(line.removeprefix("python -m sma "), folder, site)
        assert (done.stdout + done.stderr).strip() == expected.strip(), line


@pytest.mark.slow
def test_its_kinds_are_registered_only_if_it_is_installed(folder: Path, site: Path):
    assert {"token_shift", "novelty"} <= set(command("kinds", folder, site).stdout.split())
    described = command("describe model.yaml --build --length 100", folder, site)
    assert described.returncode == 0, described.stderr
    assert "Built with 32,390 parameters, as predicted" in described.stdout
    unknown = command("validate model.yaml", folder)
    assert unknown.returncode == 2
    assert "unknown router kind 'novelty' in layers.layer.router" in unknown.stderr
    assert "unknown sub-module kind 'token_shift' in layers.layer.modules.shift" in unknown.stderr


@pytest.mark.slow
def test_the_error_for_a_misspelt_kind_suggests_the_third_party_kind(folder: Path, site: Path):
    settings = "--set layers.layer.modules.shift.kind=token_shfit --set layers.layer.router.kind=novlety"
    done = command(f"validate model.yaml {settings}", folder, site)
    assert done.returncode == 2
    assert (
        "unknown sub-module kind 'token_shfit' in layers.layer.modules.shift; did you mean 'token_shift'? known kinds:"
        in done.stderr
    )
    assert "unknown router kind 'novlety' in layers.layer.router; did you mean 'novelty'? known kinds:" in done.stderr


@pytest.mark.slow
def test_a_broken_plugin_gives_a_warning_and_other_plugins_still_load(folder: Path, site: Path, tmp_path: Path):
    broken = shutil.copytree(site, tmp_path / "broken")
    (broken / "sma_shift" / "novelty.py").write_text("raise OSError('no driver')\n")
    done = command("kinds", folder, broken)
    assert done.returncode == 0
    assert done.stderr.strip() == (
        "warning: the plugin 'sma_shift.novelty' of sma-shift could not be imported: OSError: no driver"
    )
    assert "token_shift" in done.stdout.split()
    assert "novelty" not in done.stdout.split()
