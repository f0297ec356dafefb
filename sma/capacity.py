"""Static capacity: maximum number of tokens of a row, or of a batch, per sub-module, so that no shape depends on the
routing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sma.checks import check_known, what_came
from sma.errors import InputError, StateError, quote
from sma.ragged import Ragged, locate_packed, locate_static


@dataclass(frozen=True)
class PerBatch:
    """A capacity of all rows of a batch together, so that a row with many active tokens may use the slots of others.

    Which tokens fit then depends on the other rows of the batch, but on no later position.

    Attributes:
        tokens: an integer, or a float in (0, 1] as a share of the positions of the batch, padding included.
    """

    tokens: int | float


Number = TypeVar("Number", int, Tensor)

Capacity = int | float | PerBatch | Mapping[str, int | float | PerBatch]
"""An integer is a number of tokens per row, a float a share of its valid tokens; `PerBatch` is one of all rows
together; a mapping has one per sub-module.
"""


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
        # A compiler can trace this function, but not the `repr` of an object, so `quote` runs on errors only.
        return None if _fits(capacity) else _refuse(capacity, f"capacity={quote(capacity)}")
    check_known(capacity, names, "capacity")
    for name, value in capacity.items():
        if not _fits(value):
            _refuse(value, f"capacity[{quote(name)}]={quote(value)}")
    missing = [name for name in names if name not in capacity]
    if missing:
        raise InputError(f"capacity has no value for {missing[0]!r}; give every sub-module one, or one number for all")


def _fits(value: object) -> bool:
    number = value.tokens if isinstance(value, PerBatch) else value
    if type(number) is float:
        return 0 < number <= 1
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _refuse(value: object, what: str) -> None:
    number = value.tokens if isinstance(value, PerBatch) else value
    plain = isinstance(number, int | float | str) and type(number).__module__ == "builtins"
    cure = "" if plain else f"; it is {what_came(number)}: write int(x) or float(x)"
    raise InputError(
        f"{what} must be an integer of at least 1, tokens per row, or a float in (0, 1], a share of the row{cure}"
    )


class Placed(NamedTuple):
    """The tokens that sub-modules run on within a capacity.

    Attributes:
        kept: the active tokens that fit, `(B, L, M)`.
        frames: those of each sub-module, with holes and without values; no shape depends on the data.
    """

    kept: Bool[Tensor, "B L M"]
    frames: list[Ragged]


def place(
    active_BLM: Bool[Tensor, "B L M"],
    capacity: Capacity,
    names: Sequence[str],
    valid_BL: Bool[Tensor, "B L"] | None,
    positions_BL: Int[Tensor, "B L"] | None,
) -> Placed:
    """Keep the earliest active tokens up to the capacity, and locate them.

    A capacity per row keeps the earliest of every row. One of the whole batch keeps those at the earliest positions of
    all rows; at one position, those of the first rows.
    """
    rows, length, _ = active_BLM.shape
    kept, frames = [], []
    for active_BL, name in zip(active_BLM.unbind(-1), names, strict=True):
        most = capacity[name] if isinstance(capacity, Mapping) else capacity
        if isinstance(most, PerBatch):
            size = _slots(most.tokens, rows * length)
            rank_BL = active_BL.T.reshape(-1).cumsum(0).unflatten(0, (length, rows)).T
            kept.append(active_BL & (rank_BL <= size))
            frames.append(locate_packed(kept[-1], size, positions_BL))
        else:
            kept.append(active_BL & (active_BL.cumsum(1) <= _most_per_row(most, active_BL, valid_BL)))
            frames.append(locate_static(kept[-1], _slots(most, length), positions_BL))
    return Placed(torch.stack(kept, -1), frames)


def slots_per_row(capacity: int | float | Mapping[str, int | float], names: Sequence[str], length: int) -> list[int]:
    """Number of slots per row of each sub-module, at most `length`, the positions of the batch; shares round up."""
    values = [capacity[name] if isinstance(capacity, Mapping) else capacity for name in names]
    return [_slots(value, length) for value in values]


def _slots(value: int | float, tokens: int) -> int:
    return min(tokens, max(1, _part(tokens, value)) if isinstance(value, float) else value)


def _most_per_row(value: int | float, active_BL: Tensor, valid_BL: Tensor | None) -> int | Tensor:
    """Tokens of a row that fit; a share counts valid tokens, not padding."""
    if not isinstance(value, float):
        return min(value, active_BL.shape[1])
    if valid_BL is None:
        return _slots(value, active_BL.shape[1])
    return _part(valid_BL.sum(1, keepdim=True), value).clamp(min=1)


def _part(tokens: Number, share: float) -> Number:
    """A share of a number of tokens, rounded up.

    It is computed in whole billionths, because in floating point 0.1 * 30 is slightly above 3 and would give 4. The
    share is reduced by one billionth, so that a share that was rounded up does not give one token too many.
    """
    return (tokens * (int(share * 10**9 + 0.5) - 1) + 10**9 - 1) // 10**9
