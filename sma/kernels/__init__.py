"""Operators with more than one implementation: plain PyTorch for every device, Triton for NVIDIA GPUs."""

from sma.kernels.operator import Implementation, implementation, operators, use

__all__ = ["Implementation", "implementation", "operators", "use"]
