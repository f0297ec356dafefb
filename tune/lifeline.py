"""Runs Ray's blocking calls in a thread, while the main thread handles signals and the loss of the cluster.

Ray ends a process some time after it has lost its cluster, without an exception. This module detects the loss first, so
that the command can print an error message with the command that resumes, and exit with its own status.
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
from sma.streams import ABANDONED, has_abandoned

PATIENCE = 30.0
"""Time without an answer after which the cluster counts as lost, in seconds; Ray ends the process after 60."""

GRACE = 20.0
"""Maximum time for `ray.shutdown`, in seconds."""

_POLL = 0.2


class ClusterLost(SmaError, RuntimeError):
    """The Ray cluster is gone, and with it the processes that it ran."""


@contextmanager
def signals_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces when a process joins a cluster."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def follow(work: Callable[[], object], look: Callable[[], object]) -> None:
    """Run a function in a thread, and return when it returns.

    In a thread Ray does not handle Ctrl-C, so it raises `KeyboardInterrupt` in this one.

    Args:
        work: the function that uses the cluster. Its exceptions are raised here.
        look: a function that is called several times a second. Its exceptions end the waiting.

    Raises:
        ClusterLost: the cluster does not answer.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised below
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
        # The thread keeps running, and must not start another cluster after this one is left.
        auto_init_hook.enable_auto_connect = False
        thread.name = ABANDONED
        raise
    look()
    if errors:
        # If the cluster ends, the work fails before the lifeline has detected it.
        lifeline.wait()
        raise errors[0]


class Lifeline:
    """Checks from threads whether the GCS server and the local raylet of a cluster respond."""

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
        for check in (self._connect, self._query):  # in two threads, because the second blocks if the server is gone
            threading.Thread(target=check, daemon=True).start()

    def check(self) -> None:
        """Raise an error if the cluster is lost.

        Raises:
            ClusterLost: a process has ended, or the GCS server has not answered for `PATIENCE` seconds.
        """
        if not self._lost and time.monotonic() - self._seen > PATIENCE:
            self._lost = f"its GCS server has not answered for {PATIENCE:g} s"
        if self._lost:
            raise ClusterLost(f"the Ray cluster is lost: {self._lost}")

    def wait(self) -> None:
        """Call `check` for three seconds, in which the threads detect a loss."""
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
                except OSError:  # the network may recover
                    pass
            time.sleep(0.5)

    def _query(self) -> None:
        while ray.is_initialized() and not self._lost:
            with suppress(Exception):
                internal_kv._internal_kv_get(b"sma")
                self._seen = time.monotonic()
            time.sleep(0.5)


def leave_cluster(lost: bool) -> None:
    """Disconnect from Ray, and end the Ray processes that this process started.

    If interrupted work may still call Ray, the process stays connected until it exits: a call after `ray.shutdown` ends
    the process inside Ray, without the error message and the exit status of the command.

    Args:
        lost: whether the cluster does not answer, so that its processes are killed.
    """
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    interrupted = has_abandoned()
    if not lost and not interrupted:
        ray.shutdown()
        return
    node: Any = getattr(ray._private.worker, "_global_node", None)
    with suppress(Exception):  # also kills suspended processes, for which `ray.shutdown` would wait
        if node is not None and node.head:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
    if interrupted and not lost:
        atexit.unregister(ray._private.worker.shutdown)
        return
    leaving = threading.Thread(target=ray.shutdown, name=ABANDONED, daemon=True)
    leaving.start()
    leaving.join(GRACE)
