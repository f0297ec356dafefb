"""The linear bypass of a layer."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sma.devices import autocasts
from sma.init import truncated_normal_


class LinearBypass(nn.Module):
    """W x + b of every token, and the gather of the routed tokens.

    In one function, so that backward can add the gradient of the routed tokens in place. Separately it would need a
    tensor of zeros as large as the batch, and another pass.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.zeros(width))
        truncated_normal_(self.weight)

    def extra_repr(self) -> str:
        return f"width={self.bias.shape[0]}"

    def forward(
        self, x_TD: Float[Tensor, "T D"], index: Callable[[], Int[Tensor, "R"]]
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "R D"]]:
        """Return the mapped tokens, and the tokens at the indices that `index` returns, which has no duplicates.

        It is called after the product is queued, because the host may wait in it.
        """
        if not torch.is_grad_enabled() or autocasts(x_TD.device) or torch.compiler.is_compiling():
            return nn.functional.linear(x_TD, self.weight, self.bias), x_TD.index_select(0, index())
        results: tuple[Tensor, Tensor] = _LinearAndGather.apply(x_TD, self.weight, self.bias, index)
        return results


class _LinearAndGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor, index: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        mapped, places = torch.addmm(bias, x_TD, weight.T), index()
        ctx.save_for_backward(x_TD, weight, places)
        return mapped, x_TD.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor, grad_routed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_TD, weight, index = ctx.saved_tensors
        grad_x = (grad_TD @ weight).index_add_(0, index, grad_routed)
        return grad_x, grad_TD.T @ x_TD, grad_TD.sum(0), None
