"""The environment in which Ray works: settings of its own that nobody asked for do not change a sweep or a training."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager

from sma.recipes.io.isolation import changed_environment

HIDDEN = ("TUNE_", "RAY_TUNE_", "RAY_TRAIN_", "RAY_AIR_")
"""How the names of variables begin by which Tune and Train change what they do: buffers, delimiters, callbacks,
interfaces.
"""

# Tune's own files of results and its words about them are left out: the records say more, and stand in the sweep's
# folder at once.
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
"""The interface of Ray Train for which this package is written; see `sma.tune`, which sets it before Ray is
imported.
"""


def ray_settings(settings: Mapping[str, str]) -> AbstractContextManager[None]:
    """Hide Ray's variables but for these, for as long as the block runs; they are back where they were afterwards.

    Usage statistics are not sent, unless the user asks for it. `RAY_ADDRESS` needs nothing: every command names its
    cluster.
    """
    usage = {"RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0")}
    return changed_environment(lambda name: name.startswith(HIDDEN), {**V2, **settings, **usage})
