"""Parameters and MACs of every part of a model, predicted from its spec."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sma.errors import SpecError, quote
from sma.layer import LayerSpec
from sma.model import ModelSpec
from sma.norms import NormSpec
from sma.spec import dump_spec


@dataclass(frozen=True)
class Part:
    """One part of a model and its cost.

    Attributes:
        name: `backbone`, `router`, `norm`, or the name of a routed sub-module.
        kind: its registered kind, with details that distinguish it from others of the kind.
        parameters: predicted number of parameters.
        macs: MACs of one row at the given activation rate; 0 also where the spec predicts none.
        all_active: MACs of one row with every token active.
    """

    name: str
    kind: str
    parameters: int
    macs: int = 0
    all_active: int = 0

    def times(self, count: int) -> "Part":
        """The same part `count` times."""
        return Part(self.name, self.kind, self.parameters * count, self.macs * count, self.all_active * count)


@dataclass(frozen=True)
class Layers:
    """A group of equal layers.

    Attributes:
        indices: indices of the layers in the model, from 0.
        parts: the parts of one of them.
    """

    indices: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def one(self) -> Part:
        """One of them as a whole."""
        return _sum("one of them", "", self.parts)

    @property
    def all(self) -> Part:
        """All of them together."""
        count = len(self.indices)
        return _sum(
            f"layer{'s' if count > 1 else ''} {_ranges(self.indices)}",
            f"{count} alike" if count > 1 else "",
            self.parts,
        ).times(count)


@dataclass(frozen=True)
class Description:
    """The output of `python -m sma describe`: the parts of a model in the order of computation.

    Attributes:
        name: name of the model in the output.
        spec: the spec of the model.
        length: number of tokens of the row whose MACs are counted.
        rate: activation rate of the sub-modules whose router does not determine it.
        before: encoder and sinusoid.
        layers: groups of equal layers.
        after: final norm and head.
    """

    name: str
    spec: ModelSpec
    length: int
    rate: float
    before: tuple[Part, ...]
    layers: tuple[Layers, ...]
    after: tuple[Part, ...]

    @property
    def total(self) -> Part:
        """The model as a whole."""
        return _sum("total", "", (*self.before, *(group.all for group in self.layers), *self.after))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the MACs of a whole row and the numbers of one layer of each group."""
        groups = [
            {
                "layers": list(group.indices),
                **_numbers(group.one),
                "parts": [_part_numbers(part) for part in group.parts],
            }
            for group in self.layers
        ]
        return {
            "name": self.name,
            "kind": self.spec.kind,
            "width": self.spec.width,
            "length": self.length,
            "rate": self.rate,
            "before": [_part_numbers(part) for part in self.before],
            "layers": groups,
            "after": [_part_numbers(part) for part in self.after],
            "total": _numbers(self.total),
        }

    def as_text(self) -> str:
        """An aligned table, at most 100 columns wide for names of usual length."""
        spec, count = self.spec, len(self.spec.layer_specs)
        total = self.total
        rows = [["part", "kind", "parameters", f"at rate {self.rate:g}", "share", "all active", "ratio"]]
        rows += [self._row(part, total) for part in self._lines()]
        fixed = any(layer.router.expected_rate is not None for layer in spec.layer_specs if layer.modules)
        legend = [
            [f"at rate {self.rate:g}", "MACs per token, if each routed sub-module runs on this share of the tokens"],
            *([["", "(routers whose rate is shown: on that share)"]] if fixed else []),
            ["share", "of these MACs; encoder, norms and head are not counted"],
            ["all active", "MACs per token, if each runs on every token"],
            ["ratio", "of the two: the remaining share of the work"],
        ]
        return "\n".join(
            [
                (
                    f"{self.name}: {spec.kind}, width {spec.width}, "
                    f"{count} layer{'' if count == 1 else 's'}, rows of {self.length:,} tokens"
                ),
                "",
                *align(rows, right=(2, 3, 4, 5, 6)),
                "",
                *align(legend),
            ]
        )

    def _lines(self) -> Iterator[Part]:
        yield from self.before
        for group in self.layers:
            count = len(group.indices)
            yield group.all
            for part in group.parts:
                yield replace(part.times(count), name=f"  {part.name}")
            if count > 1:
                yield replace(group.one, name=f"  {group.one.name}")
        yield from self.after
        yield self.total

    def _row(self, part: Part, total: Part) -> list[str]:
        numbers = ["-"] * 4
        if part.all_active:
            share = f"{part.macs / total.macs:.1%}" if total.macs else "-"
            each = [f"{macs / self.length:,.0f}" for macs in (part.macs, part.all_active)]
            numbers = [each[0], share, each[1], f"{part.macs / part.all_active:.2f}"]
        return [part.name, part.kind, f"{part.parameters:,}" if part.parameters else "-", *numbers]


def describe(spec: ModelSpec, *, name: str = "model", length: int = 2000, rate: float = 0.25) -> Description:
    """Predict the parameters and MACs of every part of a model.

    Args:
        spec: the spec of the model.
        name: name of the model in the output.
        length: number of tokens of the row whose MACs are counted.
        rate: activation rate of every routed sub-module whose router has no `RouterSpec.expected_rate`.

    Raises:
        SpecError: the length is less than 1, or the rate is not in [0, 1].
    """
    if not 1 <= length < 2**63:
        raise SpecError(f"length={quote(length)} must be at least 1 token, and below 2^63")
    if not 0 <= rate <= 1:
        raise SpecError(
            f"rate={quote(rate)} must lie between 0 and 1: the share of the tokens that run a routed sub-module"
        )
    width = spec.width
    before = [Part("encoder", spec.encoder.kind, spec.encoder.num_parameters(width))]
    if spec.sinusoid:
        before.append(Part("sinusoid", "", 1))
    if spec.shared_router:
        router, names = spec.routers[0]
        before.append(Part("shared router", router.kind, router.num_parameters(width, len(names))))
    after = []
    if spec.final_norm_spec is not None:
        after.append(Part("final norm", spec.final_norm_spec.kind, spec.final_norm_spec.num_parameters(width)))
    if spec.head_spec is not None:
        after.append(Part("head", spec.head_spec.kind, spec.head_spec.num_parameters(spec.head_width)))
    keys = {id(layer): layer_key(layer) for layer in {id(layer): layer for layer in spec.layer_specs}.values()}
    alike: dict[str, tuple[LayerSpec, list[int]]] = {}
    for index, layer in enumerate(spec.layer_specs):
        alike.setdefault(keys[id(layer)], (layer, []))[1].append(index)
    groups = [
        Layers(tuple(indices), tuple(_layer_parts(layer, width, length, rate, spec.shared_router)))
        for layer, indices in alike.values()
    ]
    return Description(name, spec, length, rate, tuple(before), tuple(groups), tuple(after))


def layer_key(layer: LayerSpec) -> str:
    """A key that is equal for equal layers; third-party specs may not be hashable."""
    return json.dumps(dump_spec(layer), sort_keys=True)


def _layer_parts(layer: LayerSpec, width: int, length: int, rate: float, shared_router: bool) -> Iterator[Part]:
    """Yield the parts of a layer in the order of computation; they add up to the predictions of `LayerSpec`, without
    the parameters of a router that all layers share.
    """
    if layer.norm is not None and layer.norm.place == "pre":
        yield _norm(layer.norm, width)
    if layer.backbone is not None:
        macs = layer.backbone.macs(width, length).total
        yield Part("backbone", layer.backbone.kind, layer.backbone.num_parameters(width), macs, macs)
    if layer.modules:
        own = layer.router.expected_rate
        rate = rate if own is None else own
        count = len(layer.modules)
        macs = length * layer.router.macs_per_token(width, count)
        kind = layer.router.kind if own is None else f"{layer.router.kind} (rate {own:g})"
        yield Part("router", kind, 0 if shared_router else layer.router.num_parameters(width, count), macs, macs)
    for name, module in layer.modules.items():
        active, full = (module.macs(width, tokens).total for tokens in (round(rate * length), length))
        yield Part(f"routed {name}", module.kind, module.num_parameters(width), active, full)
    if layer.bypass == "linear":
        yield Part("bypass", "linear", width * (width + 1), length * width * width, length * width * width)
    elif layer.bypass == "identity":
        yield Part("bypass", "identity", 0)
    if layer.norm is not None and layer.norm.place == "post":
        yield _norm(layer.norm, width)


def _norm(norm: NormSpec, width: int) -> Part:
    return Part("norm", f"{norm.kind} ({norm.place})", norm.num_parameters(width))


def _sum(name: str, kind: str, parts: Sequence[Part]) -> Part:
    columns = ((part.parameters, part.macs, part.all_active) for part in parts)
    return Part(name, kind, *(sum(column) for column in zip((0, 0, 0), *columns, strict=True)))


def _part_numbers(part: Part) -> dict[str, Any]:
    return {"part": part.name, "kind": part.kind, **_numbers(part)}


def _numbers(part: Part) -> dict[str, Any]:
    return {"parameters": part.parameters, "macs": part.macs, "macs_all_active": part.all_active}


def _ranges(indices: Sequence[int]) -> str:
    """Write 0, 1, 2, 4 as `0-2, 4`, and cut a long list."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in runs]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:3], "..."])


def align(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Align rows of cells in columns with two blanks between them; the columns in `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
