"""Containers of modules with typed items, for editors and type checkers.

At run time they are `torch.nn.ModuleList` and `torch.nn.ModuleDict`.
"""

from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast, overload

from torch import nn

Item = TypeVar("Item", bound=nn.Module)

if TYPE_CHECKING:

    class ListOf(nn.ModuleList, Generic[Item]):
        """A list of modules of one type."""

        @overload  # type: ignore[override]
        def __getitem__(self, index: int) -> Item: ...

        @overload
        def __getitem__(self, index: slice) -> Self: ...

        def __getitem__(self, index: int | slice) -> Item | Self: ...

        def __iter__(self) -> Iterator[Item]: ...

    class DictOf(nn.ModuleDict, Generic[Item]):
        """Modules of one type by name."""

        def __getitem__(self, key: str) -> Item: ...

        def values(self) -> ValuesView[Item]: ...

        def items(self) -> ItemsView[str, Item]: ...


def list_of(modules: Iterable[Item]) -> "ListOf[Item]":
    """Make a `torch.nn.ModuleList`."""
    return cast("ListOf[Item]", nn.ModuleList(modules))


def dict_of(modules: Mapping[str, Item]) -> "DictOf[Item]":
    """Make a `torch.nn.ModuleDict`."""
    return cast("DictOf[Item]", nn.ModuleDict(modules))
