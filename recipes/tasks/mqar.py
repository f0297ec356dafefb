"""Multi-query associative recall (MQAR): key-value pairs, and later every key once as a query.

A sample is a row of token ids: key, value, key, value …, and then every key once more as a query, at an even distance
from the end of the pairs, among filler. The target at a query is the value of its key. The distances follow a power
law: most queries are near and some are far. Samples are drawn when they are requested: sample i of a split is a
function of the seed, the split and i, and no split is held in memory.

Reference:
    Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float64, Int64
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import DataError
from sma.memory import check_memory
from sma.recipes.tasks.batch import UNSCORED
from sma.recipes.tasks.contract import SPLITS, TaskData
from sma.recipes.tasks.recall import QueriesTask, collate
from sma.routers import keyed_uniform
from sma.spec import Spec, register

ROLES = {"k": "key", "v": "value", "?": "query", "~": "filler like keys", "·": "filler"}
"""Role of a token by the first character of its text."""

_BLOCK = 2**20
"""Maximum number of positions that are drawn at once for a hash, if a row has no more."""


class MQARSettings(Spec):
    """Settings of the samples. Token 0 is empty, the lower half of the others are keys, the upper half values."""

    length: int = Field(default=64, ge=4, le=2**24, description="number of tokens of a sample, at least 4 per pair")
    pairs: int = Field(default=4, ge=1, description="number of pairs, and of queries, of a sample")
    vocabulary: int = Field(
        default=8192, ge=4, le=2**20, description="number of different tokens; one half are keys, the other values"
    )
    filler: Literal["random", "zero"] = Field(
        default="random",
        description="tokens after the pairs, other than queries: drawn from the whole vocabulary, or all 0",
    )
    power: float = Field(
        default=0.01,
        ge=0.0,
        le=10.0,
        description="a of the law of the distances: a gap of g pairs of tokens between the last value and a query has "
        "the weight (g + 1)^(a - 1); small values favour near queries, 1 is uniform",
    )
    train: int = Field(default=100_000, ge=1, description="number of training samples")
    validation: int = Field(default=3000, ge=1, description="number of validation samples")
    test: int = Field(default=3000, ge=1, description="number of test samples")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of all samples")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 4 * self.pairs > self.length:
            raise ValueError(
                f"pairs={self.pairs} need a length of at least {4 * self.pairs}, two tokens for each pair and a "
                f"distance of two for each query; raise length={self.length}, or lower pairs"
            )
        if self.pairs > self.keys:
            raise ValueError(
                f"pairs={self.pairs} must be at most {self.keys}, the keys of vocabulary={self.vocabulary}, because "
                "the keys of a sample differ; raise vocabulary, or lower pairs"
            )
        return self

    @property
    def keys(self) -> int:
        """Number of different keys; they are the tokens from 1 on."""
        return self.vocabulary // 2 - 1

    @property
    def values(self) -> int:
        """Number of different values; they are the last tokens."""
        return self.vocabulary - self.vocabulary // 2

    @property
    def gaps(self) -> int:
        """Number of different gaps between the last value and a query, in pairs of tokens."""
        return (self.length - 2 * self.pairs) // 2


class Drawn(NamedTuple):
    """Drawn samples.

    Attributes:
        ids: the tokens.
        queries: position of the query of every pair, in the order of the pairs.
        answers: the values of the pairs.
    """

    ids: Int64[Tensor, "N L"]
    queries: Int64[Tensor, "N P"]
    answers: Int64[Tensor, "N P"]

    @property
    def targets(self) -> Int64[Tensor, "N L"]:
        """The answers at the queries, and `UNSCORED` elsewhere."""
        return torch.full_like(self.ids, UNSCORED).scatter_(1, self.queries, self.answers)


def draw(settings: MQARSettings, split: int, rows: Int64[Tensor, " N"]) -> Drawn:
    """Draw the samples of a split with these indices; a sample depends on the seed, the split and its index only.

    Args:
        settings: settings of the samples.
        split: index of the split.
        rows: indices of the samples.
    """
    uniform = partial(_uniform, settings.seed, split, rows)
    pairs, start = settings.pairs, 2 * settings.pairs
    keys = 1 + _distinct(settings.keys, uniform(0, pairs), uniform(1, pairs))
    answers = settings.vocabulary // 2 + _distinct(settings.values, uniform(2, pairs), uniform(3, pairs))
    # The first of independent exponential times are draws without replacement in proportion to the rates.
    rates = torch.arange(1, settings.gaps + 1, dtype=torch.float64) ** (settings.power - 1)
    times = -torch.log1p(-uniform(4, settings.gaps)) / rates
    queries = start + 2 * times.topk(pairs, largest=False, sorted=True).indices
    ids = torch.zeros(len(rows), settings.length, dtype=torch.int64)
    if settings.filler == "random":
        ids[:, start:] = (uniform(5, settings.length - start) * settings.vocabulary).long()
    ids[:, 0:start:2], ids[:, 1:start:2] = keys, answers
    return Drawn(ids.scatter_(1, queries, keys), queries, answers)


def _uniform(seed: int, split: int, rows: Tensor, what: int, columns: int) -> Float64[Tensor, "N C"]:
    return keyed_uniform(seed, torch.tensor(split), torch.tensor(what), rows[:, None], torch.arange(columns))


def _distinct(choices: int, draws: Float64[Tensor, "N P"], order: Float64[Tensor, "N P"]) -> Int64[Tensor, "N P"]:
    """Different numbers below `choices` in every row, in random order, by Floyd's algorithm: its cost does not depend
    on the number of choices.
    """
    count = draws.shape[1]
    chosen = torch.empty_like(draws, dtype=torch.int64)
    for step in range(count):
        last = choices - count + step
        drawn = (draws[:, step] * (last + 1)).long()
        taken = (chosen[:, :step] == drawn[:, None]).any(1)
        chosen[:, step] = drawn.masked_fill(taken, last)
    return chosen.gather(1, order.argsort(1))


class MQARDataset(Dataset[tuple[Tensor, Tensor]]):
    """A split as `(ids, targets)`, both `(L,)`, which are drawn when they are requested.

    Args:
        settings: settings of the samples.
        split: index of the split, a key of its draws.
        size: number of samples.
    """

    def __init__(self, settings: MQARSettings, split: int, size: int) -> None:
        self.settings, self.split, self.size = settings, split, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Int64[Tensor, "L"], Int64[Tensor, "L"]]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Int64[Tensor, "L"], Int64[Tensor, "L"]]]:
        """The samples of a batch, which a `DataLoader` requests at once."""
        drawn = draw(self.settings, self.split, torch.tensor([range(self.size)[index] for index in indices]))
        return list(zip(drawn.ids, drawn.targets, strict=True))

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Number of tokens of every sample."""
        return torch.full((self.size,), self.settings.length)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the ids, the positions of the queries and the answers of every sample, four bytes each."""
        digest = hashlib.sha256()
        for rows in torch.arange(self.size).split(max(1, _BLOCK // self.settings.length)):
            digest.update(torch.cat(draw(self.settings, self.split, rows), 1).int().numpy().tobytes())
        return digest.hexdigest()


def make_mqar(settings: MQARSettings) -> TaskData:
    """Make the splits. The samples of a split do not depend on the sizes of the others.

    Raises:
        DataError: there is too little memory for a sample, or for the indices of a split.
    """
    sizes = {name: int(getattr(settings, name)) for name in SPLITS}
    # The random numbers of a block, its tokens, and the lengths of a split.
    needed = 8 * (12 * max(settings.length, _BLOCK) + max(sizes.values()))
    check_memory(needed, "the task mqar", error=DataError, hint="lower train, validation, test or length of task.data")
    splits = [MQARDataset(settings, number, size) for number, size in enumerate(sizes.values())]
    return TaskData.of(splits, partial(show, settings), collate=collate, roles=ROLES)


def show(settings: MQARSettings, ids: Int64[Tensor, "L"]) -> list[str]:
    """Every token of a sample as text: `k5` a key, `v3` its value, `?5` the key as a query, `~` filler from the tokens
    that are keys, `·` other filler.

    Random filler that is a key of the sample, at an even distance, is shown as a query too: only the targets tell them
    apart.
    """
    texts = []
    keys: set[int] = set()
    for position, token in enumerate(ids.tolist()):
        if position >= 2 * settings.pairs:
            if token in keys and position % 2 == 0:
                texts.append(f"?{token}")
            else:
                texts.append("~" if 0 < token < settings.vocabulary // 2 else "·")
        elif position % 2:
            texts.append(f"v{token - settings.vocabulary // 2}")
        else:
            texts.append(f"k{token}")
            keys.add(token)
    return texts


@register
class MQARTask(QueriesTask):
    """Multi-query associative recall: the target at a query is the value of its key."""

    tokens: ClassVar[str] = "the empty token, keys and values"
    kind: Literal["mqar"] = "mqar"
    data: MQARSettings = Field(default=MQARSettings(), description="settings of the generated samples")

    @property
    def least_memory(self) -> int:
        # The lengths of a split; its samples are drawn on access.
        return 8 * max(self.data.train, self.data.validation, self.data.test)

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        return make_mqar(self.data)
