"""A mode that raises where a program synchronises the host with a device; it needs no device.

Tensors are on the `meta` device, which has no values, and on which code follows the path of an accelerator.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
"""Operators whose result or result size must be copied to the host."""

RANDOM_ORDER = ("bincount", "histc", "kthvalue", "median", "nanmedian", "put", "put_", "scatter_reduce", "cumsum")
"""Operators that `torch.use_deterministic_algorithms` refuses on CUDA for floating-point inputs."""


class HostAskedError(Exception):
    """An operator would synchronise the host with the device, or a CUDA graph could not capture it."""


class _NoNumbers(TorchFunctionMode):
    """Raises where a tensor is made from Python numbers, which no dispatch mode detects."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and not isinstance(args[-1], Tensor):
            raise HostAskedError(f"{function.__name__} copies numbers of the host to the device")
        return function(*args, **(kwargs or {}))


class NoHost(TorchDispatchMode):
    """Raises at operators that a CUDA graph cannot capture, or that are not deterministic.

    Args:
        wide: number of elements from which a float64 tensor is an error, because float64 is slow on many accelerators.
        ordered: whether to raise at operators that are not deterministic.
    """

    def __init__(self, wide: float = math.inf, ordered: bool = True) -> None:
        super().__init__()
        self.wide, self.ordered = wide, ordered
        self.calls = 0
        self._numbers = _NoNumbers()

    def __enter__(self) -> "NoHost":
        self._numbers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in given}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        self._require(name not in ASKS, name, "asks the host")
        self._require(len(devices) <= 1, name, f"moves between {sorted(devices)}")
        ordered = not (self.ordered and name in RANDOM_ORDER and any(map(torch.is_floating_point, given)))
        self._require(ordered, name, "is not deterministic on CUDA")
        made = function(*args, **kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._require(tensor.device.type != "cpu", name, "makes a tensor of the host")
                narrow = tensor.dtype is not torch.float64 or tensor.numel() < self.wide
                self._require(narrow, name, f"computes {tuple(tensor.shape)} in float64")
        self.calls += 1
        return made

    @staticmethod
    def _require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise HostAskedError(f"{name} {what}")
