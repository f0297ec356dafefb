"""Runnable experiments: data, training, and one script per task."""

if __name__ == "recipes":
    raise ImportError("this folder is a part of sma: write 'from sma.recipes… import …' instead of 'recipes'")
