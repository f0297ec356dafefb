"""The commands `kinds`, `kind` and `schema`: the registered kinds and their fields."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from sma.arguments import ArgumentParser
from sma.catalogue import describe_kind, find_kinds, list_kinds
from sma.spec import json_schema


def add_kinds(parser: ArgumentParser) -> None:
    """Add the arguments of `kinds`."""
    parser.add_argument("family", metavar="FAMILY", nargs="?", help="such as sub-module, router, norm")
    parser.add_argument("kind", metavar="KIND", nargs="?", help="print the fields of this kind")


def add_kind(parser: ArgumentParser) -> None:
    """Add the arguments of `kind`."""
    parser.add_argument("kind", metavar="KIND", help="such as gau, sma, layer_norm")


def add_schema(parser: ArgumentParser) -> None:
    """Add the arguments of `schema`."""
    parser.add_argument("family", metavar="FAMILY", nargs="?", default="model", help="default: model")


def run_kinds(args: argparse.Namespace) -> Iterator[str]:
    """Yield the registered kinds, of all families or of one, or the fields of one kind."""
    if args.kind is not None:
        yield from _explain(find_kinds(args.kind, args.family))
        return
    yield list_kinds(args.family)
    if args.family is None:
        yield "\nFields of a kind: sma kind gau. Parts of models: sma kind layer, sma kind repeat."


def run_kind(args: argparse.Namespace) -> Iterator[str]:
    """Yield the fields of a kind."""
    yield from _explain(find_kinds(args.kind))


def _explain(found: list[Any]) -> Iterator[str]:
    yield "\n\n\n".join(map(describe_kind, found))


def run_schema(args: argparse.Namespace) -> Iterator[str]:
    """Yield the JSON schema of a family."""
    yield json.dumps(json_schema(args.family), indent=2, ensure_ascii=False)
