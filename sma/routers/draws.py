"""Random draws that depend only on their keys, so that chunks of a stream get the same draws as the whole."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.checks import check_count
from sma.memory import zeros
from sma.pytree import register_output
from sma.routers.contract import Router
from sma.submodule import State, device_and_dtype


@register_output
@dataclass(frozen=True)
class RandomState(State):
    """State of a router that draws.

    Attributes:
        rows: row index of each stream, a key of its draws.
    """

    rows: Int[Tensor, "B"]

    def reset(self, rows: Bool[Tensor, "B"] | Int[Tensor, "R"]) -> Self:
        """Return the same state: a stream that restarts repeats its draws."""
        return self


class DrawingRouter(Router):
    """A router that draws; each stream keeps its row index when the batch is reordered."""

    state_kind = RandomState

    @property
    def draws(self) -> int:
        """The seed of this router's draws: that of its spec, shifted by its layer index, so that layers draw
        differently.
        """
        spec: Any = self.spec
        return int(spec.seed) + 2**31 * self.layer_index

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RandomState:
        """Make the state of `batch_size` streams; see `Router.init_state`."""
        check_count(batch_size, "batch_size")
        device, _ = device_and_dtype(self, device, dtype)
        rows = zeros((batch_size,), "the state of a router", device=device, dtype=torch.int64)  # checks the memory
        return RandomState(torch.arange(batch_size, out=rows))


def draw_for_tokens(
    like_BLM: Tensor, positions: Int[Tensor, "B L"] | None, streams: State | None, seed: int, *keys: Tensor
) -> Float[Tensor, "B L M"]:
    """Draw a number in [0, 1) for every row, position and index of a tensor's last axis, keyed by these, the seed and
    other keys.
    """
    rows, length, columns = like_BLM.shape
    device = like_BLM.device
    if positions is None:
        positions = torch.arange(length, device=device).expand(rows, length)
    row = (streams.rows if isinstance(streams, RandomState) else torch.arange(rows, device=device))[:, None, None]
    return keyed_uniform(seed, *keys, row, positions[..., None], torch.arange(columns, device=device))


def keyed_uniform(seed: int, *keys: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Draw numbers in [0, 1) that depend only on the seed and the integer keys, not on the order or number of draws."""
    mixed = torch.full((), (seed + 1) * _ODD % 2**62, device=keys[0].device)
    for key in keys:
        mixed = _scramble(mixed ^ (key.long() + 1) * _ODD)
    return (mixed >> 8 & (2**53 - 1)).double() * 2.0**-53


# 2**64 / golden ratio as a signed odd number: multiplying by it spreads adjacent keys over all bits.
_ODD = -7046029254386353131


def _scramble(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64, on signed 64-bit integers with wrap-around multiplication."""
    bits = (bits ^ (bits >> 30 & (2**34 - 1))) * -4658895280553007687
    bits = (bits ^ (bits >> 27 & (2**37 - 1))) * -7723592293110705685
    return bits ^ (bits >> 31 & (2**33 - 1))
