"""The zoo of sub-modules: one file has one spec, one module and its registration."""

from sma.moved import moved

if __name__ == "modules":
    raise ImportError("this folder is a part of sma: write 'from sma.modules… import …' instead of 'modules'")

moved(__name__, {"whole": "full_attention", "windowed": "sliding_window"})
