"""Sweeps on Ray Tune, and training by several workers on Ray Train. The only folder that imports ray."""

if __name__ == "tune":
    raise ImportError("this folder is a part of sma: write 'from sma.tune… import …' instead of 'tune'")
