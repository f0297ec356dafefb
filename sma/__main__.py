"""The command line `sma`: the commands of the core, and those that train, which are imported when they are called."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, NoReturn, TextIO

import torch

from sma.arguments import ArgumentParser
from sma.commands.extras import DISTRIBUTION, check_extra, missing_extra, of_an_extra
from sma.commands.kinds import add_kind, add_kinds, add_schema, run_kind, run_kinds, run_schema
from sma.commands.specs import add_describe, add_validate, run_describe, run_validate
from sma.errors import SmaError, SpecError, did_you_mean, quote, reason
from sma.streams import end_process, run_command, write_out


class Command(NamedTuple):
    """A command of the core.

    Attributes:
        what: the help of the command.
        add: function that adds its arguments to a parser.
        run: function that yields its output.
    """

    what: str
    add: Callable[[ArgumentParser], None]
    run: Callable[[argparse.Namespace], Iterator[str]]


class Experiments(NamedTuple):
    """A command of the recipes or of the sweeps.

    Attributes:
        what: the help of the command.
        module: the module of the command.
        options: name of the class of its options in the module.
        run: name of the function in the module that takes the options.
        positional: the field of the options that is given without an option.
        unless: fields of which one may be given instead; none: the positional field is required.
        extra: the extra of the distribution that the command needs.
    """

    what: str
    module: str
    options: str
    run: str
    positional: str
    unless: tuple[str, ...] = ()
    extra: str = "recipes"


COMMANDS = {
    "describe": Command("print the parts of a model with their parameters and MACs", add_describe, run_describe),
    "validate": Command(
        "check a model, an experiment or a sweep; one message per mistake, and exit status 2 if there are any",
        add_validate,
        run_validate,
    ),
    "kinds": Command("list the registered kinds, of all families or of one", add_kinds, run_kinds),
    "kind": Command("print the fields of a kind, or of 'layer' and 'repeat', the parts of a model", add_kind, run_kind),
    "schema": Command("print the JSON schema of a family, for editors", add_schema, run_schema),
}
EXPERIMENTS = {
    "train": Experiments(
        "train a model on a task and test it",
        "sma.recipes.training.single_run",
        "TrainOptions",
        "train",
        "task",
        ("spec", "resume"),
    ),
    "evaluate": Experiments(
        "test the model of a finished run again",
        "sma.recipes.training.single_run",
        "EvaluateOptions",
        "evaluate_run",
        "run",
    ),
    "report": Experiments(
        "recreate the figures and tables of a run, a comparison or a sweep",
        "sma.commands.report",
        "ReportOptions",
        "report",
        "folder",
    ),
    "generate": Experiments(
        "continue a text with a trained language model", "sma.recipes.seqboat_lm", "GenerateOptions", "write", "run"
    ),
    "compare": Experiments(
        "compare SeqBoat with its baselines on one or several tasks",
        "sma.recipes.compare",
        "Options",
        "run_comparison",
        "task",
        ("spec", "resume"),
    ),
    "sweep": Experiments(
        "search for the best sparsity and width of a model",
        "sma.tune.__main__",
        "Options",
        "search",
        "task",
        ("space", "resume"),
        "tune",
    ),
}
EXAMPLES = """examples:
  sma train listops --preset tiny
  sma sweep listops --samples 16
  sma describe seqboat_listops --length 2000 --rate 0.1
  sma validate my_model.yaml --set layers.layer.modules.attention.window=64
  sma kind gau
"""


def _parser() -> ArgumentParser:
    """The parser of the command line, for help, the version and unknown options."""
    parser = ArgumentParser(
        prog="sma",
        description="Train, compare, describe and check models of sparse modular activation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sma {_version()} (torch {torch.__version__})")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, command in (EXPERIMENTS | COMMANDS).items():
        commands.add_parser(name, help=command.what)
    return parser


def _version() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "(not installed)"


def _run_core(name: str, words: Sequence[str]) -> None:
    what, add, run = COMMANDS[name]
    parser = ArgumentParser(prog=f"sma {name}", description=f"{what[0].upper()}{what[1:]}.")
    add(parser)
    for text in run(parser.read(words)):
        write_out(text)


def _run_experiments(name: str, words: Sequence[str]) -> int:
    command, program = EXPERIMENTS[name], f"sma {name}"
    try:
        from sma.recipes.io.command import exit_code, parse  # needs the extra

        module = import_module(command.module)
    except ImportError as error:
        if not of_an_extra(error):
            raise
        raise missing_extra(program, command.extra, error) from error

    def run() -> None:
        options = parse(
            getattr(module, command.options),
            words,
            program=program,
            positional=command.positional,
            unless=command.unless,
        )
        check_extra(program, command.extra)
        getattr(module, command.run)(options)

    return exit_code(run)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the name of the program; default: those of this process.

    Returns:
        the exit status: 0; 2 after one error message on stderr; 1 if the output cannot be written; 130 after Ctrl-C and
        141 after the reader of the output exited, as in a shell. The commands that train have the statuses of
        `sma.recipes.io.command.exit_code`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: _main(words))


def _main(words: Sequence[str]) -> int:
    try:
        if not words:
            _parser().print_help(sys.stderr)
            return 2
        name, *rest = words
        if name in EXPERIMENTS:
            return _run_experiments(name, rest)
        if name in COMMANDS:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                _run_core(name, rest)
            return 0
        if not name.startswith("-"):
            known = [*EXPERIMENTS, *COMMANDS]
            raise SpecError(f"unknown command {quote(name)}{did_you_mean(name, known, 'commands')}")
        _parser().read(words)
    except SmaError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {quote(str(error.filename))} cannot be read: {reason(error)}", file=sys.stderr)
        return 2
    return 0


def program() -> NoReturn:
    """Run the command of this process, and exit."""
    end_process(main())


if __name__ == "__main__":
    program()
