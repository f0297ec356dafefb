"""Sweeps on Ray Tune. The only folder that imports ray."""

if __name__ == "tune":
    raise ImportError("this folder is a part of sma: write 'from sma.tune… import …' instead of 'tune'")
