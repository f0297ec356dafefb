"""Provenance of results: software versions, commit and hardware."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def versions() -> dict[str, str | None]:
    """Versions of the software on which the numbers of a run depend, and the commit."""
    packages = ("sparse-modular-activation", "torch", "lightning", "torchmetrics", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}, "commit": commit()}


def commit() -> str | None:
    """The commit of the running checkout, followed by `-dirty` if files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def hardware(device: str | None = None, threads: int | None = None) -> str:
    """The name of a device, with the number of threads for a CPU.

    Args:
        device: `cpu` or `cuda`; None selects the default of a run.
        threads: number of CPU threads; None selects that of this process.
    """
    if torch.cuda.is_available() if device is None else device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {threads or torch.get_num_threads()} threads"
