"""The linear bypass of a layer."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sma.autograd import refuse_second_derivatives
from sma.devices import autocasts, without_autocast
from sma.fused import fuses
from sma.glue import add_at
from sma.init import truncated_normal_
from sma.ragged import Places


class LinearBypass(nn.Module):
    """W x + b of every token, and the gather of the routed tokens.

    Both are one function, so that backward can add the gradient of the routed tokens in place. A separate gather would
    need a tensor of zeros as large as the batch, and another pass.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.zeros(width))
        truncated_normal_(self.weight)

    def extra_repr(self) -> str:
        return f"width={self.bias.shape[0]}"

    def forward(
        self, x_TD: Float[Tensor, "T D"], places: Callable[[], Places]
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "R D"]]:
        """Return the mapped tokens, and the tokens at the indices that `places` returns, without duplicates.

        `places` is called after the product is queued, because the host may wait for it.
        """
        casts = autocasts(x_TD.device) and not (fuses(x_TD) and x_TD.dtype is torch.float32)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or casts:
            return nn.functional.linear(x_TD, self.weight, self.bias), x_TD.index_select(0, places().index)
        results: tuple[Tensor, Tensor] = _LinearAndGather.apply(x_TD, self.weight, self.bias, places)
        return results


class _LinearAndGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor, places: Callable[[], Places]
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = x_TD.dtype, weight.dtype, bias.dtype
        narrow = torch.get_autocast_dtype(x_TD.device.type) if autocasts(x_TD.device) else x_TD.dtype
        with without_autocast(x_TD.device):
            left, weight = x_TD.to(narrow), weight.to(narrow)
            mapped = torch.addmm(bias.to(narrow), left, weight.T)
        found = places()
        ctx.save_for_backward(left, weight, found.index, found.inverse)
        return mapped, x_TD.index_select(0, found.index)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor, grad_routed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        left, weight, index, inverse = ctx.saved_tensors
        wide, *kinds = ctx.dtypes
        if left.dtype is not wide or weight.dtype is not kinds[0]:  # autograd has no graph of the saved copies
            refuse_second_derivatives("the bypass under autocast")
        grad_x = grad_TD @ weight
        if inverse is None or torch.is_grad_enabled() or not (fuses(grad_x) and grad_routed.shape[0]):
            grad_x = grad_x.to(wide).index_add_(0, index, grad_routed)
        else:  # a gather, because atomic additions at the holes would collide, and their order would change the sums
            grad_x = add_at(grad_x, grad_routed, inverse)
        return grad_x, (grad_TD.T @ left).to(kinds[0]), grad_TD.sum(0, dtype=kinds[1]), None
