"""A routed layer: norm, backbone, routed sub-modules, bypass, residual."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.activation import RoutedState, SparseModularActivation, check_free, keeping_nothing
from sma.around import Residual
from sma.bypass import LinearBypass
from sma.capacity import Capacity, check_capacity
from sma.checks import (
    check_batch,
    check_causal,
    check_count,
    check_dtype,
    check_frame,
    check_instance,
    check_rate,
    check_sizes,
    check_state,
    require_seen,
)
from sma.decision import Decision
from sma.errors import InputError, quote
from sma.fused import fuses
from sma.glue import SiluDropout
from sma.memory import zeros
from sma.norms import NormSpec, check_norm
from sma.padding import inverse_order, move, right_padding
from sma.pytree import register_output
from sma.ragged import Ragged, rectangular
from sma.replay import check_selection
from sma.routers import RouterSpec, SMARouterSpec
from sma.spec import FrozenDict, FrozenMapping, Spec
from sma.submodule import MACs, State, SubModuleSpec, device_and_dtype
from sma.summary import settings

NAME = 100
"""Maximum number of characters in the name of a sub-module."""


class LayerSpec(Spec):
    """Spec of `RoutedLayer`."""

    backbone: SubModuleSpec | None = Field(
        default=None, description="sub-module that every token goes through first; null for none"
    )
    backbone_activation: Literal["silu", "none"] = Field(default="silu", description="applied to the backbone's result")
    router: RouterSpec = Field(default=SMARouterSpec(), description="decides which tokens run which sub-modules")
    modules: FrozenMapping[SubModuleSpec] = Field(
        default_factory=FrozenDict, description="the routed sub-modules, by names of your choice"
    )
    bypass: Literal["none", "linear", "identity"] = Field(
        default="linear", description="path around the sub-modules to the residual"
    )
    activation: Literal["silu", "none"] = Field(default="silu", description="applied after the residual")
    norm: NormSpec | None = Field(
        default=None, description="normalises before the layer or after its residual; null for none"
    )
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="probability of dropping a channel")
    dropout_on: Literal["modules", "sum"] = Field(
        default="modules", description="drop channels of the sub-modules' results, or of their sum with the bypass"
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not self.modules and self.bypass == "none":
            raise ValueError(
                "a layer without modules needs bypass='linear' or 'identity'; "
                "otherwise it passes its input on unchanged"
            )
        bad = [name for name in self.modules if not name.isidentifier()]
        if bad:
            raise ValueError(
                f"the module name {quote(bad[0])} must be a word of letters, digits and '_'; "
                "field paths are made of them"
            )
        long = [name for name in self.modules if len(name) > NAME]
        if long:
            raise ValueError(
                f"the module name {quote(long[0])} has {len(long[0]):,} characters; at most {NAME} are allowed"
            )
        check_free(self.modules, "module", ValueError)
        return self

    def build(self, width: int) -> "RoutedLayer":
        """Make the layer for tokens of `width` channels."""
        return RoutedLayer(self, width)

    def num_parameters(self, width: int) -> int:
        """Predict the number of parameters of the layer."""
        parts = [
            spec.num_parameters(width)
            for spec in (self.backbone, self.norm, *self.modules.values())
            if spec is not None
        ]
        router = self.router.num_parameters(width, len(self.modules)) if self.modules else 0
        return sum(parts) + router + (width * (width + 1) if self.bypass == "linear" else 0)

    def macs(self, width: int, tokens: int, rates: "float | dict[str, float]" = 1.0) -> MACs:
        """Predict the MACs of one row of `tokens` tokens, each sub-module on its share (rate) of them."""
        check_count(tokens, "tokens")
        by_name = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(self.modules, rates)
        for name in self.modules:
            if name not in by_name:
                raise InputError(f"there is no rate for {name!r}; give one for each of {', '.join(self.modules)}")
            check_rate(by_name[name], f"the rate of {name!r}")
        bypass = width * width if self.bypass == "linear" else 0
        count = len(self.modules)
        router = self.router.macs_per_token(width, count) if count else 0
        elementwise = self.router.elementwise_macs_per_token(width, count) if count else 0
        own = MACs(matmul=tokens * (bypass + router - elementwise), elementwise=tokens * elementwise)
        backbone = MACs() if self.backbone is None else self.backbone.macs(width, tokens)
        routed = [spec.macs(width, round(by_name[name] * tokens)) for name, spec in self.modules.items()]
        return MACs.sum([own, backbone, *routed])


@register_output
@dataclass(frozen=True)
class LayerState(State):
    """State of a layer for B streams.

    Attributes:
        seen: number of valid tokens of each row so far; None inside a model, which counts them.
        backbone: state of the backbone; None without one.
        routed: state of the router and the sub-modules; None without sub-modules.
    """

    seen: Int[Tensor, "B"] | None
    backbone: State | None
    routed: RoutedState | None


@register_output
@dataclass(frozen=True)
class LayerOutput:
    """Output of a layer.

    Attributes:
        hidden: the tokens after the layer; undefined at padding.
        decision: the routing decision; None in a layer without routed sub-modules.
        state: state of the streams after this call; None unless one was given.
    """

    hidden: Float[Tensor, "B L D"]
    decision: Decision | None = None
    state: LayerState | None = None


class RoutedLayer(nn.Module):
    r"""$n = \mathrm{norm}(x)$, $m = \mathrm{drop}(\mathrm{silu}(\mathrm{backbone}(n)))$,
    $y = \sum_m a c f(m) + \mathrm{bypass}(m)$, $\mathrm{out} = \mathrm{silu}(x + y)$.

    With a norm of place `post`, n = x and the norm follows the residual. Without a backbone m = n. The router reads m.
    With every token active at confidence 1 this is the dense layer; with none active only the bypass is left.

    Args:
        spec: the parts.
        width: channels of every token, D.

    Attributes:
        recompute: whether the activations of the backbone and the sub-modules are recomputed in backward, not kept.
            Norm, router and decision are not run again, so gradients are those of the decision that was made.

    Shape:
        x `(B, L, D)` in, hidden `(B, L, D)` out.

    Reference:
        Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", arXiv 2306.11197.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., LayerOutput]  # which nn.Module types as Any

    def __init__(self, spec: LayerSpec, width: int) -> None:
        super().__init__()
        self.spec = check_instance(spec, LayerSpec, "RoutedLayer got", "write LayerSpec(...), or load_spec for a file")
        check_count(width, "width", 1, ": channels of the layer")
        self.width = width
        self.recompute = False
        self.norm = spec.norm.build(width) if spec.norm is not None else None
        self.backbone = spec.backbone.build(width) if spec.backbone is not None else None
        self.bypass = LinearBypass(width) if spec.bypass == "linear" else None
        self.routed: SparseModularActivation | None = None
        if spec.modules:
            parts = {name: part.build(width) for name, part in spec.modules.items()}
            drop = spec.dropout if spec.dropout_on == "modules" else 0.0
            self.routed = SparseModularActivation(spec.router.build(width, list(parts)), parts, drop)

    @property
    def causal(self) -> bool:
        """Whether no part looks ahead."""
        return (self.backbone is None or self.backbone.causal) and (self.routed is None or self.routed.causal)

    def extra_repr(self) -> str:
        return settings(self)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LayerState:
        """Make the initial state of `batch_size` streams.

        Args:
            batch_size: streams, B.
            device: default the device of the parameters.
            dtype: dtype of the tokens in the state; default the dtype of the parameters.

        Raises:
            StateError: a part is not causal, or a batch norm is in training mode.
        """
        self.check_causal()
        check_count(batch_size, "batch_size")
        device, dtype = device_and_dtype(self, device, dtype)
        seen = zeros((batch_size,), "the state of a layer", dtype=torch.int64, device=device)
        backbone = None if self.backbone is None else self.backbone.init_state(batch_size, device=device, dtype=dtype)
        routed = None if self.routed is None else self.routed.init_state(batch_size, device=device, dtype=dtype)
        return LayerState(seen, backbone, None if routed is None else replace(routed, seen=None))

    def check_causal(self) -> None:
        """Check that a stream can be continued.

        Raises:
            StateError: a part is not causal, or a batch norm is in training mode; the message names it.
        """
        check_norm("norm", self.norm)
        for name, part in (("norm", self.norm), ("backbone", self.backbone)):
            if part is not None:
                check_causal(part, name)
        if self.routed is not None:
            self.routed.check_causal()

    def check(self, state: LayerState) -> None:
        """Check that a state belongs to these parts.

        Raises:
            StateError: it belongs to a layer with other parts, so that some parts would silently restart.
        """
        has, wanted = (
            [name for name in ("backbone", "routed") if getattr(part, name) is not None] for part in (state, self)
        )
        check_sizes(self, has, wanted, "parts")
        if self.routed is not None and state.routed is not None:
            self.routed.check(state.routed)

    def forward(
        self,
        x_BLD: Float[Tensor, "B L D"],
        valid: Bool[Tensor, "B L"] | Ragged | None = None,
        state: LayerState | None = None,
        capacity: Capacity | None = None,
        decision: Decision | Bool[Tensor, "B L M"] | None = None,
    ) -> LayerOutput:
        """Run the layer on a batch.

        Args:
            x_BLD: tokens.
            valid: False at padding, on whichever side; None where there is none. A model passes the `Ragged` of `align`
                instead: it has zeroed the padding, moved it to the right, and counts the tokens of its streams.
            state: state of the streams; None at their beginning.
            capacity: maximum number of tokens of a row per sub-module, which runs on the earliest active ones: an
                integer, a float in (0, 1] as a share of the valid tokens, a `PerBatch` for all rows, or a mapping of
                these by sub-module. No shape then depends on the data. None sets no maximum.
            decision: a decision to replay, or its mask, see `SparseModularActivation.forward`, in the order of the
                tokens; None: the router's.

        Raises:
            InputError: the shapes or dtypes do not fit, the capacity is impossible, or a norm of torch has replaced
                ours.
            StateError: the state does not fit, the layer cannot continue a stream, or a capacity comes with a state.
        """
        if isinstance(valid, Ragged):
            check_frame(x_BLD, valid)
            return self._run(x_BLD, valid, state, capacity, self._selected(decision, x_BLD))
        check_batch(x_BLD, valid, self.width)
        check_dtype(self, x_BLD)
        check_capacity(capacity, self.routed_names, state)
        selected = self._selected(decision, x_BLD)
        seen = None
        if state is not None:
            self.check_causal()
            self.check(check_state(self, state, LayerState, x_BLD.shape[0]))
            seen = require_seen(self, state.seen)
        x_BLD, frame, inverse = align(x_BLD, valid, seen, static=capacity is not None)
        selected = selected if selected is None or inverse is None else move(selected, inverse_order(inverse))
        output = self._run(x_BLD, frame, state, capacity, selected)
        if output.state is not None and seen is not None:
            output = replace(output, state=replace(output.state, seen=seen + frame.lengths))
        return restore(output, inverse)

    def _selected(self, decision: Decision | Tensor | None, x_BLD: Tensor) -> Tensor | None:
        return None if decision is None else check_selection(decision, self.routed_names, x_BLD, "decision")

    def _run(
        self,
        x_BLD: Tensor,
        frame: Ragged,
        state: LayerState | None,
        capacity: Capacity | None,
        selected: Tensor | None,
    ) -> LayerOutput:
        valid = frame.mask.reshape(x_BLD.shape[:2]) if frame.holes else None
        norm, routed = self.norm, self.routed
        check_norm("norm", norm)
        first = norm is not None and self.spec.norm is not None and self.spec.norm.place == "pre"
        normal = norm(x_BLD, valid) if norm is not None and first else x_BLD
        mixed, backbone_state = keeping_nothing(self.recompute, self._backbone, normal, frame, state)
        spec, on_sum = self.spec, self.training and self.spec.dropout_on == "sum"
        dropout = spec.dropout if on_sum else 0.0
        residual = Residual(x_BLD, self.bypass, spec.bypass == "identity", spec.activation == "silu", dropout)
        if routed is None:
            out, decision, routed_state = keeping_nothing(self.recompute, residual.without_modules, mixed), None, None
        else:
            positions, before = frame.positions.reshape(x_BLD.shape[:2]), None if state is None else state.routed
            # Wrappers of a part need no argument `decision` unless a decision is replayed.
            replayed = {} if selected is None else {"decision": selected}
            around = residual.around(len(routed.submodules), self.recompute)
            result = routed(
                mixed, valid=valid, positions=positions, state=before, capacity=capacity, around=around, **replayed
            )
            out, decision, routed_state = result.values, result.decision, result.state
        new = None if state is None else LayerState(state.seen, backbone_state, routed_state)
        return LayerOutput(out if norm is None or first else norm(out, valid), decision, new)

    @property
    def routed_names(self) -> tuple[str, ...]:
        """The routed sub-modules, in the order of a decision's last axis."""
        return () if self.routed is None else self.routed.router.names

    def _backbone(self, x_BLD: Tensor, frame: Ragged, state: LayerState | None) -> tuple[Tensor, State | None]:
        backbone = self.backbone
        if backbone is None:
            return x_BLD, None
        values, after = backbone(frame.with_values(x_BLD.flatten(0, 1)), None if state is None else state.backbone)
        mixed = values.reshape(x_BLD.shape)
        dropout = self.spec.dropout if self.training else 0.0
        if self.spec.backbone_activation == "silu" and dropout and fuses(mixed):
            dropped: Tensor = SiluDropout.apply(mixed, dropout)
            return dropped, after
        if self.spec.backbone_activation == "silu":
            mixed = nn.functional.silu(mixed)
        return nn.functional.dropout(mixed, dropout) if dropout else mixed, after


def align(
    x_BLD: Tensor, valid: Tensor | None, seen: Tensor | None = None, static: bool = False
) -> tuple[Tensor, Ragged, Int[Tensor, "B L"] | None]:
    """Zero the padding of a batch and move it to the right.

    Args:
        x_BLD: the batch.
        valid: False at padding.
        seen: number of tokens in earlier chunks of each row, where its positions start; default 0.
        static: move the padding without a check of where it is, so that no control flow depends on the data.

    Returns:
        the batch; its layout as rectangular tokens without values; and the index of each original position in the new
        batch, for `restore`, or None where nothing was moved.
    """
    positions = None if seen is None else seen[:, None] + torch.arange(x_BLD.shape[1], device=x_BLD.device)
    if valid is None:
        return x_BLD, rectangular(x_BLD.new_empty(*x_BLD.shape[:2], 0), None, positions), None
    # The gradient of a weight multiplies padding by 0, and 0 x NaN is NaN.
    x_BLD = x_BLD.where(valid[..., None], 0)
    lengths, order = right_padding(valid, static or valid.is_meta)
    inverse = None
    if order is not None:
        x_BLD = move(x_BLD, order)
        inverse = inverse_order(order)
    return x_BLD, rectangular(x_BLD.new_empty(*x_BLD.shape[:2], 0), lengths, positions), inverse


def restore(output: LayerOutput, inverse: Int[Tensor, "B L"] | None) -> LayerOutput:
    """Undo the move of `align`."""
    if inverse is None:
        return output
    decision = output.decision.move(inverse) if output.decision is not None else None
    return replace(output, hidden=move(output.hidden, inverse), decision=decision)
