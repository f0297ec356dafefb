"""The environment in which Ray works: settings of its own that nobody asked for do not change a sweep or a training."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

HIDDEN = ("TUNE_", "RAY_TUNE_", "RAY_TRAIN_", "RAY_AIR_")
"""How the names of variables begin by which Tune and Train change what they do: buffers, delimiters, callbacks, interfaces."""

# Tune's own files of results and its words about them are left out: the records say more, and stand in the sweep's folder at once.
TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "60",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

V2 = {"RAY_TRAIN_V2_ENABLED": "1"}
"""The interface of Ray Train for which this package is written; see `sma.tune`, which sets it before Ray is imported."""


@contextmanager
def ray_settings(settings: Mapping[str, str]) -> Iterator[None]:
    """Hide Ray's variables but for these, for as long as the block runs; they are back where they were afterwards.

    Usage statistics are not sent, unless the user asks for it. `RAY_ADDRESS` needs nothing: every command names its cluster.
    """
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(HIDDEN)}
    os.environ.update({**V2, **settings})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        yield
    finally:
        for name in list(os.environ):
            if name.startswith(HIDDEN):
                del os.environ[name]
        os.environ.update(before)
