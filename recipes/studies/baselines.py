"""Baselines: the models that SeqBoat is compared with, made of its experiment by the same parts, and trained by the
same trainer.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from sma.errors import SpecError, did_you_mean
from sma.layer import LayerSpec
from sma.norms import LayerNormSpec
from sma.positions import RotarySpec
from sma.recipes.experiment import ExperimentSpec, RoutingLosses, TrainingSpec
from sma.routers import AlwaysRouterSpec
from sma.spec import FrozenDict
from sma.submodule import SubModuleSpec

# Below, modules are imported where they are used: a command whose help lists the names of the baselines need not wait
# for them.
if TYPE_CHECKING:
    from sma.modules.gau import GAUSpec

ATTENTION_ONLY_RATE = 0.001
"""Learning rate of models without a backbone, where the experiment's own is larger: transformers do not learn at the
rates of SeqBoat.
"""

S4D_STATES = 64
"""States per channel of S4D, as its authors have them."""


def baseline(name: str, spec: ExperimentSpec) -> ExperimentSpec:
    """Make a baseline of a SeqBoat experiment: the same task, width, depth, encoder, head, batches, updates and seed.

    | name | layers |
    |---|---|
    | `seqboat` | as they are |
    | `seqboat_full` | attention over all active tokens instead of a window |
    | `ema` | the backbone and the bypass alone |
    | `mega_chunk` | attention on every token, inside fixed chunks of a window's length |
    | `s4d` | S4D instead of EMA, and no attention |
    | `transformer` | pre-norm blocks of multi-head attention over the whole row and a gated MLP, rotary positions |
    | `local_attention` | the same with attention inside the window |

    The parameters differ, and the table says them.

    Raises:
        SpecError: an unknown name, or an experiment whose layers are no SeqBoat layers: EMA and one routed `gau`.
    """
    if name not in BASELINES:
        raise SpecError(f"unknown model {name!r}{did_you_mean(name, BASELINES, 'models')}")
    for place, layer in enumerate(spec.model.layer_specs):
        if layer.backbone is None or [part.kind for part in layer.modules.values()] != ["gau"]:
            raise SpecError(
                f"layer {place} of the experiment must be a SeqBoat layer: "
                "a backbone and one routed sub-module of kind 'gau'"
            )
    return BASELINES[name](spec)


def _gau(layer: LayerSpec) -> "tuple[str, GAUSpec]":
    ((name, part),) = layer.modules.items()
    return name, cast("GAUSpec", part)  # `baseline` looked


def _window(layer: LayerSpec) -> int:
    """What the attention reaches; models that need a window for one that has none take 128."""
    return _gau(layer)[1].window or 128


def _without_window(gau: "GAUSpec") -> "GAUSpec":
    return gau.replace(window=None, position=gau.position.without_window())


def _each_layer(
    spec: ExperimentSpec, change: Callable[[LayerSpec], list[LayerSpec]], training: TrainingSpec | None = None
) -> ExperimentSpec:
    layers = tuple(new for layer in spec.model.layer_specs for new in change(layer))
    return spec.replace(model=spec.model.replace(layers=layers), training=training or spec.training)


def _unrouted(spec: ExperimentSpec) -> TrainingSpec:
    """The training without what only routers can learn from."""
    return spec.training.replace(budget=None, losses=RoutingLosses(), router_learning_rate=None)


def _attend_to_all(spec: ExperimentSpec) -> ExperimentSpec:
    def change(layer: LayerSpec) -> list[LayerSpec]:
        name, gau = _gau(layer)
        return [layer.replace(modules=FrozenDict({name: _without_window(gau)}))]

    return _each_layer(spec, change)


def _mega_chunk(spec: ExperimentSpec) -> ExperimentSpec:
    from sma.modules.gau import ChunkedGAUSpec

    def change(layer: LayerSpec) -> list[LayerSpec]:
        name, gau = _gau(layer)
        fields = {field: getattr(gau, field) for field in type(gau).model_fields if field not in ("kind", "window")}
        unit = ChunkedGAUSpec(window=_window(layer), **fields)
        return [layer.replace(modules=FrozenDict({name: unit}), router=AlwaysRouterSpec())]

    return _each_layer(spec, change, _unrouted(spec))


def _backbone_alone(spec: ExperimentSpec) -> ExperimentSpec:
    return _each_layer(spec, lambda layer: [layer.replace(modules=FrozenDict())], _unrouted(spec))


def _s4d(spec: ExperimentSpec) -> ExperimentSpec:
    from sma.modules.s4d import S4DSpec

    def change(layer: LayerSpec) -> list[LayerSpec]:
        s4d = S4DSpec(state_size=S4D_STATES, bidirectional=_gau(layer)[1].bidirectional)
        return [layer.replace(backbone=s4d, backbone_activation="none", modules=FrozenDict())]

    return _each_layer(spec, change, _unrouted(spec))


def _transformer(spec: ExperimentSpec, local: bool = False) -> ExperimentSpec:
    from sma.modules.attention import AttentionSpec
    from sma.modules.local_attention import LocalAttentionSpec
    from sma.modules.mlp import GatedMLPSpec

    width = spec.model.width
    # As many heads as leave each an even number of channels, for the rotary positions, and at least 16 of them.
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
        both_ways = _gau(layer)[1].bidirectional
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
    "mega_chunk": _mega_chunk,
    "seqboat_full": _attend_to_all,
    "seqboat": lambda spec: spec,
}
