"""Static capacity: maximum number of tokens of a row per sub-module, so that no shape depends on the routing."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from jaxtyping import Bool
from torch import Tensor

from sma.checks import check_known, what_came
from sma.errors import InputError, StateError, quote

Capacity = int | float | Mapping[str, int | float]
"""An integer is a number of tokens per row, a float a share of its valid tokens; a mapping has one per sub-module."""


def check_capacity(capacity: Capacity | None, names: Sequence[str], state: object = None) -> None:
    """Check a capacity that `forward` was given.

    Args:
        capacity: the capacity; None for none.
        names: the sub-modules.
        state: state of the streams, if there is one.

    Raises:
        InputError: a value is out of range, a sub-module has no value, or a name is unknown.
        StateError: there is a state: a token beyond the capacity of one chunk would be missing in all later ones.
    """
    if capacity is None:
        return
    if state is not None:
        raise StateError(
            f"capacity={quote(capacity)} cannot be combined with a state, because a stream keeps every active token; "
            "leave capacity out"
        )
    if not isinstance(capacity, Mapping):
        return _check_value(capacity, f"capacity={quote(capacity)}")
    check_known(capacity, names, "capacity")
    for name, value in capacity.items():
        _check_value(value, f"capacity[{quote(name)}]={quote(value)}")
    missing = [name for name in names if name not in capacity]
    if missing:
        raise InputError(f"capacity has no value for {missing[0]!r}; give every sub-module one, or one number for all")


def _check_value(value: object, what: str) -> None:
    if type(value) is float:
        fits = 0 < value <= 1
    else:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not fits:
        plain = isinstance(value, int | float | str) and type(value).__module__ == "builtins"
        cure = "" if plain else f"; it is {what_came(value)}: write int(x) or float(x)"
        raise InputError(
            f"{what} must be an integer of at least 1, tokens per row, or a float in (0, 1], a share of the row{cure}"
        )


def slots_per_row(capacity: Capacity, names: Sequence[str], length: int) -> list[int]:
    """Number of slots per row of each sub-module, at most `length`, the positions of the batch; shares round up."""
    values = [_of(capacity, name) for name in names]
    tokens = [max(1, math.ceil(_share(value) * length)) if isinstance(value, float) else value for value in values]
    return [min(count, length) for count in tokens]


def earliest(
    active_BLM: Bool[Tensor, "B L M"], capacity: Capacity, names: Sequence[str], valid_BL: Bool[Tensor, "B L"] | None
) -> Bool[Tensor, "B L M"]:
    """The earliest active tokens of every row, up to the capacity; a share counts valid tokens, not padding."""
    whole = active_BLM.new_full(active_BLM.shape[:1], active_BLM.shape[1], dtype=torch.int64)
    lengths_B = whole if valid_BL is None else valid_BL.sum(1)
    kept = []
    for active_BL, name in zip(active_BLM.unbind(-1), names, strict=True):
        most: int | float | Tensor = _of(capacity, name)
        if isinstance(most, float):
            # In whole numbers: in floating point 0.1 * 30 is slightly above 3, and must not give 4.
            share = _share(most)
            most = ((lengths_B * share.numerator + share.denominator - 1) // share.denominator).clamp(min=1)[:, None]
        kept.append(active_BL & (active_BL.cumsum(1) <= most))
    return torch.stack(kept, -1)


def _share(value: float) -> Fraction:
    return Fraction(value).limit_denominator(10**6)


def _of(capacity: Capacity, name: str) -> int | float:
    return capacity[name] if isinstance(capacity, Mapping) else capacity
