"""Ray itself: a cluster on this machine or one that runs already, and whether it can hold the trials."""

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self

import ray
import torch
from pydantic import Field, model_validator

from sma.errors import SmaError, SpecError, quote, reason
from sma.recipes.io.isolation import changed_environment
from sma.spec import Spec
from sma.tune.lifeline import ClusterLost, leave_cluster, signals_kept
from sma.tune.scratch import remove_abandoned

LEAST_STORE = 200 * 2**20
"""Bytes of the object store where the data needs less."""


_DEVICES = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Whether Ray hides the GPUs from a process that has none of them."""


class ResourceSpec(Spec):
    """What a trial gets, and how many run at once."""

    cpus: int = Field(
        default=1, ge=1, description="cores of a trial, and threads of its training where the experiment does not say"
    )
    gpus: float | None = Field(
        default=None,
        ge=0.0,
        description="GPUs of a trial, such as 0.25 for four trials on one; null: one if there are any, else none",
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="the device: cpu takes no GPU, cuda one where `gpus` does not say, auto what the machines have",
    )
    concurrent: int | None = Field(default=None, ge=1, description="trials at once; null: as many as the machines hold")
    address: str | None = Field(
        default=None, description="a running Ray cluster: auto or HOST:PORT; null starts one on this machine"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.accelerator == "cpu" and self.gpus:
            raise ValueError(f"accelerator=cpu takes no GPU, and gpus={self.gpus:g}; leave one of them out")
        if self.accelerator == "cuda" and self.gpus == 0:
            raise ValueError(
                "accelerator=cuda needs a GPU, and gpus=0; leave one of them out, or give a share such as gpus=0.25"
            )
        return self

    def gpus_of(self, nodes: Iterable[Mapping[str, float]]) -> float:
        """GPUs of a trial on these machines."""
        default = {"cpu": 0.0, "cuda": 1.0}.get(self.accelerator, float(any(node.get("GPU", 0) > 0 for node in nodes)))
        return default if self.gpus is None else self.gpus


class Slots(NamedTuple):
    """How a sweep uses its machines.

    Attributes:
        concurrent: trials at once.
        cpus: cores of each.
        gpus: GPUs of each.
    """

    concurrent: int
    cpus: int
    gpus: float

    @property
    def accelerator(self) -> str:
        """Lightning's name for the device: a trial without a share of a GPU must not see one."""
        return "cuda" if self.gpus else "cpu"


def local_node() -> dict[str, float]:
    """The cores that this process may use, and the GPUs that torch sees."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"CPU": float(cores), "GPU": float(torch.cuda.device_count() if torch.cuda.is_available() else 0)}


def plan_slots(resources: ResourceSpec, nodes: list[Mapping[str, float]], samples: int, what: str = "trial") -> Slots:
    """How many trials fit at once.

    Args:
        resources: what was asked for.
        nodes: cores (`CPU`) and GPUs (`GPU`) of every machine.
        samples: trials in all; there need not be more slots.
        what: what they are called.

    Raises:
        SpecError: no machine can hold one trial, or all together cannot hold so many: Ray would wait forever, without a
            word.
    """
    gpus = resources.gpus_of(nodes)
    if gpus > 1 and gpus != int(gpus):
        raise SpecError(f"--gpus {gpus:g}: a trial gets a share of one GPU or a whole number of them")
    room = 0
    for node in nodes:
        fits = int(node.get("CPU", 0) // resources.cpus)
        if gpus:
            # Whole trials per device: two halves of different GPUs are no GPU.
            devices = int(node.get("GPU", 0))
            fits = min(fits, devices * int(1 / gpus + 1e-9) if gpus <= 1 else devices // int(gpus))
        room += fits
    there = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes) or "nothing"
    if not room:
        raise SpecError(
            f"no machine has {resources.cpus} CPUs and {gpus:g} GPUs for a {what}; there is {there}: lower --cpus or "
            "--gpus, or give the --address of a larger cluster"
        )
    if resources.concurrent is not None and resources.concurrent > room:
        raise SpecError(
            f"--concurrent {resources.concurrent} trials of {resources.cpus} CPUs and {gpus:g} GPUs do not fit; there "
            f"is room for {room}: {there}; lower --concurrent, --cpus or --gpus"
        )
    return Slots(min(resources.concurrent or room, samples), resources.cpus, gpus)


def check_resources(resources: ResourceSpec, samples: int, what: str = "trial") -> Slots:
    """Refuse what does not fit before anything is written or prepared; joins the cluster at the address, if one is
    given.

    Raises:
        SpecError: the trials do not fit, or there is no cluster at the address.
    """
    if resources.address is not None and not ray.is_initialized():
        _join(resources.address)
    return plan_slots(resources, _nodes() if ray.is_initialized() else [local_node()], samples, what)


@contextmanager
def cluster(resources: ResourceSpec, samples: int, data_bytes: int) -> Iterator[Slots]:
    """Start Ray on this machine and leave it at the end; a process that is connected to a cluster stays so.

    Args:
        resources: what a trial gets.
        samples: trials in all.
        data_bytes: what the object store must hold.

    Raises:
        SpecError: the trials do not fit, or there is no cluster at the address.
    """
    check_resources(resources, samples)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        try:
            yield plan_slots(resources, _nodes(), samples)
        except ClusterLost:
            leave_cluster(lost=True)
            raise
        return
    node = local_node()
    # Inherited by the processes of the trials; more threads than cores would make all of them slow.
    inherited = {"OMP_NUM_THREADS": str(resources.cpus), _DEVICES: os.environ.get(_DEVICES, "0")}
    with changed_environment(lambda name: False, inherited):
        start_ray(
            num_cpus=int(node["CPU"]),
            num_gpus=int(node["GPU"]),
            object_store_memory=max(LEAST_STORE, int(1.25 * data_bytes) + LEAST_STORE // 2),
        )
    lost = False
    try:
        yield plan_slots(resources, _nodes(), samples)
    except ClusterLost:
        lost = True
        raise
    finally:
        leave_cluster(lost)
        remove_abandoned()


def _join(address: str) -> None:
    """Connect to a running cluster."""
    if address.startswith("ray://"):
        raise SpecError(
            f"--address {address}: start the sweep on a node of the cluster, with --address auto; "
            "not through Ray's client"
        )
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            # Ray itself would try for many minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        with signals_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # each way of not being there has an exception of its own
        raise SpecError(
            f"there is no Ray cluster at {quote(address)}: {reason(error)}; start one with: "
            "ray start --head --port 6379"
        ) from error


def start_ray(**options: Any) -> None:
    """Start Ray on this machine, at the second attempt where the first took too long.

    Args:
        options: of `ray.init`.

    Raises:
        SmaError: it does not start.
    """
    for attempt in (1, 2):
        try:
            # Its own cluster, also where another one runs or RAY_ADDRESS names one: who wants that says so with
            # --address.
            # Ray prints the end of the log of a raylet that dies; one sentence says it.
            ray._private.worker.print_to_stdstream = lambda *given, **options: None
            with signals_kept():
                ray.init(
                    address="local",
                    **options,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            return
        # A machine with much else to do exceeds one of several time limits, each with an exception of its own.
        except Exception as error:
            ray.shutdown()
            if attempt == 2:
                raise SmaError(
                    f"Ray did not start on this machine: {reason(error)}; "
                    "is it busy with something else? Try again then"
                ) from error


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
