"""Standard streams of commands: text that the terminal's encoding lacks, streams that are closed, and readers that go
away.
"""

import io
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

READER_GONE = 141
"""Exit status of a command whose output nobody reads any more, such as before `| head`: that of SIGPIPE in a shell."""

ABANDONED = "abandoned"
"""Name of threads that call a library which cannot be interrupted, such as Ray; see `end_process`."""


def run_command(command: Callable[[], int | None], name: str = "error") -> int:
    """Run a command; no sign that it prints, and no stream that is closed, makes it fail.

    Args:
        command: returns its exit status; None is 0.
        name: what a sentence on stderr begins with.

    Returns:
        the exit status of the command; 141 where the reader of stdout or stderr went away; 1, after a sentence on
        stderr, where the output cannot be written.
    """
    make_tolerant()
    try:
        try:
            return command() or 0
        finally:
            _flush()
    except SystemExit as error:
        # Of a pipe without a reader, rich makes an exit of its own, and argparse, which prints help, says nothing.
        if not isinstance(error.__context__, BrokenPipeError) and (error.code or not _is_broken(sys.stdout)):
            raise
        _drop(sys.stdout, sys.stderr)
        return READER_GONE
    except BrokenPipeError:
        broken = [stream for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
        if not broken:  # a pipe of somebody else, such as one to a worker
            raise
        _drop(*broken)
        return READER_GONE
    except _Unwritable as error:
        _drop(sys.stdout)
        with suppress(OSError):
            sys.stderr.write(f"{name}: cannot write the output: {error}\n")
        return 1


def end_process(status: int) -> NoReturn:
    """Exit with a status, after `run_command`.

    If a thread named `ABANDONED` is alive, the process exits without the interpreter's cleanup, in which a library may
    wait for what is gone, and end the process with a status of its own.
    """
    if has_abandoned():
        os._exit(status)
    sys.exit(status)


def has_abandoned() -> bool:
    """Whether a thread named `ABANDONED` is alive."""
    return any(thread.name == ABANDONED for thread in threading.enumerate())


def make_tolerant() -> None:
    """Let this process print whatever it wants: what an encoding lacks becomes `?`, or an escape on stderr; what is
    closed is nowhere.
    """
    # The lowest numbers are the standard streams: where one is closed, the next file to be opened would get what is
    # printed.
    with suppress(OSError):
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


class _Unwritable(Exception):
    """Stdout cannot be written, such as on a full disk."""


def write_out(text: str) -> None:
    """Print a line of the output of a command that is run by `run_command`."""
    with _writing():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _flush() -> None:
    """Write what is buffered now: when the interpreter does it at its end, an error is a message and an exit status of
    its own.
    """
    for stream in (sys.stdout, sys.stderr):
        with _writing(), suppress(ValueError):  # the command may have closed it
            stream.flush()


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _Unwritable(error.strerror or str(error)) from error


def _is_broken(stream: Any) -> bool:
    """Whether a stream is a pipe without a reader."""
    try:
        handle = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    if not hasattr(select, "poll"):
        return True  # who knows
    poll = select.poll()
    poll.register(handle, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop(*streams: Any) -> None:
    """Let the interpreter's last flush of streams that cannot be written go nowhere, instead of failing again."""
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
