"""Functions between the large operators of a layer, fused into few passes over the batch; see `sma.fused`."""

from typing import Any

import torch
from torch import Tensor

from sma.autograd import first_derivative
from sma.fused import fused, silu_slope


@fused
def silu_dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """silu(x) with channels dropped with probability p, and the mask of the kept channels."""
    keep = torch.rand_like(x, dtype=torch.float32) >= p
    return (torch.nn.functional.silu(x) * keep / (1 - p)).to(x.dtype), keep


@fused
def silu_dropout_backward(grad: Tensor, x: Tensor, keep: Tensor, p: float) -> Tensor:
    """The gradient of x in `silu_dropout`."""
    return (grad * keep / (1 - p) * silu_slope(x)).to(x.dtype)


@fused
def join_parts(
    residual: Tensor,
    passed: Tensor | None,
    routed: Tensor | None,
    confidence: Tensor | None,
    slots: Tensor | None,
    p: float,
    on_sum: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a layer: silu(residual + passed + confidence * drop(routed[slots])), or with drop applied to the sum.

    Args:
        residual: `(N, D)`.
        passed: `(N, D)`, output of the bypass; None without one.
        routed: `(T, D)`, results of a routed sub-module, T at least 1; None without results.
        confidence: `(N,)`, of the router for each token; None without results.
        slots: `(N,)`, index of each token's result, at least T for a token without one. None: token i has result i.
        p: probability of dropping a channel; the mask is empty where it is 0.
        on_sum: whether channels are dropped from the sum of `passed` and the results, not from the results alone.
        silu: whether silu is applied at the end.

    Returns:
        the result, the sum before silu (empty without one), and the mask of the channels that are kept.
    """
    total = torch.zeros_like(residual) if passed is None else passed.to(residual.dtype)
    keep = residual.new_empty(0, dtype=torch.bool)
    if p > 0 and (on_sum or routed is not None):
        keep = torch.rand_like(residual, dtype=torch.float32) >= p
    if routed is not None and confidence is not None:
        result = _found(routed, slots).to(residual.dtype) * confidence.to(residual.dtype)[:, None]
        if p > 0 and not on_sum:
            result = result * keep / (1 - p)
        # The confidence of a token without a result may have any value.
        total = total + (result if slots is None else result.where(_has_result(slots, routed), 0))
    if p > 0 and on_sum:
        total = total * keep / (1 - p)
    total = (total + residual).to(residual.dtype)
    return (torch.nn.functional.silu(total), total, keep) if silu else (total, residual.new_empty(0), keep)


def _found(routed: Tensor, slots: Tensor | None) -> Tensor:
    """The result of each token; for a token without one, that of another token."""
    return routed if slots is None else routed[slots.clamp(max=routed.shape[0] - 1)]


def _has_result(slots: Tensor, routed: Tensor) -> Tensor:
    return (slots < routed.shape[0])[:, None]


@fused
def join_parts_backward(
    grad: Tensor,
    total: Tensor,
    keep: Tensor,
    routed: Tensor | None,
    confidence: Tensor | None,
    slots: Tensor | None,
    index: Tensor | None,
    real: Tensor | None,
    p: float,
    on_sum: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `residual`, `passed` (empty if equal to that of `residual`), `routed` and `confidence` (both
    empty without results) in `join_parts`.

    Args:
        index: `(T,)`, position of each result; None: token i has result i.
        real: `(T,)`, False for a slot without a token; None: every slot has one.
    """
    outer = (grad * silu_slope(total)).to(grad.dtype) if silu else grad.clone()
    inner = outer
    if p > 0 and on_sum:
        inner = (outer * keep / (1 - p)).to(outer.dtype)
    other = inner.clone() if p > 0 and on_sum else outer.new_empty(0)
    if routed is None or confidence is None:
        return outer, other, outer.new_empty(0), outer.new_empty(0)
    dropped = inner * keep / (1 - p) if p > 0 and not on_sum else inner
    by_confidence = (dropped * _found(routed, slots).to(dropped.dtype)).sum(-1)
    by_result = dropped * confidence.to(dropped.dtype)[:, None]
    if slots is not None and index is not None:
        by_confidence = by_confidence.where(slots < routed.shape[0], 0)
        by_result = by_result[index]
        by_result = by_result if real is None else by_result.where(real[:, None], 0)
    return outer, other, by_result.to(routed.dtype), by_confidence.to(confidence.dtype)


@fused
def add_at(x: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """The sum of `x` `(N, D)`, and of the values `(T, D)` at the tokens whose slot is below T, in the values' dtype."""
    return x.to(values.dtype) + _found(values, slots).where(_has_result(slots, values), 0)


@fused
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x^2) + epsilon) * weight over the last axis, and the factor of every row."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * factor * weight).to(x.dtype), factor


@fused
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight in `rms_norm`; the weight has one entry in all, or one per channel."""
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

    The index `(T,)` holds the position of each result; slots with `real` false have none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        passed: Tensor | None,
        routed: Tensor | None,
        confidence: Tensor | None,
        places: tuple[Tensor | None, Tensor | None, Tensor | None],
        p: float,
        on_sum: bool,
        silu: bool,
    ) -> Tensor:
        index, slots, real = places
        some = None if routed is None or routed.shape[0] == 0 else routed
        sure = None if some is None else confidence
        out, total, keep = join_parts(residual, passed, some, sure, slots, p, on_sum, silu)
        ctx.save_for_backward(total, keep, some, sure, slots, index, real)
        ctx.options = p, on_sum, silu
        ctx.kinds = tuple(None if each is None else (each.shape, each.dtype) for each in (passed, routed, confidence))
        result: Tensor = out
        return result

    @staticmethod
    @first_derivative("the fused end of a layer")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = join_parts_backward(grad, *ctx.saved_tensors, *ctx.options)
        outer, other, by_result, by_confidence = found
        passed, routed, confidence = ctx.kinds
        inner = outer if other.shape[0] == 0 else other
        return (
            outer,
            None if passed is None else inner.to(passed[1]),
            None if routed is None else by_result.reshape(routed[0]),
            None if confidence is None or by_confidence.shape[0] == 0 else by_confidence,
            *(None,) * 4,
        )


def slots_of(index: Tensor, real: Tensor | None, size: int) -> Tensor:
    """The inverse of an index: for each of `size` positions where it is in the index, or the length of the index."""
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
    """Mean and variance of every channel over the kept rows, and the number of these rows; 0 without rows."""
    count = keep.sum()
    present = x.where(keep, 0)
    mean = present.sum(0) / count.clamp(min=1)
    return mean, (present - mean).where(keep, 0).square().sum(0) / count.clamp(min=1), count


@fused
def batch_norm_scales(
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    mean_before: Tensor,
    var_before: Tensor,
    weight: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean and 1 / deviation that normalise rows, the latter also times the weight, and the share of one row in the
    moments. With fewer than two rows, the moments `before` are used, and that share is 0.
    """
    enough = count >= 2
    scale = (var.where(enough, var_before) + epsilon).rsqrt()
    factor = scale.clone() if weight is None else scale * weight.to(scale.dtype)
    return mean.where(enough, mean_before), scale, factor, enough.to(scale.dtype) / count.clamp(min=1)


@fused
def batch_norm_factors(
    total: Tensor, moment: Tensor, scale: Tensor, weight: Tensor | None, share: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The factors of the gradient of x: direct, through mean and variance; and the gradient of the weight."""
    factor = scale.clone() if weight is None else scale * weight.to(scale.dtype)
    return factor, -share * factor * total, -share * factor * scale.square() * moment, moment * scale


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
    """The gradient of x: directly, and through the mean and the variance of the kept rows."""
    return grad * factor + (by_mean + (x - mean) * by_variance).where(keep, 0)


class BatchNormFunction(torch.autograd.Function):
    """Batch norm over the kept rows, with its gradients; with fewer than two rows the moments `before` are used.

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
        center, scale, factor, share = batch_norm_scales(mean, var, count, *before, weight, epsilon)
        out = normalise(x, center, factor, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x, keep, center, scale, weight, share)
        ctx.set_materialize_grads(False)
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (weight, bias))
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    @first_derivative("the fused batch norm of a layer")
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, keep, center, scale, weight, share = ctx.saved_tensors
        total, moment = batch_norm_sums(grad, x, center)
        factor, by_mean, by_variance, weight_grad = batch_norm_factors(total, moment, scale, weight, share)
        x_grad = batch_norm_backward(grad, x, keep, center, factor, by_mean, by_variance)
        kinds = ctx.dtypes
        weight_grad = None if kinds[0] is None else weight_grad.to(kinds[0])
        return x_grad, None, weight_grad, None if kinds[1] is None else total.to(kinds[1]), None, None
