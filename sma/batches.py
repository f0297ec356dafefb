"""Batches of a user: inputs, inputs with a mask, or objects with both."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sma.checks import check_tensor, check_valid, what_came
from sma.errors import InputError, quote


class Batch(NamedTuple):
    """Arguments of a model."""

    inputs: Tensor
    valid: Tensor | None = None


def batches_of(data: Any, user: str) -> Iterator[Any]:
    """Return an iterator over batches.

    Raises:
        InputError: the data is something else, such as a single batch.
    """
    if not isinstance(data, Tensor | np.ndarray | str | bytes | Mapping):
        with suppress(TypeError):
            return iter(data)
    raise InputError(
        f"the data of {user} is {what_came(data)}; expected batches, such as a list of them or a DataLoader: [x]"
    )


def batch_of(item: Any, user: str = "calibrate") -> Batch:
    """Read one batch: inputs, a pair of inputs and mask, or an object or a mapping that names them.

    Raises:
        InputError: it has another form, or the second of a pair is not a mask, as in (inputs, targets).
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
        given = f"a mapping of {quote(list(item))}" if isinstance(item, Mapping) else what_came(item)
        raise InputError(
            f"a batch of {user} is {given}; expected inputs, a pair (inputs, valid), or an object with "
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


def takes(model: nn.Module, *inputs: Tensor, **named: Any) -> bool:
    """Whether the forward of a module accepts these arguments; True where that is unknown."""
    try:
        inspect.signature(model.forward).bind(*inputs, **named)
    except TypeError:
        return False
    except ValueError:  # a scripted or builtin function
        return True
    return True


def check_takes(model: nn.Module, batch: Batch, cure: str) -> None:
    """Check that the forward of a module takes a batch.

    Raises:
        InputError: it takes no mask, or needs more than inputs; the message ends with the cure.
    """
    if not takes(model, *(tensor for tensor in batch if tensor is not None)):
        what = "more than inputs" if batch.valid is None else "no valid mask beside its inputs"
        raise InputError(f"the forward of {type(model).__name__} takes {what}; {cure}")
