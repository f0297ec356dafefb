"""A routed layer: norm, backbone, routed sub-modules, bypass, residual."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.activation import SparseModularActivation, check_batch, name_is_taken
from sma.decision import Decision
from sma.errors import StateError
from sma.initial import reset_linear_
from sma.norms import NormSpec
from sma.pytree import register_output
from sma.ragged import Ragged, move, rectangular, right_padding
from sma.routers import RouterSpec, SMARouterSpec
from sma.spec import FrozenDict, FrozenMapping, Spec
from sma.submodule import Operations, SubModuleSpec


class LayerSpec(Spec):
    """Spec of `RoutedLayer`."""

    backbone: SubModuleSpec | None = Field(default=None, description="sub-module that every token goes through first; null for none")
    backbone_activation: Literal["silu", "none"] = Field(default="silu", description="applied to the backbone's result")
    router: RouterSpec = Field(default=SMARouterSpec(), description="decides which tokens run which sub-modules")
    modules: FrozenMapping[SubModuleSpec] = Field(default_factory=FrozenDict, description="the routed sub-modules, by names of your choice")
    bypass: Literal["none", "linear", "identity"] = Field(default="linear", description="what reaches the residual past the sub-modules")
    activation: Literal["silu", "none"] = Field(default="silu", description="applied after the residual")
    norm: NormSpec | None = Field(default=None, description="normalises before the layer or after its residual; null for none")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="probability of dropping a channel")
    dropout_on: Literal["modules", "sum"] = Field(
        default="modules", description="drop channels of the sub-modules' results, or of their sum with the bypass"
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.modules and self.bypass == "none":
            raise ValueError("a layer without modules needs bypass='linear' or 'identity'; otherwise it passes its input on unchanged")
        bad = [name for name in self.modules if not name.isidentifier()]
        if bad:
            raise ValueError(f"the module name {bad[0]!r} must be a word of letters, digits and '_'; field paths are made of them")
        taken = [name for name in self.modules if name_is_taken(name)]
        if taken:
            raise ValueError(f"the module name {taken[0]!r} is taken by torch.nn.ModuleDict; choose another, such as {taken[0] + '_'!r}")
        return self

    def build(self, width: int) -> "RoutedLayer":
        """Make the layer for tokens of `width` channels."""
        return RoutedLayer(self, width)

    def num_parameters(self, width: int) -> int:
        """Predict the number of parameters of the layer."""
        parts = [spec.num_parameters(width) for spec in (self.backbone, self.norm, *self.modules.values()) if spec is not None]
        router = self.router.num_parameters(width, len(self.modules)) if self.modules else 0
        return sum(parts) + router + (width * (width + 1) if self.bypass == "linear" else 0)

    def operations(self, width: int, tokens: int, rates: "float | dict[str, float]" = 1.0) -> Operations:
        """Predict the multiply-adds of one row of `tokens` tokens, each sub-module on its share (rate) of them."""
        total = Operations()
        if self.backbone is not None:
            total = total.plus(self.backbone.operations(width, tokens))
        if self.bypass == "linear":
            total = total.plus(Operations(tokens * width * width))
        if self.modules:
            total = total.plus(Operations(tokens * self.router.operations(width, len(self.modules))))
        for name, spec in self.modules.items():
            rate = rates if isinstance(rates, float | int) else rates[name]
            total = total.plus(spec.operations(width, round(rate * tokens)))
        return total


@register_output
@dataclass(frozen=True)
class LayerOutput:
    """What a layer returns.

    Attributes:
        hidden: the tokens after the layer; meaningless at padding.
        decision: who ran where; None in a layer without routed sub-modules.
        state: where the stream stands; None unless one was given.
    """

    hidden: Float[Tensor, "B L D"]
    decision: Decision | None = None
    state: Any = None


class RoutedLayer(nn.Module):
    r"""$n = \mathrm{norm}(x)$, $m = \mathrm{drop}(\mathrm{silu}(\mathrm{backbone}(n)))$,
    $y = \sum_m a c f(m) + \mathrm{bypass}(m)$, $\mathrm{out} = \mathrm{silu}(x + y)$.

    With a norm of place `post`, n = x and the norm follows the residual. Without a backbone m = n. The router reads m. With
    every token active at confidence 1 it is the dense layer; with none active the bypass alone.

    Args:
        spec: the parts.
        width: channels of every token, D.

    Shape:
        x `(B, L, D)` in, hidden `(B, L, D)` out.

    Reference:
        Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", arXiv 2306.11197.
    """

    def __init__(self, spec: LayerSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.width = width
        self.norm = spec.norm.build(width) if spec.norm is not None else None
        self.backbone = spec.backbone.build(width) if spec.backbone is not None else None
        self.bypass = nn.Linear(width, width) if spec.bypass == "linear" else None
        self.routed: SparseModularActivation | None = None
        if spec.modules:
            parts = {name: part.build(width) for name, part in spec.modules.items()}
            drop = spec.dropout if spec.dropout_on == "modules" else 0.0
            self.routed = SparseModularActivation(spec.router.build(width, list(parts)), parts, drop)
        if self.bypass is not None:
            reset_linear_(self.bypass)

    @property
    def causal(self) -> bool:
        """Whether no part looks ahead."""
        return (self.backbone is None or self.backbone.causal) and (self.routed is None or self.routed.causal)

    def forward(self, x_BLD: Float[Tensor, "B L D"], valid: Bool[Tensor, "B L"] | None = None, state: Any = None) -> LayerOutput:
        """Run the layer on a batch.

        Args:
            x_BLD: tokens.
            valid: False at padding, on whichever side; None where there is none.
            state: not supported yet; must be None.

        Raises:
            InputError: the shapes or dtypes do not fit.
            StateError: a state was given.
        """
        if state is not None:
            raise StateError("RoutedLayer does not support streaming yet; run whole sequences with state=None")
        check_batch(x_BLD, valid, self.width)
        x_BLD, frame, places = align(x_BLD, valid)
        return restore(self.run(x_BLD, frame), places)

    def run(self, x_BLD: Float[Tensor, "B L D"], frame: Ragged) -> LayerOutput:
        """Run the layer on a batch that is padded on the right; `frame` is `rectangular` of it."""
        valid = frame.mask.unflatten(0, x_BLD.shape[:2]) if frame.holes else None
        positions = frame.positions.unflatten(0, x_BLD.shape[:2])
        before, after = (self.norm, None) if self._norm_first else (None, self.norm)
        mixed = self._backbone(x_BLD if before is None else before(x_BLD, valid), frame)
        sum_TD = self._bypass(mixed.flatten(0, 1), x_BLD.dtype)
        decision = None
        if self.routed is not None:
            sum_TD, decision = self.routed.add_to(sum_TD, mixed, mixed, valid, positions)
        if self.spec.dropout_on == "sum":
            sum_TD = nn.functional.dropout(sum_TD, self.spec.dropout, self.training)
        # In place, as the sub-modules' results were: a fresh tensor of this size costs more than the sum.
        out = sum_TD.add_(x_BLD.flatten(0, 1)).unflatten(0, x_BLD.shape[:2])
        if self.spec.activation == "silu":
            out = nn.functional.silu(out)
        return LayerOutput(out if after is None else after(out, valid), decision)

    @property
    def _norm_first(self) -> bool:
        return self.spec.norm is not None and self.spec.norm.place == "pre"

    def _backbone(self, x_BLD: Tensor, frame: Ragged) -> Tensor:
        if self.backbone is None:
            return x_BLD
        mixed = self.backbone(frame.with_values(x_BLD.flatten(0, 1)))[0].unflatten(0, x_BLD.shape[:2])
        if self.spec.backbone_activation == "silu":
            mixed = nn.functional.silu(mixed)
        return nn.functional.dropout(mixed, self.spec.dropout, self.training)

    def _bypass(self, mixed_TD: Tensor, dtype: torch.dtype) -> Tensor:
        """What passes the sub-modules by, in a contiguous tensor of its own and in the dtype of the residual stream."""
        if self.bypass is not None:
            return self.bypass(mixed_TD).to(dtype)
        if self.spec.bypass == "identity":
            return mixed_TD.to(dtype, memory_format=torch.contiguous_format, copy=True)
        return torch.zeros_like(mixed_TD, dtype=dtype, memory_format=torch.contiguous_format)


def align(x_BLD: Tensor, valid: Tensor | None) -> tuple[Tensor, Ragged, Int[Tensor, "B L"] | None]:
    """Zero the padding of a batch and move it to the right.

    Returns:
        the batch, the same as rectangular tokens, and where `restore` finds each place; None where nothing was moved.
    """
    if valid is None:
        return x_BLD, rectangular(x_BLD), None
    # Zeros, because the gradient of a weight multiplies what stands at padding by a gradient of 0: NaN there would survive.
    x_BLD = x_BLD.where(valid[..., None], 0)
    lengths, order = right_padding(valid)
    places = None
    if order is not None:
        x_BLD, places = move(x_BLD, order), order.argsort(1)
    return x_BLD, rectangular(x_BLD, lengths), places


def restore(output: LayerOutput, places: Int[Tensor, "B L"] | None) -> LayerOutput:
    """Undo the move of `align`."""
    if places is None:
        return output
    decision = output.decision.move(places) if output.decision is not None else None
    return replace(output, hidden=move(output.hidden, places), decision=decision)
