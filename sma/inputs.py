"""What came instead of a tensor, a mask, a number or a sequence, and how to convert it."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from sma.errors import InputError, quote


def what_came(value: object) -> str:
    """Say in a few words what a value is: its class, and shape and dtype where it has them."""
    if value is None:
        return "None"
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    shape, dtype = (getattr(value, part, None) for part in ("shape", "dtype"))
    told = [f"shape {quote(tuple(shape))}"] if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    told += [] if dtype is None else [f"dtype {quote(str(dtype))[1:-1]}"]
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}{' of ' if told else ''}{' and '.join(told)}"


def check_tensor(value: object, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Check that a value is a dense tensor, and return it.

    Args:
        value: what was given.
        what: its name with its verb, such as `the tokens are`.
        dtype: to which the sentence says to convert.

    Raises:
        InputError: it is a NumPy array, a list or anything else; says how to convert it.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            cure = ".to_padded_tensor(0.0), with a mask of the real tokens" if value.is_nested else ".to_dense()"
            raise InputError(f"{what} a {kind} tensor; required is a dense one: convert it with {cure}")
        return value
    if isinstance(value, str | bytes):
        raise InputError(f"{what} {what_came(value)}; required is a torch.Tensor: encode the text to token ids first")
    target = f", dtype={dtype}" if dtype is not None else ""
    raise InputError(f"{what} {what_came(value)}; required is a torch.Tensor: write torch.as_tensor(x{target})")


def check_mask(
    valid: object, shape: Sequence[int], whose: str = "as the input has", device: torch.device | None = None
) -> None:
    """Check the mask of valid positions.

    Raises:
        InputError: it is no boolean tensor of this shape and device.
    """
    valid = check_tensor(valid, "valid is", torch.bool)
    if valid.dtype is not torch.bool:
        raise InputError(
            f"valid has dtype {valid.dtype}; required is torch.bool, True at real tokens: write valid.bool()"
        )
    if tuple(valid.shape) != tuple(shape):
        raise InputError(f"valid has shape {tuple(valid.shape)}; required is (B, L) = {tuple(shape)}, {whose}")
    if device is not None and valid.device != device:
        raise InputError(
            f"valid is on {valid.device} and the input on {device}; move it with valid.to({str(device)!r})"
        )


def check_positions(positions: object, shape: Sequence[int]) -> None:
    """Check positions, one per token.

    Raises:
        InputError: they are no integers of this shape.
    """
    positions = check_tensor(positions, "positions are", torch.int64)
    if tuple(positions.shape) != tuple(shape):
        raise InputError(
            f"positions have shape {tuple(positions.shape)}; required is (B, L) = {tuple(shape)}, as of the tokens"
        )
    if positions.is_floating_point() or positions.is_complex() or positions.dtype is torch.bool:
        raise InputError(f"positions have dtype {positions.dtype}; required are integers, such as torch.int64")


def check_count(value: Any, what: str, least: int = 0, unit: str = "") -> None:
    """Check a number of things.

    Raises:
        InputError: it is no integer, or too small.
    """
    # Plain integers first: a compiler knows these alone.
    if isinstance(value, bool) or not isinstance(value, int | Integral | torch.SymInt):
        raise InputError(
            f"{what}={quote(value)} is {what_came(value)}; required is an integer of at least {least}{unit}"
        )
    if value < least:
        raise InputError(f"{what}={quote(value)} must be at least {least}{unit}")


def check_number(value: Any, what: str) -> None:
    """Check that a value is a plain number.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{what} is {what_came(value)}, {quote(value)}; required is a plain number: write float(x)")
