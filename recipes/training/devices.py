"""Checks of the device of a run, made before anything is written."""

import torch

from sma.errors import SpecError, quote

ACCELERATORS = ("auto", "cpu", "cuda", "mps")


def device_of(accelerator: str) -> str:
    """The type of device on which a run computes: `cpu`, `cuda` or `mps`.

    Raises:
        SpecError: the name is unknown, or torch finds no such device.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if accelerator == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if accelerator not in ACCELERATORS:
        raise SpecError(f"unknown accelerator {quote(accelerator)}; give one of {', '.join(ACCELERATORS)}")
    if not available[accelerator]:
        others = ", ".join(kind for kind, found in available.items() if found)
        built = (
            ""
            if accelerator != "cuda" or torch.version.cuda or torch.version.hip
            else "; this torch was built without CUDA"
        )
        raise SpecError(f"--accelerator {accelerator}: torch finds no such device{built}; available: {others}")
    return accelerator


def check_device(accelerator: str, precision: str = "32-true") -> str:
    """Check that a device exists and supports a precision; returns its type.

    Raises:
        SpecError: it does not exist, or does not support the precision.
    """
    device = device_of(accelerator)
    if precision == "16-mixed" and device == "cpu":
        raise SpecError(
            "precision=16-mixed needs a GPU, and the run is on the CPU; set precision=bf16-mixed or precision=32-true"
        )
    if precision == "64-true" and device == "mps":
        raise SpecError("precision=64-true does not exist on mps; give --accelerator cpu, or set precision=32-true")
    return device
