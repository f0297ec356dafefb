"""Isolation of a run from variables of the environment that change the behaviour of libraries.

Lightning detects a job scheduler or a launcher in the environment, and then changes ranks, waits for other processes,
resumes from its own files, and requeues the job; `PL_TRAINER_…` changes its arguments. A run sets all of this
explicitly, so these variables are hidden during the run, and restored afterwards.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

SCHEDULERS = ("SLURM_", "TORCHELASTIC_", "JSM_", "LSB_", "PL_", "LT_")
"""Prefixes of the variables of schedulers, and of Lightning's settings."""

RANKS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "STANDALONE_PORT",
)
"""Variables of a distributed training. Ray sets them for its workers."""

BARS = ("COLAB_GPU", "TQDM_MINITERS")
"""Variables of Lightning's progress bar, which fails if their values are not numbers."""

DISPLAYS = ("MPLBACKEND",)
"""The variable of the matplotlib backend of a notebook, which programs started from the notebook may lack."""


def is_hidden(name: str, ranks: bool = True) -> bool:
    """Whether a variable is hidden from a run; `ranks` also hides those of a distributed training."""
    return name.startswith(SCHEDULERS) or name in (*BARS, *DISPLAYS) or (ranks and name in RANKS)


@contextmanager
def changed_environment(is_hidden: Callable[[str], bool], settings: Mapping[str, str] | None = None) -> Iterator[None]:
    """Remove variables from the environment and set others inside the block; all are restored afterwards.

    Args:
        is_hidden: whether a variable of this name is removed.
        settings: variables to set.
    """
    given = settings or {}
    before = {name: os.environ.pop(name) for name in list(os.environ) if is_hidden(name) or name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in list(os.environ):
            if is_hidden(name) or name in given:
                del os.environ[name]
        os.environ.update(before)


def hidden_variables(*, ranks: bool = True) -> AbstractContextManager[None]:
    """Remove the variables from the environment inside the block.

    Args:
        ranks: whether to remove `RANKS` too; False for a rank of a distributed training.
    """
    return changed_environment(lambda name: is_hidden(name, ranks))
