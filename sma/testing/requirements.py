"""Common requirements of the laws of sub-modules, routers and models."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sma.checkpoint import load_state, save_state
from sma.errors import StateError
from sma.spec import Spec, dump_spec, load_spec
from sma.submodule import State
from sma.testing.examples import Example

Law = Callable[[Any, Example], None]


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    """Max |found - wanted| / max(1, max |wanted|); infinite where only one of the two is NaN."""
    if found.shape != wanted.shape:
        raise AssertionError(f"a shape of {tuple(found.shape)} instead of {tuple(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    if not torch.equal(found.isnan(), wanted.isnan()):
        return float("inf")
    difference = (found - wanted).detach().double().nan_to_num(0.0).abs().max()
    return float(difference / max(1.0, float(wanted.detach().double().nan_to_num(0.0).abs().max())))


def require_near(found: Tensor, wanted: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Raise unless two tensors agree."""
    difference = largest_difference(found, wanted)
    if not difference <= tolerance:
        raise AssertionError(f"{what}: relative difference {difference:.1e}, allowed {tolerance:.0e}")


def require(condition: bool, complaint: str) -> None:
    """Raise unless a condition holds."""
    if not condition:
        raise AssertionError(complaint)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, for `require_unchanged`."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def require_unchanged(found: Mapping[str, Tensor], kept: Mapping[str, Tensor], what: str) -> None:
    """Raise unless tensors equal the kept copies bit by bit."""
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, kept[name])]
    require(not changed, f"{what} {changed}")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def require_gradients(module: nn.Module, zero: bool) -> None:
    """Raise unless every parameter that is not frozen has a finite gradient, one of zeros where no token was active."""
    for name, parameter in trained_parameters(module).items():
        if parameter.grad is None:
            raise AssertionError(
                f"the gradient of {name!r} is None; other ranks of a distributed training would wait for it"
            )
        require(bool(parameter.grad.isfinite().all()), f"the gradient of {name!r} is not finite")
        require(not (zero and bool(parameter.grad.any())), f"without active tokens the gradient of {name!r} is not 0")


def require_slope(value: Callable[[float], Tensor], leaves: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
    """Raise unless gradients agree with differences.

    Args:
        value: function from a step size to the result, with the leaves moved by that multiple of their directions.
        leaves: tensors whose gradients are those of `value(0)`, or None where it does not depend on them.
        directions: one per leaf.
    """
    slope = sum(
        float((leaf.grad * d).sum()) for leaf, d in zip(leaves, directions, strict=True) if leaf.grad is not None
    )
    # Richardson's difference: its error is of fourth order.
    near, far = (float((value(step) - value(-step)).detach()) / (2 * step) for step in (1e-5, 2e-5))
    wanted = (4 * near - far) / 3
    # A kink between the points would show in the two differences themselves.
    limit = 1e-5 * max(1.0, abs(wanted)) + 10 * abs(near - far)
    require(abs(slope - wanted) <= limit, f"backward gives a slope of {slope:.8g}, differences {wanted:.8g}")


def require_prediction(spec: Spec, predicted: int, module: nn.Module, family: str = "model") -> None:
    """Raise unless a spec predicts the number of parameters and survives dump and load."""
    counted = sum(parameter.numel() for parameter in module.parameters())
    require(counted == predicted, f"num_parameters predicts {predicted}, and the {family} has {counted}")
    require(load_spec(dump_spec(spec), family=family) == spec, "the spec changed in dump and load")


def saved_and_loaded(state: State, like: State) -> Any:
    """A state, written into a file and read back; `like` is a state of the same module for any number of rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_state(state, path)
        return load_state(path, like)


def if_streams(law: Law) -> Law:
    """Decorator for a law that applies only to parts that continue from a state."""

    @wraps(law)
    def kept(case: Any, example: Example) -> None:
        if case.streams:
            law(case, example)

    return kept


def refuses_a_state_unless_causal(case: Any, example: Example) -> None:
    """A part that cannot continue from a state raises `StateError` instead of making one."""
    if case.streams:
        return
    try:
        case.make().init_state(2)
    except StateError:
        return
    raise AssertionError("the part does not stream, but init_state made a state instead of raising StateError")
