"""transformers and torchvision, where they are installed: `make test-extras` puts both beside the environment."""

import importlib
import importlib.util
import re
import sys

import pytest
import torch

_MISSING = torch.library.Library("torchvision", "FRAGMENT")


def _import_torchvision() -> bool:
    """Import torchvision, if it is installed.

    A build of torchvision for another build of torch, such as one with CUDA, cannot load its compiled operators, and
    its import fails when it describes their shapes. Its models in Python need none of them.
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


# First, because transformers imports torchvision where it is installed.
HAS_TORCHVISION = _import_torchvision()
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-extras")
