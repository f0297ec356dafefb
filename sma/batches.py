"""Batches that a user gives: inputs alone, with a mask, or objects that have both."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sma.checks import check_tensor, check_valid, what_came
from sma.errors import InputError, quote


class Batch(NamedTuple):
    """What a model takes."""

    inputs: Tensor
    valid: Tensor | None = None


def batches_of(data: Any, user: str) -> Iterator[Any]:
    """Begin to go through batches.

    Raises:
        InputError: these are none, such as a single batch.
    """
    if isinstance(data, Tensor | np.ndarray | str | bytes | Mapping):
        raise InputError(
            f"the data of {user} is {what_came(data)}; required are batches, "
            "such as a list of them or a DataLoader: [x]"
        )
    try:
        return iter(data)
    except TypeError:
        raise InputError(
            f"the data of {user} is {what_came(data)}; required are batches, such as a list or a DataLoader"
        ) from None


def batch_of(item: Any, user: str = "calibrate") -> Batch:
    """Read one batch: inputs, a pair of inputs and mask, or an object or a mapping that names them.

    Raises:
        InputError: it is of another form; also where the second of a pair is no mask, such as the targets of a training
            set.
    """
    if isinstance(item, tuple | list) and item:
        inputs, valid = item[0], item[1] if len(item) > 1 else None
    elif isinstance(item, Mapping) and "inputs" in item:
        inputs, valid = item["inputs"], item.get("valid")
    elif hasattr(item, "inputs"):
        inputs, valid = item.inputs, getattr(item, "valid", None)
    elif isinstance(item, Tensor) or hasattr(item, "__array__"):
        inputs, valid = item, None
    else:
        raise InputError(
            f"a batch of {user} is {_form(item)}; required are inputs, a pair (inputs, valid), or an object with "
            "the attributes, or a mapping with the keys, inputs and valid"
        )
    inputs = check_tensor(inputs, f"the inputs of a batch of {user} are")
    if valid is not None:
        check_tensor(valid, "valid is", torch.bool)
    try:
        check_valid(inputs, valid)
    except InputError as error:
        raise InputError(
            f"{error}. The second of a pair is the mask of the valid tokens; targets are not needed: "
            "give [inputs for inputs, targets in data]"
        ) from None
    return Batch(inputs, valid)


def _form(item: Any) -> str:
    return f"a mapping of {quote(list(item))}" if isinstance(item, Mapping) else what_came(item)


def takes(model: nn.Module, *inputs: Tensor, **named: Any) -> bool:
    """Whether the forward of a module can be called so; also where that is not known."""
    try:
        inspect.signature(model.forward).bind(*inputs, **named)
    except TypeError:
        return False
    except ValueError:  # of a scripted or builtin one
        return True
    return True


def check_takes(model: nn.Module, batch: Batch, cure: str) -> None:
    """Check that the forward of a module takes a batch.

    Raises:
        InputError: it takes no mask, or needs more than inputs; says the cure.
    """
    if not takes(model, *(tensor for tensor in batch if tensor is not None)):
        what = "more than inputs" if batch.valid is None else "no valid mask beside its inputs"
        raise InputError(f"the forward of {type(model).__name__} takes {what}; {cure}")
