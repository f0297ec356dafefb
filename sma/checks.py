"""Checks of arguments: one check and one message for each mistake, shared by all entry points.

A message contains the given value, the requirement and the remedy. It begins with `what`: the name of a value with its
verb, such as `the tokens are`. Outer layers add the location: `layer 3 'attention' (kind gau, causal=False) cannot …`.
"""

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sma.devices import autocasts, is_sharded
from sma.errors import InputError, StateError, did_you_mean, quote, with_article

if TYPE_CHECKING:
    from sma.decision import Decision
    from sma.ragged import Ragged

Kind = TypeVar("Kind")
Axes = Mapping[str, int | None]
"""Letters of a shape, each with its size where one is required."""

INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64}


def what_came(value: object) -> str:
    """Describe a value in a few words: its class, and its shape and dtype where it has them."""
    if value is None:
        return "None"
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    shape, dtype = (getattr(value, part, None) for part in ("shape", "dtype"))
    told = [f"shape {quote(tuple(shape))}"] if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    told += [] if dtype is None else [f"dtype {quote(str(dtype))[1:-1]}"]
    return f"{with_article(name)}{' of ' if told else ''}{' and '.join(told)}"


def check_instance(value: object, kind: type[Kind], what: str, cure: str) -> Kind:
    """Check the class of a value, and return it.

    Raises:
        InputError: it has another class; the message ends with the cure.
    """
    if not isinstance(value, kind):
        raise InputError(f"{what} {what_came(value)}; expected {with_article(kind.__name__)}: {cure}")
    return value


def check_module(value: object, whose: str) -> nn.Module:
    """Check that an argument is a module, and return it.

    Raises:
        InputError: it is something else.
    """
    return check_instance(value, nn.Module, f"{whose} got", "give the model itself, not its name, spec or file")


def check_tensor(value: object, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Check that a value is a dense tensor, and return it.

    Args:
        value: the given value.
        what: its name with its verb.
        dtype: dtype of the conversion that the message proposes.

    Raises:
        InputError: it is not a tensor; the message explains the conversion.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            cure = ".to_padded_tensor(0.0), with a mask of the real tokens" if value.is_nested else ".to_dense()"
            raise InputError(f"{what} a {kind} tensor; expected a dense one: convert it with {cure}")
        return value
    if isinstance(value, str | bytes):
        raise InputError(f"{what} {what_came(value)}; expected a torch.Tensor: encode the text to token ids first")
    target = f", dtype={dtype}" if dtype is not None else ""
    raise InputError(f"{what} {what_came(value)}; expected a torch.Tensor: write torch.as_tensor(x{target})")


def check_floats(value: object, what: str, axes: Axes) -> None:
    """Check that a value is a floating-point tensor of a shape.

    Raises:
        InputError: it is not.
    """
    x = check_tensor(value, what, torch.float32)
    _require(x, what, axes, x.is_floating_point(), "floating-point", "" if x.is_complex() else ".float()")


def check_integers(value: object, what: str, axes: Axes, of_mask: str = ".long()") -> None:
    """Check that a value is an integer tensor of a shape; `of_mask` is the proposed conversion of a mask.

    Raises:
        InputError: it is not.
    """
    x = check_tensor(value, what, torch.int64)
    _require(x, what, axes, x.dtype in INTEGERS, "integer", of_mask if x.dtype is torch.bool else ".long()")


def check_booleans(value: object, what: str, axes: Axes) -> None:
    """Check that a value is a mask of a shape.

    Raises:
        InputError: it is not.
    """
    x = check_tensor(value, what, torch.bool)
    _require(x, what, axes, x.dtype is torch.bool, "boolean", ".bool()")


def _require(x: Tensor, what: str, axes: Axes, right: bool, numbers: str, convert: str) -> None:
    """Raise unless the dtype of a tensor is right and its shape fits."""
    if right and x.ndim == len(axes):
        for index, size in enumerate(axes.values()):
            if size is not None and x.shape[index] != size:
                break
        else:
            return
    letters = [letter if size is None else f"{letter} = {size}" for letter, size in axes.items()]
    shape = f"({letters[0]},)" if len(letters) == 1 else f"({', '.join(letters)})"
    cure = f": convert with {convert}" if convert and not right else ""
    given = f"of shape {tuple(x.shape)} and dtype {x.dtype}"
    raise InputError(f"{what} {given}; expected {with_article(numbers)} tensor of shape {shape}{cure}")


def check_valid(like: Tensor, valid: object) -> None:
    """Check the mask of the valid positions of a batch, or None.

    Raises:
        InputError: it is not a boolean tensor `(B, L)` on the device of the batch.
    """
    if valid is None:
        return
    check_booleans(valid, "valid is", dict(zip("BL", like.shape, strict=False)))
    check_device(cast(Tensor, valid).device, like.device, "valid")


def check_device(found: torch.device, wanted: torch.device, name: str, error: type[Exception] = InputError) -> None:
    """Check that an argument is on the device of the batch.

    Raises:
        InputError: it is on another; `error` where that is given.
    """
    if found != wanted:
        raise error(f"{name} is on {found} and the input on {wanted}; move it with {name}.to({str(wanted)!r})")


def check_count(value: Any, what: str, least: int = 0, unit: str = "") -> None:
    """Check a count.

    Raises:
        InputError: it is not an integer, or too small.
    """
    # `int` comes first, because torch.compile supports no other of these classes.
    if isinstance(value, bool) or not isinstance(value, int | Integral | torch.SymInt):
        raise InputError(f"{what}={quote(value)} is {what_came(value)}; expected an integer of at least {least}{unit}")
    if value < least:
        raise InputError(f"{what}={quote(value)} must be at least {least}{unit}")


def check_number(value: Any, what: str) -> None:
    """Check that a value is a plain number.

    Raises:
        InputError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{what} is {what_came(value)}, {quote(value)}; expected a plain number: write float(x)")


def check_rate(value: Any, what: str) -> None:
    """Check an activation rate.

    Raises:
        InputError: it is not a number from 0 to 1.
    """
    check_number(value, what)
    if not 0 <= value <= 1:  # also true for NaN
        raise InputError(f"{what} is {value}; it must lie between 0 and 1")


def check_known(names: Collection[object], known: Collection[str], whose: str) -> None:
    """Check that names are those of sub-modules.

    Raises:
        InputError: one is not; the message lists the sub-modules.
    """
    for name in names:
        if name not in known:
            raise InputError(
                f"{whose} names {quote(name)}, which is not a sub-module{did_you_mean(str(name), known, 'sub-modules')}"
            )


def check_batch(x_BLD: Tensor, valid: Tensor | None, width: int | None = None, what: str = "the tokens are") -> None:
    """Check a batch of tokens or control states, which has `width` channels if that is given, and its mask.

    Raises:
        InputError: it does not fit; the message contains the requirement.
    """
    check_floats(x_BLD, what, {"B": None, "L": None, "D": width})
    check_valid(x_BLD, valid)


def check_frame(x_BLD: Tensor, frame: "Ragged") -> None:
    """Check that ragged tokens are the layout of a batch.

    Raises:
        InputError: they are packed, or belong to a batch of another shape.
    """
    if frame.stride is None or (frame.num_rows, frame.stride) != tuple(x_BLD.shape[:2]):
        found = "packed" if frame.stride is None else f"{frame.num_rows} rows of {frame.stride}"
        raise InputError(
            f"valid is a Ragged ({found}) that is not the layout of tokens of shape {tuple(x_BLD.shape)}; give the "
            "mask (B, L), or the result of sma.layer.align"
        )


def check_dtype(part: nn.Module, x: Tensor, what: str = "the tokens") -> None:
    """Check that a tensor has the dtype of a parameter, unless autocast converts it.

    Raises:
        InputError: it has another dtype; the message gives those of the parameters.
    """
    if torch.compiler.is_compiling() or autocasts(x.device):
        return
    # Usually the first parameter matches. Sharded ones are gathered in the dtype of their mixed precision when their
    # module is called.
    if any(parameter.dtype is x.dtype or is_sharded(parameter) for parameter in part.parameters()):
        return
    dtypes = sorted({str(parameter.dtype) for parameter in part.parameters() if parameter.is_floating_point()})
    if dtypes:
        raise InputError(
            f"{what} have dtype {x.dtype} and the parameters {' and '.join(dtypes)}; "
            "convert either with .to(dtype), or use torch.autocast"
        )


def check_beside(x_BLD: Tensor, control_BLD: Tensor | None, positions: Tensor | None) -> None:
    """Check control states and positions, whose shapes must be those of the tokens: others could be broadcast.

    Raises:
        InputError: they do not fit; the message contains the requirement.
    """
    rows, length = x_BLD.shape[:2]
    if control_BLD is not None:
        check_floats(control_BLD, "control_BLD is", {"B": rows, "L": length, "E": None})
    if positions is not None:
        check_integers(positions, "positions are", {"B": rows, "L": length})


def check_decision(names: Sequence[str], decision: "Decision", control_BLD: Tensor, whose: str) -> None:
    """Check a decision, which may come from a third-party router.

    Raises:
        InputError: it does not fit these sub-modules and these tokens.
    """
    check_names(decision, names, whose)
    rows, length = control_BLD.shape[:2]
    axes = {"B": rows, "L": length, "M": len(names)}
    check_booleans(decision.active, f"active of {whose} is", axes)
    check_floats(decision.confidence, f"confidence of {whose} is", axes)


def check_names(decision: "Decision", names: Sequence[str], whose: str) -> None:
    """Check the names of the sub-modules of a decision.

    Raises:
        InputError: they are others, or in another order.
    """
    if tuple(decision.names) != tuple(names):
        raise InputError(f"{whose} is about {list(decision.names)}; expected {list(names)}, in this order")


def check_decisions(decisions: "Sequence[Decision]", what: str, valid: Tensor | None = None) -> None:
    """Check that an argument is a sequence of decisions, and that a mask fits each.

    Raises:
        InputError: it is a whole output, a single decision or something else; or the mask does not fit.
    """
    if _is_decision(decisions):
        raise InputError(
            f"{what} got one Decision; expected a sequence of them, one for each routed layer: write [decision]"
        )
    if hasattr(decisions, "decisions") or not isinstance(decisions, Sequence):
        cure = ": give output.decisions" if hasattr(decisions, "decisions") else ", such as output.decisions"
        raise InputError(
            f"{what} got {what_came(decisions)}; expected a sequence of decisions, one for each routed layer{cure}"
        )
    for index, decision in enumerate(decisions):
        if not _is_decision(decision):
            raise InputError(
                f"{what} got {what_came(decision)} as decision {index}; expected a Decision of each routed layer"
            )
        check_valid(decision.active, valid)


def _is_decision(value: object) -> bool:
    return hasattr(value, "p_on") and hasattr(value, "active")


def check_rows(rows: Tensor, count: int) -> Tensor:
    """Check the indices of rows, and return them as int64.

    Raises:
        InputError: they are not a vector of integers, or one is out of range. The range is checked on the CPU only,
            because an accelerator would have to wait.
    """
    check_integers(rows, "rows are", {"R": None}, ".nonzero().squeeze(1)")
    rows = rows.long()
    if not torch.compiler.is_compiling() and rows.device.type == "cpu" and rows.numel():
        wrong = [bound for bound in (int(rows.min()), int(rows.max())) if not 0 <= bound < count]
        if wrong:
            raise InputError(f"row {wrong[0]} is out of range; the state has {count} streams, numbered from 0")
    return rows


def check_floating(dtype: object) -> torch.dtype:
    """Check the dtype of the tokens in a state.

    Raises:
        InputError: it is not a floating-point dtype that torch computes with.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"the dtype {quote(dtype)} is not a floating-point dtype; give one such as torch.float32")
    return dtype


def check_causal(part: Any, name: str = "") -> None:
    """Check that a part can continue a stream.

    Args:
        part: the part, with the attribute `causal`, and optionally `keeps_state` and the advice `to_stream`.
        name: name of the part in the layer or model that checks it.

    Raises:
        StateError: it looks ahead, or keeps no state.
    """
    if not (part.causal and getattr(part, "keeps_state", True)):
        kind = getattr(getattr(part, "spec", None), "kind", type(part).__name__ if name else None)
        known = "" if kind is None else f"kind {kind}, "
        cure = getattr(part, "to_stream", "build the model with bidirectional=false to stream it")
        label = repr(name) if name else type(part).__name__
        raise StateError(f"{label} ({known}causal={part.causal}) cannot continue from a state; {cure}")


def check_state(part: nn.Module, state: object, kind: type[Kind], rows: int) -> Kind:
    """Check the class of a state and the number of its rows.

    Raises:
        StateError: it does not fit; the message contains the requirement.
    """
    name = type(part).__name__
    if not isinstance(state, kind):
        raise StateError(
            f"{name} got a state of class {type(state).__name__}; expected {kind.__name__}: use init_state"
        )
    streams = cast(Any, state).batch_size
    if streams != rows:
        raise StateError(
            f"{name} got a state of {streams} streams for a batch of {rows} rows; "
            f"make one with init_state({rows}), or take rows with state.select"
        )
    return state


def check_sizes(part: nn.Module, found: object, wanted: object, what: str = "sizes") -> None:
    """Check the sizes, or other properties, of a state of the right class.

    Raises:
        StateError: it belongs to a part with other settings or another width.
    """
    if found != wanted:
        raise StateError(
            f"{type(part).__name__} got the state of another model: {what} {found} instead of {wanted}; use init_state"
        )


def require_seen(part: nn.Module, seen: Tensor | None) -> Tensor:
    """Return the number of tokens that each stream has seen.

    Raises:
        StateError: the state does not count them, so positions would restart with every chunk.
    """
    if seen is None:
        raise StateError(
            f"{type(part).__name__} got a state without a token count, such as a part of the state of a layer or a "
            "model; use the init_state of the module that is called"
        )
    return seen
