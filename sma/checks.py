"""What `forward` refuses: tokens, masks, decisions and states that do not fit, each in a sentence."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from sma.decision import Decision
from sma.devices import autocasts
from sma.errors import InputError, StateError
from sma.inputs import check_mask, check_positions, check_tensor, what_came
from sma.ragged import Ragged
from sma.routers import Router
from sma.submodule import is_sharded


def check_batch(x_BLD: Tensor, valid: Tensor | None, width: int | None = None) -> None:
    """Check the shapes and dtypes of a batch of tokens.

    Raises:
        InputError: what was given and what is required.
    """
    check_tensor(x_BLD, "the tokens are", torch.float32)
    if x_BLD.ndim != 3 or (width is not None and x_BLD.shape[2] != width):
        raise InputError(
            f"the tokens have shape {tuple(x_BLD.shape)}; required is (B, L, D{'' if width is None else f' = {width}'})"
        )
    if not x_BLD.is_floating_point():
        raise InputError(
            f"the tokens have dtype {x_BLD.dtype}; required is a floating-point dtype, such as torch.float32"
        )
    check_valid(x_BLD, valid)


def check_frame(x_BLD: Tensor, frame: Ragged) -> None:
    """Check that ragged tokens are the layout of a batch.

    Raises:
        InputError: they are packed, or those of a batch of another shape.
    """
    if frame.stride is None or (frame.num_rows, frame.stride) != tuple(x_BLD.shape[:2]):
        found = "packed" if frame.stride is None else f"{frame.num_rows} rows of {frame.stride}"
        raise InputError(
            f"valid is a Ragged ({found}) that is not the layout of tokens of shape {tuple(x_BLD.shape)}; give the "
            "mask (B, L), or what sma.layer.align returned of the batch"
        )


def check_dtype(part: nn.Module, x: Tensor, what: str = "the tokens") -> None:
    """Check that numbers have the dtype of the parameters, or one of theirs; autocast converts by itself.

    Raises:
        InputError: what was given and what is required.
    """
    if torch.compiler.is_compiling() or autocasts(x.device):
        return
    # Mostly the first one says so: all are looked at only where an error is to be told.
    # Sharded parameters are gathered, in the dtype of their mixed precision, when their module is called.
    if any(parameter.dtype is x.dtype or is_sharded(parameter) for parameter in part.parameters()):
        return
    dtypes = sorted({str(parameter.dtype) for parameter in part.parameters() if parameter.is_floating_point()})
    if dtypes:
        raise InputError(
            f"{what} have dtype {x.dtype} and the parameters {' and '.join(dtypes)}; "
            "convert either with .to(dtype), or use torch.autocast"
        )


def check_control(x_BLD: Tensor, control_BLD: Tensor | None, positions: Tensor | None) -> None:
    """Check what comes beside the tokens of a batch: shapes that broadcast or index would give results on the wrong
    ones.
    """
    shape = tuple(x_BLD.shape[:2])
    if control_BLD is not None:
        check_tensor(control_BLD, "control_BLD is", torch.float32)
        if control_BLD.ndim != 3 or tuple(control_BLD.shape[:2]) != shape:
            raise InputError(
                f"control_BLD has shape {tuple(control_BLD.shape)}; "
                f"required is (B, L, E) with (B, L) = {shape}, as of the tokens"
            )
        if not control_BLD.is_floating_point():
            raise InputError(
                f"control_BLD has dtype {control_BLD.dtype}; required is a floating-point dtype, such as torch.float32"
            )
    if positions is not None:
        check_positions(positions, shape)


def check_decision(router: Router, decision: Decision, control_BLD: Tensor) -> None:
    """Check a decision, which may come from a router of somebody else.

    Raises:
        InputError: it is not one about these sub-modules and these tokens.
    """
    name, wanted = type(router).__name__, (*control_BLD.shape[:2], len(router.names))
    if tuple(decision.names) != tuple(router.names):
        raise InputError(
            f"the router {name} decided about {list(decision.names)}; "
            f"its names, in their order, are {list(router.names)}"
        )
    for field in ("active", "confidence"):
        shape = tuple(getattr(decision, field).shape)
        if shape != wanted:
            raise InputError(
                f"the router {name} decided with {field} of shape {shape}; required is (B, L, M) = {wanted}"
            )
    if decision.active.dtype is not torch.bool:
        raise InputError(
            f"the router {name} decided with active of dtype {decision.active.dtype}; required is torch.bool"
        )


def check_valid(inputs: Tensor, valid: Tensor | None) -> None:
    """Check the mask of the valid positions of a batch.

    Raises:
        InputError: what was given and what is required.
    """
    if valid is not None:
        check_mask(valid, inputs.shape[:2], device=inputs.device)


def check_decisions(decisions: Sequence[Decision], what: str, valid: Tensor | None = None) -> None:
    """Check that a function of decisions got some, and that a mask fits to each.

    Raises:
        InputError: it got the whole output, a single decision or something else; or the mask does not fit.
    """
    if isinstance(decisions, Decision):
        raise InputError(
            f"{what} got one Decision; required is a sequence of them, one for each routed layer: write [decision]"
        )
    if hasattr(decisions, "decisions") or not isinstance(decisions, Sequence):
        cure = ": give output.decisions" if hasattr(decisions, "decisions") else ", such as output.decisions"
        raise InputError(
            f"{what} got {what_came(decisions)}; required is a sequence of decisions, one for each routed layer{cure}"
        )
    for place, decision in enumerate(decisions):
        if not isinstance(decision, Decision):
            raise InputError(
                f"{what} got {what_came(decision)} as decision {place}; required is a Decision of each routed layer"
            )
        check_valid(decision.active, valid)


def check_parts(part: nn.Module, found: Collection[str], wanted: Collection[str]) -> None:
    """Check of which parts a state is.

    Raises:
        StateError: it is that of a layer of other parts.
    """
    if set(found) != set(wanted):
        raise StateError(
            f"{type(part).__name__} got the state of another model: it is of the parts {sorted(found)}; "
            f"required are {sorted(wanted)}: use init_state"
        )


def require_seen(part: nn.Module, seen: Tensor | None) -> Tensor:
    """The tokens that the streams of a part which stands alone have seen.

    Raises:
        StateError: its state does not count them, so that positions would begin anew with every chunk.
    """
    if seen is None:
        raise StateError(
            f"{type(part).__name__} got a state that counts no tokens, as inside of a layer or a model, which counts "
            "them; use the init_state of what is called"
        )
    return seen
