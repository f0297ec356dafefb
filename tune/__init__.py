"""Sweeps on Ray Tune, and training by several workers on Ray Train. The only folder that imports ray."""

import os

from sma.moved import moved

# Ray reads the variable at its import. This package uses version 2 of the interface of Ray Train.
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"

if __name__ == "tune":
    raise ImportError("this folder is a part of sma: write 'from sma.tune… import …' instead of 'tune'")

moved(__name__, {"folder": "sweep_folder", "results": "sweep_results", "environment": "ray_settings"})
