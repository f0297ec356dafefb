"""Build the distribution in dist/, check it, and try it in fresh environments. Nothing is published."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# The folders of the package, and where they are installed.
FOLDERS = {"sma": "sma", "modules": "sma/modules", "recipes": "sma/recipes", "tune": "sma/tune"}
TRAIN = ("train", "digits", "--no-progress", "--set=training.updates=2", "--set=training.warmup=1", "--out=run")
# Extras of each environment, and the commands that need them; the core and README's example are tried in all.
ENVIRONMENTS: dict[str, list[tuple[str, ...]]] = {
    "": [("describe", "seqboat_listops"), ("validate", "mine.yaml")],
    "recipes,tune": [TRAIN, ("validate", "run"), ("sweep", "--help")],
}
BLOCK = re.compile(r"^```(yaml|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Failed(Exception):
    """The distribution is not fit for a release."""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Run a command without the checkout on its path; returns its output.

    Raises:
        Failed: its exit status is not 0.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_version() -> str:
    """The version, which only pyproject.toml defines.

    Raises:
        Failed: it is a development version, or CHANGELOG.md has no dated section for it below `Unreleased`.
    """
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?", version):
        raise Failed(f"version={version!r} in pyproject.toml is not that of a release, such as 0.1.0 or 0.1.0rc1")
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if sections[:1] != ["[Unreleased]"]:
        raise Failed("the first section of CHANGELOG.md must be '## [Unreleased]'")
    if not any(re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", section) for section in sections[1:2]):
        raise Failed(f"the second section of CHANGELOG.md must be '## [{version}] - DATE', with the date as YYYY-MM-DD")
    return version


def build(folder: Path) -> Path:
    """Build sdist and wheel from the last commit, the wheel from the sdist; returns the wheel."""
    if run("git", "status", "--porcelain"):
        raise Failed("there are changes that are not in a commit; a release is built from a commit")
    source = folder / "source"
    source.mkdir()
    run("git", "archive", "--output", folder / "source.tar", "HEAD")
    run("tar", "-xf", folder / "source.tar", "-C", source)
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, source)
    (wheel,) = DIST.glob("*.whl")
    expected = {
        f"{inside}/{path.relative_to(source / name).as_posix()}"
        for name, inside in FOLDERS.items()
        for path in (source / name).rglob("*")
        if path.is_file() and not any(parent.is_symlink() for parent in path.parents)
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if held != expected:
        raise Failed(f"these files are in the wheel or in the tree alone: {sorted(held ^ expected)}")
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    return wheel


def write_example(folder: Path) -> str:
    """Write the model and the program of README's first example; returns what the program prints."""
    found = dict[str, str]()
    for language, text in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        found.setdefault(language, text)
    (folder / "mine.yaml").write_text(found["yaml"], encoding="utf-8")
    (folder / "example.py").write_text(found["python"], encoding="utf-8")
    return found["text"]


def try_wheel(wheel: Path, version: str, extras: str, commands: Sequence[Sequence[str]], folder: Path) -> None:
    """Install the wheel with extras in a fresh environment, and run README's example and commands there.

    Raises:
        Failed: a command fails, or its output differs.
    """
    run(sys.executable, "-m", "venv", folder / "venv")
    binaries = folder / "venv" / "bin"
    pip = (binaries / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q")
    constraints = ("-c", ROOT / "constraints.txt")
    if index := os.environ.get("TORCH_INDEX"):
        run(*pip, "--no-deps", "--index-url", index, *constraints, "torch")
    run(*pip, *constraints, f"{wheel}[{extras}]" if extras else wheel)
    run(binaries / "python", "-m", "pip", "check")
    work = folder / "work"
    work.mkdir()
    expected = write_example(work)
    printed = run(binaries / "python", "example.py", cwd=work)
    if printed.strip() != expected.strip():
        raise Failed(f"README's example prints {printed!r} and not {expected!r}")
    if not run(binaries / "sma", "--version", cwd=work).startswith(f"sma {version} "):
        raise Failed(f"sma --version does not print {version}")
    for command in (("--help",), ("kinds",), *commands):
        run(binaries / "sma", *command, cwd=work)


def main() -> int:
    """Return the exit status: 0 if the distribution in dist/ is fit for a release."""
    try:
        version = check_version()
        with tempfile.TemporaryDirectory() as temporary:
            wheel = build(Path(temporary))
            print(f"built and checked {', '.join(path.name for path in sorted(DIST.iterdir()))}", flush=True)
            for number, (extras, commands) in enumerate(ENVIRONMENTS.items()):
                (folder := Path(temporary, str(number))).mkdir()
                try_wheel(wheel, version, extras, commands, folder)
                print(f"works in a fresh environment {f'with {extras}' if extras else 'without extras'}", flush=True)
                shutil.rmtree(folder)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"sma {version} is ready in dist/; nothing was published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
