"""The installed package: one import name, every file of the tree, and an entry point for every kind."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"sma": "sma", "modules": "sma/modules", "recipes": "sma/recipes", "tune": "sma/tune"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLUGINS = PROJECT["project"]["entry-points"]["sma.plugins"]
IMPORT_ALL = "import sma, sma.errors, sma.modules, sma.recipes.io, sma.recipes.tasks.kinds, sma.tune"


def _python(program: str, cwd: Path, search_path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": search_path}
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, env=environment, capture_output=True, text=True)


def _tree() -> set[str]:
    """Every file of the four folders, by its installed name."""
    return {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not any(parent.is_symlink() for parent in path.parents)
    }


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, because an old build/ folder would add deleted files.

    The copy has no symbolic links, as on Windows.
    """
    copy = tmp_path_factory.mktemp("copy")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=_links_and_caches)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


def _links_and_caches(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__" or (Path(folder) / name).is_symlink()]


def test_wheel_holds_exactly_the_files_of_the_tree(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    hint = "a new folder belongs into `packages` of pyproject.toml, another kind of file into `package-data`"
    assert sorted(_tree() - held) == [], hint
    assert sorted(held - _tree()) == []


def test_wheel_holds_the_licence_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "licenses/LICENSE" in info
    assert "sma = sma.__main__:program" in archive.read(info["entry_points.txt"]).decode()


@pytest.mark.slow
def test_wheel_works_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, text=True)
    program = f"""{IMPORT_ALL}
from importlib.metadata import entry_points
from pathlib import Path
for plugin in entry_points(group="sma.plugins"):
    plugin.load()
print(Path(sma.modules.__file__).resolve())"""
    result = _python(program, tmp_path, str(site))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str((site / "sma/modules/__init__.py").resolve())


def test_installed_package_is_importable_from_any_folder(tmp_path: Path) -> None:
    result = _python(IMPORT_ALL, tmp_path)
    assert result.returncode == 0, result.stderr


def test_folders_of_the_user_do_not_shadow_the_package(tmp_path: Path) -> None:
    for name in ("modules", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("mine = True\n")
    (tmp_path / "tune.py").write_text("mine = True\n")
    result = _python(
        f"{IMPORT_ALL}\nimport modules, recipes, tune; print(modules.mine, recipes.mine, tune.mine)", tmp_path
    )
    assert result.stdout.strip() == "True True True", result.stderr


_IMPORT_BARE = """
for name in ("modules", "recipes", "tune"):
    try:
        __import__(name)
    except ImportError as error:
        print(type(error).__name__, error)
"""


def test_import_of_a_bare_name_in_the_checkout_raises_with_the_right_name() -> None:
    assert _python(_IMPORT_BARE, ROOT).stdout.splitlines() == [
        f"ImportError this folder is a part of sma: write 'from sma.{name}… import …' instead of '{name}'"
        for name in ("modules", "recipes", "tune")
    ]


def test_bare_names_are_not_installed(tmp_path: Path) -> None:
    assert _python(_IMPORT_BARE, tmp_path).stdout.splitlines() == [
        f"ModuleNotFoundError No module named {name!r}" for name in ("modules", "recipes", "tune")
    ]


def _registering() -> set[str]:
    """Dotted names of the files of sma/, sma/routers/ and modules/ that register a kind."""
    names = set()
    for folder, inside in [("sma", "sma"), ("sma/routers", "sma/routers"), ("modules", "sma/modules")]:
        for path in (ROOT / folder).glob("*.py"):
            if "@register" in path.read_text(encoding="utf-8").splitlines():
                names.add(f"{inside}/{path.stem}".replace("/", "."))
    return names


def test_the_plugins_are_the_files_that_register_a_kind() -> None:
    assert sorted(_registering() - set(PLUGINS.values())) == [], "name it in the entry points of pyproject.toml"
    assert sorted(set(PLUGINS.values()) - _registering()) == [], "these register nothing"


def test_plugins_are_named_after_their_modules() -> None:
    assert {name: value for name, value in PLUGINS.items() if name != value} == {}
