"""Complete experiments that a user runs, and behind them `io`, `tasks`, `reports`, `training` and `studies`."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

if __name__ == "recipes":
    raise ImportError("this folder is a part of sma: write 'from sma.recipes… import …' instead of 'recipes'")

_MOVED = {
    "data": "tasks and sma.recipes.io (the contact sheet: python -m sma.recipes.tasks.pathfinder.sheet)",
    "baselines": "studies.baselines",
    "efficiency": "studies.efficiency",
    "signals": "io.signals",
}
"""Modules that a released page has named, and where they are now."""


class _Moved(MetaPathFinder):
    """Answers an import of a module's former name with its present one."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        new = _MOVED.get(name.removeprefix(f"{__name__}."))
        if name.startswith(f"{__name__}.") and new is not None:
            raise ModuleNotFoundError(f"{name} has moved to {__name__}.{new}", name=name)
        return None


sys.meta_path.append(_Moved())
