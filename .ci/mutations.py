"""Apply the mutations of tests/mutations.yaml one at a time, and report those that no test detects."""

import argparse
import importlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutations.yaml"
# Libraries that take long to import. Each mutation runs in a fork of this process, which imports them, but never sma.
HEAVY = ("torch", "torch._dynamo", "triton", "hypothesis", "lightning", "torchmetrics", "ray.tune", "optuna")


class Tried(NamedTuple):
    """Exit status and output of pytest."""

    status: int
    output: str

    @property
    def first(self) -> str:
        """The name of the first failed test."""
        lines = [line for line in self.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return lines[0].split(" - ")[0] if lines else "no test is named"


def load() -> list[dict[str, Any]]:
    """Load the mutations.

    Raises:
        ValueError: a text does not occur exactly once in its file.
    """
    mutations: list[dict[str, Any]] = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    for mutation in mutations:
        count = (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["before"])
        if count != 1:
            raise ValueError(
                f"{mutation['name']!r}: its text occurs {count} times in {mutation['file']}, and must occur once; "
                f"correct {LIST.relative_to(ROOT)}"
            )
    return mutations


def copy_repository(folder: Path) -> None:
    """Copy the tracked files of the working tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if os.path.lexists(ROOT / name):  # it may be removed without a commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def run_tests(folder: Path, tests: Sequence[str], log: Path) -> Tried:
    """Run tests of a copy until one fails: the fast ones, and also the slow ones if a whole file is slow."""
    options = ["-q", "-x", "--tb=short", "-n", "0", "-p", "no:cacheprovider"]
    if not any("\npytestmark = pytest.mark.slow" in (folder / test.split("::")[0]).read_text() for test in tests):
        options += ["-m", "not slow"]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 3
        with suppress(BaseException), log.open("w", encoding="utf-8") as file:
            os.chdir(folder)
            # The copy must be first, and the checkout from which the package may be installed is removed.
            sys.path[:] = [str(folder), *(each for each in sys.path if Path(each) not in (ROOT, ROOT / ".ci"))]
            os.environ["PYTHONPATH"] = str(folder)
            with redirect_stdout(file), redirect_stderr(io.StringIO()):
                status = int(pytest.main([*options, *tests]))
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Tried(status, log.read_text(encoding="utf-8"))


def try_one(mutation: dict[str, Any], folder: Path, log: Path) -> Tried:
    """Apply one mutation, run its tests, and undo it."""
    path = folder / mutation["file"]
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation["before"], mutation["after"]), encoding="utf-8")
    try:
        return run_tests(folder, mutation["tests"], log)
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    """Return the exit status: 0 if the tests detect every mutation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations with one of these words in their name or file")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without a mistake first")
    arguments = parser.parse_args()
    try:
        mutations = load()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.words:
        mutations = [each for each in mutations if any(w in each["name"] or w in each["file"] for w in arguments.words)]
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    for name in HEAVY:
        with suppress(ImportError):
            importlib.import_module(name)
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary, "copy"), Path(temporary, "log")
        copy_repository(folder)
        if not arguments.trust:
            every = list(dict.fromkeys(test for mutation in mutations for test in mutation["tests"]))
            tried = run_tests(folder, every, log)
            if tried.status != pytest.ExitCode.OK:
                print(f"error: the tests fail without a mistake:\n{tried.output[-4000:]}", file=sys.stderr)
                return 2
        for mutation in mutations:
            tried = try_one(mutation, folder, log)
            if tried.status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
                print(f"error: {mutation['tests']} cannot be run:\n{tried.output[-4000:]}", file=sys.stderr)
                return 2
            caught = tried.status != pytest.ExitCode.OK
            survivors += not caught
            print(f"{'caught  ' if caught else 'SURVIVED'}  {mutation['name']} ({mutation['file']})", flush=True)
            if caught:
                print(f"          {tried.first}", flush=True)
    print(f"{len(mutations) - survivors} of {len(mutations)} mutations were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
