"""Associative recall in noise: key-value pairs are scattered among distractors, and later every key is a query.

A sample is a row of token ids. In its first part, every key is followed by its value, and all keys differ. In the
second part, the same keys occur in another order among distractors, and the target at each is its value. The samples
are generated; the same settings give the same samples.

References:
    Ba et al., "Using Fast Weights to Attend to the Recent Past", arXiv 1610.06258; Arora et al., "Zoology: Measuring
    and Improving Recall in Efficient Language Models", arXiv 2312.04927.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Int64, Integer, UInt8
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import DataError
from sma.memory import check_memory
from sma.model import ModelSpec
from sma.recipes.tasks.batch import UNSCORED, Batch
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.spec import Spec, register

ROLES = {"k": "key", "v": "value", "?": "query", "·": "distractor"}
"""Role of a token by the first character of its text."""


class RecallSettings(Spec):
    """Settings of the samples. The first token ids are the values, the next the keys, the last the distractors."""

    length: int = Field(default=128, ge=4, description="number of tokens of a sample")
    queries_from: int = Field(default=96, ge=2, description="position of the first token of the second part")
    pairs: int = Field(default=8, ge=1, description="number of pairs, and of queries, of a sample")
    keys: int = Field(default=32, ge=1, le=100, description="number of different keys")
    values: int = Field(default=16, ge=2, le=100, description="number of different values")
    distractors: int = Field(default=32, ge=1, le=50, description="number of different distractors")
    train: int = Field(default=64000, ge=1, description="number of training samples")
    validation: int = Field(default=500, ge=1, description="number of validation samples")
    test: int = Field(default=2000, ge=1, description="number of test samples")
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of all samples")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.pairs > self.keys:
            raise ValueError(f"pairs={self.pairs} must be at most keys={self.keys}; the keys of a sample differ")
        if 2 * self.pairs > self.queries_from or self.pairs > self.length - self.queries_from:
            raise ValueError(
                f"pairs={self.pairs} do not fit: they require {2 * self.pairs} of the first "
                f"queries_from={self.queries_from} tokens, "
                f"and their queries {self.pairs} of the other {self.length - self.queries_from}"
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return self.values + self.keys + self.distractors


class RecallDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples as `(ids, targets)`, both `(L,)`: the target of a query is its value; other targets are `UNSCORED`.

    Args:
        ids: the samples.
        queries: positions of the queries of every sample, in ascending order.
        answers: their values.
    """

    def __init__(
        self, ids: UInt8[Tensor, "N L"], queries: Integer[Tensor, "N P"], answers: UInt8[Tensor, "N P"]
    ) -> None:
        self.ids, self.queries, self.answers = ids, queries, answers

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Int64[Tensor, "L"], Int64[Tensor, "L"]]:
        ids = self.ids[range(len(self))[index]].long()
        return ids, torch.full_like(ids, UNSCORED).scatter_(0, self.queries[index].long(), self.answers[index].long())

    @property
    def lengths(self) -> Int64[Tensor, "N"]:
        """Number of tokens of every sample."""
        return torch.full((len(self),), self.ids.shape[1])

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids, the positions of the queries and the answers, a byte each. The positions have four bytes
        each if a sample has more than 256.
        """
        return hashlib.sha256(
            b"".join(tensor.contiguous().numpy().tobytes() for tensor in (self.ids, self.queries, self.answers))
        ).hexdigest()


def make_recall(settings: RecallSettings) -> TaskData:
    """Generate the samples. The samples of a split do not depend on the sizes of the others.

    Raises:
        DataError: there is too little memory.
    """
    sizes = (settings.train, settings.validation, settings.test)
    drawn = max(settings.keys, settings.queries_from - settings.pairs, settings.length - settings.queries_from)
    # The samples of all splits, and the random numbers of the largest one.
    needed = settings.length * sum(sizes) + (8 * settings.length + 12 * drawn) * max(sizes)
    check_memory(
        needed, "the task recall", error=DataError, hint="lower train, validation, test or length of task.data"
    )
    splits = [
        _draw(settings, size, torch.Generator().manual_seed(settings.seed * 1_000_003 + number))
        for number, size in enumerate(sizes)
    ]
    return TaskData.of(splits, partial(show, settings), collate=collate, roles=ROLES)


def _draw(settings: RecallSettings, size: int, generator: torch.Generator) -> RecallDataset:
    pairs, start = settings.pairs, settings.queries_from
    first = settings.values + settings.keys
    ids = torch.randint(first, first + settings.distractors, (size, settings.length), generator=generator)
    keys = settings.values + _sample(settings.keys, pairs, size, generator)
    values = torch.randint(settings.values, (size, pairs), generator=generator)
    # A choice of P of S - P positions, each of them then widened to two, is a uniform choice of P disjoint pairs of
    # neighbours among S positions.
    positions = _sample(start - pairs, pairs, size, generator).sort(1).values + torch.arange(pairs)
    ids.scatter_(1, positions, keys).scatter_(1, positions + 1, values)
    queries = start + _sample(settings.length - start, pairs, size, generator).sort(1).values
    order = torch.rand(size, pairs, generator=generator).argsort(1)
    ids.scatter_(1, queries, keys.gather(1, order))
    queries = queries.to(torch.uint8 if settings.length <= 256 else torch.int32)
    return RecallDataset(ids.to(torch.uint8), queries, values.gather(1, order).to(torch.uint8))


def _sample(choices: int, count: int, size: int, generator: torch.Generator) -> Int64[Tensor, "N P"]:
    """Draw `size` rows of `count` different numbers below `choices`, in random order."""
    return torch.rand(size, choices, generator=generator).argsort(1)[:, :count]


def show(settings: RecallSettings, ids: Int64[Tensor, "L"]) -> list[str]:
    """Every token of a sample as text: `v3` a value, `k5` a key, `?5` the same key as a query, `·` a distractor."""
    texts = []
    for position, token in enumerate(ids.tolist()):
        if token < settings.values:
            texts.append(f"v{token}")
        elif token < settings.values + settings.keys:
            texts.append(f"{'k' if position < settings.queries_from else '?'}{token - settings.values}")
        else:
            texts.append("·")
    return texts


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Stack samples of one length."""
    inputs, targets = (torch.stack(tensors) for tensors in zip(*items, strict=True))
    return Batch(inputs, torch.ones_like(inputs, dtype=torch.bool), targets)


class QueriesTask(ClassificationTask):
    """Base of the tasks with targets at the queries of a row of token ids.

    Attributes:
        tokens: noun for the tokens of the vocabulary, for the message about a model with another one.
    """

    tokens: ClassVar[str]
    data: Any

    @property
    def classes(self) -> int:
        return int(self.data.vocabulary)

    @property
    def chance(self) -> float:
        return 1 / int(self.data.values)

    def check_model(self, model: ModelSpec) -> None:
        if not model.scores_positions:
            raise ValueError(f"the model kind {model.kind!r} does not score every position; use kind 'language_model'")
        vocabulary = getattr(model.encoder, "vocabulary", 0)
        if vocabulary != self.classes:
            raise ValueError(f"model.encoder.vocabulary={vocabulary} must be {self.classes}: {self.tokens} of the task")

    @property
    def training_samples(self) -> int | None:
        return int(self.data.train)

    @property
    def least_length(self) -> int:
        return int(self.data.length)


@register
class RecallTask(QueriesTask):
    """Associative recall: the target at a query is the value of its key."""

    tokens: ClassVar[str] = "values, keys and distractors"
    kind: Literal["recall"] = "recall"
    data: RecallSettings = Field(default=RecallSettings(), description="settings of the generated samples")

    @property
    def least_memory(self) -> int:
        # A split is drawn at once, as integers of 8 bytes.
        return 8 * max(self.data.train, self.data.validation, self.data.test) * self.data.length

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        return make_recall(self.data)
