"""Baselines of SeqBoat, derived from its experiment, with the same components and trainer."""

from collections.abc import Callable
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

    The numbers of parameters differ, and the table lists them; `with_parameters` makes them equal.

    Raises:
        SpecError: the name is unknown, or a layer is not a SeqBoat layer (a backbone and one routed attention).
    """
    if name not in BASELINES:
        raise SpecError(f"unknown model {name!r}{did_you_mean(name, BASELINES, 'models')}")
    for index, layer in enumerate(spec.model.layer_specs):
        parts = list(layer.modules.values())
        if layer.backbone is None or len(parts) != 1 or not isinstance(parts[0], RoutedAttention):
            raise SpecError(
                f"layer {index} of the experiment must be a SeqBoat layer: "
                "a backbone and one routed sub-module that is an attention with a window, such as the kind 'gau'"
            )
    return BASELINES[name](spec)


def with_parameters(name: str, spec: ExperimentSpec, step: int = 4) -> ExperimentSpec:
    """Make a baseline with the width that gives the number of parameters nearest to that of the experiment.

    Args:
        name: see `baseline`.
        spec: the experiment.
        step: the width is a multiple of it, so that the heads of an attention can divide the channels.
    """

    def made(width: int) -> ExperimentSpec:
        return baseline(name, spec.replace(model=spec.model.replace(width=width)))

    asked = spec.model.num_parameters()
    last = baseline(name, spec)
    width = spec.model.width - spec.model.width % step
    up = last.model.num_parameters() < asked
    while (width := width + (step if up else -step)) > 0:
        following = made(width)
        distances = [abs(each.model.num_parameters() - asked) for each in (last, following)]
        if distances[1] >= distances[0]:
            break
        last = following
    return last


def _attention(layer: LayerSpec) -> RoutedAttention:
    (part,) = layer.modules.values()
    return cast(RoutedAttention, part)  # checked by `baseline`


def _window(layer: LayerSpec) -> int:
    """The window of a layer's attention; 128 if it has none and the model needs one."""
    return _attention(layer).window or 128


def _with_attention(layer: LayerSpec, attention: SubModuleSpec) -> LayerSpec:
    return layer.replace(modules=FrozenDict(dict.fromkeys(layer.modules, attention)))


def _each_layer(
    spec: ExperimentSpec, change: Callable[[LayerSpec], list[LayerSpec]], training: TrainingSpec | None = None
) -> ExperimentSpec:
    layers = tuple(new for layer in spec.model.layer_specs for new in change(layer))
    return spec.replace(model=spec.model.replace(layers=layers), training=training or spec.training)


def _unrouted(spec: ExperimentSpec) -> TrainingSpec:
    """The training without budget and losses of decisions, which need routers."""
    return spec.training.replace(budget=None, losses=RoutingLosses(), router_learning_rate=None)


def _attend_to_all(spec: ExperimentSpec) -> ExperimentSpec:
    return _each_layer(spec, lambda layer: [_with_attention(layer, _attention(layer).attending_to_all())])


def _always(spec: ExperimentSpec) -> ExperimentSpec:
    return _each_layer(spec, lambda layer: [layer.replace(router=AlwaysRouterSpec())], _unrouted(spec))


def _mega_chunk(spec: ExperimentSpec) -> ExperimentSpec:
    def change(layer: LayerSpec) -> list[LayerSpec]:
        chunked = _with_attention(layer, _attention(layer).in_chunks(_window(layer)))
        return [chunked.replace(router=AlwaysRouterSpec())]

    return _each_layer(spec, change, _unrouted(spec))


def _backbone_alone(spec: ExperimentSpec) -> ExperimentSpec:
    return _each_layer(spec, lambda layer: [layer.replace(modules=FrozenDict())], _unrouted(spec))


def _s4d(spec: ExperimentSpec) -> ExperimentSpec:
    from sma.modules.s4d import S4DSpec

    def change(layer: LayerSpec) -> list[LayerSpec]:
        s4d = S4DSpec(state_size=S4D_STATES, bidirectional=_attention(layer).bidirectional)
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

    def change(layer: LayerSpec) -> list[LayerSpec]:
        both_ways = _attention(layer).bidirectional
        attention: SubModuleSpec = AttentionSpec(heads=heads, bidirectional=both_ways, position=RotarySpec())
        if local:
            attention = LocalAttentionSpec(
                heads=heads, bidirectional=both_ways, position=RotarySpec(), window=_window(layer)
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
