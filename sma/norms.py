"""Norms over the channels of a token, and batch norm over the valid tokens."""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, distributed, nn

from sma.errors import InputError
from sma.fused import fuses
from sma.glue import BatchNormFunction, RMSNormFunction
from sma.spec import Spec, register
from sma.summary import settings


class NormSpec(Spec):
    """Root of the norm kinds."""

    family: ClassVar[str] = "norm"
    kind: str
    place: Literal["pre", "post"] = Field(default="pre", description="before the layer, or after its residual")
    epsilon: float = Field(default=1e-5, gt=0.0, lt=1.0, description="added to the variance or the mean square")

    def build(self, width: int) -> "Norm":
        """Make the norm of `width` channels."""
        raise TypeError(f"{type(self).__name__} must define build(self, width)")

    def num_parameters(self, width: int) -> int:
        """Predict the number of parameters of the norm."""
        raise TypeError(f"{type(self).__name__} must define num_parameters(self, width)")


class Norm(nn.Module):
    """Base of the norms of a layer."""

    to_stream: ClassVar[str] = "call model.eval() first"

    @property
    def causal(self) -> bool:
        """Whether the result at a token depends on no other token."""
        return True

    def extra_repr(self) -> str:
        return settings(self)

    def forward(self, x: Float[Tensor, "*N D"], valid: Bool[Tensor, "*N"] | None = None) -> Float[Tensor, "*N D"]:
        """Normalise every token.

        Args:
            x: tokens.
            valid: False at padding; only norms over the batch need it.
        """
        raise TypeError(f"{type(self).__name__} must define forward(self, x, valid=None)")


@register
class LayerNormSpec(NormSpec):
    """Spec of `LayerNorm`."""

    kind: Literal["layer_norm"] = "layer_norm"
    affine: bool = Field(default=True, description="learn a scale and an offset per channel")

    def build(self, width: int) -> "LayerNorm":
        return LayerNorm(self, width)

    def num_parameters(self, width: int) -> int:
        return 2 * width if self.affine else 0


class LayerNorm(Norm):
    r"""$(x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon} \cdot w + b$ over the channels of a token."""

    def __init__(self, spec: LayerNormSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.ones(width)) if spec.affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if spec.affine else None

    def forward(self, x: Float[Tensor, "*N D"], valid: Bool[Tensor, "*N"] | None = None) -> Float[Tensor, "*N D"]:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.spec.epsilon)


@register
class RMSNormSpec(NormSpec):
    """Spec of `RMSNorm`."""

    kind: Literal["rms_norm"] = "rms_norm"
    affine: bool = Field(default=True, description="learn a scale per channel")

    def build(self, width: int) -> "RMSNorm":
        return RMSNorm(self, width)

    def num_parameters(self, width: int) -> int:
        return width if self.affine else 0


class RMSNorm(Norm):
    r"""$x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot w$ over the channels of a token.

    Reference:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
    """

    def __init__(self, spec: RMSNormSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.ones(width)) if spec.affine else None

    def forward(self, x: Float[Tensor, "*N D"], valid: Bool[Tensor, "*N"] | None = None) -> Float[Tensor, "*N D"]:
        if self.weight is not None and fuses(x):
            fused: Tensor = RMSNormFunction.apply(x, self.weight, self.spec.epsilon)
            return fused
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, x.shape[-1:], weight, self.spec.epsilon)


@register
class ScaleNormSpec(NormSpec):
    """Spec of `ScaleNorm`."""

    kind: Literal["scale_norm"] = "scale_norm"
    affine: bool = Field(default=True, description="learn the factor g; false sets g = 1")

    def build(self, width: int) -> "ScaleNorm":
        return ScaleNorm(self, width)

    def num_parameters(self, width: int) -> int:
        return int(self.affine)


class ScaleNorm(Norm):
    r"""$g \, x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$ with one learned factor g.

    Reference:
        Nguyen and Salazar, "Transformers without Tears", arXiv 1910.05895; the mean instead of the sum is the SeqBoat
        authors'.
    """

    def __init__(self, spec: ScaleNormSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.scale = nn.Parameter(torch.ones(1)) if spec.affine else None

    def forward(self, x: Float[Tensor, "*N D"], valid: Bool[Tensor, "*N"] | None = None) -> Float[Tensor, "*N D"]:
        if self.scale is not None and fuses(x):
            fused: Tensor = RMSNormFunction.apply(x, self.scale, self.spec.epsilon)
            return fused
        normal = nn.functional.rms_norm(x, x.shape[-1:], None, self.spec.epsilon)
        return normal if self.scale is None else normal * self.scale.to(x.dtype)


@register
class BatchNormSpec(NormSpec):
    """Spec of `BatchNorm`."""

    kind: Literal["batch_norm"] = "batch_norm"
    momentum: float = Field(
        default=0.1, gt=0.0, le=1.0, description="weight of the newest batch in the running statistics"
    )
    affine: bool = Field(default=True, description="learn a scale and an offset per channel")
    synchronized: bool = Field(
        default=False, description="in training, take the statistics over the batches of all processes together"
    )

    def build(self, width: int) -> "BatchNorm":
        return BatchNorm(self, width)

    def num_parameters(self, width: int) -> int:
        return 2 * width if self.affine else 0


class _SumOverProcesses(torch.autograd.Function):
    """Differentiable sum of a tensor over all processes; that of torch is deprecated without a public successor."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, grad_outputs[0])


class BatchNorm(Norm, nn.BatchNorm1d):
    r"""$(x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon} \cdot w + b$ per channel, over all valid tokens of the
    batch.

    Training uses the statistics of the batch and updates the running statistics (with the unbiased variance, as
    `torch.nn.BatchNorm1d`); evaluation uses the running statistics. A batch of fewer than two valid tokens has no
    variance: training then uses the running statistics too, and does not update them.

    With `synchronized`, processes that train together normalise by the statistics of all their batches, as one process
    with the whole batch would. Every process must then call the norm in training, as under DistributedDataParallel.

    As a subclass of `BatchNorm1d` it is found by `torch.optim.swa_utils.update_bn` and by Lightning's averaging.
    update_bn passes no mask, so padding would count: use `sma.update_statistics` instead. `convert_sync_batchnorm`
    replaces the norm by torch's `SyncBatchNorm`, which takes no mask; the layer then raises an error that names
    `synchronized`.
    """

    @property
    def causal(self) -> bool:
        """False in training, where the result at a token depends on the whole batch."""
        return not self._of_the_batch

    def __init__(self, spec: BatchNormSpec, width: int) -> None:
        super().__init__(width, spec.epsilon, spec.momentum, spec.affine)
        self.spec = spec
        # Used only with `momentum = None`, with which the tools above request the mean of all batches. Not saved.
        self.register_buffer("num_batches_tracked", self.num_batches_tracked, persistent=False)

    @property
    def _of_the_batch(self) -> bool:
        # torch.func.replace_all_batch_norm_modules_ removes the running statistics.
        return self.training or self.running_mean is None

    def forward(self, x: Float[Tensor, "*N D"], valid: Bool[Tensor, "*N"] | None = None) -> Float[Tensor, "*N D"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
        before = (wide.new_zeros(()), wide.new_ones(()))
        if self.running_mean is not None and self.running_var is not None:
            before = (self.running_mean.to(wide.dtype), self.running_var.to(wide.dtype))
        if not self._of_the_batch:
            return self._normalise(wide, *before).reshape(x.shape).to(x.dtype)
        keep = torch.ones_like(wide[:, :1], dtype=torch.bool) if valid is None else valid.reshape(-1, 1)
        if fuses(x) and not self._shares_statistics:
            normal, mean, var, count = BatchNormFunction.apply(
                wide, keep, self.weight, self.bias, before, self.spec.epsilon
            )
            self._update(mean, var * count / (count - 1).clamp(min=1), count >= 2)
            return normal.reshape(x.shape).to(x.dtype)
        count = self._over_processes(keep.sum())
        present = wide.where(keep, 0)
        mean = self._over_processes(present.sum(0)) / count.clamp(min=1)
        var = self._over_processes((present - mean).where(keep, 0).square().sum(0)) / count.clamp(min=1)
        enough = count >= 2
        self._update(mean, var * count / (count - 1).clamp(min=1), enough)
        normal = self._normalise(wide, mean.where(enough, before[0]), var.where(enough, before[1]))
        return normal.reshape(x.shape).to(x.dtype)

    @property
    def _shares_statistics(self) -> bool:
        return self.spec.synchronized and distributed.is_available() and distributed.is_initialized()

    def _over_processes(self, total: Tensor) -> Tensor:
        if not self._shares_statistics:
            return total
        summed: Tensor = _SumOverProcesses.apply(total)
        return summed

    def _normalise(self, wide: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = (var + self.spec.epsilon).rsqrt()
        if self.weight is None or self.bias is None:
            return (wide - mean) * scale
        return (wide - mean) * (scale * self.weight.to(wide.dtype)) + self.bias.to(wide.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, enough: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        weight = enough * _first_pass(mean)
        self.num_batches_tracked.add_(weight.long())
        weight = weight / self.num_batches_tracked.clamp(min=1) if self.momentum is None else weight * self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(var.to(self.running_var.dtype), weight)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load like any module; `BatchNorm1d` would require the counter."""
        nn.Module._load_from_state_dict(self, *args)


def check_norm(name: str, norm: nn.Module | None) -> None:
    """Check that a norm was not replaced by a norm of torch.

    Raises:
        InputError: it was; the message names an alternative.
    """
    if norm is None or isinstance(norm, Norm) or not type(norm).__module__.startswith("torch.nn.modules."):
        return
    what = f"{name!r} is torch's {type(norm).__name__}, which takes no mask of the valid tokens"
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise InputError(
            f"{what}; build the model with norm: {{kind: batch_norm, synchronized: true}} for statistics over all "
            "processes, without convert_sync_batchnorm"
        )
    raise InputError(f"{what}; use one of sma.norms, a subclass of sma.norms.Norm, or None")


# A custom operator, because a compiler would freeze the value from the time of compilation.
@torch.library.custom_op("sma::first_pass", mutates_args=())
def _first_pass(like: Tensor) -> Tensor:
    """1; or 0 where activation checkpointing repeats the forward pass in backward, as that batch has been counted."""
    return like.new_ones(()) if torch._C._current_graph_task_id() == -1 else like.new_zeros(())


@_first_pass.register_fake
def _(like: Tensor) -> Tensor:
    return like.new_empty(())
