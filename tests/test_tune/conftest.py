import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from sma.tune.cluster import start_ray


@pytest.fixture(scope="module")
def two_slots() -> Iterator[None]:
    """A local cluster of two cores, to which sweeps in this process connect.

    Each file starts a cluster, because `ray.shutdown` also ends the processes of earlier clusters of this process.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    start_ray(num_cpus=2, num_gpus=0, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of all sweeps of the session."""
    return tmp_path_factory.mktemp("data")
