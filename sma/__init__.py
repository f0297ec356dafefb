"""Sparse modular activation: every token decides, at every layer, which sub-modules it needs, and only those run on
it.
"""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from sma.activation import RoutedOutput as RoutedOutput
from sma.activation import SparseModularActivation as SparseModularActivation
from sma.averaging import update_statistics as update_statistics
from sma.budget import BudgetController as BudgetController
from sma.calibration import calibrate as calibrate
from sma.checkpoint import load as load
from sma.checkpoint import load_state as load_state
from sma.checkpoint import save as save
from sma.checkpoint import save_state as save_state
from sma.decision import Decision as Decision
from sma.errors import SmaError as SmaError
from sma.layer import LayerSpec as LayerSpec
from sma.layer import RoutedLayer as RoutedLayer
from sma.model import SequenceModel as SequenceModel
from sma.model import build as build
from sma.model_output import ModelOutput as ModelOutput
from sma.ragged import Ragged as Ragged
from sma.ragged import compress as compress
from sma.ragged import extract as extract
from sma.routers import Router as Router
from sma.spec import load_spec as load_spec
from sma.spec import register as register
from sma.submodule import State as State
from sma.submodule import SubModule as SubModule
from sma.submodule import SubModuleSpec as SubModuleSpec

try:
    __version__ = _version("sparse-modular-activation")
except PackageNotFoundError:  # a checkout that was not installed
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
    "SequenceModel",
    "SmaError",
    "SparseModularActivation",
    "State",
    "SubModule",
    "SubModuleSpec",
    "__version__",
    "build",
    "calibrate",
    "compress",
    "extract",
    "load",
    "load_spec",
    "load_state",
    "register",
    "save",
    "save_state",
    "update_statistics",
]
