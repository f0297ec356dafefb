"""Launches of kernels: on a device, in the interpreter, or recorded so that they can be compiled without a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes of shared memory per block in the interpreter, which has no limit, but tests small tiles faster. It is also the
# minimum of all supported GPUs.
_LEAST = 101_376


class Launch(NamedTuple):
    """A recorded launch.

    Attributes:
        kernel: the function under `triton.jit`.
        grid: programs along each axis.
        arguments: tensors and numbers, in order.
        constants: compile-time constants by name.
        num_warps, num_stages: options of the compiler.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


class _Recorder(NamedTuple):
    launches: list[Launch]
    shared_memory: int
    capability: int


_recorders: list[_Recorder] = []


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run a kernel on the device of its first tensor; an empty grid runs nothing.

    Args:
        kernel: function under `triton.jit`.
        grid: programs along each axis.
        arguments: tensors and numbers, in the order of its parameters.
        num_warps, num_stages: options of the compiler.
        constants: its parameters of type `tl.constexpr`.
    """
    if _recorders:
        recorded = Launch(kernel, grid, arguments, constants, num_warps, num_stages)
        _recorders[-1].launches.append(recorded)
        return
    if 0 in grid:
        return
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


@contextmanager
def recording(shared_memory: int, capability: int = 9) -> Iterator[list[Launch]]:
    """Record launches instead of running them, so that tensors may be on the device `meta`.

    Args:
        shared_memory: bytes of shared memory per block of the assumed GPU.
        capability: the first number of its compute capability.
    """
    recorder = _Recorder([], shared_memory, capability)
    _recorders.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.pop()


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have on a device."""
    if _recorders:
        return _recorders[-1].shared_memory
    if device.type != "cuda":
        return _LEAST
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _LEAST))


def capability(device: torch.device) -> int:
    """The first number of the compute capability of a device; 0 in the interpreter."""
    if _recorders:
        return _recorders[-1].capability
    return int(torch.cuda.get_device_properties(device).major) if device.type == "cuda" else 0


def input_precision(dtype: torch.dtype) -> str:
    """Precision of products of float32 numbers: `tf32` if PyTorch's own products on CUDA use TF32, else `ieee`."""
    if dtype is not torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Setting of torch 2.9 and newer; if both settings were written, reading the older one raises an error.
    setting = getattr(matmul, "fp32_precision", None)
    return "tf32" if (matmul.allow_tf32 if setting is None else setting == "tf32") else "ieee"
