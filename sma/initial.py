"""Initial values of parameters."""

import torch
from torch import Tensor, nn


def truncated_normal_(tensor: Tensor, std: float = 0.02) -> Tensor:
    """Fill a tensor from a normal distribution of mean 0, cut at two standard deviations."""
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def reset_linear_(linear: nn.Linear, std: float = 0.02) -> None:
    """Draw the weights of a linear map; its bias, if it has one, starts at 0."""
    truncated_normal_(linear.weight, std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
