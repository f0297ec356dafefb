"""Sparse modular activation: in every layer, each token runs only the sub-modules that a router selects for it."""

import sys as _sys
from importlib import import_module as _import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from sma.activation import RoutedOutput, SparseModularActivation
from sma.averaging import update_statistics
from sma.budget import BudgetController
from sma.calibration import calibrate
from sma.checkpoint import load, load_state, save, save_state
from sma.decision import Decision
from sma.errors import SmaError
from sma.layer import LayerSpec, RoutedLayer
from sma.model import SequenceModel, build
from sma.model_output import ModelOutput
from sma.ragged import Ragged, compress, extract
from sma.replay import load_decisions, save_decisions
from sma.retrofit import collect_decisions, retrofit
from sma.routers import Router
from sma.spec import load_spec, register
from sma.submodule import State, SubModule, SubModuleSpec
from sma.wrap import RowWise, TokenWise

if TYPE_CHECKING:
    from sma import modules as modules
    from sma import routers as routers
else:

    def __getattr__(name):
        """Import the zoo where it is first used, such as for `sma.modules.GAUSpec`."""
        if name == "modules":
            return _import_module("sma.modules")
        # With the module, a traceback suggests a similar name.
        raise AttributeError(f"module 'sma' has no attribute {name!r}", name=name, obj=_sys.modules[__name__])


try:
    __version__ = _version("sparse-modular-activation")
except PackageNotFoundError:  # a checkout without an installation
    __version__ = "0+unknown"

__all__ = [
    "BudgetController",
    "Decision",
    "LayerSpec",
    "ModelOutput",
    "Ragged",
    "RoutedLayer",
    "RoutedOutput",
    "Router",
    "RowWise",
    "SequenceModel",
    "SmaError",
    "SparseModularActivation",
    "State",
    "SubModule",
    "SubModuleSpec",
    "TokenWise",
    "__version__",
    "build",
    "calibrate",
    "collect_decisions",
    "compress",
    "extract",
    "load",
    "load_decisions",
    "load_spec",
    "load_state",
    "register",
    "retrofit",
    "save",
    "save_decisions",
    "save_state",
    "update_statistics",
]
