"""Settings of the device of a training: precision of matrix products, transfer of batches. They change no batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from sma.recipes.experiment import TrainingSpec

WORKERS = 2
"""Processes that prepare batches for an accelerator unless the experiment gives another number."""


def for_device(batches: DataLoader[Any], training: TrainingSpec, device: str) -> DataLoader[Any]:
    """Set how a loader prepares batches for a device: by how many processes, and in which memory.

    A batch is a function of its number, so the batches are the same. The loader must not have been iterated over.

    Args:
        batches: the loader.
        training: its settings `workers` and `pinned`.
        device: `cpu`, `cuda` or `mps`.
    """
    accelerated = device != "cpu"
    default = WORKERS if accelerated and (os.cpu_count() or 1) > WORKERS else 0
    workers = default if training.workers is None else training.workers
    batches.num_workers = workers
    batches.prefetch_factor = 2 if workers else None
    # A batch in pinned memory is copied while the device computes; Lightning's copies do not block then.
    batches.pin_memory = training.pinned and device == "cuda"
    return batches


@contextmanager
def product_precision(training: TrainingSpec, device: str) -> Iterator[None]:
    """Let CUDA round the operands of float32 products to TF32 inside the block, if the training allows it."""
    if device != "cuda" or not training.tf32:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
