"""Standard streams in real processes: unencodable characters, closed streams, and readers that exit early."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Only this file, because it does not need the rest of sma, whose import takes seconds.
HEAD = f"import sys; sys.path.insert(0, {str(ROOT / 'sma')!r}); from streams import run_command, write_out\n"
ANY = r"print('\u00b7\u2423\ufffd\U0001f642 caf\udce9')"

NAMES = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for folder in ("sma", "recipes", "tune", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents if ROOT in parent.parents)
    and re.search(r'^if __name__ == "__main__":', path.read_text(encoding="utf-8"), re.MULTILINE)
]


def _run(body, **options):
    program = (
        HEAD
        + "def command():\n"
        + "".join(f"    {line}\n" for line in body.split("\n"))
        + "sys.exit(run_command(command))\n"
    )
    environment = {**os.environ, **options.pop("env", {})}
    # No options such as `-I`, because the environment variables are under test.
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, timeout=60, **options
    )


@pytest.fixture
def closed_pipe():
    """A pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param("print('x')", id="print"),
        pytest.param("print('x' * 100_000)", id="much"),
        pytest.param("print('x', flush=True); print('y', flush=True)", id="flushed"),
        pytest.param("write_out('x')", id="write_out"),
        pytest.param("import argparse; argparse.ArgumentParser().parse_args(['--help'])", id="help"),
        pytest.param("from rich.console import Console; Console().print('x')", id="rich"),
    ],
)
def test_command_without_a_reader_ends_silently(body, buffered, closed_pipe):
    result = _run(body, stdout=closed_pipe, env={"PYTHONUNBUFFERED": buffered})
    assert (result.returncode, result.stderr) == (141, b"")


def test_errors_without_a_reader_end_silently(closed_pipe):
    program = HEAD + "sys.exit(run_command(lambda: print('wrong', file=sys.stderr)))"
    result = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=closed_pipe, timeout=60)
    assert (result.returncode, result.stdout) == (141, b"")


def test_a_broken_pipe_of_the_command_stays_an_error():
    result = _run("import os\nread, write = os.pipe()\nos.close(read)\nos.write(write, b'x')", stdout=subprocess.PIPE)
    assert result.returncode == 1
    assert b"BrokenPipeError" in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "ascii:strict", "utf-8"])
def test_every_character_can_be_printed_in_any_encoding(encoding):
    result = _run(f"{ANY}\n{ANY[:-1]}, file=sys.stderr)", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding})
    assert result.returncode == 0
    assert b"caf?" in result.stdout
    assert b"caf\\udce9" in result.stderr


def test_every_character_can_be_printed_in_a_locale_without_an_encoding():
    result = _run(ANY, stdout=subprocess.PIPE, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_accept_output_and_no_file_reuses_their_descriptor(tmp_path, closed):
    body = (
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('x'); print('y', file=sys.stderr); sys.stderr.isatty()\n"
        "file.write('z')"
    )
    program = (
        HEAD
        + "def command():\n"
        + "".join(f"    {line}\n" for line in body.split("\n"))
        + "sys.exit(run_command(command))\n"
    )
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    result = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} program.py {closed}"], cwd=tmp_path, capture_output=True, timeout=60
    )
    assert (result.returncode, b"Traceback" in result.stderr) == (0, False)
    assert (tmp_path / "file").read_text() == "z"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which is always full")
@pytest.mark.parametrize("body", ["print('x')", "write_out('x')"])
def test_a_full_disk_gives_an_error_message(body):
    with open("/dev/full", "w") as full:
        result = _run(body, stdout=full, env={"PYTHONUNBUFFERED": ""})
    assert (result.returncode, result.stderr) == (1, b"error: cannot write the output: No space left on device\n")


@pytest.mark.parametrize(("body", "status"), [("return 3", 3), ("return None", 0), ("sys.exit(4)", 4)])
def test_status_of_the_command_is_returned(body, status):
    assert _run(body, stdout=subprocess.PIPE).returncode == status


def test_the_list_of_commands_is_complete():
    assert {
        "sma",
        "tune",
        "recipes.seqboat_lm",
        "recipes.compare",
        "benchmarks.layer",
        "recipes.tasks.pathfinder.sheet",
    } <= {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_command_uses_run_command(name):
    path = ROOT / name.replace(".", "/")
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert called & {"run_command", "exit_code"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_help_of_every_command_fits_ascii_and_ends_without_a_reader(name, closed_pipe):
    module = name if name.startswith(("sma", "benchmarks")) else f"sma.{name}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-W", "ignore", "-m", module, "--help"]
    result = subprocess.run(command, stdout=closed_pipe, stderr=subprocess.PIPE, cwd=ROOT, env=environment, timeout=120)
    assert (result.returncode, result.stderr) == (141, b"")


def test_the_status_of_the_command_is_returned_if_a_library_blocks_the_exit():
    body = """
import atexit, sys, threading, time
from streams import ABANDONED, end_process, run_command

atexit.register(time.sleep, 600)
threading.Thread(target=time.sleep, args=(600,), name=ABANDONED).start()
end_process(run_command(lambda: print("said") or 2))
"""
    end = subprocess.run([sys.executable, "-c", HEAD + body], stdout=subprocess.PIPE, timeout=60)
    assert (end.returncode, end.stdout.split()) == (2, [b"said"])
