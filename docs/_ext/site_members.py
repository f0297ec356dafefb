"""Left out: base classes that are not public, and members that their class or another package describes."""

import inspect
import sys

from sphinx.application import Sphinx


def _bases(app: Sphinx, name: str, obj: object, options: object, bases: list[type]) -> None:
    bases[:] = [base for base in bases if not getattr(base, "__name__", "").startswith("_")]


def _described_elsewhere(name: str, member: object) -> bool:
    """Whether the docstring of a method comes from another package, such as that of `torch.nn.Module.extra_repr`."""
    if not inspect.isfunction(member) or member.__doc__ or "." not in member.__qualname__:
        return False
    owner = getattr(sys.modules[member.__module__], member.__qualname__.split(".")[0], None)
    bases = owner.__mro__[1:] if inspect.isclass(owner) else ()
    docstrings = [base.__module__ for base in bases if getattr(base.__dict__.get(name), "__doc__", None)]
    return bool(docstrings) and not docstrings[0].startswith("sma")


def _skip(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Skip the fields of a named tuple, which autodoc shows as `Alias for field number 0`, and what others describe."""
    if type(obj).__name__ == "_tuplegetter" or name == "model_config" or _described_elsewhere(name, obj):
        return True
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the filters."""
    app.connect("autodoc-process-bases", _bases)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
