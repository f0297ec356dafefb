import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from sma.tune.cluster import start_ray


@pytest.fixture(scope="module")
def two_slots() -> Iterator[None]:
    """A local cluster of two cores, which a sweep in this process then uses.

    Every file has its own, because the end of a cluster in this process also ends the processes of older clusters.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    start_ray(num_cpus=2, num_gpus=0, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all sweeps of the session keep their data."""
    return tmp_path_factory.mktemp("data")
