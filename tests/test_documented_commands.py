"""Commands named in the documentation: each is accepted up to the preparation of its data.

Not tested are commands with placeholders, in capitals or brackets, and those that read a file of an earlier command.
Console blocks are run by `test_docs`.
"""

import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sma.recipes.tasks.kinds  # noqa: F401  (the classes of all tasks)
from sma.__main__ import main as run_sma
from sma.recipes.tasks.contract import TaskSpec

pytestmark = pytest.mark.usefixtures("as_users_run")

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"[A-Z_]+=\S+")
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python (?:-m sma\b|recipes/)|sma (?:train|compare|describe|kind)\b)")
PLACEHOLDER = re.compile(r"\b[A-Z]+\b(?!=)|…|\||--(?:spec|resume|beside|evaluate)\b|sma\.tune|describe$")


class Reached(BaseException):
    """The command was accepted, and prepares its data."""


def _commands(text: str) -> Iterator[str]:
    blocks = FENCE.findall(text.replace("\\\n", " "))
    lines = [line for language, body in blocks if language in ("", "sh") for line in body.splitlines()]
    lines += [inline.replace("\n", " ") for inline in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    for line in lines:
        command = re.sub(r"\s+#.*$", "", line.strip())
        if COMMAND.match(command):
            words = [word for word in shlex.split(command) if not SETTING.fullmatch(word)]
            if not PLACEHOLDER.search(" ".join(words)):
                yield " ".join(map(shlex.quote, words))


def _program(words: list[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    if words[0] == "sma" or words[1:3] == ["-m", "sma"]:
        return run_sma, words[1:] if words[0] == "sma" else words[3:]
    named = words[1:] if words[1] != "-m" else words[2:]
    module = named[0].removesuffix(".py").replace("/", ".").removeprefix("sma.")
    return importlib.import_module(f"sma.{module}").main, named[1:]


CASES = sorted({(page.name, command) for page in PAGES for command in _commands(page.read_text(encoding="utf-8"))})


def test_there_are_commands():
    assert len(CASES) > 30


@pytest.mark.parametrize(("page", "command"), CASES)
def test_a_documented_command_is_accepted(page, command, tmp_path, monkeypatch, capsys):
    def prepare(*_, **__):
        raise Reached

    for spec in (TaskSpec, *_below(TaskSpec)):
        if "prepare" in vars(spec):
            monkeypatch.setattr(spec, "prepare", prepare)
    monkeypatch.chdir(tmp_path)
    run, arguments = _program(shlex.split(command))
    try:
        status = run(arguments)
    except (Reached, SystemExit) as end:
        status = end.code if isinstance(end, SystemExit) else 0
    assert not status, capsys.readouterr().err


def _below(spec: type) -> Iterator[type]:
    for derived in spec.__subclasses__():
        yield derived
        yield from _below(derived)
