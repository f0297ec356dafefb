"""Imports of transformers and torchvision, if installed; `make test-extras` installs both in `.venv/interop`."""

import importlib
import importlib.util
import re
import sys

import pytest
import torch

_MISSING = torch.library.Library("torchvision", "FRAGMENT")


def _import_torchvision() -> bool:
    """Import torchvision, if it is installed.

    If it was built for another build of torch, such as one with CUDA, it cannot load its compiled operators, and its
    import fails when it registers their shapes. Its models use none of them, so the missing ones are defined here.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    while True:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _MISSING.define(f"{missing[1]}(Tensor boxes) -> Tensor")
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return True


# Imported first, because transformers imports torchvision if it is installed.
HAS_TORCHVISION = _import_torchvision()
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-extras")
