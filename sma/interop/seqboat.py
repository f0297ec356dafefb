"""Conversion of weights from and to the SeqBoat authors' implementation (renll/SeqBoat).

`from_reference` converts their layers, models and encoders, and `to_reference` returns the tensors under their names.
Two versions of their code exist: `standalone_layer` (whose EMA is called `ssm`) and `unit` (whose EMA is called
`move`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from sma.encoders import (
    EncoderSpec,
    LinearEncoder,
    LinearEncoderSpec,
    RealNumber,
    RealNumberSpec,
    TokenEmbedding,
    TokenEmbeddingSpec,
)
from sma.errors import CheckpointError, did_you_mean, parsing, quote
from sma.heads import MeanPoolLinear, MeanPoolLinearSpec
from sma.kernels.weighting import Weighting
from sma.layer import LayerSpec, RoutedLayer
from sma.model import SequenceClassifierSpec, SequenceEncoderSpec, SequenceModel
from sma.modules.ema import EMA, EMASpec
from sma.modules.gau import GatedAttentionUnit, GAUSpec
from sma.norms import BatchNormSpec, LayerNormSpec, Norm, NormSpec, RMSNormSpec, ScaleNorm, ScaleNormSpec
from sma.positions import PositionSpec, RelativeBiasSpec, RotarySpec
from sma.repeat import RepeatSpec
from sma.routers import AlwaysRouterSpec, RouterSpec, SMARouter, SMARouterSpec
from sma.spec import FrozenDict

_MARK = "_reference_kind"  # kind of the authors' module from which a module was made

Kind = Literal["standalone_layer", "unit", "standalone_model", "lra_encoder"]


class Entry(NamedTuple):
    """A tensor of the authors, and our tensor, in their shape, that contains it or its rows `rows`."""

    name: str
    ours: Tensor
    rows: slice | None = None


def from_reference(kind: Kind, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RoutedLayer | SequenceModel:
    """Build our module from the authors' constructor arguments and tensors.

    Args:
        kind: `standalone_layer` or `unit` give a `RoutedLayer`; `standalone_model` and `lra_encoder` a `SequenceModel`.
        config: constructor arguments under the authors' names.
        tensors: parameters and buffers by the authors' names.

    Raises:
        CheckpointError: an unknown kind; an argument that is missing or has no counterpart here; a tensor that is
            missing, unknown, or of another shape.
    """
    module = _empty(kind, config)
    entries = list(_entries(module))
    # Without their constants and counters, which affect no output.
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith(("inv_freq", "num_batches_tracked"))}
    wanted = {entry.name for entry in entries}
    if wanted != set(given):
        missing, unknown = sorted(wanted - set(given)), sorted(set(given) - wanted)
        missing_names, unknown_names = (quote(names) if names else "nothing" for names in (missing, unknown))
        raise CheckpointError(f"the tensors do not fit {quote(kind)}: missing {missing_names}, unknown {unknown_names}")
    with torch.no_grad():
        for entry in entries:
            theirs = given[entry.name] if entry.rows is None else given[entry.name][entry.rows]
            if theirs.shape != entry.ours.shape:
                shape = tuple(entry.ours.shape)
                raise CheckpointError(
                    f"{entry.name!r} has shape {tuple(given[entry.name].shape)}, which does not fit {shape} here"
                )
            entry.ours.copy_(theirs)
    return module


def to_reference(module: RoutedLayer | SequenceModel, *, gradients: bool = False) -> dict[str, Tensor]:
    """Return the weights of a module that `from_reference` made, or their gradients, by the authors' names and in their
    shapes.

    Raises:
        CheckpointError: a part has no counterpart in the authors' code, or a requested gradient is missing.
    """
    parts: dict[str, list[Tensor]] = {}
    for entry in _entries(module):
        ours: Tensor | None = entry.ours
        if gradients:
            if not isinstance(entry.ours, nn.Parameter):
                continue
            ours = entry.ours.grad
        if ours is None:
            raise CheckpointError(f"{entry.name!r} has no gradient; call backward() first")
        if not isinstance(ours, Tensor) or ours.is_quantized:
            raise CheckpointError(
                f"the part of {entry.name!r} was replaced by one that packs its weights, such as a quantised one"
            )
        parts.setdefault(entry.name, []).append(ours.detach().clone())
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def _entries(module: RoutedLayer | SequenceModel) -> Iterator[Entry]:
    version = getattr(module, _MARK, None)
    if version is None:
        raise CheckpointError(
            "this module was not made by sma.interop.seqboat.from_reference, so the authors' names are not known"
        )
    if isinstance(module, RoutedLayer):
        yield from _layer_entries(module, "", "ssm" if version == "standalone_layer" else "move")
    elif version == "standalone_model":
        yield from _standalone_entries(module)
    else:
        yield from _lra_entries(module)


def _standalone_entries(model: SequenceModel) -> Iterator[Entry]:
    encoder, head = cast(LinearEncoder, model.encoder).linear, cast(MeanPoolLinear, model.head).linear
    yield from (Entry("encoder.weight", encoder.weight), Entry("encoder.bias", encoder.bias))
    for index, layer in enumerate(model.routed_layers):
        yield from _layer_entries(layer, f"seq_layers.{index}.", "ssm")
    yield from _norm_entries(model.final_norm, "final_norm.norm.")
    yield from (Entry("decoder.weight", head.weight), Entry("decoder.bias", head.bias))


def _lra_entries(model: SequenceModel) -> Iterator[Entry]:
    if isinstance(model.encoder, TokenEmbedding):
        yield Entry("embed_tokens.embed.weight", model.encoder.weight)
    else:
        encoder = cast(RealNumber, model.encoder)
        yield from (Entry("embed_tokens.weight", encoder.weight), Entry("embed_tokens.bias", encoder.bias))
    if model.sinusoid is not None:
        yield Entry("pos_emb.scale", model.sinusoid.scale)
    for index, layer in enumerate(model.routed_layers):
        yield from _layer_entries(layer, f"layers.{index}.mega_layer.", "move")
    yield from _norm_entries(model.final_norm, "final_norm.norm.")


def _layer_entries(layer: RoutedLayer, prefix: str, ema_name: str) -> Iterator[Entry]:
    ema = cast(EMA, layer.backbone)
    for name in ("alpha", "beta", "delta", "gamma", "omega"):
        yield Entry(f"{prefix}{ema_name}.{name}", getattr(ema, name))
    if layer.routed is None or layer.bypass is None:
        raise CheckpointError("a layer without a GAU or a linear bypass has no counterpart in the authors' code")
    router, gau = layer.routed.router, cast(GatedAttentionUnit, layer.routed.submodules["attention"])
    first = 0
    if isinstance(router, SMARouter):
        # The authors keep router and bypass in one matrix.
        first = 2
        yield from (
            Entry(f"{prefix}hx_proj.weight", router.weight, slice(0, 2)),
            Entry(f"{prefix}hx_proj.bias", router.bias, slice(0, 2)),
        )
        yield Entry(f"{prefix}q_router.temp", router.log_temperature)
    yield Entry(f"{prefix}hx_proj.weight", layer.bypass.weight, slice(first, None))
    yield Entry(f"{prefix}hx_proj.bias", layer.bypass.bias, slice(first, None))
    yield from (Entry(f"{prefix}mx_proj.weight", gau.in_proj.weight), Entry(f"{prefix}mx_proj.bias", gau.in_proj.bias))
    yield from (Entry(f"{prefix}h_proj.weight", gau.out_proj.weight), Entry(f"{prefix}h_proj.bias", gau.out_proj.bias))
    yield from (Entry(f"{prefix}gamma", gau.gain), Entry(f"{prefix}beta", gau.offset))
    if gau.bias_table is not None:
        yield Entry(f"{prefix}rel_pos_bias.rel_pos_bias", gau.bias_table)
    yield from _norm_entries(layer.norm, f"{prefix}norm.norm.")


def _norm_entries(norm: Norm | None, prefix: str) -> Iterator[Entry]:
    if isinstance(norm, ScaleNorm):
        if norm.scale is not None:
            yield Entry(f"{prefix}scalar", norm.scale)
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name, None)
        if tensor is not None:
            yield Entry(f"{prefix}{name}", tensor)


def _empty(kind: Kind, config: Mapping[str, Any]) -> RoutedLayer | SequenceModel:
    makers: dict[str, Callable[[Mapping[str, Any]], RoutedLayer | SequenceModel]] = {
        "standalone_layer": _standalone_layer,
        "unit": _unit,
        "standalone_model": _standalone_model,
        "lra_encoder": _lra_encoder,
    }
    if not isinstance(kind, str) or kind not in makers:
        raise CheckpointError(
            f"unknown kind {quote(kind)} of the authors' modules{did_you_mean(str(kind), makers, 'known kinds')}"
        )
    # The types of their arguments are not checked, so torch and arithmetic may raise any exception.
    with parsing(f"the config of {quote(kind)}", CheckpointError, "give the arguments of the authors' constructor"):
        try:
            module = makers[kind](config)
        except KeyError as error:
            raise CheckpointError(
                f"the config of {quote(kind)} lacks {error}; give every argument of the authors' constructor"
            ) from None
    setattr(module, _MARK, kind)
    return module


def _standalone_layer(config: Mapping[str, Any]) -> RoutedLayer:
    return _layer(config, config.get("window_size", 256)).build(_width(config))


def _unit(config: Mapping[str, Any]) -> RoutedLayer:
    return _layer(config, config["chunk_size"]).build(_width(config))


def _width(config: Mapping[str, Any]) -> int:
    width = config["embed_dim"]
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"embed_dim={quote(width)} must be an integer of at least 1")
    return width


def _layer(config: Mapping[str, Any], window: int) -> LayerSpec:
    """The authors' layer; their `window` of -1 means all active tokens."""
    bidirectional = config.get("bidirectional", False)
    _one_of(config, "activation", ("silu",), "silu")
    gau = GAUSpec(
        query_size=config["zdim"],
        hidden_size=config["hdim"],
        window=window if window > 0 else None,
        bidirectional=bidirectional,
        attention=cast(Weighting, _one_of(config, "attention_activation", get_args(Weighting), "relu2")),
        position=_position(config),
        value_dropout=config.get("hidden_dropout", 0.0),
        attention_dropout=config.get("attention_dropout", 0.0),
    )
    router: RouterSpec = SMARouterSpec(temperature_scale=config.get("init_temp_scale", 1.0))
    return LayerSpec(
        backbone=EMASpec(state_size=config["ndim"], bidirectional=bidirectional, truncation=config.get("truncation")),
        router=AlwaysRouterSpec() if config.get("always_act") else router,
        modules=FrozenDict(attention=gau),
        norm=_norm(config),
        dropout=config.get("dropout", 0.0),
        dropout_on="modules" if bidirectional else "sum",
    )


def _position(config: Mapping[str, Any]) -> PositionSpec:
    name = _one_of(config, "rel_pos_bias", ("simple", "rotary"), "simple")
    if name == "rotary":
        return RotarySpec()
    distance: Literal["slot_distance", "true_distance"] = (
        "slot_distance" if config.get("local_pos") else "true_distance"
    )
    return RelativeBiasSpec(distance=distance, max_positions=config.get("max_positions", 1024))


# The specs of the authors' norms, by their names; all of theirs have the same epsilon, 1e-5.
_NORMS: dict[str, Callable[..., NormSpec]] = {
    "layernorm": LayerNormSpec,
    "rmsnorm": RMSNormSpec,
    "scalenorm": ScaleNormSpec,
    "batchnorm": BatchNormSpec,
    "syncbatchnorm": partial(BatchNormSpec, synchronized=True),
}


def _norm(config: Mapping[str, Any]) -> NormSpec:
    place: Literal["pre", "post"] = "pre" if config.get("prenorm", True) else "post"
    name = _one_of(config, "norm_type", tuple(_NORMS), "layernorm")
    return _NORMS[name](place=place, affine=config.get("norm_affine", True))


def _one_of(config: Mapping[str, Any], argument: str, known: Sequence[str], default: str) -> str:
    """A value of an argument of the authors, if it has a counterpart here.

    Raises:
        CheckpointError: it has none; the message lists the values that have one.
    """
    name = config.get(argument, default)
    if name not in known:
        listed = did_you_mean(str(name), known, "known")
        raise CheckpointError(f"{argument}={quote(name)} of the authors' modules is not supported here{listed}")
    return str(name)


# Arguments of the authors' models that are those of their layers.
_PASSED_ON = ("attention_activation", "norm_type", "rel_pos_bias", "init_temp_scale", "activation", "dropout")


def _standalone_model(config: Mapping[str, Any]) -> SequenceModel:
    layer = _layer(
        {
            "embed_dim": config["d_model"],
            "zdim": config["d_qk"],
            "hdim": 2 * config["d_model"],
            "ndim": config["d_ema"],
            "max_positions": config["max_positions"],
            "prenorm": config["prenorm"],
            "bidirectional": config.get("bidirectional", True),
            **{name: config[name] for name in _PASSED_ON if name in config},
            "norm_type": config.get("norm_type", "batchnorm"),
        },
        config["mem_size"],
    )
    return SequenceClassifierSpec(
        width=config["d_model"],
        encoder=LinearEncoderSpec(features=config["d_input"]),
        layers=RepeatSpec(repeat=config["n_layers"], layer=layer),
        head=MeanPoolLinearSpec(classes=config["d_output"]),
    ).build()


def _lra_encoder(config: Mapping[str, Any]) -> SequenceModel:
    width = config["embedding_dim"]
    layer = _layer(
        {
            "embed_dim": width,
            "zdim": config["z_dim"],
            "hdim": config["hidden_dim"],
            "ndim": config["n_dim"],
            "prenorm": config["normalize_before"],
            "max_positions": config["max_seq_len"],
            "bidirectional": True,
            **{
                name: config[name]
                for name in (
                    *_PASSED_ON,
                    "truncation",
                    "local_pos",
                    "always_act",
                    "attention_dropout",
                    "hidden_dropout",
                )
                if name in config
            },
            "attention_activation": config.get("attention_activation", "softmax"),
        },
        config["chunk_size"],
    )
    _one_of(config, "sen_rep_type", ("mp",), "mp")
    sparse = _one_of(config, "embedding_type", ("sparse", "linear"), "sparse") == "sparse"
    encoder: EncoderSpec = (
        TokenEmbeddingSpec(vocabulary=config["vocab_size"], padding=config["padding_idx"])
        if sparse
        else RealNumberSpec()
    )
    return SequenceEncoderSpec(
        width=width,
        encoder=encoder,
        sinusoid=config.get("add_apos", False),
        embedding_dropout=config.get("dropout", 0.0),
        layers=RepeatSpec(repeat=config["num_encoder_layers"], layer=layer),
    ).build()
