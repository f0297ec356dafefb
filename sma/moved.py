"""Former names of modules and of their attributes: an import of one fails with the present name."""

import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Never


class _Moved(MetaPathFinder):
    def __init__(self, package: str, present: Mapping[str, str]) -> None:
        self._present = {f"{package}.{former}": f"{package}.{name}" for former, name in present.items()}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name in self._present:
            raise ModuleNotFoundError(f"{name} has moved to {self._present[name]}", name=name)
        return None


def moved(package: str, present: Mapping[str, str]) -> None:
    """Let imports of former modules of a package fail with their present names.

    Args:
        package: whose modules have moved.
        present: the present name of each former one, both within the package.
    """
    sys.meta_path.append(_Moved(package, present))


def former_names(module: str, **present: str) -> Callable[[str], Never]:
    """Make the `__getattr__` of a module that reports the present name when a former name is imported.

    Args:
        module: name of the module.
        **present: the present name by the former one.
    """

    def __getattr__(name: str) -> Never:
        if name in present:
            raise ImportError(f"{module}.{name} is now {present[name]}", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
