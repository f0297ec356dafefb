"""The command line: `python -m sma describe SPEC`, `kinds`, `kind`, `schema`, `validate`."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO

import torch

from sma.catalogue import describe_kind, find_kinds, list_kinds
from sma.checkpoint import SPEC
from sma.describe import describe, layer_key
from sma.errors import QUOTED, SmaError, SpecError, did_you_mean, quote, reason
from sma.model import ModelSpec, SequenceModel
from sma.recipes.io.presets import read_shipped, shipped
from sma.spec import json_schema, load_spec, parse_setting
from sma.streams import run_command, write_out

if TYPE_CHECKING:
    from sma.recipes.experiment import ExperimentSpec
    from sma.tune.sweep import SweepSpec

DISTRIBUTION = "sparse-modular-activation"
EXPERIMENT = "experiment.yaml"

MANY = 64
"""Layers beyond which `validate` builds each different one once."""
EXAMPLES = """examples:
  python -m sma describe seqboat_listops --length 2000 --rate 0.1
  python -m sma describe my_model.yaml --set layers.layer.modules.attention.window=64
  python -m sma kinds sub-module
  python -m sma kind gau
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are sentences like all others: no usage, no exit."""

    def error(self, message: str) -> NoReturn:
        shown = message if len(message) <= 3 * QUOTED else f"{message[: 3 * QUOTED - 3]}..."
        raise SpecError(f"{shown}; see {self.prog} --help")


Command = Callable[[argparse.Namespace], Iterator[str]]


def _parser() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="sma",
        description="Describe and check models of sparse modular activation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sma {_version()} (torch {torch.__version__})")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Command, what: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    described = command("describe", _describe, "print the parts of a model with their parameters and operations")
    validated = command(
        "validate", _validate, "check a spec; exit status 2 and one sentence per mistake where it is wrong"
    )
    for each in (described, validated):
        each.add_argument(
            "spec", metavar="SPEC", help=f"YAML or JSON file, or a shipped spec: {', '.join(shipped('specs'))}"
        )
        each.add_argument(
            "--set",
            metavar="PATH=VALUE",
            action="append",
            default=[],
            help="set a field first; the value is YAML; may be repeated",
        )
    described.add_argument(
        "--length", type=int, default=2000, metavar="N", help="tokens of the row to count for (default: 2000)"
    )
    described.add_argument(
        "--rate", type=float, default=0.25, metavar="R", help="activation rate, 0 to 1 (default: 0.25)"
    )
    described.add_argument("--json", action="store_true", help="print JSON instead of the table")
    described.add_argument("--build", action="store_true", help="build the model too and count its parameters")

    listed = command("kinds", _kinds, "list the registered kinds, of all families or of one")
    listed.add_argument("family", metavar="FAMILY", nargs="?", help="such as sub-module, router, norm")
    listed.add_argument("kind", metavar="KIND", nargs="?", help="print the fields of this kind")
    explained = command(
        "kind", _kind, "print the fields of a kind; also of 'layer' and 'repeat', which models are made of"
    )
    explained.add_argument("kind", metavar="KIND", help="such as gau, sma, layer_norm")
    schema = command("schema", _schema, "print the JSON schema of a family, for editors")
    schema.add_argument("family", metavar="FAMILY", nargs="?", default="model", help="default: model")
    return parser, dict(commands.choices)


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "(not installed)"


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
                "give a spec file, a shipped spec or a folder that sma.save wrote or a run"
            )
        return read_shipped(found[0], "specs")
    return read_shipped(
        source, "presets" if source in shipped("presets") and source not in shipped("specs") else "specs"
    )


def _sort(data: dict[str, Any]) -> Literal["model", "experiment", "sweep"]:
    """What a mapping describes, by the fields that only one of them has."""
    if "kind" not in data and ("space" in data or "experiment" in data):
        return "sweep"
    return "experiment" if "kind" not in data and ("task" in data or "training" in data) else "model"


@contextmanager
def _recipes(source: str, what: str) -> Iterator[None]:
    """Let what an experiment needs beyond the core be missing with a sentence."""
    try:
        yield
    except ImportError as error:
        extra = "tune" if what == "sweep" else "recipes"
        raise SpecError(
            f"{quote(source)} is {_article(what)}, which takes the extra {extra!r} ({reason(error)}); "
            f"run: python -m pip install '{DISTRIBUTION}[{extra}]'"
        ) from error


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _load(args: argparse.Namespace) -> ModelSpec:
    """The model spec that was asked for; of an experiment or a sweep its model."""
    data = read_model_spec(args.spec)
    sort = _sort(data)
    if sort == "model":
        return load_spec(data, overrides=dict(map(parse_setting, args.set)))
    return (_load_experiment(args, data) if sort == "experiment" else _load_sweep(args, data).experiment).model


def _load_experiment(args: argparse.Namespace, data: dict[str, Any]) -> "ExperimentSpec":
    with _recipes(args.spec, "experiment"):
        from sma.recipes.experiment import load_experiment  # the core works without the extras that it needs
    return load_experiment(data, args.set)


def _load_sweep(args: argparse.Namespace, data: dict[str, Any]) -> "SweepSpec":
    with _recipes(args.spec, "sweep"):
        from sma.tune.sweep import make_sweep
    # By its path, from which the path of its experiment is counted.
    return make_sweep(args.spec if os.path.isfile(args.spec) else data, settings=args.set)


def _name(source: str) -> str:
    return quote(Path(source).stem if Path(source).suffix in (".yaml", ".yml", ".json") else source)[1:-1]


def _describe(args: argparse.Namespace) -> Iterator[str]:
    spec = _load(args)
    description = describe(spec, name=_name(args.spec), length=args.length, rate=args.rate)
    built = _build(spec, "cpu") if args.build else None
    if args.json:
        facts = (
            {}
            if built is None
            else {"built": {"parameters": _count(built), "bytes": _bytes(built), "causal": built.causal}}
        )
        yield json.dumps(description.as_dict() | facts, indent=2)
        return
    yield description.as_text()
    if built is not None:
        reach = "causal" if built.causal else "not causal: a token may see later ones"
        yield (
            "\n"
            f"Built with {_count(built):,} parameters, as predicted; {_bytes(built) / 1e6:,.1f} MB in float32; {reach}."
        )


def _build(spec: ModelSpec, device: str) -> SequenceModel:
    """Build the model and hold the prediction against it; on the device 'meta' this takes no memory.

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


def _validate(args: argparse.Namespace) -> Iterator[str]:
    data = read_model_spec(args.spec)
    sort = _sort(data)
    if sort == "model":
        spec, what = load_spec(data, overrides=dict(map(parse_setting, args.set))), ""
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
    """The same model with each of many layers once: what one of them says of its spec, all that are like it say."""
    layers = spec.layer_specs
    if len(layers) <= MANY:
        return spec
    different = {id(layer): layer for layer in layers}
    once = {layer_key(layer): layer for layer in [*different.values(), layers[-1]]}
    last = once.pop(layer_key(layers[-1]))  # the final norm may be one like its
    return spec.replace(layers=(*once.values(), last))


def _kinds(args: argparse.Namespace) -> Iterator[str]:
    if args.kind is not None:
        yield from _explain(find_kinds(args.kind, args.family))
        return
    yield list_kinds(args.family)
    if args.family is None:
        yield "\nFields of a kind: sma kind gau. What models are made of: sma kind layer, sma kind repeat."


def _kind(args: argparse.Namespace) -> Iterator[str]:
    yield from _explain(find_kinds(args.kind))


def _explain(found: list[Any]) -> Iterator[str]:
    yield "\n\n\n".join(map(describe_kind, found))


def _schema(args: argparse.Namespace) -> Iterator[str]:
    yield json.dumps(json_schema(args.family), indent=2, ensure_ascii=False)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; a word that nothing expects is answered with the nearest one that exists."""
    parser, commands = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise SpecError(f"unknown command {quote(argv[0])}{did_you_mean(argv[0], commands, 'commands')}")
    args, unknown = parser.parse_known_args(argv)
    if not unknown:
        return args
    word = unknown[0]
    if word.startswith("-"):
        options = [
            option
            for action in commands[args.command]._actions
            for option in action.option_strings
            if option.startswith("--")
        ]
        name = word.partition("=")[0]
        raise SpecError(f"{args.command} has no option {quote(name)}{did_you_mean(name, options, 'options')}")
    hint = "; write --set before each path=value" if "=" in word else f"; see sma {args.command} --help"
    raise SpecError(f"{args.command} takes no further argument {quote(word)}{hint}")


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"sma: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; default those it was called with.

    Returns:
        the exit status: 0; 2 where something is wrong with what was asked, after a sentence on stderr; 1 where the
        output cannot be written; 130 after Ctrl-C and 141 where the reader of the output went away, as the shell has
        it.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: _main(words), name="sma")


def _main(words: Sequence[str]) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            if not words:
                _parser()[0].print_help(sys.stderr)
                return 2
            args = _parse(words)
            for text in args.run(args):
                write_out(text)
        except SmaError as error:
            print("\n".join(f"sma: {sentence}" for sentence in str(error).splitlines()), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        except OSError as error:
            if error.filename is None:
                raise
            print(f"sma: {quote(str(error.filename))} cannot be read: {reason(error)}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
