"""Time of the matrix products and Fourier transforms in a computation: a lower bound of its time."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

COUNTED = ("mm", "addmm", "bmm", "baddbmm", "_fft_r2c", "_fft_c2r", "_fft_c2c", "convolution")


class Layout:
    """The memory layout of a tensor, without its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride, self.dtype, self.device = tensor.size(), tensor.stride(), tensor.dtype, tensor.device

    def fill(self) -> Tensor:
        """A tensor of this layout with random numbers; overlapping views stay overlapping."""
        extent = (
            1 + sum((size - 1) * step for size, step in zip(self.size, self.stride, strict=True))
            if 0 not in self.size
            else 0
        )
        real = torch.randn if self.dtype.is_floating_point or self.dtype.is_complex else torch.ones
        return real(extent, dtype=self.dtype, device=self.device).as_strided(self.size, self.stride)


class Recorder(TorchDispatchMode):
    """Records every matrix product and Fourier transform that runs inside it, in backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the call and run it."""
        if function.overloadpacket.__name__ in COUNTED:
            self.calls.append(
                (function, tree_map_only(Tensor, Layout, args), tree_map_only(Tensor, Layout, kwargs or {}))
            )
        return function(*args, **(kwargs or {}))


def median_milliseconds(
    step: Callable[[], object], device: str, seconds: float = 3.0, least: int = 7, most: int = 200
) -> float:
    """Median time of a step, after three warm-up steps."""
    times = list(_timed(step, device, 3))[3:]
    until = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < until):
        times.extend(_timed(step, device, 1))
    return 1e3 * statistics.median(times)


def _timed(step: Callable[[], object], device: str, count: int) -> Iterator[float]:
    for _ in range(count):
        with stopwatch(device) as elapsed:
            step()
        yield elapsed[0]


@contextmanager
def stopwatch(device: str) -> Iterator[list[float]]:
    """Time a block in seconds; on a GPU, until it has finished."""
    elapsed = [0.0]
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield elapsed
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed[0] = time.perf_counter() - start


def products_milliseconds(step: Callable[[], object], device: str) -> float:
    """Median time of the matrix products and Fourier transforms that a step does, on operands of the same shapes and
    layouts.
    """
    with Recorder() as recorder:
        step()
    calls = [
        (function, tree_map_only(Layout, Layout.fill, args), tree_map_only(Layout, Layout.fill, kwargs))
        for function, args, kwargs in recorder.calls
    ]

    def replay() -> None:
        with torch.no_grad():
            for function, args, kwargs in calls:
                function(*args, **kwargs)

    return median_milliseconds(replay, device)
