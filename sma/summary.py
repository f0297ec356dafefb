"""One-line reprs of outputs and states, and of modules by their specs."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sma.errors import quote
from sma.spec import Spec

SHOWN = 8
"""Maximum number of items of a collection in a repr."""


def summary(value: Any, *, depth: int = 1) -> str:
    """Return the repr of a dataclass or named tuple of tensors, with dtype and shape of every tensor instead of its
    elements.

    Args:
        value: an instance, whose fields may be placeholders of a tracer.
        depth: number of levels of inner dataclasses to show.
    """
    if dataclasses.is_dataclass(value):
        every = [field.name for field in dataclasses.fields(value)]
        shown = [field.name for field in dataclasses.fields(value) if field.repr]
    else:
        every = shown = list(value._fields)
    parts = [f"{name}={brief(getattr(value, name, None), depth=depth)}" for name in shown]
    return f"{type(value).__name__}({', '.join([*parts, *_device(value, every)])})"


def brief(value: Any, *, depth: int = 0) -> str:
    """Return a value in one line: a tensor as `float32[2, 5]`, a dataclass as its repr or, beyond `depth`, class."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return repr(value) if depth > 0 and not _nests(value) else f"{type(value).__name__}(...)"
    if isinstance(value, Mapping):
        return f"{{{listed(f'{quote(key)}: {_class(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple | list) and not all(isinstance(item, str | int) for item in value):
        classes = {_class(item) for item in value}
        if len(classes) == 1 and not isinstance(value[0], Tensor):
            return f"({len(value)} x {classes.pop()})"
        return f"({listed(brief(item) if isinstance(item, Tensor) else _class(item) for item in value)})"
    return quote(value)


def listed(items: Iterable[str]) -> str:
    """Join the first items by commas, with the number of the others."""
    every = list(items)
    return ", ".join(every[:SHOWN] + ([f"... {len(every) - SHOWN} more"] if len(every) > SHOWN else []))


def is_known(tensor: Any) -> bool:
    """Whether the elements of a tensor can be read: not on meta, nor in a traced, compiled or captured program."""
    if type(tensor) is not Tensor or tensor.is_meta or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def settings(part: nn.Module) -> str:
    """Return the settings of a module for `extra_repr`: its width and the fields of its spec.

    Fields that describe inner modules are left out, because these show their own settings.
    """
    spec = getattr(part, "spec", None)
    width = getattr(part, "width", getattr(spec, "width", None))
    shown = [f"width={width}"] if isinstance(width, int) else []
    if isinstance(spec, Spec):
        fields = {name: getattr(spec, name) for name in type(spec).model_fields if name not in ("kind", "width")}
        inner = {name for name, _ in part.named_children()}
        shown += [
            f"{name}={_setting(value)}" for name, value in fields.items() if name not in inner and not _builds(value)
        ]
    return ", ".join(shown)


def _setting(value: Any) -> str:
    if not isinstance(value, Spec):
        return quote(value)
    fields = ", ".join(
        f"{name}={_setting(getattr(value, name))}" for name in type(value).model_fields if name != "kind"
    )
    return f"{getattr(value, 'kind', type(value).__name__)}({fields})"


def _builds(value: Any) -> bool:
    """Whether a setting describes modules, alone or in a collection."""
    if isinstance(value, Spec):
        return hasattr(value, "build") or any(_builds(getattr(value, name)) for name in type(value).model_fields)
    if isinstance(value, Mapping):
        return any(map(_builds, value.values()))
    return isinstance(value, tuple | list) and any(map(_builds, value))


def _class(item: Any) -> str:
    return "None" if item is None else type(item).__name__


def _nests(value: Any) -> bool:
    """Whether a dataclass contains mappings or dataclasses, so that its repr is long."""
    own = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return any(dataclasses.is_dataclass(part) or isinstance(part, Mapping) for part in own)


def _device(value: Any, fields: Iterable[str]) -> list[str]:
    own = (getattr(value, name, None) for name in fields)
    devices = {str(part.device) for part in own if isinstance(part, Tensor)}
    return [f"device={devices.pop()!r}"] if len(devices) == 1 else []
