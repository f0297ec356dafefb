"""The newest token of every row, the state of both parts."""

from dataclasses import dataclass

import torch
from sma import State
from sma.pytree import register_output
from torch import Tensor


@register_output
@dataclass(frozen=True)
class LastToken(State):
    """The newest token of every row, `(B, D)`; zeros before the first token."""

    values: Tensor


def line_up(tokens_BLD: Tensor, before: LastToken | None) -> Tensor:
    """`(B, L + 1, D)`: the newest earlier token, then the tokens, so index t is the token before token t."""
    rows, _, width = tokens_BLD.shape
    first = tokens_BLD.new_zeros(rows, 1, width) if before is None else before.values[:, None].to(tokens_BLD.dtype)
    return torch.cat([first, tokens_BLD], dim=1)


def newest(line: Tensor, places: Tensor, before: LastToken) -> LastToken:
    """The tokens at one index `(B,)` of every line, as the state after `before`."""
    rows = torch.arange(line.shape[0], device=line.device)
    return LastToken(line[rows, places].to(before.values.dtype))
