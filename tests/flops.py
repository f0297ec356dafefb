"""A counter of matrix products, including those inside the operators of this project."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sma.kernels.operator import RUNS


class _Inside(TorchDispatchMode):
    """Replaces operators of this project by the PyTorch operators that they consist of."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return RUNS.get(func.name(), func)(*args, **(kwargs or {}))


@contextmanager
def counted_products() -> Iterator[FlopCounterMode]:
    """Count the products in the block. Attention runs by the math backend, the only one that is counted on a CPU."""
    with FlopCounterMode(display=False) as counter, _Inside(), sdpa_kernel(SDPBackend.MATH):
        yield counter
