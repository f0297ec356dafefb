"""The Ray cluster, started on this machine or joined at an address, and the number of trials that fit on it."""

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
from sma.tune.scratch import remove_abandoned_folders

MIN_STORE = 200 * 2**20
"""Minimum size of the object store, in bytes."""

_DEVICES = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Variable by which Ray hides all GPUs from a process without a share of one."""


class ResourceSpec(Spec):
    """Resources of a trial, and the number of concurrent trials."""

    cpus: int = Field(
        default=1, ge=1, description="cores of a trial, and threads of its training unless the experiment sets them"
    )
    gpus: float | None = Field(
        default=None,
        ge=0.0,
        description="GPUs of a trial, such as 0.25 for four trials on one; null: one if the machines have any",
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="the device: cpu uses no GPU, cuda one unless `gpus` is set, auto one if the machines have any",
    )
    concurrent: int | None = Field(
        default=None, ge=1, description="number of concurrent trials; null: as many as fit on the machines"
    )
    address: str | None = Field(
        default=None, description="a running Ray cluster: auto or HOST:PORT; null starts one on this machine"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.accelerator == "cpu" and self.gpus:
            raise ValueError(f"accelerator=cpu uses no GPU, and gpus={self.gpus:g}; leave one of them out")
        if self.accelerator == "cuda" and self.gpus == 0:
            raise ValueError(
                "accelerator=cuda needs a GPU, and gpus=0; leave one of them out, or give a share such as gpus=0.25"
            )
        return self

    def gpus_of(self, nodes: Iterable[Mapping[str, float]]) -> float:
        """Number of GPUs of a trial on these machines."""
        default = {"cpu": 0.0, "cuda": 1.0}.get(self.accelerator, float(any(node.get("GPU", 0) > 0 for node in nodes)))
        return default if self.gpus is None else self.gpus


class Slots(NamedTuple):
    """The slots of the machines for trials.

    Attributes:
        concurrent: number of concurrent trials.
        cpus: cores of a trial.
        gpus: GPUs of a trial.
    """

    concurrent: int
    cpus: int
    gpus: float

    @property
    def accelerator(self) -> str:
        """Lightning's name for the device; `cpu` for a trial without a share of a GPU."""
        return "cuda" if self.gpus else "cpu"


def local_node() -> dict[str, float]:
    """The numbers of cores that this process may use and of GPUs that torch finds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"CPU": float(cores), "GPU": float(torch.cuda.device_count() if torch.cuda.is_available() else 0)}


def plan_slots(resources: ResourceSpec, nodes: list[Mapping[str, float]], samples: int, what: str = "trial") -> Slots:
    """The slots for trials on some machines.

    Args:
        resources: the requested resources.
        nodes: cores (`CPU`) and GPUs (`GPU`) of every machine.
        samples: total number of trials, the maximum number of slots.
        what: the noun for a trial in error messages.

    Raises:
        SpecError: no trial fits on a machine, or fewer fit than requested. Ray would wait forever without a message.
    """
    gpus = resources.gpus_of(nodes)
    if gpus > 1 and gpus != int(gpus):
        raise SpecError(f"--gpus {gpus:g} must be at most 1, a share of one GPU, or an integer")
    room = 0
    for node in nodes:
        fits = int(node.get("CPU", 0) // resources.cpus)
        if gpus:
            # Trials are counted per device, because the share of a trial cannot span two GPUs.
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
    """Check that the trials fit before anything is written; joins the cluster at the address, if one is given.

    Raises:
        SpecError: the trials do not fit, or there is no cluster at the address.
    """
    if resources.address is not None and not ray.is_initialized():
        _join(resources.address)
    return plan_slots(resources, _nodes() if ray.is_initialized() else [local_node()], samples, what)


@contextmanager
def cluster(resources: ResourceSpec, samples: int, data_bytes: int) -> Iterator[Slots]:
    """Start Ray on this machine and shut it down at the end. An existing connection to a cluster is kept.

    Args:
        resources: the resources of a trial.
        samples: total number of trials.
        data_bytes: size of the data in the object store, in bytes.

    Raises:
        SpecError: the trials do not fit, or there is no cluster at the address.
    """
    check_resources(resources, samples)
    logging.getLogger("ray").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started:
        node = local_node()
        # The processes of the trials inherit the variables. More threads than cores would slow down all of them.
        inherited = {"OMP_NUM_THREADS": str(resources.cpus), _DEVICES: os.environ.get(_DEVICES, "0")}
        with changed_environment(lambda name: False, inherited):
            start_ray(
                num_cpus=int(node["CPU"]),
                num_gpus=int(node["GPU"]),
                object_store_memory=max(MIN_STORE, int(1.25 * data_bytes) + MIN_STORE // 2),
            )
    lost = False
    try:
        yield plan_slots(resources, _nodes(), samples)
    except ClusterLost:
        lost = True
        raise
    finally:
        if started or lost:
            leave_cluster(lost)
        if started:
            remove_abandoned_folders()


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
            # Ray itself retries for many minutes.
            socket.create_connection((host, int(port)), timeout=10).close()
        with signals_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises many kinds of exceptions for an unreachable cluster
        raise SpecError(
            f"there is no Ray cluster at {quote(address)}: {reason(error)}; start one with: "
            "ray start --head --port 6379"
        ) from error


def start_ray(**options: Any) -> None:
    """Start Ray on this machine, with a second attempt if the first fails.

    Args:
        options: options of `ray.init`.

    Raises:
        SmaError: Ray does not start.
    """
    for attempt in (1, 2):
        try:
            # A new cluster even if another one runs or RAY_ADDRESS names one; --address joins those.
            # Ray prints the end of the log of a raylet that dies; the error message below replaces it.
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
        # A busy machine exceeds one of several time limits, each with its own exception.
        except Exception as error:
            ray.shutdown()
            if attempt == 2:
                raise SmaError(
                    f"Ray did not start on this machine: {reason(error)}; try again when the machine is less busy"
                ) from error


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
