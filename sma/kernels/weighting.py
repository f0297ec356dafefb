"""From scores to weights of an attention."""

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["softmax", "relu2", "laplace"]

# Mean and standard deviation of Mega's laplace function, which approximates relu^2.
LAPLACE_MEAN, LAPLACE_STD = 0.707107, 0.282095


def weigh(scores: Tensor, weighting: Weighting) -> Tensor:
    """Weights of scores; a score of -inf, that of a pair out of reach, gives exactly 0."""
    if weighting == "softmax":
        return torch.softmax(scores, dim=-1)
    if weighting == "relu2":
        positive = scores.relu()
        return positive * positive if torch.is_grad_enabled() else positive.square_()
    return torch.special.erf((scores - LAPLACE_MEAN) / (LAPLACE_STD * 2**0.5)).add_(1).mul_(0.5)


def slope(scores: Tensor, weighting: Weighting) -> Tensor:
    """Derivative of a weight by its score."""
    if weighting == "relu2":
        return scores.relu().mul_(2)
    return torch.exp(-0.5 * ((scores - LAPLACE_MEAN) / LAPLACE_STD).square()).div_(LAPLACE_STD * (2 * torch.pi) ** 0.5)
