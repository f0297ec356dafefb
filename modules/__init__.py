"""The zoo: one file is one spec, one module and its registration."""

if __name__ == "modules":
    raise ImportError("this folder is a part of sma: write 'from sma.modules… import …' instead of 'modules'")
