"""Initial values of parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def truncated_normal_(tensor: Tensor, std: float = 0.02) -> Tensor:
    """Fill a tensor from a normal distribution of mean 0, truncated at two standard deviations."""
    return nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def reset_linear_(linear: nn.Linear, std: float = 0.02) -> None:
    """Draw the weights of a linear map from a truncated normal distribution, and set its bias to 0."""
    truncated_normal_(linear.weight, std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default device temporarily, and restore its random state afterwards."""
    device = torch.get_default_device().type
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device == "cuda" else []):
        if device in ("cpu", "meta"):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds all accelerators
        else:
            torch.manual_seed(seed)
        yield
