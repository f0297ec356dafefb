"""Attributes of parts: the spec and the width from which they were built; consecutive equal specs are shown once."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import nn


def remembering(build: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the `build` of a spec so that its modules get the attributes `spec` and `width`, unless they have them.

    Reprs and errors use both, also for modules whose authors store neither.
    """
    if hasattr(build, "_remembers"):
        return build

    @wraps(build)
    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        part = build(self, *args, **kwargs)
        if isinstance(part, nn.Module):
            for name, value in (("spec", self), ("width", args[0] if args else kwargs.get("width"))):
                if value is not None and not hasattr(part, name):
                    setattr(part, name, value)
        return part

    remember._remembers = True  # type: ignore[attr-defined]
    return remember


class Repeated:
    """The repr of a sequence of equal items: `[item] * 12`."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __repr__(self) -> str:
        return f"[{self.items[0]!r}] * {len(self.items)}"


def is_repeated(value: Any) -> bool:
    """Whether a value is a sequence of several equal items that are not plain numbers or words."""
    several = isinstance(value, tuple | list) and len(value) > 1
    return several and not isinstance(value[0], str | int | float) and all(item == value[0] for item in value)
