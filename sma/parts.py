"""Modules keep the spec that built them, and their width."""

from collections.abc import Callable
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
