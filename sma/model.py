"""Models: an encoder, layers, and a head, built from one spec."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from sma.capacity import Capacity, check_capacity
from sma.checks import (
    check_causal,
    check_count,
    check_device,
    check_dtype,
    check_instance,
    check_sizes,
    check_state,
    check_tensor,
    check_valid,
)
from sma.containers import list_of
from sma.decision import Decision
from sma.encoders import EncoderSpec
from sma.errors import InputError, SpecError, StateError, quote
from sma.formats import rename
from sma.heads import HeadSpec
from sma.init import seeded
from sma.layer import LayerSpec, RoutedLayer, align
from sma.memory import FEWER, check_memory, zeros
from sma.model_output import ModelOutput, ModelState
from sma.norms import NormSpec, check_norm
from sma.padding import inverse_order, move
from sma.positions import Sinusoid
from sma.repeat import Layers, RepeatSpec
from sma.replay import check_selections
from sma.routers import RouterSpec
from sma.routers.shared import check_alike, place_routers
from sma.spec import Spec, load_spec, register
from sma.submodule import MACs, device_and_dtype
from sma.summary import settings


class ModelSpec(Spec):
    """Root of the model kinds."""

    family: ClassVar[str] = "model"
    rows_per_sample: ClassVar[int] = 1
    """Number of rows of the inputs per sample, which has one row of scores."""
    scores_positions: ClassVar[bool] = False
    """Whether the logits score the next token at every position; the module is then a `LanguageModel`."""

    kind: str
    width: int = Field(ge=1, description="channels of every token, D")
    encoder: EncoderSpec = Field(description="from inputs to vectors")
    sinusoid: bool = Field(
        default=False, description="add a learned multiple of sinusoids of the position after the encoder"
    )
    embedding_dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="probability of dropping a channel after the encoder"
    )
    layers: Layers = Field(description="a list of layers, or {repeat: …, layer: …}")
    shared_router: bool = Field(
        default=False, description="all layers share one router and its parameters; score biases are per layer"
    )
    final_norm: NormSpec | None = Field(
        default=None,
        description="norm after the last layer; null: a norm like the last layer's own if that is of place 'pre', "
        "else none",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.shared_router:
            check_alike(self.routers)
        if self.sinusoid and self.width % 2:
            raise ValueError(
                f"width={self.width} must be even with sinusoid=true: half of the channels are sines, half cosines"
            )
        return self

    def build(self) -> "SequenceModel":
        """Make the model, with weights from the global random state."""
        return SequenceModel(self)

    @property
    def head_spec(self) -> HeadSpec | None:
        """The head; None in kinds without one."""
        return None

    @property
    def head_width(self) -> int:
        """Number of channels that the head reads."""
        return self.width

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The specs of all layers, with repeats expanded."""
        return self.layers.expanded if isinstance(self.layers, RepeatSpec) else self.layers

    @property
    def routers(self) -> list[tuple[RouterSpec, tuple[str, ...]]]:
        """The router and the names of the sub-modules of every routed layer."""
        return [(layer.router, tuple(layer.modules)) for layer in self.layer_specs if layer.modules]

    @property
    def final_norm_spec(self) -> NormSpec | None:
        """The norm after the last layer, with the default of null applied."""
        if self.final_norm is not None:
            return self.final_norm
        norm = self.layer_specs[-1].norm if self.layer_specs else None
        return norm if norm is not None and norm.place == "pre" else None

    def num_parameters(self) -> int:
        """Predict the number of parameters of the model."""
        parts = (self.encoder, self.final_norm_spec, *self.layer_specs)
        head = self.head_spec.num_parameters(self.head_width) if self.head_spec is not None else 0
        shared = [router.num_parameters(self.width, len(names)) for router, names in self.routers[1:]]
        own = sum(part.num_parameters(self.width) for part in parts if part is not None)
        return own + head + int(self.sinusoid) - sum(shared) * self.shared_router

    def macs(self, length: int, rates: float | dict[str, float] = 1.0) -> MACs:
        """Predict the MACs of the layers on one row of `length` tokens, at these activation rates."""
        check_count(length, "length")
        return MACs.sum(layer.macs(self.width, length, rates) for layer in self.layer_specs)


@register
class SequenceEncoderSpec(ModelSpec):
    """A model without a head: hidden states and their mean."""

    kind: Literal["sequence_encoder"] = "sequence_encoder"


@register
class SequenceClassifierSpec(ModelSpec):
    """A model that scores whole rows."""

    kind: Literal["sequence_classifier"] = "sequence_classifier"
    head: HeadSpec = Field(description="from the mean of a row's tokens to scores")

    @property
    def head_spec(self) -> HeadSpec | None:
        return self.head


@register
class LanguageModelSpec(ModelSpec):
    """A causal model that scores the next token at every position; its output is tied to the embedding."""

    kind: Literal["language_model"] = "language_model"
    scores_positions: ClassVar[bool] = True

    @model_validator(mode="after")
    def _predicts(self) -> Self:
        if not self.encoder.scores_tokens:
            raise ValueError(
                f"the encoder kind {self.encoder.kind!r} does not score tokens, as the output of a language model "
                "must; use 'token_embedding'"
            )
        for index, layer in enumerate(self.layer_specs):
            for name, part in {"backbone": layer.backbone, **layer.modules}.items():
                if getattr(part, "bidirectional", False):
                    raise ValueError(
                        f"layer {index} {name!r} sees the token that is to be predicted; set its bidirectional=false"
                    )
        return self

    def build(self) -> "LanguageModel":
        return LanguageModel(self)


class SequenceModel(nn.Module):
    """Encoder, layers, final norm, mean over the valid tokens, head.

    Args:
        spec: the parts.

    Shape:
        inputs `(B, L)` or `(B, L, F)`, as the encoder takes them, in; a `ModelOutput` out.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., ModelOutput]  # which nn.Module types as Any

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = check_instance(spec, ModelSpec, "SequenceModel got", "sma.build also takes a mapping or a file")
        self.encoder = spec.encoder.build(spec.width)
        self.sinusoid = Sinusoid(spec.width) if spec.sinusoid else None
        self.layers = list_of(layer.build(spec.width) for layer in spec.layer_specs)
        routed = {index: layer.routed for index, layer in enumerate(self.routed_layers) if layer.routed is not None}
        place_routers({index: part.router for index, part in routed.items()}, share=spec.shared_router)
        self.final_norm = spec.final_norm_spec.build(spec.width) if spec.final_norm_spec is not None else None
        self.head = spec.head_spec.build(spec.head_width) if spec.head_spec is not None else None

    @property
    def causal(self) -> bool:
        """Whether no layer looks ahead."""
        return all(layer.causal for layer in self.routed_layers)

    @property
    def routed_layers(self) -> list[RoutedLayer]:
        """The layers without wrappers, such as of activation checkpointing: for their attributes, not for calls."""
        return [next(part for part in layer.modules() if isinstance(part, RoutedLayer)) for layer in self.layers]

    def extra_repr(self) -> str:
        return settings(self)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """Make the initial state of `batch_size` streams.

        Args:
            batch_size: streams, B.
            device: default the device of the parameters.
            dtype: dtype of the tokens in the state; default the dtype of the parameters. Recurrent states are never
                below float32.

        Raises:
            StateError: a part is not causal, or a batch norm is in training mode; the message names layer and part.
        """
        self._check_causal()
        check_count(batch_size, "batch_size")
        device, dtype = device_and_dtype(self, device, dtype)
        if device.type != "meta":
            # The size of the whole state, from the meta device, before a part of it takes memory.
            needed = self.init_state(batch_size, device="meta", dtype=dtype).num_bytes
            check_memory(needed, f"the state for batch_size={batch_size}", device=device, error=InputError, hint=FEWER)
        seen = zeros((batch_size,), "the state of a model", dtype=torch.int64, device=device)
        total = zeros((batch_size, self.spec.width), "the state of a model", dtype=torch.float64, device=device)
        layers = (layer.init_state(batch_size, device=device, dtype=dtype) for layer in self.routed_layers)
        return ModelState(seen, total, tuple(replace(state, seen=None) for state in layers))

    def _check_causal(self) -> None:
        self._each_layer(lambda layer, index: layer.check_causal())
        check_norm("final_norm", self.final_norm)
        if self.final_norm is not None:
            check_causal(self.final_norm, "final_norm")

    def _each_layer(self, check: Callable[[RoutedLayer, int], None]) -> None:
        for index, layer in enumerate(self.routed_layers):
            try:
                check(layer, index)
            except StateError as error:
                raise StateError(f"layer {index} {error}") from None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, after weights of older files are renamed to their present names."""
        rename(state_dict, self.state_dict(), prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def recompute_activations(self, enabled: bool = True) -> Self:
        """Trade time for memory in training: recompute the activations of each layer in backward, except its input,
        norm and decision.

        Gradients are the same, and no router runs twice; see `RoutedLayer.recompute`. The setting is not part of the
        spec and is not saved.
        """
        for layer in self.routed_layers:
            layer.recompute = enabled
        return self

    def forward(
        self,
        inputs: Tensor,
        valid: Bool[Tensor, "B L"] | None = None,
        state: ModelState | None = None,
        capacity: Capacity | None = None,
        decisions: Sequence[Decision | Tensor] | None = None,
    ) -> ModelOutput:
        """Run the model on a batch of whole rows or, with a state, of the next chunk of each stream.

        Args:
            inputs: token ids or numbers.
            valid: False at padding, on whichever side; None where there is none.
            state: state of the streams; None for whole rows.
            capacity: maximum number of tokens of a row per sub-module, which runs on the earliest active ones: an
                integer, a float in (0, 1] as a share of the valid tokens, a `PerBatch` for all rows, or a mapping of
                these by name of a sub-module in any layer. No shape then depends on the data; `Decision.overflow`
                counts the active tokens beyond the maximum. None sets no maximum.
            decisions: decisions to replay, such as those of an earlier output, or masks `(B, L, M)` of which tokens run
                which sub-modules: one for each routed layer, for the same tokens. Scores and confidences are those of
                the routers as they are now, see `Router.replay`; padding is never active. None: the routers decide.

        Raises:
            InputError: the shapes, dtypes or ids do not fit, the capacity is impossible, or the decisions are not those
                of these layers and tokens.
            StateError: the state does not fit, the model cannot continue a stream, or a capacity comes with a state.
        """
        check_tensor(inputs, "the inputs are", self.encoder.input_dtype)
        self.encoder.check(inputs)
        check_valid(inputs, valid)
        if inputs.is_floating_point():
            check_dtype(self.encoder, inputs, "the inputs")
        if capacity is not None:
            check_capacity(
                capacity,
                list(dict.fromkeys(name for layer in self.routed_layers for name in layer.routed_names)),
                state,
            )
        if state is not None:
            self._check(state, inputs)
        selected = [None] * len(self.layers) if decisions is None else self._selected(decisions, inputs)
        if valid is not None and inputs.is_floating_point():
            # The gradient of the encoder's weights multiplies padding by 0, and 0 x NaN is NaN.
            inputs = inputs.where(valid.reshape(*valid.shape, *[1] * (inputs.ndim - 2)), 0)
        seen_before = None if state is None else state.seen
        hidden, frame, inverse = align(self.encoder(inputs), valid, seen_before, static=capacity is not None)
        mask = frame.mask.unflatten(0, hidden.shape[:2])[..., None] if frame.holes else None
        if self.sinusoid is not None:
            hidden = hidden + self.sinusoid(frame.positions.unflatten(0, hidden.shape[:2])).to(hidden.dtype)
        hidden = nn.functional.dropout(hidden, self.spec.embedding_dropout) if self.training else hidden
        made, states = [], []
        for index, layer in enumerate(self.layers):
            # The output of a layer is undefined at padding.
            hidden = hidden if mask is None else hidden.where(mask, 0)
            mask_BLM = selected[index]
            if mask_BLM is not None and inverse is not None:
                mask_BLM = move(mask_BLM, inverse_order(inverse))
            # Wrappers of a layer need no argument `decision` unless a decision is replayed.
            replayed = {} if mask_BLM is None else {"decision": mask_BLM}
            output = layer(hidden, frame, None if state is None else state.layers[index], capacity, **replayed)
            hidden = output.hidden
            if output.decision is not None:
                made.append(output.decision if inverse is None else output.decision.move(inverse))
            if output.state is not None:
                states.append(output.state)
        check_norm("final_norm", self.final_norm)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden, None if mask is None else mask.squeeze(-1))
        hidden = hidden if mask is None else hidden.where(mask, 0)
        # In float32 or wider, because in half precision the sum and the length of a long row overflow.
        total, seen, after = hidden.sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32)), frame.lengths, None
        if state is not None:
            total, seen = total + state.total, seen + state.seen
            after = ModelState(seen, total, tuple(states))
        pooled = (total / seen.clamp(min=1)[:, None]).to(hidden.dtype)
        hidden = hidden if inverse is None else move(hidden, inverse)
        return ModelOutput(hidden, pooled, self._logits(hidden, pooled), tuple(made), after)

    def _selected(self, decisions: Sequence[Decision | Tensor], inputs: Tensor) -> list[Tensor | None]:
        """For each layer the mask of the decision that it replays; None where it routes nothing."""
        names = [layer.routed_names for layer in self.routed_layers]
        masks = iter(check_selections(decisions, [each for each in names if each], inputs))
        return [next(masks) if each else None for each in names]

    def _logits(self, hidden: Float[Tensor, "B L D"], pooled: Float[Tensor, "B D"]) -> Tensor | None:
        return self.head(pooled) if self.head is not None else None

    def _check(self, state: ModelState, inputs: Tensor) -> None:
        self._check_causal()
        check_state(self, state, ModelState, inputs.shape[0])
        check_sizes(self, len(state.layers), len(self.layers), "layers")
        self._each_layer(lambda layer, index: layer.check(state.layers[index]))
        check_device(state.seen.device, inputs.device, "state", StateError)


class LanguageModel(SequenceModel):
    """A `SequenceModel` whose logits `(B, L, V)` score the token that follows each position.

    Raises:
        SpecError: a part looks ahead, as batch norm does in training, and would see the tokens that are predicted.
    """

    def __init__(self, spec: LanguageModelSpec) -> None:
        super().__init__(spec)
        try:
            self._check_causal()
        except StateError as error:
            raise SpecError(f"LanguageModelSpec: a language model must not look ahead, but {error}") from None

    def _logits(self, hidden: Float[Tensor, "B L D"], pooled: Float[Tensor, "B D"]) -> Float[Tensor, "B L V"]:
        return cast(Tensor, self.encoder(hidden, scores=True))


def build(spec: ModelSpec | Mapping[str, Any] | str | Path, seed: int | None = None) -> SequenceModel:
    """Build a model; with a seed, always with the same weights and without a change of the global random states.

    Args:
        spec: a spec, a mapping of its fields, or the path of a YAML or JSON file.
        seed: seed of the weights; None draws them from the global random state.

    Raises:
        SpecError: the file cannot be read, the spec is not a valid one of a model, or the seed is no 64-bit integer.
    """
    wrong = isinstance(seed, bool | Tensor) or not hasattr(seed, "__index__")
    if seed is not None and (wrong or not 0 <= int(seed) < 2**64):
        raise SpecError(f"seed={quote(seed)} must be an integer of at least 0 and below 2^64, or None")
    if isinstance(spec, Spec) and not isinstance(spec, ModelSpec):
        raise SpecError(
            f"sma.build takes the spec of a model, and {type(spec).__name__} has another family; call its build(width)"
        )
    with seeded(int(seed)) if seed is not None else nullcontext():
        return load_spec(spec).build()
