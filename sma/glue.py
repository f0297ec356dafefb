"""What a layer computes between its large operators, fused into few passes over the batch for accelerators.

Elementwise operators move as many bytes as the large ones compute on. On a CUDA device each function here is one
compiled kernel; where it cannot be compiled, and on other accelerators, it runs as it is written. A CPU has its caches
and its operators in place, and a compiler fuses by itself: for both a layer calls the operators one by one.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sma.autograd import first_derivative
from sma.errors import reason


def fuses(x: Tensor) -> bool:
    """Whether a layer calls the functions of this file for a tensor."""
    return x.device.type != "cpu" and not torch.compiler.is_compiling()


class Way(NamedTuple):
    """How the functions of this file run on a device.

    Attributes:
        name: `compiled`, `written` or `plain`.
        reason: why, one sentence.
    """

    name: str
    reason: str


def of_device(device: torch.device | str) -> Way:
    """How what a layer computes between its operators runs on a device, and why."""
    kind = torch.device(device).type
    if kind == "cpu":
        return Way("plain", "a CPU has its caches, and operators in place")
    if kind == "cuda":
        return Way("compiled", "the device is a GPU; each is compiled when it is first called")
    return Way("written", f"functions are compiled for CUDA, and the device is {str(device)!r}")


class Fused:
    """A function of elementwise operators and reductions, as one operator of torch.

    Args:
        name: name of the operator.
        function: the function, of tensors and numbers, with annotations by which torch finds the schema.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: Callable[..., Any] | None = None
        self.operator = torch.library.custom_op(f"sma::{name}", self._run, mutates_args=(), schema=_schema(function))
        self.operator.register_fake(function)

    def __call__(self, *arguments: Any) -> Any:
        return self.operator(*arguments)

    def _run(self, *arguments: Any) -> Any:
        return self.implementation(arguments[0].device)(*arguments)

    def implementation(self, device: torch.device) -> Callable[..., Any]:
        """The function that runs on a device, compiled when it is first called on CUDA."""
        if device.type != "cuda":
            return self.function
        if self.compiled is None:
            self.compiled = _with_fallback(torch.compile(self.function, dynamic=True, fullgraph=True), self.function)
        return self.compiled


def _schema(function: Callable[..., Any]) -> str:
    schema: str = torch.library.infer_schema(function, mutates_args=())
    return schema


def _with_fallback(compiled: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that runs as it is written where the compiler fails, with one warning."""
    broken = False

    def run(*arguments: Any) -> Any:
        nonlocal broken
        if not broken:
            try:
                return compiled(*arguments)
            except Exception as error:  # a compiler that is not installed, or a device that it does not know
                broken = True
                warnings.warn(f"a kernel cannot be compiled and runs in parts, slower: {reason(error)}", stacklevel=2)
        return function(*arguments)

    return run


def fused(function: Callable[..., Any]) -> Fused:
    """Decorator for `Fused`, under the name of the function."""
    return Fused(function.__name__, function)


@fused
def silu_dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """silu(x), channels dropped with probability p; and the mask of those that are kept."""
    keep = torch.rand_like(x, dtype=torch.float32) >= p
    return (torch.nn.functional.silu(x) * keep / (1 - p)).to(x.dtype), keep


@fused
def silu_dropout_backward(grad: Tensor, x: Tensor, keep: Tensor, p: float) -> Tensor:
    """The gradient of x in `silu_dropout`."""
    gate = torch.sigmoid(x)
    return (grad * keep / (1 - p) * gate * (1 + x * (1 - gate))).to(x.dtype)


@fused
def join_parts(
    residual: Tensor, passed: Tensor | None, routed: Tensor | None, slots: Tensor | None, p: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a layer: silu(residual + drop(passed + routed[slots])).

    Args:
        residual: `(N, D)`.
        passed: `(N, D)`, what the bypass made of the tokens; None for nothing.
        routed: `(T, D)`, results of routed sub-modules, T at least 1; None for nothing.
        slots: `(N,)`, index of each token's result; T where it has none. None where every token has its own.
        p: probability of dropping a channel of the sum before the residual; the mask is empty where it is 0.
        silu: whether silu follows.

    Returns:
        the result, the sum before silu (empty without one), and the mask of the channels that are kept.
    """
    total = torch.zeros_like(residual) if passed is None else passed.to(residual.dtype)
    if routed is not None and slots is None:
        total = total + routed.to(residual.dtype)
    if routed is not None and slots is not None:
        found = routed[slots.clamp(max=routed.shape[0] - 1)].to(residual.dtype)
        total = total + found.where((slots < routed.shape[0])[:, None], 0)
    keep = residual.new_empty(0, dtype=torch.bool)
    if p > 0:
        keep = torch.rand_like(residual, dtype=torch.float32) >= p
        total = (total * keep / (1 - p)).to(residual.dtype)
    total = total + residual
    return (torch.nn.functional.silu(total), total, keep) if silu else (total, residual.new_empty(0), keep)


@fused
def drop_backward(grad: Tensor, keep: Tensor, p: float) -> Tensor:
    """The gradient of what was dropped."""
    return (grad * keep / (1 - p)).to(grad.dtype)


@fused
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """X / sqrt(mean(x^2) + epsilon) * weight over the last axis; and the factor of every row."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * factor * weight).to(x.dtype), factor


@fused
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight in `rms_norm`; the weight has one number or one per channel."""
    normal = x.to(factor.dtype) * factor
    scaled = grad.to(factor.dtype) * weight
    x_grad = factor * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    weight_grad = (grad.to(factor.dtype) * normal).flatten(0, -2).sum(0)
    return x_grad.to(x.dtype), (weight_grad.sum(0, keepdim=True) if weight.shape[0] == 1 else weight_grad)


class SiluDropout(torch.autograd.Function):
    """`silu_dropout`, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        out, keep = silu_dropout(x, p)
        ctx.save_for_backward(x, keep)
        ctx.p = p
        result: Tensor = out
        return result

    @staticmethod
    @first_derivative("the fused dropout of a layer")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return silu_dropout_backward(grad, *ctx.saved_tensors, ctx.p), None


class JoinParts(torch.autograd.Function):
    """`join_parts` of the results of one sub-module, with its gradients.

    The index `(T,)` holds the position of each result; slots with `hole` true have none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        passed: Tensor | None,
        routed: Tensor | None,
        index: Tensor | None,
        real: Tensor | None,
        p: float,
        silu: bool,
    ) -> Tensor:
        some = None if routed is None or routed.shape[0] == 0 else routed
        slots = None if some is None or index is None else slots_of(index, real, residual.shape[0])
        out, total, keep = join_parts(residual, passed, some, slots, p, silu)
        ctx.save_for_backward(total, keep, index, real)
        ctx.dtypes = tuple(None if part is None else part.dtype for part in (passed, routed))
        ctx.p, ctx.silu = p, silu
        result: Tensor = out
        return result

    @staticmethod
    @first_derivative("the fused end of a layer")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, keep, index, real = ctx.saved_tensors
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, total)
        inner = drop_backward(grad, keep, ctx.p) if ctx.p else grad
        passed, routed = ctx.dtypes
        found = None
        if routed is not None:
            found = (inner if index is None else inner.index_select(0, index)).to(routed)
            found = found if real is None else found.where(real[:, None], 0)
        return grad, None if passed is None else inner.to(passed), found, None, None, None, None


def slots_of(index: Tensor, real: Tensor | None, size: int) -> Tensor:
    """The inverse of an index: for each of `size` positions its place in the index, or the length of the index."""
    places = torch.arange(index.shape[0], device=index.device)
    slots = torch.full((size + 1,), index.shape[0], device=index.device)
    return slots.scatter_(0, index if real is None else index.where(real, size), places)[:size]


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm`, with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, factor = rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, factor)
        result: Tensor = out
        return result

    @staticmethod
    @first_derivative("the fused norm of a layer")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        x_grad, weight_grad = rms_norm_backward(grad, x, weight, factor)
        return x_grad, weight_grad.to(weight.dtype), None


@fused
def batch_moments(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of every channel over the rows that are kept, and their number; 0 without rows."""
    count = keep.sum()
    present = x.where(keep, 0)
    mean = present.sum(0) / count.clamp(min=1)
    return mean, (present - mean).where(keep, 0).square().sum(0) / count.clamp(min=1), count


@fused
def normalise(x: Tensor, mean: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """(x - mean) * factor + bias per channel."""
    return (x - mean) * factor if bias is None else (x - mean) * factor + bias


@fused
def batch_norm_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all rows of the gradient, and of the gradient times x - mean."""
    return grad.sum(0), (grad * (x - mean)).sum(0)


@fused
def batch_norm_backward(
    grad: Tensor, x: Tensor, keep: Tensor, mean: Tensor, factor: Tensor, by_mean: Tensor, by_variance: Tensor
) -> Tensor:
    """The gradient of x: its own, and those through the mean and the variance of the rows that are kept."""
    return grad * factor + (by_mean + (x - mean) * by_variance).where(keep, 0)


class BatchNormFunction(torch.autograd.Function):
    """Batch norm over the rows that are kept, with its gradients; fewer than two rows use the moments `before`.

    Returns the normalised rows, and mean, variance and number of the rows, which carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keep: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        before: tuple[Tensor, Tensor],
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = batch_moments(x, keep)
        enough = count >= 2
        center = mean.where(enough, before[0])
        scale = (var.where(enough, before[1]) + epsilon).rsqrt()
        factor = scale if weight is None else scale * weight.to(x.dtype)
        out = normalise(x, center, factor, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x, keep, center, scale, weight, enough.to(x.dtype) / count.clamp(min=1))
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (weight, bias))
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @first_derivative("the fused batch norm of a layer")
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, center, scale, weight, share = ctx.saved_tensors
        total, moment = batch_norm_sums(grad, x, center)
        factor = scale if weight is None else scale * weight.to(x.dtype)
        by_mean, by_variance = -share * factor * total, -share * factor * scale.square() * moment
        x_grad = batch_norm_backward(grad, x, keep, center, factor, by_mean, by_variance)
        kinds = ctx.dtypes
        weight_grad = None if kinds[0] is None else (moment * scale).to(kinds[0])
        return x_grad, None, weight_grad, None if kinds[1] is None else total.to(kinds[1]), None, None
