"""Complete experiments, and their parts `io`, `tasks`, `reports`, `training` and `studies`."""

from sma.moved import moved

if __name__ == "recipes":
    raise ImportError("this folder is a part of sma: write 'from sma.recipes… import …' instead of 'recipes'")

moved(
    __name__,
    {
        "data": "tasks and sma.recipes.io (the contact sheet: python -m sma.recipes.tasks.pathfinder.sheet)",
        "baselines": "studies.baselines",
        "efficiency": "studies.efficiency",
        "signals": "io.signals",
    },
)
