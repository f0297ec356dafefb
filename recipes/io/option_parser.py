"""The parser of a command whose options are the fields of a typed class, and its help."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sma.arguments import ArgumentParser
from sma.errors import did_you_mean, quote
from sma.recipes.io.names import plain


@dataclass(frozen=True)
class Metavar:
    """Placeholder for the value of an option in the help.

    Attributes:
        word: the placeholder, such as `FOLDER`.
    """

    word: str


File = Annotated[Path, Metavar("FILE")]
Folder = Annotated[Path, Metavar("FOLDER")]
FolderOrURI = Annotated[str, Metavar("FOLDER")]
Name = Annotated[str, Metavar("NAME")]
Names = Annotated[str, Metavar("NAME,NAME")]
Setting = Annotated[str, Metavar("PATH=VALUE")]
Settings = Annotated[str, Metavar("PATH=VALUE,PATH=VALUE")]
Cluster = Annotated[str, Metavar("HOST:PORT")]


def option_parser(options: type[BaseModel], program: str, positional: str | None = None) -> ArgumentParser:
    """Return the parser of a command line; its result has only the given options.

    Args:
        options: class of the options. The field `top_k` becomes `--top-k`. Further aliases, the names in earlier
            versions, are accepted but not listed.
        program: the name of the command.
        positional: the field that is given without an option, such as the task in `sma train listops`.
    """
    first = ""
    if positional is not None:
        word = positional.upper()
        first = f" {word}" if options.model_fields[positional].is_required() else f" [{word}]"
    parser = ArgumentParser(
        prog=program,
        usage=f"{program}{first} [options]",
        description=options.__doc__,
        argument_default=argparse.SUPPRESS,
    )
    last = getattr(options, "repeatable", ())
    for name, field in sorted(options.model_fields.items(), key=lambda item: item[0] in last):
        names = option_names(name, field)
        flags = [f"--{each.replace('_', '-')}" for each in names]
        how: dict[str, Any] = {"help": _help(field), "metavar": _metavar(field)}
        if name == positional:
            how = {"help": field.description, "metavar": positional.upper()}
            parser.add_argument(names[0], nargs=None if field.is_required() else "?", **how)
        elif field.annotation is bool:
            _add_switch(parser, flags[0], names[0], field)
        else:
            how |= {"dest": names[0], "action": "append" if get_origin(field.annotation) is list else "store"}
            parser.add_argument(flags[0], required=field.is_required(), **how)
            for flag in flags[1:]:
                parser.add_argument(flag, **{**how, "help": argparse.SUPPRESS})
    return parser


def mistakes(error: ValidationError, options: type[BaseModel], positional: str | None = None) -> list[str]:
    """Return one message per invalid value, with the name of its option."""
    messages = []
    for item in error.errors():
        name = str(item["loc"][0])
        field = next((each for key, each in options.model_fields.items() if name in option_names(key, each)), None)
        shown = f"--{name.replace('_', '-')}" if name != positional or field is None else name.upper()
        choices = [] if field is None else _choices(field.annotation)
        if item["type"] == "literal_error" and choices:
            hint = did_you_mean(str(item["input"]), choices, "choices")
            messages.append(f"{shown}: unknown choice {quote(item['input'])}{hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            messages.append(f"{shown}={quote(item['input'])}: {message[:1].lower()}{message[1:]}; see --help")
    return messages


def option_names(name: str, field: FieldInfo) -> list[str]:
    """The names of a field on the command line; the current one is first."""
    alias = field.validation_alias
    return [str(each) for each in alias.choices] if isinstance(alias, AliasChoices) else [name]


def _add_switch(parser: ArgumentParser, flag: str, name: str, field: FieldInfo) -> None:
    """Add both forms of a Boolean option; the help lists the form that changes the default, or both."""
    off = f"--no-{flag[2:]}"
    if field.default:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, dest=name, help=_help(field))
        return
    parser.add_argument(flag, action="store_true", dest=name, help=_help(field))
    parser.add_argument(off, action="store_false", dest=name, help=argparse.SUPPRESS)


def _metavar(field: FieldInfo) -> str:
    """The placeholder for the value in the help."""
    for each in (*field.metadata, *_parts(field.annotation)):
        if isinstance(each, Metavar):
            return each.word
    if choices := _choices(field.annotation):
        return f"{{{','.join(choices)}}}"
    parts = _parts(field.annotation)
    return "NUMBER" if int in parts or float in parts else "FILE" if Path in parts else "TEXT"


def _parts(annotation: Any) -> list[Any]:
    """The types and the metadata of an annotation."""
    if get_origin(annotation) in (Union, UnionType, Annotated, list):
        return [part for each in get_args(annotation) for part in _parts(each)]
    return [annotation]


def _choices(annotation: Any) -> list[str]:
    parts = [part for part in _parts(annotation) if get_origin(part) is Literal]
    return [str(choice) for part in parts for choice in get_args(part)]


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    default: Any = None if field.is_required() else field.get_default(call_default_factory=True)
    if default is True:
        text += " (default: yes)"
    elif default is not None and default is not False and not isinstance(default, list | Mapping):
        shown = plain(default)
        text += f" (default: {shown if shown.strip() == str(default) else quote(default)})"
    return text.replace("%", "%%")  # argparse formats it
