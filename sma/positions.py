"""Position encodings: relative bias tables, rotary angles, and the additive sinusoid."""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from sma.spec import Spec, register


class PositionSpec(Spec):
    """Root of the position kinds of an attention.

    A kind can add biases from a table to the scores, rotate queries and keys, or do neither.

    Attributes:
        has_table: whether a learned number per distance is added to the scores.
        turns: whether queries and keys are rotated by their positions.
    """

    family: ClassVar[str] = "position"
    kind: str
    has_table: ClassVar[bool] = False
    turns: ClassVar[bool] = False

    @property
    def over_slots(self) -> bool:
        """Whether the table counts distances in active tokens, not in original positions."""
        return False

    def check_attention(self, window: int | None, channels: int, what: str) -> None:
        """Check that an attention can have these positions.

        Args:
            window: window of the attention; None for all tokens.
            channels: number of channels of a query.
            what: setting that determines the channels, for the message: `query_size=3`.

        Raises:
            ValueError: it cannot; the message has the requirement.
        """

    def table_size(self, window: int | None) -> int:
        """Number of entries of the bias table, for an attention with this window; 0 without a table."""
        return 0

    def table_center(self, window: int | None) -> int:
        """Index of distance 0 in the bias table."""
        return 0

    def without_window(self) -> "PositionSpec":
        """The same positions for an attention to all tokens."""
        return self

    def turn(self, x: Float[Tensor, "T *H Z"], positions: Int[Tensor, "T"]) -> Float[Tensor, "T *H Z"]:
        """Rotate queries or keys by their positions."""
        return x


@register
class RelativeBiasSpec(PositionSpec):
    """A learned number per distance, added to the attention scores.

    Over true distance the table holds 2 P - 1 entries, index clamp(key - query, ±(P - 1)) + P - 1. Over slot distance
    it holds 6 W - 1 entries, index (key slot - query slot) + 4 W - 1: the authors' layout, kept so that their weights
    load.
    """

    kind: Literal["relative_bias"] = "relative_bias"
    has_table: ClassVar[bool] = True
    distance: Literal["true_distance", "slot_distance"] = Field(
        default="true_distance", description="count original positions, or active tokens only"
    )
    max_positions: int = Field(
        default=1024, ge=1, le=2**24, description="P: true distances from here on share one entry"
    )

    @property
    def over_slots(self) -> bool:
        return self.distance == "slot_distance"

    def check_attention(self, window: int | None, channels: int, what: str) -> None:
        if self.over_slots and window is None:
            raise ValueError(
                "distance='slot_distance' needs a window, which sizes its table; "
                "set window, or use distance='true_distance'"
            )

    def table_size(self, window: int | None) -> int:
        if not self.over_slots:
            return 2 * self.max_positions - 1
        return 6 * window - 1 if window is not None else 0

    def table_center(self, window: int | None) -> int:
        if not self.over_slots:
            return self.max_positions - 1
        return 4 * window - 1 if window is not None else 0

    def without_window(self) -> "RelativeBiasSpec":
        return self.replace(distance="true_distance")


@register
class RotarySpec(PositionSpec):
    """Rotates interleaved channel pairs of queries and keys by an angle proportional to their original position."""

    kind: Literal["rotary"] = "rotary"
    turns: ClassVar[bool] = True
    base: float = Field(default=10000.0, gt=1.0, description="ratio of the slowest to the fastest wave length")

    def check_attention(self, window: int | None, channels: int, what: str) -> None:
        if channels % 2:
            raise ValueError(f"{what}: rotary positions turn pairs of channels, so their number must be even")

    def turn(self, x: Float[Tensor, "T *H Z"], positions: Int[Tensor, "T"]) -> Float[Tensor, "T *H Z"]:
        return rotate(x, positions, self.base)


@register
class NoPositionSpec(PositionSpec):
    """Attention without positions."""

    kind: Literal["none"] = "none"


def angles(positions: Int[Tensor, "*P"], speed: Float[Tensor, "F"], dtype: torch.dtype) -> Float[Tensor, "*P F"]:
    """Position times speed in radians, less whole turns: between -pi and pi.

    A turn is 2^64 units of a 64-bit integer, so that a product which wraps around loses whole turns and nothing else.
    In float32 the error near position 10^6 would be 0.03 rad, and many accelerators are slow in float64.

    Args:
        positions: any integers.
        speed: radians per position in float64, in [0, 1].
        dtype: dtype of the result.
    """
    units = (speed * (2.0**64 / (2 * math.pi))).long()
    return (positions.long()[..., None] * units).to(dtype) * (2 * math.pi / 2.0**64)


def rotate(x: Float[Tensor, "T *H Z"], positions: Int[Tensor, "T"], base: float) -> Float[Tensor, "T *H Z"]:
    """Rotate the channel pairs (2i, 2i + 1) of every token by position * base^(-2i/Z).

    Reference:
        Su et al., "RoFormer", arXiv 2104.09864.
    """
    size = x.shape[-1]
    speed = base ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float64) / size)
    angle = angles(positions, speed, torch.promote_types(x.dtype, torch.float32))
    shape = (x.shape[0], *([1] * (x.ndim - 2)), size // 2)
    cos, sin = angle.cos().to(x.dtype).reshape(shape), angle.sin().to(x.dtype).reshape(shape)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class Sinusoid(nn.Module):
    r"""Additive position: $[\sin | \cos]$ of position times $10000^{-2i/D}$, times one learned number that starts at
    $D^{-1/2}$.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.tensor([width**-0.5]))

    def extra_repr(self) -> str:
        return f"width={self.width}"

    def forward(self, positions: Int[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """Return the vectors to add to tokens at these positions."""
        half = self.width // 2
        speed = 10000.0 ** (-2 * torch.arange(half, device=positions.device, dtype=torch.float64) / self.width)
        angle = angles(positions, speed, torch.promote_types(self.scale.dtype, torch.float32))
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.scale.dtype) * self.scale
