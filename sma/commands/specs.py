"""The commands `describe` and `validate`: the parts of a model, and the check of a file."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sma.arguments import ArgumentParser
from sma.checkpoint import SPEC
from sma.commands.extras import missing_extra
from sma.describe import describe, layer_key
from sma.devices import usable_device
from sma.errors import SpecError, nearest, quote, reason
from sma.fused import Way, of_device
from sma.kernels import Implementation, implementation, operators
from sma.model import ModelSpec, SequenceModel
from sma.recipes.io.presets import read_shipped, shipped
from sma.spec import load_spec

if TYPE_CHECKING:
    from sma.recipes.experiment import ExperimentSpec
    from sma.tune.sweep import SweepSpec

EXPERIMENT = "experiment.yaml"
MANY = 64
"""Number of layers beyond which `validate` builds only one of equal layers."""

Sort = Literal["model", "experiment", "sweep"]
FIELDS: tuple[tuple[Sort, tuple[str, ...]], ...] = (
    ("sweep", ("space", "experiment")),
    ("experiment", ("task", "training", "model")),
)
"""Top-level fields that only sweeps or only experiments have."""


def add_describe(parser: ArgumentParser) -> None:
    """Add the arguments of `describe`."""
    _add_spec(parser)
    parser.add_argument(
        "--length",
        type=int,
        default=2000,
        metavar="NUMBER",
        help="number of tokens of a row for the MACs (default: 2000)",
    )
    parser.add_argument(
        "--rate", type=float, default=0.25, metavar="NUMBER", help="activation rate, 0 to 1 (default: 0.25)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--build", action="store_true", help="also build the model and count its parameters")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        help="also print which implementation of each operator runs on a device, and why",
    )


def add_validate(parser: ArgumentParser) -> None:
    """Add the arguments of `validate`."""
    _add_spec(parser)


def _add_spec(parser: ArgumentParser) -> None:
    parser.add_argument(
        "spec",
        metavar="SPEC",
        help="a model, an experiment or a sweep: a YAML or JSON file, the folder of a run or of a saved model, "
        f"or a shipped spec: {', '.join(shipped('specs'))}",
    )
    parser.add_argument(
        "--set",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help="change a field before validation; the value is YAML; may be repeated",
    )


def read_model_spec(source: str) -> dict[str, Any]:
    """Read the plain data of a model spec, an experiment or a sweep.

    Args:
        source: the name of a shipped spec or experiment, a file, or the folder of a saved model or of a run.

    Raises:
        SpecError: there is no such spec or file, or it is not a mapping.
    """
    if os.path.isdir(source):
        found = [path for path in (Path(source) / SPEC, Path(source) / EXPERIMENT) if path.is_file()]
        if not found:
            raise SpecError(
                f"the folder {quote(source)} holds no {SPEC}; "
                "give a spec file, a shipped spec, or the folder of a saved model or of a run"
            )
        return read_shipped(found[0], "specs")
    return read_shipped(
        source, "presets" if source in shipped("presets") and source not in shipped("specs") else "specs"
    )


def _sort(data: dict[str, Any]) -> Sort:
    """The type of a mapping, by the fields that only one type has, or by similar fields if it has none of them."""
    known = {"kind", *ModelSpec.model_fields}
    for sort, fields in FIELDS:
        if "kind" not in data and any(name in data for name in fields):
            return sort
    for sort, fields in FIELDS:
        if not known & data.keys() and any(nearest(str(name), fields) for name in data):
            return sort
    return "model"


def _load(args: argparse.Namespace) -> ModelSpec:
    """The requested model spec; for an experiment or a sweep that of its model."""
    data = read_model_spec(args.spec)
    sort = _sort(data)
    if sort == "model":
        return load_spec(data, overrides=args.set)
    return (_load_experiment(args, data) if sort == "experiment" else _load_sweep(args, data).experiment).model


def _load_experiment(args: argparse.Namespace, data: dict[str, Any]) -> "ExperimentSpec":
    from sma.recipes.experiment import load_experiment  # takes a second

    return load_experiment(data, args.set)  # it imports the tasks


def _load_sweep(args: argparse.Namespace, data: dict[str, Any]) -> "SweepSpec":
    try:
        from sma.tune.sweep import make_sweep

        # By its path, because the path of its experiment is relative to it.
        return make_sweep(args.spec if os.path.isfile(args.spec) else data, settings=args.set)
    except ImportError as error:
        raise missing_extra(f"{quote(args.spec)} is a sweep, which", "tune", error) from error


def _name(source: str) -> str:
    return quote(Path(source).stem if Path(source).suffix in (".yaml", ".yml", ".json") else source)[1:-1]


def run_describe(args: argparse.Namespace) -> Iterator[str]:
    """Yield the parts of a model with their parameters and MACs."""
    spec = _load(args)
    description = describe(spec, name=_name(args.spec), length=args.length, rate=args.rate)
    chosen = {} if args.device is None else _implementations(args.device)
    built = _build(spec, "cpu") if args.build else None
    if args.json:
        facts: dict[str, Any] = {}
        if built is not None:
            facts["built"] = {"parameters": _count(built), "bytes": _bytes(built), "causal": built.causal}
        if chosen:
            facts["implementations"] = {name: each._asdict() for name, each in chosen.items()}
        yield json.dumps(description.as_dict() | facts, indent=2)
        return
    yield description.as_text()
    if chosen:
        width = max(map(len, chosen))
        lines = (f"{name:{width}}  {each.name:8}  {each.reason}" for name, each in chosen.items())
        yield "\n" + "\n".join([f"operators on {args.device}:", *lines])
    if built is not None:
        reach = "causal" if built.causal else "not causal: a token may see later ones"
        yield (
            "\n"
            f"Built with {_count(built):,} parameters, as predicted; {_bytes(built) / 1e6:,.1f} MB in float32; {reach}."
        )


def _implementations(device: str) -> dict[str, Implementation | Way]:
    """The implementation of every operator on a device, and of the fused functions.

    Raises:
        InputError: there is no such device.
    """
    usable_device(device)
    return {**{name: implementation(name, device) for name in operators()}, "between_operators": of_device(device)}


def _build(spec: ModelSpec, device: str) -> SequenceModel:
    """Build the model and compare it with the prediction; on the device 'meta' this takes no memory.

    Raises:
        SpecError: the parts do not fit each other, there is not enough memory, or the prediction is wrong.
    """
    try:
        with torch.device(device):
            model = spec.build()
    except (RuntimeError, MemoryError) as error:
        raise SpecError(
            f"the model of {spec.num_parameters():,} parameters cannot be built: {reason(error) or 'out of memory'}"
        ) from error
    if _count(model) != spec.num_parameters():
        predicted = f"{spec.num_parameters():,}"
        raise SpecError(
            f"the model has {_count(model):,} parameters, but its spec predicts {predicted}: a num_parameters is wrong"
        )
    return model


def _count(model: SequenceModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: SequenceModel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def run_validate(args: argparse.Namespace) -> Iterator[str]:
    """Yield the type of a valid file; raise an error for an invalid one."""
    data = read_model_spec(args.spec)
    sort = _sort(data)
    if sort == "model":
        spec, what = load_spec(data, overrides=args.set), "a model: "
    elif sort == "experiment":
        experiment = _load_experiment(args, data)
        spec, what = experiment.model, f"an experiment of {_updates(experiment)}; its model is "
    else:
        sweep = _load_sweep(args, data)
        spec = sweep.experiment.model
        what = f"a sweep of {sweep.samples:,} trials of {_updates(sweep.experiment)}; the model of trial 0 is "
    count, layers = spec.num_parameters(), len(spec.layer_specs)
    _build(_with_layers_once(spec), "meta")
    yield (
        f"ok: {_name(args.spec)} is {what}a {spec.kind} of width {spec.width} with {layers:,} "
        f"layer{'' if layers == 1 else 's'} and {count:,} parameters"
    )


def _updates(experiment: "ExperimentSpec") -> str:
    return f"{experiment.training.updates:,} updates on {experiment.task.kind}"


def _with_layers_once(spec: ModelSpec) -> ModelSpec:
    """The same model with one of many equal layers, because equal layers have equal errors."""
    layers = spec.layer_specs
    if len(layers) <= MANY:
        return spec
    different = {id(layer): layer for layer in layers}
    once = {layer_key(layer): layer for layer in [*different.values(), layers[-1]]}
    last = once.pop(layer_key(layers[-1]))  # the final norm may depend on it
    return spec.replace(layers=(*once.values(), last))
