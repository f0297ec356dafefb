"""Launches of every operator at the shapes of the presets, on tensors without values."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Case(NamedTuple):
    """One forward and backward pass of an operator.

    Attributes:
        preset: name of a preset with these sizes.
        dtype: `tf32`, `ieee`, `bf16` or `fp16`.
        run: launches every kernel on tensors of the device `meta`.
    """

    preset: str
    dtype: str
    run: Callable[[], object]


# By operator; the argument lists the dtypes.
CASES: dict[str, Callable[[Sequence[str]], Iterator[Case]]] = {}
