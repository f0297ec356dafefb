"""A whole update as one program, which runs eagerly or as a CUDA graph."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from sma.capacity import Capacity
from sma.devices import without_autocast
from sma.errors import SmaError, SpecError, reason
from sma.model import ModelSpec
from sma.recipes.experiment import TrainingSpec

WARM_UP = 3
"""Updates with batches of one shape that run eagerly before the next one is captured."""

MAX_GRAPHS = 16
"""Maximum number of graphs at a time; batches of further shapes run eagerly."""

ResultT = TypeVar("ResultT")
Loss = Callable[[Any, Capacity | None], tuple[Tensor, Any]]


class Update:
    """One update of a model: loss, backward, clipping, and a step of the optimiser.

    It reads no value from a device, and with a capacity no shape depends on one.

    Args:
        compute: function of a batch and a capacity that returns the loss and measures, a pytree of tensors.
        optimizer: the optimiser.
        clip_norm: maximum norm of the gradient; None does not clip.

    Example:
        ``step = Graphed(Update(compute, optimizer, 1.0))``, and for every batch
        ``loss, measures = step(batch, PerBatch(0.4))``.
    """

    def __init__(self, compute: Loss, optimizer: torch.optim.Optimizer, clip_norm: float | None = None) -> None:
        self.compute, self.optimizer, self.clip_norm = compute, optimizer, clip_norm

    def __call__(self, batch: Any, capacity: Capacity | None = None) -> tuple[Tensor, Any]:
        """Make the update; returns the loss and the measures without their gradients."""
        loss, measures = self.compute(batch, capacity)
        with without_autocast(loss.device):
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip_norm is not None:
                parameters = [part for group in self.optimizer.param_groups for part in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
            self.optimizer.step()
        return loss.detach(), tree_map_only(Tensor, Tensor.detach, measures)


class Recorder(Protocol):
    """Records the operations of a device, and repeats them on the same memory."""

    def run(self, program: Callable[[], ResultT]) -> ResultT:
        """Run a program that is recorded later."""

    def record(self, program: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        """Record a program.

        Returns:
            a function that runs it, and its result, which every run overwrites.
        """

    def forget(self) -> None:
        """Wait for the device, because all recordings are dropped."""


class CUDARecorder:
    """Records CUDA graphs. They share their memory, because they never run at the same time."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, program: Callable[[], ResultT]) -> ResultT:
        """Run on the stream of the recordings, on which libraries make their workspaces."""
        outer = torch.cuda.current_stream()
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            result = program()
        outer.wait_stream(self._stream)
        return result

    def record(self, program: Callable[[], ResultT]) -> tuple[Callable[[], None], ResultT]:
        """Capture a graph; the loader's threads may call CUDA meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = program()
        return graph.replay, result

    def forget(self) -> None:
        """Wait for the device; the next graphs use another memory pool, because gradients may be in the current one."""
        torch.cuda.synchronize()
        self._pool = torch.cuda.graph_pool_handle()


RECORDERS: dict[str, Callable[[], Recorder]] = {"cuda": CUDARecorder}
"""The recorders by type of device."""


class _Recorded(NamedTuple):
    inputs: list[Tensor]
    replay: Callable[[], None]
    result: tuple[Tensor, Any]


class Graphed:
    """Makes updates as graphs, one for every shape of a batch. Every call makes one update.

    The first updates with a shape run eagerly, and so do rare shapes. A new capacity discards the graphs.

    Args:
        update: the update. Its optimiser is changed: learning rates become tensors, which a graph reads and a schedule
            overwrites.
        warm_up: number of eager updates with a shape.

    Raises:
        SpecError: the parameters are not on a CUDA device.
    """

    def __init__(self, update: Update, *, warm_up: int = WARM_UP) -> None:
        self.update, self.warm_up = update, warm_up
        device = make_capturable(update.optimizer)
        if device.type not in RECORDERS:
            raise SpecError(
                f"the parameters of an update as a graph are on {device}; move the model to a CUDA device before its "
                "optimiser is made, or call the Update itself"
            )
        self._recorder = RECORDERS[device.type]()
        self._capacity: Capacity | None = None
        self._recorded: dict[Hashable, _Recorded] = {}
        self._seen: Counter[Hashable] = Counter()

    def __call__(self, batch: Any, capacity: Capacity | None = None) -> tuple[Tensor, Any]:
        """Make one update.

        Args:
            batch: a pytree of tensors on the device, and of constants.
            capacity: the capacity of the sub-modules.

        Returns:
            the loss and the measures. The next update may overwrite them.

        Raises:
            SpecError: the update cannot be captured.
        """
        if capacity != self._capacity:
            self._recorder.forget()
            self._recorded.clear()
            self._seen.clear()
            self._capacity = capacity
        leaves, structure = tree_flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in self._recorded:
            if self._seen[key] < self.warm_up or len(self._recorded) >= MAX_GRAPHS:
                self._seen[key] += 1
                return self._recorder.run(lambda: self.update(batch, capacity))
            buffers = [tensor.clone() for tensor in tensors]
            rest = iter(buffers)
            static = tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
            self._recorded[key] = _Recorded(buffers, *self._record(static, capacity))
        recorded = self._recorded[key]
        for buffer, tensor in zip(recorded.inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        recorded.replay()
        return recorded.result

    def _record(self, batch: Any, capacity: Capacity | None) -> tuple[Callable[[], None], tuple[Tensor, Any]]:
        self.update.optimizer.zero_grad()  # gradients belong to the memory of the graph
        try:
            return self._recorder.record(lambda: self.update(batch, capacity))
        except SmaError:
            raise
        except Exception as error:  # an error of CUDA or of a third-party module
            raise SpecError(
                f"the update cannot be captured in a CUDA graph: {reason(error)}; set training.graph=false"
            ) from error


def make_capturable(optimizer: torch.optim.Optimizer) -> torch.device:
    """Keep learning rates and step counts of an optimiser on the device of its parameters; returns the device."""
    device = next(part.device for group in optimizer.param_groups for part in group["params"])
    for group in optimizer.param_groups:
        # The dtype that fused kernels require.
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)
    optimizer._warned_capturable_if_run_uncaptured = True  # the first updates run uncaptured
    return device


def check_graph(training: TrainingSpec, device: str, processes: int = 1) -> None:
    """Check that updates can run as CUDA graphs, if the training requires it.

    Raises:
        SpecError: the device is not a CUDA device, or several processes share the updates.
    """
    if training.graph and device not in RECORDERS:
        raise SpecError(
            f"training.graph=true needs a CUDA device, and the training runs on {device}; set training.graph=false"
        )
    if training.graph and processes > 1:
        raise SpecError(
            f"training.graph=true runs in one process, and {processes} share the updates; set training.graph=false"
        )


def check_capturable(spec: ModelSpec, capacity: Capacity | None) -> None:
    """Check, on a batch without values, that no part of a model reads a value or a size from its device.

    Raises:
        SpecError: a router or a sub-module does.
    """
    if spec.encoder.reads not in ("tokens", "numbers"):  # the shape of other inputs is not known here
        return
    with torch.device("meta"):
        model = spec.build().train()
        inputs = torch.zeros(2, 16, dtype=model.encoder.input_dtype)
        valid = torch.ones(2, 16, dtype=torch.bool)
    try:
        model(inputs, valid, capacity=capacity)
    except RuntimeError as error:  # NotImplementedError is one
        raise SpecError(
            "training.graph=true cannot capture this model, because a router or a sub-module reads a value or a size "
            f"from its device: {reason(error)}; set training.graph=false"
        ) from error
