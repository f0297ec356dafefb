"""The definition of operators with a plain and a Triton implementation, and the choice between the two."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

from sma.autograd import first_derivative
from sma.devices import without_autocast
from sma.errors import InputError, did_you_mean, quote

Name = Literal["plain", "triton"]

# Constants, for which a compiler needs no guard.
_HAS_TRITON = find_spec("triton") is not None
_INSTALL = "pip install 'sparse-modular-activation[gpu]'"
# Oldest compute capability for which Triton has products of TF32 and bfloat16 numbers.
_OLDEST = 8

_LIBRARY = Library("sma", "FRAGMENT")
_operators: list[str] = []
# The functions that run under the names of the operators, for counters and timers; their last argument is the
# implementation.
RUNS: dict[str, Callable[..., Any]] = {}
_forced: list[Name] = []
# Formulas to be registered with torch's FlopCounterMode, by the name of the operator.
_macs: dict[str, Callable[..., int]] = {}


class Implementation(NamedTuple):
    """The implementation of an operator.

    Attributes:
        name: `plain` or `triton`.
        reason: the reason for the choice, in one sentence.
    """

    name: Name
    reason: str


def implementation(operator: str, device: torch.device | str) -> Implementation:
    """Return which implementation of an operator runs on a device, and why.

    Args:
        operator: name of the operator; `operators()` lists them.
        device: device of its tensors.

    Raises:
        InputError: the operator is unknown.
    """
    _check_known(operator, "operator", _operators)
    device = torch.device(device)
    name = choose(device)
    if _forced:
        return Implementation(name, "sma.kernels.use chose it")
    if name == "triton":
        return Implementation(name, "the device is an NVIDIA GPU and triton is installed")
    if device.type != "cuda":
        return Implementation(name, f"kernels exist for NVIDIA GPUs, and the device is {str(device)!r}")
    if torch.version.hip is not None:
        return Implementation(name, "kernels exist for NVIDIA GPUs, and this build of torch is for AMD GPUs")
    if not _HAS_TRITON:
        return Implementation(name, f"triton is not installed; write {_INSTALL}")
    return Implementation(name, f"kernels need compute capability {_OLDEST}.0, and this GPU has an older one")


def operators() -> list[str]:
    """Names of the operators that have more than one implementation."""
    return sorted(_operators)


def choose(device: torch.device) -> Name:
    """The implementation that operators use on a device. Compilers trace this function."""
    if _forced:
        return _forced[-1]
    if device.type != "cuda" or not _HAS_TRITON or torch.version.hip is not None:
        return "plain"
    return "triton" if torch.cuda.get_device_properties(device).major >= _OLDEST else "plain"


@contextmanager
def use(name: Name) -> Iterator[None]:
    """Force an implementation of all operators within a `with` statement, for all threads.

    Backward uses the implementation that its forward used.

    Args:
        name: `plain`, or `triton`, which needs an NVIDIA GPU or Triton's interpreter (`TRITON_INTERPRET=1`).

    Raises:
        InputError: the name is unknown, or triton is not installed.
    """
    _check_known(name, "implementation", ("plain", "triton"))
    if name == "triton" and not _HAS_TRITON:
        raise InputError(f"the implementation 'triton' needs the package triton; write {_INSTALL}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def define(
    name: str,
    schema: str,
    *,
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    macs: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """Define the operator `torch.ops.sma.<name>`, whose last argument names the implementation.

    Args:
        name: name of the operator; `sma.kernels.gpu.<name without _backward>` has a function `forward` or `backward`
            with the arguments of `plain`.
        schema: arguments and results as `torch.library` writes them, without the last argument: `(Tensor x) -> Tensor`.
        plain: the implementation in PyTorch, for every device.
        fake: the shapes of its results, a function of the arguments and of the implementation.
        macs: multiply-accumulates of its matrix products for torch's FlopCounterMode, from the same arguments;
            None where it has none.
    """
    backward = name.endswith("_backward")
    family, method = name.removesuffix("_backward"), "backward" if backward else "forward"
    inputs, _, results = schema.partition(") ->")
    _LIBRARY.define(f"{name}{inputs}, str implementation) ->{results}")

    def run(*arguments: Any) -> Any:
        *given, chosen = arguments
        # Operators inside an operator run under the caller's autocast.
        with without_autocast(given[0].device):
            return (plain if chosen == "plain" else getattr(_device_programs(family), method))(*given)

    RUNS[f"sma::{name}"] = run
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sma::{name}", fake, lib=_LIBRARY)
    if not backward:
        _operators.append(name)
    if macs is not None:
        _macs[name] = macs
    operator: Callable[..., Any] = getattr(torch.ops.sma, name).default
    return operator


def differentiate(
    operator: Callable[..., Any],
    what: str,
    *,
    save: Callable[[Any, Sequence[Any], Sequence[Tensor], Sequence[Tensor]], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Register the gradient of an operator that returns its results and, last, a list of tensors for backward.

    It takes a third of the time of `torch.library.register_autograd`, which wraps every tensor of the list.

    Args:
        operator: what `define` returned.
        what: its name in the error about second derivatives.
        save: stores on the context what backward needs; takes context, arguments, results, and the list.
        backward: takes the context and the gradients of the results; returns those of the arguments.
    """

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, saved: list[Tensor], *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                *results, kept = operator(*arguments)
            saved.extend(kept)
            save(ctx, arguments, results, kept)
            return results[0] if len(results) == 1 else tuple(results)

        @staticmethod
        @first_derivative(what)
        def backward(ctx: Any, *gradients: Any) -> Any:
            return (None, *backward(ctx, *gradients))

    def differentiable(*arguments: Any) -> Any:
        _register_flops()
        tensors = (each for each in arguments if isinstance(each, Tensor))
        if not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors)):
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)
        saved: list[Tensor] = []
        results = Gradient.apply(saved, *arguments)
        return (*results, saved) if isinstance(results, tuple) else (results, saved)

    _LIBRARY.impl(operator.name().removeprefix("sma::"), differentiable, "Autograd")  # type: ignore[attr-defined]


def _register_flops() -> None:
    """Register the operators defined since the last call with FlopCounterMode, which cannot look into an operator.

    Its module imports Triton, which takes longer than the whole import of sma. Nothing is done before the caller has
    imported it.
    """
    module = sys.modules.get("torch.utils.flop_counter")
    while module is not None and _macs:
        name, macs = _macs.popitem()

        def flops(*arguments: Any, out_val: Any = None, _macs: Callable[..., int] = macs) -> int:
            return 2 * _macs(*arguments)

        module.register_flop_formula(getattr(torch.ops.sma, name), get_raw=True)(flops)


@cache
def _device_programs(family: str) -> Any:
    """Import the kernels of an operator; the interpreter reads its environment variable when triton is imported."""
    return import_module(f"sma.kernels.gpu.{family}")


def _check_known(name: str, what: str, known: Sequence[str]) -> None:
    if name not in known:
        raise InputError(f"unknown {what} {quote(name)}{did_you_mean(name, known, f'{what}s')}")
