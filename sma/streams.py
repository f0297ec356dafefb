"""Standard streams of commands: unencodable characters, closed streams, and readers that exit early."""

import io
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

READER_GONE = 141
"""Exit status of a command whose reader exited, as in `| head`: that of SIGPIPE in a shell."""

ABANDONED = "abandoned"
"""Name of threads in uninterruptible library calls, such as of Ray; see `end_process`."""


def run_command(command: Callable[[], int | None], name: str = "error") -> int:
    """Run a command that does not fail on unencodable characters or closed streams.

    Args:
        command: returns its exit status; None is 0.
        name: beginning of a message on stderr.

    Returns:
        the exit status of the command; 141 if the reader of stdout or stderr exited; 1, after a message on stderr, if
        the output cannot be written.
    """
    make_tolerant()
    try:
        try:
            return command() or 0
        finally:
            _flush()
    except SystemExit as error:
        # On a pipe without a reader rich exits the process, and the help of argparse ignores the error.
        if not isinstance(error.__context__, BrokenPipeError) and (error.code or not _is_broken(sys.stdout)):
            raise
        _drop(sys.stdout, sys.stderr)
        return READER_GONE
    except BrokenPipeError:
        broken = [stream for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
        if not broken:  # another pipe, such as to a worker
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

    If a thread named `ABANDONED` is alive, the process skips the interpreter's cleanup, in which a library could hang
    or change the exit status.
    """
    if has_abandoned():
        os._exit(status)
    sys.exit(status)


def has_abandoned() -> bool:
    """Whether a thread named `ABANDONED` is alive."""
    return any(thread.name == ABANDONED for thread in threading.enumerate())


def make_tolerant() -> None:
    """Replace unencodable characters by `?`, or an escape on stderr, and closed streams by the null device."""
    # The standard streams have the lowest descriptors, so the next opened file would get that of a closed stream.
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
    """Print a line of the output of a command under `run_command`."""
    with _writing():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _flush() -> None:
    """Flush the streams now: an error in the interpreter's last flush would change the exit status."""
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
        return True  # not known
    poll = select.poll()
    poll.register(handle, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop(*streams: Any) -> None:
    """Redirect unwritable streams to the null device, so that the interpreter's last flush does not fail."""
    for stream in streams:
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
