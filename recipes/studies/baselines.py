"""Baselines of SeqBoat, derived from its experiment, with the same components and trainer."""

from collections.abc import Callable
from itertools import chain
from typing import Protocol, cast, runtime_checkable

from sma.errors import SpecError, did_you_mean
from sma.layer import LayerSpec
from sma.norms import LayerNormSpec
from sma.positions import RotarySpec
from sma.recipes.experiment import ExperimentSpec, RoutingLosses, TrainingSpec
from sma.routers import AlwaysRouterSpec
from sma.spec import FrozenDict
from sma.submodule import SubModuleSpec

# Modules are imported where they are used, so the help of a command can list the baselines without delay.


@runtime_checkable
class RoutedAttention(Protocol):
    """The spec of an attention from which baselines are derived, such as `GAUSpec`.

    Attributes:
        window: number of active tokens in reach on each side; None attends to all.
        bidirectional: whether it attends to later tokens too.
    """

    window: int | None
    bidirectional: bool

    def attending_to_all(self) -> SubModuleSpec:
        """The same attention over all active tokens instead of a window."""

    def in_chunks(self, window: int) -> SubModuleSpec:
        """The same attention inside fixed chunks of `window` active tokens."""


ATTENTION_ONLY_RATE = 0.001
"""Maximum learning rate of models without a backbone; transformers do not learn at the rates of SeqBoat."""

S4D_STATES = 64
"""States per channel of S4D, as in its paper."""


def baseline(name: str, spec: ExperimentSpec) -> ExperimentSpec:
    """Make a baseline of a SeqBoat experiment: the same task, width, depth, encoder, head, batches, updates and seed.

    | name | layers |
    |---|---|
    | `seqboat` | unchanged |
    | `seqboat_full` | attention over all active tokens instead of a window |
    | `ema` | the backbone and the bypass only |
    | `always` | attention on every token |
    | `mega_chunk` | attention on every token, inside fixed chunks of the window's length |
    | `s4d` | S4D instead of EMA, and no attention |
    | `transformer` | pre-norm blocks of multi-head attention over the whole row and a gated MLP, rotary positions |
    | `local_attention` | the same, with attention limited to the window |

    A layer without a routed attention keeps its place: `s4d` and the transformers replace it like the others, with the
    window and direction of the first attention; the other baselines leave it unchanged.

    The numbers of parameters differ, and the table lists them; `with_parameters` makes them equal.

    Raises:
        SpecError: the name is unknown, a layer is not a SeqBoat layer (a backbone and at most one routed attention), or
            no layer has an attention.
    """
    if name not in BASELINES:
        raise SpecError(f"unknown model {name!r}{did_you_mean(name, BASELINES, 'models')}")
    for index, layer in enumerate(spec.model.layer_specs):
        parts = list(layer.modules.values())
        if layer.backbone is None or len(parts) > 1 or not all(isinstance(part, RoutedAttention) for part in parts):
            raise SpecError(
                f"layer {index} of the experiment must be a SeqBoat layer: a backbone and at most one routed "
                "sub-module, which is an attention with a window, such as the kind 'gau'"
            )
    if not any(layer.modules for layer in spec.model.layer_specs):
        raise SpecError(
            "no layer of the experiment has a routed attention, such as the kind 'gau', to compare with baselines"
        )
    return BASELINES[name](spec)


def with_parameters(name: str, spec: ExperimentSpec, step: int = 4) -> ExperimentSpec:
    """Make a baseline with the width that gives the number of parameters nearest to that of the experiment.

    Args:
        name: see `baseline`.
        spec: the experiment.
        step: the width is that of the experiment, or a multiple of `step`, which the heads of an attention can divide.
    """

    def made(width: int) -> ExperimentSpec:
        return baseline(name, spec.replace(model=spec.model.replace(width=width)))

    asked = spec.model.num_parameters()
    last = baseline(name, spec)
    width = spec.model.width - spec.model.width % step
    up = last.model.num_parameters() < asked
    if not up and spec.model.width % step:  # the next lower multiple is `width` itself
        width += step
    while (width := width + (step if up else -step)) > 0:
        following = made(width)
        distances = [abs(each.model.num_parameters() - asked) for each in (last, following)]
        if distances[1] >= distances[0]:
            break
        last = following
    return last


def _window(attention: RoutedAttention) -> int:
    """The window of an attention; 128 if it has none and the model needs one."""
    return attention.window or 128


def _with_attention(layer: LayerSpec, attention: SubModuleSpec) -> LayerSpec:
    return layer.replace(modules=FrozenDict(dict.fromkeys(layer.modules, attention)))


def _each_layer(
    spec: ExperimentSpec,
    change: Callable[[LayerSpec, RoutedAttention], list[LayerSpec]],
    training: TrainingSpec | None = None,
) -> ExperimentSpec:
    """Replace every layer by those that `change` makes of it and of its attention, or of the first one."""
    layers = spec.model.layer_specs
    attentions = [cast(RoutedAttention, next(iter(layer.modules.values()), None)) for layer in layers]
    first = next(filter(None, attentions))  # checked by `baseline`
    changed = [change(layer, attention or first) for layer, attention in zip(layers, attentions, strict=True)]
    made = tuple(chain.from_iterable(changed))
    shared = spec.model.shared_router and any(layer.modules for layer in made)
    model = spec.model.replace(layers=made, shared_router=shared)
    return spec.replace(model=model, training=training or spec.training)


def _each_routed_layer(
    spec: ExperimentSpec,
    change: Callable[[LayerSpec, RoutedAttention], LayerSpec],
    training: TrainingSpec | None = None,
) -> ExperimentSpec:
    """Replace every layer with an attention; the others are unchanged."""
    return _each_layer(spec, lambda layer, own: [change(layer, own) if layer.modules else layer], training)


def _unrouted(spec: ExperimentSpec) -> TrainingSpec:
    """The training without budget and losses of decisions, which need routers."""
    return spec.training.replace(budget=None, losses=RoutingLosses(), router_learning_rate=None)


def _attend_to_all(spec: ExperimentSpec) -> ExperimentSpec:
    return _each_routed_layer(spec, lambda layer, attention: _with_attention(layer, attention.attending_to_all()))


def _always(spec: ExperimentSpec) -> ExperimentSpec:
    return _each_routed_layer(spec, lambda layer, _: layer.replace(router=AlwaysRouterSpec()), _unrouted(spec))


def _mega_chunk(spec: ExperimentSpec) -> ExperimentSpec:
    def change(layer: LayerSpec, attention: RoutedAttention) -> LayerSpec:
        return _with_attention(layer, attention.in_chunks(_window(attention))).replace(router=AlwaysRouterSpec())

    return _each_routed_layer(spec, change, _unrouted(spec))


def _backbone_alone(spec: ExperimentSpec) -> ExperimentSpec:
    return _each_layer(spec, lambda layer, _: [layer.replace(modules=FrozenDict())], _unrouted(spec))


def _s4d(spec: ExperimentSpec) -> ExperimentSpec:
    from sma.modules.s4d import S4DSpec

    def change(layer: LayerSpec, own: RoutedAttention) -> list[LayerSpec]:
        s4d = S4DSpec(state_size=S4D_STATES, bidirectional=own.bidirectional)
        return [layer.replace(backbone=s4d, backbone_activation="none", modules=FrozenDict())]

    return _each_layer(spec, change, _unrouted(spec))


def _transformer(spec: ExperimentSpec, local: bool = False) -> ExperimentSpec:
    from sma.modules.attention import AttentionSpec
    from sma.modules.local_attention import LocalAttentionSpec
    from sma.modules.mlp import GatedMLPSpec

    width = spec.model.width
    # The most heads with at least 16 channels each, an even number for the rotary positions.
    heads = next((heads for heads in (8, 4, 2) if width % (2 * heads) == 0 and width // heads >= 16), 1)

    def block(part: SubModuleSpec, layer: LayerSpec) -> LayerSpec:
        return LayerSpec(
            backbone=part,
            backbone_activation="none",
            bypass="identity",
            activation="none",
            norm=LayerNormSpec(place="pre"),
            dropout=layer.dropout,
            dropout_on="sum",
        )

    def change(layer: LayerSpec, own: RoutedAttention) -> list[LayerSpec]:
        both_ways = own.bidirectional
        attention: SubModuleSpec = AttentionSpec(heads=heads, bidirectional=both_ways, position=RotarySpec())
        if local:
            attention = LocalAttentionSpec(
                heads=heads, bidirectional=both_ways, position=RotarySpec(), window=_window(own)
            )
        return [block(attention, layer), block(GatedMLPSpec(hidden_size=2 * width), layer)]

    training = _unrouted(spec)
    return _each_layer(spec, change, training.replace(learning_rate=min(ATTENTION_ONLY_RATE, training.learning_rate)))


BASELINES: dict[str, Callable[[ExperimentSpec], ExperimentSpec]] = {
    "transformer": _transformer,
    "local_attention": lambda spec: _transformer(spec, local=True),
    "s4d": _s4d,
    "ema": _backbone_alone,
    "always": _always,
    "mega_chunk": _mega_chunk,
    "seqboat_full": _attend_to_all,
    "seqboat": lambda spec: spec,
}
