"""Run the tests of the core with the oldest versions of its dependencies that pyproject.toml allows."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "lowest"
TESTS = ("tests/test_sma", "tests/test_modules")


def oldest(requirement: str) -> str:
    """The oldest version of a requirement, without its extras: `einops>=0.8` becomes `einops==0.8`."""
    name, version = re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", requirement).groups()  # type: ignore[union-attr]
    return f"{name}=={version}"


def main() -> int:
    """Return the exit status of pip or of the tests. Arguments replace the options and names of pytest.

    torch stays the installed one, unless the variable TORCH is set: its oldest build for Linux takes some gigabytes.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chosen = [
        oldest(each) for each in project["dependencies"] if os.environ.get("TORCH") or not each.startswith("torch>")
    ]
    print("with", *chosen, flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--upgrade"]
    done = subprocess.run([*pip, "--target", str(FOLDER), *chosen])
    if done.returncode:
        return done.returncode
    # The folder precedes the packages of the environment.
    environment = {**os.environ, "PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    words = sys.argv[1:] or ["-n", "2", "-m", "not slow", *TESTS]
    return subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
