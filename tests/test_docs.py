"""Runs every example of the documentation, and compares its output with the text in the page.

A `yaml` or `python` block whose first line is a file name, such as `# name.yaml`, is written to that file. Other
`python` blocks are run; the next `text` block is the expected output. In a `console` block, the lines after `$ command`
are the expected output. Blocks in other languages are not run.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

# Its kinds must be registered before the first page runs, after which the registry is restored.
import sma.recipes.tasks.kinds
import sma.spec
import sma.tune.sweep
from sma.testing.model_laws import MODEL_LAWS
from sma.testing.router_laws import ROUTER_LAWS
from sma.testing.submodule_laws import SUBMODULE_LAWS

ROOT = Path(__file__).resolve().parents[1]
# The first lists the pages of the site. The commands of the second take minutes.
WITHOUT_EXAMPLES = ("index.md", "benchmarks.md")
GUIDES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in WITHOUT_EXAMPLES)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def console_steps(text: str) -> list[tuple[str, str]]:
    """Split a console block into commands and the output after each."""
    steps = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        steps.append((command, output))
    return steps


def run_command(command: str, folder: Path) -> str:
    words = shlex.split(command.replace("sma ", "python -m sma ", 1) if command.startswith("sma ") else command)
    words = [sys.executable if word == "python" else word for word in words]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_every_example_has_the_output_in_the_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_users_run: None
) -> None:
    monkeypatch.chdir(tmp_path)
    # A copy of the registry, so that the kinds of a page are removed after it.
    monkeypatch.setattr(sma.spec, "_registry", {family: sma.spec.kinds(family) for family in sma.spec.families()})
    names: dict[str, object] = {"__name__": "__page__"}
    printed = ""
    ran = 0
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        title = re.match(r"# (\S+\.(?:yaml|py))\n", text)
        if language in ("yaml", "python") and title:
            (tmp_path / title[1]).write_text(text, encoding="utf-8")
        elif language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, str(page), "exec"), names)
            printed = output.getvalue()
        elif language == "text":
            assert text.strip() == printed.strip()
        elif language == "console":
            for command, expected in console_steps(text):
                assert run_command(command, tmp_path).strip() == expected.strip(), command
        else:
            continue
        ran += 1
    assert ran, f"{page.name} has no example"


@pytest.mark.parametrize(
    "laws",
    [
        pytest.param(SUBMODULE_LAWS, id="submodule"),
        pytest.param(ROUTER_LAWS, id="router"),
        pytest.param(MODEL_LAWS, id="model"),
    ],
)
def test_the_page_of_the_conformance_kit_lists_every_law(laws: Sequence[Callable[..., None]]) -> None:
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = [f"| `{law.__name__}` | {(law.__doc__ or '').strip().splitlines()[0]} |" for law in laws]
    assert "\n".join(rows) in page


def _git(*words: str, text: str = "") -> str:
    return subprocess.run(["git", *words], cwd=ROOT, input=text, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs the repository and git")
def test_every_commit_named_in_a_page_exists() -> None:
    if _git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("the history of this clone is incomplete")
    named = {
        (page.name, found)
        for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
        for found in re.findall(r"\b[0-9a-f]{7,12}\b(?!…)", page.read_text(encoding="utf-8"))
        if not found.isdecimal() and not found.isalpha()
    }
    assert len(named) > 50
    kinds = _git("cat-file", "--batch-check=%(objecttype)", text="".join(f"{found}\n" for _, found in sorted(named)))
    missing = [each for each, kind in zip(sorted(named), kinds.splitlines(), strict=True) if kind != "commit"]
    assert missing == []
