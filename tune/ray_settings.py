"""The environment variables of Ray, so that settings from outside do not change a sweep or a training."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager

from sma.recipes.io.isolation import changed_environment

HIDDEN = ("TUNE_", "RAY_TUNE_", "RAY_TRAIN_", "RAY_AIR_")
"""Prefixes of the variables that change the behaviour of Tune and Train."""

# Tune's result files and its messages about them are disabled: the records in the sweep's folder replace them.
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

# Ray would start a process that warns the workers of the end of their machine; they do not use the warning. On a busy
# machine or file system, imports alone can take more than the 60 s that Ray gives workers to start.
TRAIN = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}

V2 = {"RAY_TRAIN_V2_ENABLED": "1"}
"""The version of Ray Train's interface that this package uses; `sma.tune` sets it before Ray is imported."""


def ray_settings(settings: Mapping[str, str]) -> AbstractContextManager[None]:
    """Hide Ray's variables except these inside the block, and restore them afterwards.

    Usage statistics are sent only if the user enables them. `RAY_ADDRESS` has no effect, because every command passes
    the address of its cluster.
    """
    usage = {"RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0")}
    return changed_environment(lambda name: name.startswith(HIDDEN), {**V2, **settings, **usage})
