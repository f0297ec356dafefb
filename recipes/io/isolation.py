"""Variables of the environment by which libraries would take a training for something else than what was asked for.

Lightning looks for a job scheduler or a launcher in the environment, and then changes ranks, waits for other processes,
resumes from files of its own, and requeues the job; `PL_TRAINER_…` changes arguments that nobody gave. A run is told
all of this explicitly, so that these variables are hidden while it works, and are back where they were afterwards.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

SCHEDULERS = ("SLURM_", "TORCHELASTIC_", "JSM_", "LSB_", "PL_", "LT_")
"""How the names begin that schedulers set, and Lightning's own settings."""

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
"""By which processes that train together find each other; Ray sets them for its own."""

BARS = ("COLAB_GPU", "TQDM_MINITERS")
"""Which Lightning reads for its progress bar, and stumbles over where they are no numbers."""

DISPLAYS = ("MPLBACKEND",)
"""By which a notebook has matplotlib draw into it: a program that it starts may not have that backend, and shows
nothing.
"""


def is_hidden(name: str, ranks: bool = True) -> bool:
    """Whether a variable is hidden from a run; `ranks` also hides those of processes that train together."""
    return name.startswith(SCHEDULERS) or name in (*BARS, *DISPLAYS) or (ranks and name in RANKS)


@contextmanager
def changed_environment(is_hidden: Callable[[str], bool], settings: Mapping[str, str] | None = None) -> Iterator[None]:
    """Take variables out of the environment and set others for as long as the block runs; all of them are as before
    afterwards.

    Args:
        is_hidden: which are taken out, by their names.
        settings: the variables that are set.
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
    """Take the variables out of the environment for as long as the block runs.

    Args:
        ranks: also those by which processes find each other; False for one of several that train together.
    """
    return changed_environment(lambda name: is_hidden(name, ranks))
