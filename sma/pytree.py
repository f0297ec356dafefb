"""Registration of output dataclasses as pytrees, for torch.export, torch.compile and vmap."""

import dataclasses
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree

from sma.summary import summary

Class = TypeVar("Class", bound=type[Any])


def register_output(cls: Class) -> Class:
    """Class decorator for a frozen dataclass: fields with `metadata={"static": True}` are constants, others children.

    A child that is None is not a leaf, because vmap would require an axis of it. The repr is one line, unless the class
    defines its own.
    """
    written = getattr(vars(cls).get("__repr__"), "__globals__", {}).get("__name__")
    if written in ("dataclasses", "reprlib"):  # generated, and would print all elements
        cls.__repr__ = summary  # type: ignore[assignment]
    children = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("static")]
    constants = [field.name for field in dataclasses.fields(cls) if field.metadata.get("static")]

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        present = tuple(name for name in children if getattr(value, name) is not None)
        return [getattr(value, name) for name in present], (present, *(getattr(value, name) for name in constants))

    def flatten_with_keys(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        leaves, context = flatten(value)
        return [(_pytree.GetAttrKey(name), leaf) for name, leaf in zip(context[0], leaves, strict=True)], context

    def unflatten(values: Any, context: Any) -> Any:
        # Without __init__, because torch also rebuilds the tree with placeholders.
        made = object.__new__(cls)
        present, *rest = context
        found = dict(zip((*present, *constants), (*values, *rest), strict=True))
        for name in (*children, *constants):
            object.__setattr__(made, name, found.get(name))
        return made

    _pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=list,
        from_dumpable_context=_hashable,
        flatten_with_keys_fn=flatten_with_keys,
    )
    return cls


def _hashable(context: Any) -> Any:
    """Convert lists, which JSON makes of tuples, back to tuples."""
    return tuple(map(_hashable, context)) if isinstance(context, list) else context


def map_tensors(function: Any, value: Any) -> Any:
    """Apply a function to every tensor of a registered dataclass, tuple or dictionary."""
    return _pytree.tree_map_only(Tensor, function, value)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a registered dataclass, tuple or dictionary, in order."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def named_tensors(value: Any) -> dict[str, Tensor]:
    """All tensors of a registered dataclass, tuple or dictionary by path, such as `.layers[0].backbone.hidden`."""
    leaves, _ = _pytree.tree_flatten_with_path(value)
    return {_pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def with_tensors(value: Any, named: dict[str, Tensor]) -> Any:
    """The same value with its tensors replaced, by the paths of `named_tensors`."""
    return _pytree.tree_map_with_path(
        lambda path, leaf: named[_pytree.keystr(path)] if isinstance(leaf, Tensor) else leaf, value
    )
