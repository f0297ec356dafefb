"""Devices: what a run asks for, checked before anything is made."""

import torch

from sma.errors import SpecError, quote

ACCELERATORS = ("auto", "cpu", "cuda", "mps")


def device_of(accelerator: str) -> str:
    """The kind of device on which a run computes: `cpu`, `cuda` or `mps`.

    Raises:
        SpecError: there is none of this kind here, or no such kind.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if accelerator == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if accelerator not in ACCELERATORS:
        raise SpecError(f"unknown accelerator {quote(accelerator)}; give one of {', '.join(ACCELERATORS)}")
    if not there[accelerator]:
        others = ", ".join(kind for kind, found in there.items() if found)
        built = (
            ""
            if accelerator != "cuda" or torch.version.cuda or torch.version.hip
            else "; this torch was built without CUDA"
        )
        raise SpecError(f"--accelerator {accelerator}: torch sees no such device here{built}; there is: {others}")
    return accelerator


def check_device(accelerator: str, precision: str = "32-true") -> str:
    """Check that there is a device, and that it can compute in this precision; returns its kind.

    Raises:
        SpecError: it is not there, or cannot.
    """
    device = device_of(accelerator)
    if precision == "16-mixed" and device == "cpu":
        raise SpecError(
            "precision=16-mixed needs a GPU, and the run is on the CPU; set precision=bf16-mixed or precision=32-true"
        )
    if precision == "64-true" and device == "mps":
        raise SpecError("precision=64-true does not exist on mps; give --accelerator cpu, or set precision=32-true")
    return device
