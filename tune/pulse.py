"""Signs of life of trials: a process that is stopped, or that waits for something that never comes, is told from one
that works.

A trial leaves a number in the cluster's own table now and then, and the driver looks whether it changes. No clock of
another machine is read.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from ray.experimental import internal_kv

INTERVAL = 2.0
"""Seconds from one sign of life to the next, at least."""


class Pulse(Callback):
    """Gives a sign of life after a batch, of training, validation or test, and wherever `beat` is called.

    Args:
        key: under which it is left.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._last = -INTERVAL
        self.beat()

    def beat(self, *_: Any) -> None:
        """Leave one, if the last is some seconds old."""
        now = time.monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            internal_kv._internal_kv_put(self.key.encode(), repr(time.time()).encode())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After an update."""
        self.beat()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After a batch of an evaluation."""
        self.beat()

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """After a batch of the test."""
        self.beat()


def read_pulse(key: str) -> bytes | None:
    """The last sign of life under a key."""
    found: bytes | None = internal_kv._internal_kv_get(key.encode())
    return found


def forget_pulses(keys: Iterable[str]) -> None:
    """Remove the signs of life of a sweep that ends, from a cluster that may go on."""
    with contextlib.suppress(Exception):  # it may be lost
        for key in keys:
            internal_kv._internal_kv_del(key.encode())


class Listener:
    """How long processes have been silent.

    Args:
        limit: seconds that are too long.
        read: the last sign of life under a key.
        clock: of this process, in seconds.
    """

    def __init__(
        self,
        limit: float,
        read: Callable[[str], bytes | None] = read_pulse,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit, self._read, self._clock = limit, read, clock
        self._seen: dict[str, tuple[object, bytes | None, float]] = {}
        self._looked = -limit

    @property
    def due(self) -> bool:
        """Whether it is time to look again: signs of life are not asked for at every turn."""
        if self._clock() - self._looked < min(INTERVAL, self.limit / 4):
            return False
        self._looked = self._clock()
        return True

    def silent(self, key: str, process: object) -> bool:
        """Whether a process has given no sign of life for too long.

        Args:
            key: under which it leaves them.
            process: which one it is; with another one the time begins again.
        """
        found, now = self._read(key), self._clock()
        before = self._seen.get(key)
        if before is None or before[0] != process or before[1] != found:
            self._seen[key] = (process, found, now)
            return False
        return now - before[2] > self.limit

    def restart(self, key: str) -> None:
        """Begin again: something was done about the silence."""
        self._seen.pop(key, None)
