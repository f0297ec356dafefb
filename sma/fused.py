"""Functions of elementwise operators and reductions that run as one compiled kernel on CUDA.

Separate elementwise operators would read and write as much memory as the large operators. On a CUDA device each
function here is one compiled kernel. If it cannot be compiled, and on other accelerators, its operators run one by one.
Layers call the operators one by one on a CPU too, which has caches and in-place operators, and in a compiled model,
whose compiler fuses operators itself.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sma.autograd import first_derivative
from sma.errors import reason


def fuses(x: Tensor) -> bool:
    """Whether a layer calls fused functions for a tensor."""
    return x.device.type != "cpu" and not torch.compiler.is_compiling()


class Way(NamedTuple):
    """How fused functions run on a device.

    Attributes:
        name: `compiled`, `written` or `plain`.
        reason: the reason, in one sentence.
    """

    name: str
    reason: str


def of_device(device: torch.device | str) -> Way:
    """Implementation of the functions between the operators of a layer on a device, and the reason."""
    kind = torch.device(device).type
    if kind == "cpu":
        return Way("plain", "a CPU has caches and in-place operators")
    if kind == "cuda":
        return Way("compiled", "the device is a GPU; each is compiled when it is first called")
    return Way("written", f"functions are compiled for CUDA, and the device is {str(device)!r}")


class Fused:
    """A function of elementwise operators and reductions, as one operator of torch.

    Args:
        name: name of the operator.
        function: the function, of tensors and numbers, with annotations by which torch finds the schema.
        schema: arguments and results as `torch.library` writes them; default those of the annotations.
    """

    def __init__(self, name: str, function: Callable[..., Any], schema: str | None = None) -> None:
        self.function = function
        self.compiled: Callable[..., Any] | None = None
        schema = _schema(function) if schema is None else schema
        self.operator = torch.library.custom_op(f"sma::{name}", self._run, mutates_args=(), schema=schema)
        self.operator.register_fake(function)

    def __call__(self, *arguments: Any) -> Any:
        device = arguments[0].device
        # On CUDA a call of the operator takes more host time than a call of the compiled function.
        if device.type == "cuda" and not (torch.is_grad_enabled() or _is_watched()):
            return self.implementation(device)(*arguments)
        return self.operator(*arguments)

    def _run(self, *arguments: Any) -> Any:
        return self.implementation(arguments[0].device)(*arguments)

    def implementation(self, device: torch.device) -> Callable[..., Any]:
        """The function that runs on a device, compiled when it is first called on CUDA."""
        if device.type != "cuda":
            return self.function
        if self.compiled is None:
            self.compiled = Compiled(self.function)
        return self.compiled


def _is_watched() -> bool:
    """Whether a mode counts, traces or fakes operators."""
    return bool(torch._C._len_torch_dispatch_stack())


def _schema(function: Callable[..., Any]) -> str:
    schema: str = torch.library.infer_schema(function, mutates_args=())
    return schema


class Compiled:
    """A function that is compiled once for every width of its first argument, with its numbers and dtypes as constants,
    and for any number of rows above 1. If the compiler fails, the function runs uncompiled, after one warning.

    Args:
        function: of tensors whose last axes, and whose only axes if as wide as the first, keep their sizes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled = torch.compile(function, dynamic=True, fullgraph=True)
        self._known: set[Any] = set()
        self._is_broken = False

    def __call__(self, *arguments: Any) -> Any:
        if self._is_broken:
            return self._function(*arguments)
        key = _seen_by_compiler(arguments)
        if key in self._known:
            try:
                return self._compiled(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # something that is not in the key has changed, and the compiler has reached its limit
                self._known.discard(key)
        try:
            result = self._compile(arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler is installed, or it does not support the device
            result = self._function(*arguments)  # an error in the arguments is raised here again
            self._is_broken = True
            text = f"a kernel cannot be compiled, so its operators run one by one, more slowly: {reason(error)}"
            warnings.warn(text, stacklevel=2)
            return result
        self._known.add(key)
        return result

    def _compile(self, arguments: tuple[Any, ...]) -> Any:
        from torch._dynamo import config, mark_static

        width = arguments[0].shape[-1:]
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        marks = [dict(vars(each)) for each in tensors]
        # With a constant width a kernel can load many channels at a time, and keep a row in registers.
        for each in tensors:
            if each.ndim > 1 or each.shape == width:
                mark_static(each, each.ndim - 1)
        try:
            with config.patch(specialize_float=True, recompile_limit=_MOST, accumulated_recompile_limit=_MOST):
                return self._compiled(*arguments)
        finally:
            for each, mark in zip(tensors, marks, strict=True):
                vars(each).clear()
                vars(each).update(mark)


# Maximum number of compiled programs of one function.
_MOST = 4096


def _seen_by_compiler(arguments: tuple[Any, ...]) -> Any:
    """The properties on which a compiled program depends: constants, modes, and for each tensor its dtype, device,
    whether it needs gradients and is contiguous, and which of its sizes are 0 or 1.
    """
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), arguments[0].device, arguments[0].shape[-1]
    return *modes, *(_seen_of_tensor(each) if isinstance(each, Tensor) else each for each in arguments)


def _seen_of_tensor(x: Tensor) -> Any:
    sizes = tuple(2 if size > 1 else size for size in x.shape)
    return x.dtype, x.requires_grad, x.is_contiguous(), x.is_inference(), sizes


def fused(function: Callable[..., Any]) -> Fused:
    """Decorator for `Fused`, under the name of the function."""
    return Fused(function.__name__, function)


class FusedWithGradient:
    """A function with its gradient: as it is written on a CPU and in a compiled model, elsewhere two `Fused` operators.

    Args:
        name: name of the operator.
        function: the function, as for `Fused`; it returns several tensors.
        backward: maps the gradients of all results, then the arguments of the function, to the gradients of those
            arguments that are tensors of floating-point numbers.
    """

    def __init__(self, name: str, function: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self.function = function
        self.fused = Fused(name, self._separate, _schema(function))
        self.gradient = Fused(f"{name}_backward", backward)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Any:
                ctx.save_for_backward(*(each for each in given if isinstance(each, Tensor)))
                ctx.given = [None if isinstance(each, Tensor) else (each,) for each in given]
                return self.fused(*given)

            @staticmethod
            @first_derivative(f"the fused function {name}")
            def backward(ctx: Any, *grads: Tensor) -> Any:
                saved = iter(ctx.saved_tensors)
                given = [next(saved) if each is None else each[0] for each in ctx.given]
                found = iter(self.gradient(*grads, *given))
                return tuple(next(found) if is_real(each) else None for each in given)

        self._apply = Function.apply

    def __call__(self, *arguments: Any) -> Any:
        return self._apply(*arguments) if fuses(arguments[0]) else self.function(*arguments)

    def _separate(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The results as separate tensors, as an operator must return them; a compiler removes the copies."""
        return tuple(each.clone(memory_format=torch.contiguous_format) for each in self.function(*arguments))


def is_real(argument: Any) -> bool:
    """Whether an argument is a tensor of floating-point numbers."""
    return isinstance(argument, Tensor) and argument.is_floating_point()


def with_gradient(backward: Callable[..., Any]) -> Callable[[Callable[..., Any]], FusedWithGradient]:
    """Decorator for `FusedWithGradient`, under the name of the function."""
    return lambda function: FusedWithGradient(function.__name__, function, backward)


def silu_slope(x: Tensor) -> Tensor:
    """Derivative of silu."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))
