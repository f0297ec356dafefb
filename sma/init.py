"""Initial values of parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the random state that a seed gives, on the device on which torch makes tensors now; then put the old
    states back.
    """
    place = torch.get_default_device().type
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if place == "cuda" else []):
        if place in ("cpu", "meta"):
            torch.default_generator.manual_seed(seed)  # and not torch.manual_seed, which seeds every accelerator
        else:
            torch.manual_seed(seed)
        yield
