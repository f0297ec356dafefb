"""A sweep on a running cluster of several nodes."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.forks import Completed, run_fork
from tests.test_tune.sweeps import write_sweep
from tests.test_tune.test_killed import IMPORTED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster of two nodes with one core each."""
    assert not ray.is_initialized()
    node = {"num_cpus": 1, "object_store_memory": 150 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.add_node(**node)
    yield str(made.address)
    made.shutdown()


def run(folder: Path, *arguments: str) -> Completed:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*arguments, "--accelerator=cpu"]
    return run_fork("sma.tune", *words, folder=folder, environment=environment, imported=IMPORTED, timeout=900)


def test_trials_run_on_all_nodes(address: str, tmp_path: Path) -> None:
    files = [f"--space={write_sweep(tmp_path)}", f"--storage={tmp_path / 's'}", f"--data={tmp_path / 'data'}"]
    done = run(tmp_path, *files, "--samples=4", "--no-stop", f"--address={address}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert (summary["finished"], summary["slots"]) == (4, 2)
    records = [json.loads(path.read_text()) for path in (tmp_path / "s" / "records").iterdir()]
    assert len({record["node"] for record in records}) == 2


def test_a_trial_that_fits_on_no_node_is_refused_before_anything_is_written(address: str, tmp_path: Path) -> None:
    refused = run(
        tmp_path, f"--space={write_sweep(tmp_path)}", f"--storage={tmp_path / 's'}", f"--address={address}", "--cpus=2"
    )
    assert refused.returncode == 2
    assert (
        "no machine has 2 CPUs and 0 GPUs for a trial; there is 1 CPUs and 0 GPUs; 1 CPUs and 0 GPUs" in refused.stderr
    )
    assert not (tmp_path / "s").exists()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", ["", "file://"], ids=["shared-folder", "uri"])
def test_one_model_is_trained_on_all_nodes(address: str, scheme: str, tmp_path: Path) -> None:
    write_sweep(tmp_path)
    spec, out = f"--spec={tmp_path / 'experiment.yaml'}", tmp_path / "out"
    # Each node has room for one worker.
    done = run(
        tmp_path, "--workers=2", spec, f"--out={scheme}{out}", f"--data={tmp_path / 'data'}", f"--address={address}"
    )
    assert done.returncode == 0, done.stderr
    assert "update 30 of 30" in done.stdout
    assert json.loads((out / "summary.json").read_text())["updates"] == 30
    assert (out / "model").is_dir()
