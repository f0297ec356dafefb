"""Heartbeats of trials, with which the driver detects processes that are suspended or wait forever.

A trial writes a number into the key-value store of the cluster every few seconds, and the driver checks whether it
changes. Clocks of different machines are not compared.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.callbacks import Callback
from ray.experimental import internal_kv

INTERVAL = 2.0
"""Minimum time between heartbeats, in seconds."""


class Pulse(Callback):
    """Writes a heartbeat after every batch of training, validation or test, and on every call of `beat`.

    Args:
        key: key of the heartbeat in the store.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._last = -INTERVAL
        self.beat()

    def beat(self, *_: Any, **__: Any) -> None:
        """Write a heartbeat, unless the last is less than `INTERVAL` seconds old."""
        now = time.monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            internal_kv._internal_kv_put(self.key.encode(), repr(time.time()).encode())

    on_train_batch_end = on_validation_batch_end = on_test_batch_end = beat


def forget_pulses(keys: Iterable[str]) -> None:
    """Remove the heartbeats of a sweep that ends, from a cluster that may continue."""
    with contextlib.suppress(Exception):  # the cluster may be lost
        for key in keys:
            internal_kv._internal_kv_del(key.encode())


class Listener:
    """Measures the time since the last heartbeat of processes.

    Args:
        limit: maximum time without a heartbeat, in seconds.
        read: a function that returns the last heartbeat under a key.
        clock: a monotonic clock, in seconds.
    """

    def __init__(
        self,
        limit: float,
        read: Callable[[str], bytes | None] = lambda key: internal_kv._internal_kv_get(key.encode()),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit, self._read, self._clock = limit, read, clock
        self._seen: dict[str, tuple[object, bytes | None, float]] = {}
        self._looked = -limit

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last check of the heartbeats."""
        if self._clock() - self._looked < min(INTERVAL, self.limit / 4):
            return False
        self._looked = self._clock()
        return True

    def silent(self, key: str, process: object) -> bool:
        """Whether a process has written no heartbeat for longer than the limit.

        Args:
            key: key of its heartbeats.
            process: identity of the process. The time restarts if it changes.
        """
        found, now = self._read(key), self._clock()
        before = self._seen.get(key)
        if before is None or before[0] != process or before[1] != found:
            self._seen[key] = (process, found, now)
            return False
        return now - before[2] > self.limit

    def restart(self, key: str) -> None:
        """Restart the time of a key, after its process was ended."""
        self._seen.pop(key, None)
