"""The run-time checker of the types and shapes that signatures promise; `conftest.py` puts it over the whole package.

jaxtyping and beartype check an argument by its type, dtype and shape, which takes longer than most of the functions
that they check. So a function is checked once for every combination of these, of arguments and result together, and
calls that look the same are let through. What is checked stays the same: most calls look like earlier ones.
"""

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeDecorHintException
from torch import Tensor

MOST = 10_000
"""Combinations of arguments that are remembered for one function, which bounds the memory."""


class _Unclear(Exception):
    """What a check sees of a value cannot be written down."""


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and results by their annotations, or nothing where beartype cannot read one, such as `Self`
    outside a class.
    """
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        return function


@functools.cache
def _handler(kind: type) -> Callable[[Any, int], Hashable]:
    """What a check can see of the values of a class."""

    def within(value: Any, depth: int) -> Hashable:
        if len(value) > 32 or depth == 3:  # it may be large, or hold itself
            raise _Unclear
        items = value.items() if issubclass(kind, Mapping) else value
        return (kind, *(_look(each, depth + 1) for each in items))

    if issubclass(kind, Tensor):
        return lambda value, depth: (kind, value.dtype, tuple(value.shape))
    if issubclass(kind, bool | int | str | float | type(None) | type):
        return lambda value, depth: (kind, value)
    if issubclass(kind, Mapping | Sequence | Set) and not issubclass(kind, bytes | range):
        return within
    return lambda value, depth: kind


def _look(value: Any, depth: int = 0) -> Hashable:
    return _handler(type(value))(value, depth)


def jaxtyped(part: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """`jaxtyping.jaxtyped` for a function, or for the constructor of a dataclass, that checks what it has not seen."""
    if part is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(part):
        if dataclasses.is_dataclass(part) and not hasattr(part.__init__, "is_checked"):
            part.__init__ = _checked(part.__init__, typechecker)  # type: ignore[misc]
        return part
    if isinstance(part, classmethod | staticmethod):
        return type(part)(_checked(part.__func__, typechecker))
    if isinstance(part, property):
        ways = (None if way is None else _checked(way, typechecker) for way in (part.fget, part.fset, part.fdel))
        return property(*ways)
    return _checked(part, typechecker)


def _checked(function: Callable[..., Any], typechecker: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Hashable, set[Hashable]] = {}  # results that were checked, by arguments
    made = threading.local()  # a result that is only to be checked
    full: Callable[..., Any] | None = None

    def answer(*args: Any, **kwargs: Any) -> Any:
        return made.results[0] if getattr(made, "results", None) else function(*args, **kwargs)

    def with_checker() -> Callable[..., Any]:
        """The function under jaxtyping's checker; made at the first call, because most functions are never called."""
        # With the globals of the function, in which its annotations are read.
        same = FunctionType(answer.__code__, function.__globals__, function.__name__, closure=answer.__closure__)
        checked: Callable[..., Any] = _ORIGINAL(functools.update_wrapper(same, function), typechecker=typechecker)
        return checked

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal full
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        full = full or with_checker()
        try:
            given = (*map(_look, args), *((name, _look(value)) for name, value in kwargs.items()))
            results = known.get(given)
        except Exception:  # sizes may be symbols, which have no hash
            return full(*args, **kwargs)
        result = full(*args, **kwargs) if results is None else function(*args, **kwargs)
        try:
            seen = _look(result)
            if results is not None and seen in results:
                return result
        except Exception:
            seen = _Unclear
        if results is not None:
            made.results = [result]
            try:
                full(*args, **kwargs)
            finally:
                made.results = []
        if seen is not _Unclear and (given in known or len(known) < MOST):
            known.setdefault(given, set()).add(seen)
        return result

    wrapper.is_checked = True  # type: ignore[attr-defined]
    return wrapper


_ORIGINAL = jaxtyping.jaxtyped


def install(modules: Sequence[str]) -> None:
    """Check the functions and dataclasses of modules that are imported from now on."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]  # to which the import hook refers
    jaxtyping.install_import_hook(list(modules), f"{__name__}.check")
