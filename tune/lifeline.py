"""Work of Ray's in a thread of its own, while the main thread watches for signals and for the end of the cluster.

A process that loses its cluster is ended by Ray's own code after a while, without an exception. So the cluster is
looked at from here: a sentence, an exit status and the command that resumes come first.
"""

import atexit
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray._private import auto_init_hook
from ray.experimental import internal_kv

from sma.errors import SmaError

PATIENCE = 30.0
"""Seconds in which the cluster must answer; Ray itself ends the process after 60."""

GRACE = 20.0
"""Seconds that Ray gets to leave a cluster."""

_POLL = 0.2

_left: list[threading.Thread] = []
"""Threads of work that was interrupted: they may still call Ray."""


class ClusterLost(SmaError, RuntimeError):
    """The Ray cluster is gone, and with it the processes that it ran."""


@contextmanager
def signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when a process joins a cluster; a handler that is there already stays."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def follow(work: Callable[[], object], look: Callable[[], object]) -> None:
    """Do the work in a thread, and return at its end.

    Ray does not take Ctrl-C for itself there: in this thread it is a `KeyboardInterrupt`, and the cluster is left with
    it.

    Args:
        work: what uses the cluster; its exception is raised here.
        look: is called several times a second; what it raises ends the waiting.

    Raises:
        ClusterLost: the cluster does not answer.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # of every kind: it is raised below
            errors.append(error)

    lifeline = Lifeline()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL)
            look()
            lifeline.check()
    except BaseException:
        # The thread is left to itself, and must not start a cluster of its own where this one is left.
        auto_init_hook.enable_auto_connect = False
        _left.append(thread)
        raise
    look()
    if errors:
        # Where the cluster ends, the work fails before anybody knows why.
        lifeline.wait()
        raise errors[0]


class Lifeline:
    """Asks the processes that hold a cluster together for signs of life, from a thread of its own."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        host, _, port = context.gcs_address.rpartition(":")
        self._processes = {
            "its GCS server, on the head node": (host.strip("[]"), int(port)),
            "the raylet of this machine": (own["NodeManagerAddress"], int(own["NodeManagerPort"])),
        }
        self._refused: dict[str, int] = {}
        self._seen = time.monotonic()
        self._lost = ""
        for ask in (self._connect, self._ask):  # apart, for the second blocks where the server is gone
            threading.Thread(target=ask, daemon=True).start()

    def check(self) -> None:
        """Raise what was found.

        Raises:
            ClusterLost: a process is gone, or none has answered for long.
        """
        if not self._lost and time.monotonic() - self._seen > PATIENCE:
            self._lost = f"its GCS server has not answered for {PATIENCE:g} s"
        if self._lost:
            raise ClusterLost(f"the Ray cluster is lost: {self._lost}")

    def wait(self) -> None:
        """Give the thread the time to find out, and `check`."""
        for _ in range(int(3.0 / _POLL)):
            self.check()
            time.sleep(_POLL)

    def _connect(self) -> None:
        while ray.is_initialized() and not self._lost:
            for name, (host, port) in self._processes.items():
                try:
                    socket.create_connection((host, port), timeout=5.0).close()
                    self._refused[name] = 0
                except ConnectionRefusedError:
                    self._refused[name] = self._refused.get(name, 0) + 1
                    if self._refused[name] >= 3:
                        self._lost = f"{name} has ended"
                except OSError:  # the network: it may come back
                    pass
            time.sleep(0.5)

    def _ask(self) -> None:
        while ray.is_initialized() and not self._lost:
            with suppress(Exception):
                internal_kv._internal_kv_get(b"sma")
                self._seen = time.monotonic()
            time.sleep(0.5)


def leave_cluster(lost: bool) -> None:
    """Disconnect from Ray, and end what this process started of it.

    Where interrupted work may still call Ray, the end of this process is what disconnects it: after `ray.shutdown` such
    a call ends the process in Ray's own code, without the sentence and the status that were to come.

    Args:
        lost: the cluster does not answer: its processes are not asked.
    """
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    interrupted = any(thread.is_alive() for thread in _left)
    if not lost and not interrupted:
        ray.shutdown()
        return
    node: Any = getattr(ray._private.worker, "_global_node", None)
    with suppress(Exception):  # those that are left, stopped ones too, which would be waited for
        if node is not None and node.head:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    if interrupted and not lost:
        atexit.unregister(ray._private.worker.shutdown)
        return
    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(GRACE)
