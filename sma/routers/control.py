"""A short causal convolution over control states, before a router scores them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sma.memory import zeros
from sma.padding import inverse_order, move, right_padding
from sma.pytree import register_output
from sma.submodule import State


@register_output
@dataclass(frozen=True)
class ControlState(State):
    """State of a router with a convolution over its control states.

    Attributes:
        newest: the last K - 1 control states of each row, the newest last; zeros before the beginning of a stream.
    """

    newest: Float[Tensor, "B K D"]


class ControlConv(nn.Module):
    r"""$\mathrm{silu}(\sum_{j < K} w_j \odot h_{t-j} + b)$: each channel independently, over the valid tokens of a row.

    Args:
        width: channels of the control state, D.
        kernel_size: tokens that one result depends on, K, including its own.

    Attributes:
        weight: `(D, K)`, the last tap on the newest token; initialised uniformly within 1 / sqrt(K).
        bias: `(D,)`, initialised to 0.

    Reference:
        github.com/microsoft/ArchScale, which puts a convolution of 4 tokens before its router.
    """

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, kernel_size))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.uniform_(self.weight, -(kernel_size**-0.5), kernel_size**-0.5)

    @property
    def sizes(self) -> tuple[int, int]:
        """Control states that a stream keeps, and their channels."""
        width, kernel_size = self.weight.shape
        return kernel_size - 1, width

    def init_state(self, batch_size: int, device: torch.device | None, dtype: torch.dtype | None) -> ControlState:
        """Make the state of streams that have seen no token, in float32 or wider."""
        wide = torch.promote_types(dtype or torch.float32, torch.float32)
        return ControlState(zeros((batch_size, *self.sizes), "the state of a router", device=device, dtype=wide))

    def forward(
        self, control_BLD: Float[Tensor, "B L D"], valid: Bool[Tensor, "B L"] | None, state: ControlState | None
    ) -> tuple[Float[Tensor, "B L D"], ControlState | None]:
        """Convolve along every row; padding takes no part, and its results have no meaning.

        Args:
            control_BLD: control states, in float32 or wider.
            valid: False at padding, on whichever side; None where there is none.
            state: the control states before these; None at the beginning of a row.

        Returns:
            the results, and a new state if and only if one was given.
        """
        order = None
        if valid is not None:
            # The gradient of a tap multiplies padding by 0, and 0 x NaN is NaN.
            control_BLD = control_BLD.where(valid[..., None], 0)
            # On an accelerator a check for padding would wait for the device.
            lengths, order = right_padding(valid, static=valid.device.type != "cpu")
            control_BLD = control_BLD if order is None else move(control_BLD, order)
        length, before = control_BLD.shape[1], self.weight.shape[1] - 1
        if state is None:
            along = nn.functional.pad(control_BLD, (0, 0, before, 0))
        else:
            along = torch.cat([state.newest.to(control_BLD.dtype), control_BLD], 1)
        # Taps one by one, so that a later value that is not finite reaches no earlier result.
        out = self.bias.to(along.dtype).expand_as(control_BLD)
        for tap, weight in enumerate(self.weight.to(along.dtype).unbind(1)):
            out = out + weight * along[:, tap : tap + length]
        out = nn.functional.silu(out)
        out = out if order is None else move(out, inverse_order(order))
        if state is None:
            return out, None
        if valid is None:
            return out, ControlState(along[:, length:])
        newest = lengths[:, None] + torch.arange(before, device=along.device)
        return out, ControlState(move(along, newest))
