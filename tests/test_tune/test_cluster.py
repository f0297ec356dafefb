import os
from typing import Any

import pytest

from sma.errors import SpecError
from sma.tune.cluster import ResourceSpec, Slots, check_resources, cluster, local_node, plan_slots, start_ray

TWO = [{"CPU": 2.0}]
GPUS = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 4.0}]


@pytest.mark.parametrize(
    ("requested", "nodes", "samples", "expected"),
    [
        pytest.param({}, TWO, 16, Slots(2, 1, 0.0), id="two-of-one-core"),
        pytest.param({}, TWO, 1, Slots(1, 1, 0.0), id="no-more-than-trials"),
        pytest.param({"cpus": 2}, [{"CPU": 3.0}, {"CPU": 5.0}], 16, Slots(3, 2, 0.0), id="whole-trials-per-machine"),
        pytest.param({"concurrent": 1}, TWO, 16, Slots(1, 1, 0.0), id="fewer"),
        pytest.param({}, GPUS, 16, Slots(2, 1, 1.0), id="one-gpu-each"),
        pytest.param({"gpus": 0.25}, GPUS, 16, Slots(8, 1, 0.25), id="shares"),
        pytest.param({"gpus": 0.6}, GPUS, 16, Slots(2, 1, 0.6), id="shares-of-one-device"),
        pytest.param({"gpus": 0, "cpus": 4}, GPUS, 16, Slots(5, 4, 0.0), id="no-gpus-requested"),
        pytest.param({"accelerator": "cpu", "cpus": 4}, GPUS, 16, Slots(5, 4, 0.0), id="on-the-cpu"),
        pytest.param({"accelerator": "cuda"}, GPUS, 16, Slots(2, 1, 1.0), id="on-gpus"),
        pytest.param({"accelerator": "cuda", "gpus": 0.5}, GPUS, 16, Slots(4, 1, 0.5), id="on-halves-of-gpus"),
    ],
)
def test_slots_fit_the_machines(
    requested: dict[str, Any], nodes: list[dict[str, float]], samples: int, expected: Slots
) -> None:
    assert plan_slots(ResourceSpec(**requested), nodes, samples) == expected


@pytest.mark.parametrize(
    ("requested", "nodes", "message"),
    [
        pytest.param(
            {"cpus": 3}, [{"CPU": 2.0}, {"CPU": 2.0}], r"no machine has 3 CPUs.*2 CPUs and 0 GPUs; 2 CPUs", id="cpus"
        ),
        pytest.param({"gpus": 1}, TWO, r"no machine has 1 CPUs and 1 GPUs.*lower --cpus or --gpus", id="gpus"),
        pytest.param({"concurrent": 3}, TWO, r"--concurrent 3 trials.*room for 2", id="concurrent"),
        pytest.param({"gpus": 1.5}, GPUS, r"a share of one GPU, or an integer", id="odd-share"),
        pytest.param({}, [], r"there is nothing", id="no-machines"),
        pytest.param({"accelerator": "cuda"}, TWO, r"no machine has 1 CPUs and 1 GPUs for a trial", id="no-gpu"),
        pytest.param(
            {"accelerator": "cpu", "gpus": 0.5}, GPUS, r"accelerator=cpu uses no GPU, and gpus=0.5", id="cpu-and-gpu"
        ),
        pytest.param(
            {"accelerator": "cuda", "gpus": 0}, GPUS, r"accelerator=cuda needs a GPU, and gpus=0", id="cuda-and-none"
        ),
    ],
)
def test_impossible_resources_are_refused(
    requested: dict[str, Any], nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        plan_slots(ResourceSpec(**requested), nodes, 16)


def test_a_trial_without_a_gpu_runs_on_the_cpu() -> None:
    assert [plan_slots(ResourceSpec(gpus=gpus), GPUS, 16).accelerator for gpus in (None, 0.0)] == ["cuda", "cpu"]


def test_a_new_cluster_is_started_even_if_ray_address_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr("ray.init", lambda **options: started.append(options))
    start_ray(num_cpus=1)
    assert [options["address"] for options in started] == ["local"]


def test_variables_for_the_processes_of_ray_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr("sma.tune.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setattr("sma.tune.cluster.start_ray", lambda **_: started.append(dict(os.environ)))
    monkeypatch.setattr("sma.tune.cluster._nodes", lambda: TWO)
    monkeypatch.setattr("sma.tune.cluster.leave_cluster", lambda lost: None)
    before = dict(os.environ)
    with cluster(ResourceSpec(accelerator="cpu"), 1, 0):
        assert started[0]["OMP_NUM_THREADS"] == "1"
        assert dict(os.environ) == before


def test_the_local_node_has_at_least_one_core() -> None:
    assert local_node()["CPU"] >= 1


@pytest.mark.parametrize(
    ("address", "message"),
    [
        pytest.param("127.0.0.1:1", r"there is no Ray cluster at '127.0.0.1:1'.*ray start --head", id="no-server"),
        pytest.param("somewhere", r"there is no Ray cluster at 'somewhere'", id="no-port"),
        pytest.param(
            "ray://127.0.0.1:10001", r"start the sweep on a node of the cluster, with --address auto", id="client"
        ),
    ],
)
def test_an_address_without_a_cluster_is_refused(address: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_resources(ResourceSpec(address=address), 16)
