"""A run-time check of the types and shapes in signatures; `conftest.py` installs it for the core.

jaxtyping and beartype check an argument by its type, dtype and shape, which takes longer than most of the checked
functions. So each combination of these, of arguments and result together, is checked once per function. Later calls
with the same combination skip the check, which would have the same outcome.
"""

import abc
import contextlib
import dataclasses
import functools
import inspect
import threading
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from itertools import compress
from types import CodeType, FunctionType
from typing import Any

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeDecorHintException
from torch import Tensor

MOST = 10_000
"""Maximum number of combinations of arguments that are stored per function, to bound the memory."""


class _Unclear(Exception):
    """The properties that a check depends on cannot be summarised in a key."""


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and results by their annotations; no check if beartype cannot read one, such as `Self` outside a
    class.
    """
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        return function


_nesting: set[type] = set()


@functools.cache
def _handler(kind: type) -> Callable[..., Hashable]:
    """A function from a value of a class to the key on which a check can depend; for most classes the class itself."""

    def within(value: Any, depth: int = 0) -> Hashable:
        if len(value) > 32 or depth == 3:  # it may be large, or contain itself
            raise _Unclear
        items = value.items() if issubclass(kind, Mapping) else value
        return (kind, *[_look(each, depth + 1) for each in items])

    if issubclass(kind, Tensor):
        return lambda value: (kind, value.dtype, value.shape)
    if issubclass(kind, bool | int | str | float | type(None) | type):
        return lambda value: (kind, value)
    if issubclass(kind, Mapping | Sequence | Set) and not issubclass(kind, bytes | range):
        _nesting.add(kind)
        return within
    return type


def _look(value: Any, depth: int) -> Hashable:
    handler = _handler(kind := type(value))
    return handler(value, depth) if kind in _nesting else handler(value)


@functools.cache
def _outer_handler(kind: type) -> Callable[[Any], Hashable]:
    """`_handler` for checks that depend only on the classes of the items of a collection."""
    if issubclass(kind, Mapping):
        return lambda value: (kind, frozenset(map(type, value)), frozenset(map(type, value.values())))
    if issubclass(kind, list | tuple | Set):
        return lambda value: (kind, *map(type, value)) if len(value) < 9 else (kind, frozenset(map(type, value)))
    return type


def _read(hint: Any, names: dict[str, Any]) -> Any:
    """An annotation, evaluated if it is a string."""
    with contextlib.suppress(Exception):  # it may use names that exist only under TYPE_CHECKING
        return eval(hint, names) if isinstance(hint, str) else hint
    return hint


def _is_plain(hint: Any) -> bool:
    """Whether a check by an annotation depends only on the class of a value."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return all(map(_is_plain, typing.get_args(hint)))
    if hint is None or hint is Any:
        return True
    ordinary = (type.__instancecheck__, abc.ABCMeta.__instancecheck__)
    return isinstance(hint, type) and typing.get_origin(hint) is None and type(hint).__instancecheck__ in ordinary


def _seer(hint: Any) -> Callable[[type], Callable[[Any], Hashable]] | None:
    """`_handler` or `_outer_handler` for the values of an annotation; None if a check depends only on their class."""
    if _is_plain(hint):
        return None
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _handler if any(_seer(each) is _handler for each in typing.get_args(hint)) else _outer_handler
    items, holds = typing.get_args(hint), typing.get_origin(hint) in (list, tuple, set, dict, Mapping, Sequence, Set)
    plain = all(_is_plain(each) for each in items if each is not Ellipsis)
    return _outer_handler if holds and plain and len(items) < 9 else _handler


def jaxtyped(part: Any = None, *, typechecker: Callable[..., Any]) -> Any:
    """`jaxtyping.jaxtyped` for a function or the constructor of a dataclass, with a check per new combination only."""
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


class _Stack(threading.local):
    """The functions that are being checked, per thread; jaxtyping's wrapper calls the last one."""

    def __init__(self) -> None:
        self.calls: list[Callable[..., Any]] = []


class _Memory:
    """Checked combinations of one function, or of all functions that one nested definition creates."""

    def __init__(self, function: FunctionType, typechecker: Callable[..., Any]) -> None:
        self.annotations, self.typechecker = function.__annotations__, typechecker
        self.known: dict[Hashable, set[Hashable]] = {}  # checked results, by arguments
        self.stack = _Stack()
        self.full: Callable[..., Any] | None = None

    def prepare(self, function: FunctionType) -> None:
        """Wrap the function by jaxtyping's checker, at the first call, because most functions are never called."""
        stack = self.stack

        def answer(*args: Any, **kwargs: Any) -> Any:
            return stack.calls[-1](*args, **kwargs)

        signature = inspect.signature(function)
        parameters = signature.parameters.values()
        hints = {name: _read(hint, function.__globals__) for name, hint in self.annotations.items()}
        # Sizes such as "{size}" depend on the values of arguments.
        find = (lambda hint: _handler) if any("{" in str(each) for each in self.annotations.values()) else _seer
        self.named = {each.name: find(hints.get(each.name)) for each in parameters}
        ordered = [each for each in parameters if each.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD]
        variable = [each for each in parameters if each.kind == inspect.Parameter.VAR_POSITIONAL]
        found = [self.named[each.name] for each in (*ordered, *variable * 32)]
        self.seen, self.seers = [see is not None for see in found], [*filter(None, found)]
        self.see_result = _seer(hints.get("return"))
        # Its globals are those of the function, in which jaxtyping evaluates the annotations.
        same = FunctionType(answer.__code__, function.__globals__, function.__name__, closure=answer.__closure__)
        functools.update_wrapper(same, function)
        del same.__wrapped__  # type: ignore[attr-defined]  # it may keep large objects alive
        same.__signature__ = signature  # type: ignore[attr-defined]
        self.full = _ORIGINAL(same, typechecker=self.typechecker)

    def check(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function, with a check of its arguments and its result."""
        assert self.full is not None
        self.stack.calls.append(call)
        try:
            return self.full(*args, **kwargs)
        finally:
            self.stack.calls.pop()


_nested: dict[int, tuple[CodeType, _Memory]] = {}


def _memory(function: FunctionType, typechecker: Callable[..., Any]) -> _Memory:
    if "<locals>" not in function.__qualname__:
        return _Memory(function, typechecker)
    code = function.__code__  # by identity, because equal code may belong to another function
    memory = _nested.setdefault(id(code), (code, _Memory(function, typechecker)))[1]
    same = memory.annotations == function.__annotations__ and memory.typechecker is typechecker
    return memory if same else _Memory(function, typechecker)


def _checked(function: Any, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    memory = _memory(function, typechecker)
    known = memory.known

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if _config.jaxtyping_disable:
            return function(*args, **kwargs)
        if memory.full is None:
            memory.prepare(function)
        try:
            if len(args) > len(memory.seen):
                raise _Unclear
            given: Any = tuple(map(type, args))
            if seers := memory.seers:
                seen = compress(args, memory.seen)
                given += tuple([see(type(each))(each) for see, each in zip(seers, seen, strict=False)])
            for name, value in kwargs.items():
                see = memory.named.get(name, _handler)
                given += (name, see(type(value))(value) if see else type(value))
            results = known.get(given)
        except Exception:  # sizes may be symbolic, which are not hashable
            return memory.check(function, args, kwargs)
        result = memory.check(function, args, kwargs) if results is None else function(*args, **kwargs)
        try:
            see = memory.see_result
            seen = see(type(result))(result) if see else type(result)
            if results is not None and seen in results:
                return result
        except Exception:
            seen = _Unclear
        if results is not None:
            memory.check(lambda *args, **kwargs: result, args, kwargs)
        if seen is not _Unclear and (given in known or len(known) < MOST):
            known.setdefault(given, set()).add(seen)
        return result

    wrapper.is_checked = True  # type: ignore[attr-defined]
    return wrapper


_ORIGINAL, _config = jaxtyping.jaxtyped, jaxtyping.config


def install(modules: Sequence[str]) -> None:
    """Check the functions and dataclasses of these modules, which must not be imported yet."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]  # the import hook uses it
    jaxtyping.install_import_hook(list(modules), f"{__name__}.check")
