"""Statistics of decisions: activation rates, attention spans, and the MACs that routing saves.

Pure functions of a model's output: nothing is stored, logged or moved to another device.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.checks import check_count, check_decisions, check_integers, check_known, check_rate, what_came
from sma.decision import Decision
from sma.errors import InputError, quote
from sma.model import ModelSpec
from sma.moved import former_names
from sma.pytree import register_output
from sma.ragged import locate
from sma.summary import is_known, listed, summary

Health = Literal["ok", "dead", "saturated"]


@register_output
@dataclass(frozen=True)
class RateCount:
    """Counts for activation rates over many batches; `+` adds those of batches, chunks or ranks.

    Attributes:
        active: `(K, M)` number of active valid tokens of each routing layer and sub-module.
        valid: `()` number of valid tokens, the same for every layer.
        layers: names of the sub-modules of each of the K layers. M is the number of different names; a name that a
            layer lacks has the count 0 and no rate there.
    """

    active: Int[Tensor, "K M"]
    valid: Int[Tensor, ""]
    layers: tuple[tuple[str, ...], ...] = field(metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sub-modules, in the order of the last axis."""
        return _union(self.layers)

    @property
    def rates(self) -> Float[Tensor, "K M"]:
        """Active valid tokens / valid tokens, in [0, 1]; 0 where no token is valid, NaN where a layer lacks the
        sub-module.
        """
        present = [[name in layer for name in self.names] for layer in self.layers]
        mask = torch.tensor(present, dtype=torch.bool, device=self.active.device).reshape(self.active.shape)
        return (self.active.double() / self.valid.clamp(min=1)).where(mask, torch.nan)

    def by_layer(self) -> list[dict[str, float]]:
        """The rate of every sub-module of every routing layer, as plain numbers for logs and `count_macs`."""
        rows = self.rates.tolist()
        return [
            {name: row[self.names.index(name)] for name in layer} for layer, row in zip(self.layers, rows, strict=True)
        ]

    def __repr__(self) -> str:
        if not (is_known(self.active) and is_known(self.valid)):
            return summary(self)
        rates = (
            f"{{{listed(f'{quote(name)}: {rate:.3g}' for name, rate in layer.items())}}}" for layer in self.by_layer()
        )
        return f"RateCount(rates=({listed(rates)}), valid={int(self.valid)})"

    def __add__(self, other: Self) -> "RateCount":
        if not isinstance(other, RateCount):
            return NotImplemented
        if self.layers != other.layers:
            raise InputError(
                f"counts of different models cannot be added: layers with {list(self.layers)} and {list(other.layers)}"
            )
        return RateCount(self.active + other.active, self.valid + other.valid, self.layers)

    def __radd__(self, other: int) -> "RateCount":
        """Support `sum(counts)`, which starts with 0."""
        return self if other == 0 else NotImplemented


def _union(layers: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for layer in layers for name in layer))


def count_rates(decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> RateCount:
    """Count the active and the valid tokens of one batch.

    Args:
        decisions: one per routing layer, as `ModelOutput.decisions`.
        valid: False at padding; None where there is none.

    Raises:
        InputError: the mask is not boolean or its shape is not that of the decisions.
    """
    check_decisions(decisions, "count_rates", valid)
    layers = tuple(decision.names for decision in decisions)
    if not decisions:
        return RateCount(torch.zeros(0, 0, dtype=torch.int64), torch.zeros((), dtype=torch.int64), ())
    first, names = decisions[0].active, _union(layers)
    # `torch.tensor` would copy the number to an accelerator, for which the host waits.
    total = torch.full((), first.shape[0] * first.shape[1], device=first.device) if valid is None else valid.sum()
    rows = []
    for decision in decisions:
        counts = (decision.active if valid is None else decision.active & valid[..., None]).sum((0, 1))
        none = counts.new_zeros(())
        by_name = dict(zip(decision.names, counts.unbind(), strict=True))
        rows.append(torch.stack([by_name.get(name, none) for name in names]))
    return RateCount(torch.stack(rows), total, layers)


def activation_rates(decisions: Sequence[Decision], valid: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "K M"]:
    r"""Activation rate of every layer and sub-module in one batch: $\sum_t a_t^m / \sum_t 1$ over the valid tokens.

    Do not average rates of batches of different sizes; add `count_rates` instead.

    Args:
        decisions: one per routing layer, as `ModelOutput.decisions`.
        valid: False at padding; None where there is none.

    Returns:
        `(K, M)` in float64, in [0, 1]: K layers, and the sub-modules in the order of `module_names`. 0 where no token
        is valid, NaN where a layer lacks the sub-module.
    """
    return count_rates(decisions, valid).rates


def module_names(decisions: Sequence[Decision]) -> tuple[str, ...]:
    """Names of the sub-modules of all layers in order of first appearance: the last axis of `activation_rates`."""
    check_decisions(decisions, "module_names")
    return _union(decision.names for decision in decisions)


def router_health(rate: float, *, dead: float = 0.001, saturated: float = 0.999) -> Health:
    """Classify the activation rate of one sub-module, measured over enough tokens to resolve 0.1 %.

    A dead sub-module runs on (almost) no token; a router that learns only from active tokens cannot recover without a
    budget. A saturated one runs on (almost) every token, so routing has no effect. Under `always` and `never` that is
    intended.

    Args:
        rate: activation rate in [0, 1].
        dead: rate below which a sub-module is dead.
        saturated: rate above which a sub-module is saturated.

    Raises:
        InputError: the rate is not a number in [0, 1].
    """
    check_rate(rate, "the activation rate")
    if rate < dead:
        return "dead"
    return "saturated" if rate > saturated else "ok"


def attention_span(
    decision: Decision,
    window: int | None,
    valid: Bool[Tensor, "B L"] | None = None,
    positions: Int[Tensor, "B L"] | None = None,
) -> Float[Tensor, "M"]:
    r"""Mean true distance back to the earliest token within the window of an attention over the active tokens.

    $\mathrm{span} = \frac{1}{T} \sum_i (p_i - p_{\max(0, i - W)})$ per row, over its active tokens i at positions
    $p_i$, T of them in the batch. With every token active it is at most W; the sparser the activation, the further the
    same window reaches, up to the whole row. The equal reach ahead of a bidirectional attention is not included.

    Args:
        decision: which tokens are active.
        window: active tokens in reach, W; None for all.
        valid: False at padding; needed only for default positions, since padding is never active.
        positions: position of each token in its row's stream; default its rank among the valid tokens of its row.

    Returns:
        `(M,)` in float64, in tokens, for every sub-module as if it were an attention; 0 without active tokens.

    Raises:
        InputError: the window is less than 1, or the mask does not fit.
    """
    check_decisions([decision], "attention_span", valid)
    if window is not None:
        check_count(window, "window", 1, "; use window=None for all active tokens")
    if positions is not None:
        check_integers(positions, "positions are", dict(zip("BL", decision.active.shape, strict=False)))
    if positions is None and valid is not None:
        positions = valid.cumsum(1) - 1
    spans = []
    for tokens in locate(decision.active, positions):
        slots = tokens.slots
        earliest = torch.zeros_like(slots) if window is None else (slots - window).clamp(min=0)
        reach = tokens.positions - tokens.positions[tokens.offsets[tokens.rows] + earliest]
        spans.append(reach.sum().double() / max(1, reach.shape[0]))
    return torch.stack(spans) if spans else torch.zeros(0, dtype=torch.float64, device=decision.active.device)


class MACCount(NamedTuple):
    """Multiply-accumulates (MACs) of the layers of a model, per token.

    Attributes:
        per_token: at the given activation rates.
        all_active: with every sub-module on every token.
    """

    per_token: float
    all_active: float

    @property
    def saved(self) -> float:
        """Share of the MACs that routing saves, in [0, 1]."""
        return 1 - self.per_token / self.all_active if self.all_active else 0.0


def count_macs(spec: ModelSpec, length: int, rates: float | Sequence[float | Mapping[str, float]]) -> MACCount:
    """Predict the MACs of a model at measured activation rates.

    The specs predict the matmul, FFT and elementwise MACs of the layers. Encoder, norms, activations and head are not
    counted.

    Args:
        spec: the spec of the model.
        length: number of tokens of a row.
        rates: one entry per routing layer, a number or a mapping by sub-module, as from `RateCount.by_layer`; or one
            number for all.

    Raises:
        InputError: the number of layers or their sub-modules do not fit, a rate is not in [0, 1], or the length is less
            than 1.
    """
    if not hasattr(spec, "layer_specs"):
        raise InputError(f"count_macs got {what_came(spec)}; expected the spec of a model: load_spec(…), or model.spec")
    check_count(length, "length", 1, " token")
    if not isinstance(rates, int | float | Sequence) or isinstance(rates, str):
        raise InputError(f"the rates are {what_came(rates)}; expected a number, or a list with one entry per layer")
    routing = [layer for layer in spec.layer_specs if layer.modules]
    given = [rates] * len(routing) if isinstance(rates, int | float) else list(rates)
    if len(given) != len(routing):
        raise InputError(f"there are rates for {len(given)} layers; the model has {len(routing)} that route")
    each = iter(given)
    actual, full = 0, 0
    for index, layer in enumerate(spec.layer_specs):
        chosen = _by_name(next(each), layer.modules, index) if layer.modules else {}
        actual += layer.macs(spec.width, length, chosen).total
        full += layer.macs(spec.width, length, 1.0).total
    return MACCount(actual / length, full / length)


__getattr__ = former_names(__name__, operation_count="sma.stats.count_macs", OperationCount="sma.stats.MACCount")


def _by_name(rate: float | Mapping[str, float], modules: Iterable[str], index: int) -> dict[str, float]:
    names = list(modules)
    given = dict(rate) if isinstance(rate, Mapping) else dict.fromkeys(names, rate)
    check_known(given, names, f"the rate of layer {index}")
    for name in names:
        if name not in given:
            raise InputError(f"there is no rate for {name!r} of layer {index}; give one for each of {', '.join(names)}")
        check_rate(given[name], f"the rate of {name!r} of layer {index}")
    return given
