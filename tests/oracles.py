"""Slow reference implementations: loops over rows and tokens, one formula at a time."""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor, nn

from sma.layer import RoutedLayer
from sma.model import SequenceModel
from sma.norms import BatchNorm, LayerNorm, Norm, RMSNorm, ScaleNorm
from sma.ragged import Ragged
from sma.routers import (
    AlwaysRouter,
    BernoulliRouter,
    ExclusiveRouter,
    ExpertChoiceRouter,
    ExploreRouter,
    GumbelRouter,
    LinearRouter,
    Router,
    SMARouter,
    SteerableRouter,
    ThresholdRouter,
    TopKRouter,
)


@dataclass
class Token:
    """One active token: its index in the flattened batch, its position in the row, and its value."""

    place: int
    position: int
    value: Tensor


def compress(
    x: Tensor, active: Tensor, positions: Tensor | None = None, capacity: int | None = None
) -> list[list[Token]]:
    """The active tokens of every row, in order, at most the first `capacity` of them."""
    rows = []
    for b in range(x.shape[0]):
        row: list[Token] = []
        for t in range(x.shape[1]):
            if active[b, t] and (capacity is None or len(row) < capacity):
                position = t if positions is None else int(positions[b, t])
                row.append(Token(b * x.shape[1] + t, position, x[b, t]))
        rows.append(row)
    return rows


def tokens_of(tokens: Ragged) -> list[list[Token]]:
    """The real tokens of every row, packed or rectangular, found by offsets and lengths alone."""
    rows = []
    for b in range(len(tokens.offsets) - 1):
        first = int(tokens.offsets[b])
        places = range(first, first + int(tokens.lengths[b]))
        assert all(int(tokens.rows[i]) == b for i in range(first, int(tokens.offsets[b + 1])))
        rows.append([Token(int(tokens.index[i]), int(tokens.positions[i]), tokens.values[i]) for i in places])
    return rows


def one_row(values: Tensor, positions: list[int] | None = None) -> Ragged:
    """The tokens of a single row, packed."""
    count = values.shape[0]
    where = torch.arange(count) if positions is None else torch.tensor(positions, dtype=torch.long)
    rows = torch.zeros(count, dtype=torch.long)
    return Ragged(
        values, torch.arange(count), where, rows, torch.tensor([0, count]), torch.tensor([count]), holes=False
    )


def segment_reduce(values: Tensor, offsets: list[int], reduce: str) -> Tensor:
    """Reduce every row by itself; an empty row gives 0."""
    out = []
    for start, end in pairwise(offsets):
        part = values[start:end]
        if start == end:
            out.append(torch.zeros_like(values.sum(0)))
        elif reduce == "sum":
            out.append(part.sum(0))
        elif reduce == "mean":
            out.append(part.sum(0) / (end - start))
        else:
            out.append(part.amax(0) if reduce == "max" else part.amin(0))
    return torch.stack(out) if out else values.new_zeros((0, *values.shape[1:]))


def decide(router: Router, control: Tensor) -> list[tuple[bool, Tensor]]:
    """Whether each sub-module is active for one token `(D,)`, and its confidence."""
    if not isinstance(router, SMARouter):
        return [(isinstance(router, AlwaysRouter), torch.ones((), dtype=control.dtype)) for _ in router.names]
    decisions = []
    temperature = router.log_temperature.exp()[0]
    for m in range(len(router.names)):
        off = (router.weight[2 * m] * control).sum() + router.bias[2 * m]
        on = (router.weight[2 * m + 1] * control).sum() + router.bias[2 * m + 1]
        p_on = 1 / (1 + torch.exp((off - on) / temperature))
        decisions.append((bool(on > off), torch.where(on > off, p_on, 1 - p_on)))
    return decisions


def normalise(norm: Norm | None, token: Tensor) -> Tensor:
    """Normalise one token `(D,)`; batch norm uses its running statistics."""
    if norm is None:
        return token
    assert isinstance(norm, LayerNorm | BatchNorm | RMSNorm | ScaleNorm)
    epsilon = norm.spec.epsilon
    if isinstance(norm, LayerNorm | BatchNorm):
        mean, var = token.mean(), token.var(correction=0)
        if isinstance(norm, BatchNorm):
            mean, var = norm.running_mean, norm.running_var
        normal = (token - mean) / torch.sqrt(var + epsilon)
        return normal if norm.weight is None or norm.bias is None else normal * norm.weight + norm.bias
    size = torch.sqrt((token**2).mean() + epsilon)
    gain = norm.weight if isinstance(norm, RMSNorm) else norm.scale
    return token / size if gain is None else token / size * gain


def layer(part: RoutedLayer, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Run a layer row by row and token by token, on the valid tokens alone.

    Backbone and sub-modules are called on the tokens of one row at a time. Returns the hidden states, zeros at padding,
    and the active mask `(B, L, M)`.
    """
    spec = part.spec
    names = [] if part.routed is None else part.routed.router.names
    hidden = torch.zeros_like(x)
    active = torch.zeros(*x.shape[:2], len(names), dtype=torch.bool)
    first = spec.norm is not None and spec.norm.place == "pre"
    for b in range(x.shape[0]):
        places = [t for t in range(x.shape[1]) if valid[b, t]]
        if not places:
            continue
        tokens = [normalise(part.norm, x[b, t]) if first else x[b, t] for t in places]
        mixed = list(part.backbone(one_row(torch.stack(tokens)))[0]) if part.backbone is not None else tokens
        if part.backbone is not None and spec.backbone_activation == "silu":
            mixed = [token * torch.sigmoid(token) for token in mixed]
        if part.bypass is not None:
            sums = [part.bypass.weight @ token + part.bypass.bias for token in mixed]
        else:
            sums = [token if spec.bypass == "identity" else torch.zeros_like(token) for token in mixed]
        for m, name in enumerate(names):
            assert part.routed is not None
            choices = [decide(part.routed.router, token)[m] for token in mixed]
            ranks = [rank for rank, (on, _) in enumerate(choices) if on]
            if ranks:
                results = part.routed.submodules[name](one_row(torch.stack([mixed[rank] for rank in ranks]), ranks))[0]
            for slot, rank in enumerate(ranks):
                active[b, places[rank], m] = True
                sums[rank] = sums[rank] + choices[rank][1] * results[slot]
        for t, total in zip(places, sums, strict=True):
            out = x[b, t] + total
            out = out * torch.sigmoid(out) if spec.activation == "silu" else out
            hidden[b, t] = out if first else normalise(part.norm, out)
    return hidden, active


def sinusoid(position: int, width: int) -> Tensor:
    """[sin | cos] of the position times 10000^(-2i/D), without the learned factor."""
    angles = [position * 10000 ** (-2 * i / width) for i in range(width // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def model(part: SequenceModel, inputs: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Run a model row by row: hidden states, zeros at padding, and the mean over the valid tokens of each row."""
    hidden = torch.zeros(*valid.shape, part.spec.width, dtype=next(part.parameters()).dtype)
    for b in range(valid.shape[0]):
        places = [t for t in range(valid.shape[1]) if valid[b, t]]
        for rank, t in enumerate(places):
            hidden[b, t] = part.encoder(inputs[b : b + 1, t : t + 1])[0, 0]
            if part.sinusoid is not None:
                hidden[b, t] += part.sinusoid.scale[0] * sinusoid(rank, part.spec.width)
    for one in part.routed_layers:
        hidden, _ = layer(one, hidden, valid)
    pooled = torch.zeros(valid.shape[0], part.spec.width, dtype=hidden.dtype)
    for b in range(valid.shape[0]):
        places = [t for t in range(valid.shape[1]) if valid[b, t]]
        for t in places:
            hidden[b, t] = normalise(part.final_norm, hidden[b, t].clone())
            pooled[b] += hidden[b, t] / len(places)
    return hidden, pooled


class Reach(nn.Module):
    """A weighted sum of the tokens up to each token of a row. It is no `SubModule` and has no spec.

    The weights depend on order, positions and rows, so that an error in any of them changes the result.
    """

    causal = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.eye(width) + 0.05)

    def forward(self, tokens: Ragged, state: None = None) -> tuple[Tensor, None]:
        out = []
        for i in range(tokens.values.shape[0]):
            reached = [j for j in range(i + 1) if tokens.rows[j] == tokens.rows[i]]
            out.append(
                sum(
                    (tokens.values[j] / (1 + tokens.positions[i] - tokens.positions[j]) for j in reached),
                    torch.zeros(()),
                )
            )
        values = torch.stack(out) if out else tokens.values
        return values @ self.weight.to(values.dtype), None


@dataclass
class Choice:
    """Decision of a router about one token and one sub-module; the confidence has its gradient."""

    active: bool
    confidence: Tensor
    p_on: Tensor


def choices(router: Router, control: Tensor, row: int = 0) -> list[list[Choice]]:
    """Decisions of a learned router about the tokens `(L, D)` of a row without padding, by token and sub-module."""
    assert isinstance(router, LinearRouter)
    scores = [
        [(weight * token).sum() + bias for weight, bias in zip(router.weight, router.bias, strict=True)]
        for token in control
    ]
    shift = router.score_bias.tolist() if isinstance(router, SteerableRouter) else [0.0] * len(router.names)
    if isinstance(router, ExpertChoiceRouter):
        columns = [taken_by_an_expert([row[m] for row in scores], router.spec.share) for m in range(len(router.names))]
        return [[column[t] for column in columns] for t in range(len(control))]
    if isinstance(router, ExclusiveRouter):
        return [the_best([token[0], *plus(token[1:], shift)], router.log_temperature.exp()[0]) for token in scores]
    if isinstance(router, TopKRouter):
        count = len(shift)
        return [
            the_first(plus(token[:count], shift) + token[count:], router.spec.k, count, router.log_temperature.exp()[0])
            for token in scores
        ]
    if isinstance(router, ThresholdRouter):
        return [[above(score, router.spec.threshold) for score in plus(token, shift)] for token in scores]
    pairs = [list(zip(token[0::2], plus(token[1::2], shift), strict=True)) for token in scores]
    if isinstance(router, GumbelRouter):
        return [
            [sampled(router, off, on, row, t, m) for m, (off, on) in enumerate(token)] for t, token in enumerate(pairs)
        ]
    if isinstance(router, BernoulliRouter):
        return [
            [tossed(router, off, on, row, t, m) for m, (off, on) in enumerate(token)] for t, token in enumerate(pairs)
        ]
    assert isinstance(router, SMARouter | ExploreRouter)
    temperature = router.log_temperature.exp()[0]
    if isinstance(router, ExploreRouter):
        return [
            [tried(router, off / temperature, on / temperature, (row, t, m)) for m, (off, on) in enumerate(token)]
            for t, token in enumerate(pairs)
        ]
    return [[switched(off / temperature, on / temperature) for off, on in token] for token in pairs]


def plus(scores: list[Tensor], shift: list[float]) -> list[Tensor]:
    """Scores plus their biases."""
    return [score + more for score, more in zip(scores, shift, strict=True)]


def switched(off: Tensor, on: Tensor) -> Choice:
    """Decision of `sma`: the softmax of two scores."""
    p_on = 1 / (1 + torch.exp(off - on))
    return Choice(bool(on > off), p_on if on > off else 1 - p_on, p_on)


def tried(router: ExploreRouter, off: Tensor, on: Tensor, place: tuple[int, int, int]) -> Choice:
    """Decision of `explore`: in training, a draw below `tries` reverses the decision of `sma`."""
    p_on = 1 / (1 + torch.exp(off - on))
    if not router.training:
        return Choice(bool(on > off), p_on, p_on)
    share = router.spec.tries
    chance = 1 - share if on > off else share
    reversed_ = uniform(router.spec.seed, int(router.updates), *place) < share
    return Choice(bool(on > off) != reversed_, p_on, torch.tensor(chance, dtype=torch.float64))


def above(score: Tensor, threshold: float) -> Choice:
    """Decision of `threshold`: the odds of being active are the odds of the gate over those of the threshold."""
    gate = 1 / (1 + torch.exp(-score))
    odds = torch.exp(score) * (1 - threshold) / threshold
    return Choice(bool(score > math.log(threshold / (1 - threshold))), gate, odds / (1 + odds))


def shares_of(scores: list[Tensor], temperature: Tensor) -> list[Tensor]:
    """The softmax of scores at a temperature."""
    powers = [torch.exp(score / temperature) for score in scores]
    return [power / sum(powers) for power in powers]


def the_best(scores: list[Tensor], temperature: Tensor) -> list[Choice]:
    """Decision of `exclusive`: skip or one sub-module is active, if its score exceeds all others."""
    shares = shares_of(scores, temperature)
    return [
        Choice(
            all(bool(score > other) for rival, other in enumerate(scores) if rival != place),
            shares[place],
            shares[place],
        )
        for place, score in enumerate(scores)
    ][1:]


def the_first(scores: list[Tensor], k: int, modules: int, temperature: Tensor) -> list[Choice]:
    """Decision of `top_k`: the k highest scores, on a tie the first. Scores after the sub-modules' run nothing."""
    shares = shares_of(scores, temperature)
    taken = best_places(scores, k)
    return [Choice(place in taken, shares[place], shares[place]) for place in range(modules)]


def best_places(scores: list[Tensor], count: int) -> list[int]:
    """Indices of the `count` highest scores, found one after another; on a tie the first."""
    left = list(range(len(scores)))
    taken = []
    for _ in range(count):
        best = left[0]
        for place in left:
            if scores[place] > scores[best]:
                best = place
        taken.append(best)
        left.remove(best)
    return taken


def taken_by_an_expert(scores: list[Tensor], share: float) -> list[Choice]:
    """Decision of `expert_choice` for one sub-module: it takes the decimal share of the tokens of a row, rounded up."""
    count = math.ceil(Fraction(str(share)) * len(scores))
    ordered = [scores[place].detach() for place in best_places(scores, len(scores))]
    taken = best_places(scores, count)
    following = ordered[count] if count < len(scores) else ordered[-1] - 2 if ordered else torch.zeros(())
    found = []
    for place, score in enumerate(scores):
        middle = (ordered[count - 1] + following) / 2
        found.append(Choice(place in taken, 1 / (1 + torch.exp(-score)), 1 / (1 + torch.exp(middle - score))))
    return found


def sampled(router: GumbelRouter, off: Tensor, on: Tensor, row: int, position: int, place: int) -> Choice:
    """Decision of `gumbel`: a sample in training, the higher score in evaluation.

    The confidence is 1, with the gradient of the relaxed sample.
    """
    spec, update = router.spec, int(router.updates)
    p_on = 1 / (1 + torch.exp(off - on))
    if router.training:
        off, on = (
            score + more for score, more in zip((off, on), gumbel_draws(router, row, position, place), strict=True)
        )
    done = 1.0 if update >= spec.anneal else update / spec.anneal
    temperature = math.exp(math.log(spec.temperature) + done * math.log(spec.final_temperature / spec.temperature))
    relaxed = 1 / (1 + torch.exp((off - on) / temperature))
    return Choice(bool(on > off), 1 + relaxed - relaxed.detach(), p_on)


def tossed(router: BernoulliRouter, off: Tensor, on: Tensor, row: int, position: int, place: int) -> Choice:
    """Decision of `bernoulli`: the sample of `gumbel`, with a confidence of 1 without a gradient."""
    p_on = 1 / (1 + torch.exp(off - on))
    if router.training:
        off, on = (
            score + more for score, more in zip((off, on), gumbel_draws(router, row, position, place), strict=True)
        )
    return Choice(bool(on > off), torch.ones_like(p_on), p_on)


def gumbel_draws(router: GumbelRouter | BernoulliRouter, row: int, position: int, place: int) -> list[float]:
    """Gumbel noise on the scores off and on of one sub-module at one token."""
    draws = (uniform(router.spec.seed, int(router.updates), row, position, 2 * place + switch) for switch in (0, 1))
    return [-math.log(-math.log(draw)) for draw in draws]


def gumbel_noise(router: GumbelRouter | BernoulliRouter, rows: int, length: int) -> Tensor:
    """Gumbel noise of a batch without padding, `(B, L, M, 2)`."""
    places = range(len(router.names))
    noise = [
        [[gumbel_draws(router, row, position, place) for place in places] for position in range(length)]
        for row in range(rows)
    ]
    return torch.tensor(noise, dtype=torch.float64)


def uniform(seed: int, *keys: int) -> float:
    """A uniform draw by splitmix64 in Python integers, so that recorded runs and negative controls can be repeated."""
    whole = 2**64 - 1
    golden = 0x9E3779B97F4A7C15
    mixed = (seed + 1) * golden % 2**62
    for key in keys:
        mixed ^= (key + 1) * golden & whole
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & whole
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & whole
        mixed ^= mixed >> 31
    return (mixed >> 8) % 2**53 / 2**53
