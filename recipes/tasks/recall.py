"""Associative recall in noise: pairs of a key and a value are scattered among distractors, and later the keys are asked
for.

A sample is a row of token ids. In its first part every key is followed by its value; in the rest the same keys stand
among distractors again, in another order, and at each the model has to name the value. No key comes twice in the first
part. Everything else is noise that nobody needs. Generated: the same settings give the same samples.

References:
    Ba et al., "Using Fast Weights to Attend to the Recent Past", arXiv 1610.06258; Arora et al., "Zoology: Measuring
    and Improving Recall in Efficient Language Models", arXiv 2312.04927.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Self

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


class RecallSettings(Spec):
    """Which samples to generate. Token ids are the values, then the keys, then the distractors."""

    length: int = Field(default=128, ge=4, description="tokens of a sample")
    queries_from: int = Field(default=96, ge=2, description="position at which the queries begin")
    pairs: int = Field(default=8, ge=1, description="pairs of a sample, each of which is asked for once")
    keys: int = Field(default=32, ge=1, le=100, description="different keys")
    values: int = Field(default=16, ge=2, le=100, description="different values")
    distractors: int = Field(default=32, ge=1, le=50, description="different distractors")
    train: int = Field(default=64000, ge=1, description="training samples")
    validation: int = Field(default=500, ge=1, description="validation samples")
    test: int = Field(default=2000, ge=1, description="test samples")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of all samples")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.pairs > self.keys:
            raise ValueError(f"pairs={self.pairs} must be at most keys={self.keys}; no key comes twice")
        if 2 * self.pairs > self.queries_from or self.pairs > self.length - self.queries_from:
            raise ValueError(
                f"pairs={self.pairs} do not fit: they take {2 * self.pairs} of the first "
                f"queries_from={self.queries_from} tokens, "
                f"and their queries {self.pairs} of the other {self.length - self.queries_from}"
            )
        return self

    @property
    def vocabulary(self) -> int:
        """Different tokens."""
        return self.values + self.keys + self.distractors


class RecallDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples as `(ids, targets)`, both `(L,)`: the target of a query is the id of its value, every other position is
    `UNSCORED`.

    Args:
        ids: the samples.
        queries: which positions are queries, by sample, in order.
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
        """Tokens of every sample."""
        return torch.full((len(self),), self.ids.shape[1])

    @property
    def sha256(self) -> str:
        """Of the ids, the positions of the queries and the answers, a byte each; above 256 positions four bytes for
        each of these.
        """
        return hashlib.sha256(
            b"".join(part.contiguous().numpy().tobytes() for part in (self.ids, self.queries, self.answers))
        ).hexdigest()


class RecallData(NamedTuple):
    """The three splits, and the SHA-256 of each."""

    train: RecallDataset
    validation: RecallDataset
    test: RecallDataset
    hashes: dict[str, str]


def make_recall(settings: RecallSettings) -> RecallData:
    """Generate the samples; which ones the others splits hold does not change with the size of one.

    Raises:
        DataError: the memory has no room for them.
    """
    sizes = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    drawn = max(settings.keys, settings.queries_from - settings.pairs, settings.length - settings.queries_from)
    # Of every split what is kept, and of the largest what it is drawn with.
    needed = settings.length * sum(sizes.values()) + (8 * settings.length + 12 * drawn) * max(sizes.values())
    check_memory(
        needed, "the task recall", error=DataError, hint="lower train, validation, test or length of task.data"
    )
    splits = {}
    for number, (name, size) in enumerate(sizes.items()):
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        splits[name] = _draw(settings, size, generator)
    return RecallData(**splits, hashes={name: split.sha256 for name, split in splits.items()})


def _draw(settings: RecallSettings, size: int, generator: torch.Generator) -> RecallDataset:
    pairs, start = settings.pairs, settings.queries_from
    first = settings.values + settings.keys
    ids = torch.randint(first, first + settings.distractors, (size, settings.length), generator=generator)
    keys = settings.values + _some(settings.keys, pairs, size, generator)
    values = torch.randint(settings.values, (size, pairs), generator=generator)
    # Choosing P of S - P places and making each two wide spreads pairs that do not touch each other over S places, all
    # ways alike.
    places = _some(start - pairs, pairs, size, generator).sort(1).values + torch.arange(pairs)
    ids.scatter_(1, places, keys).scatter_(1, places + 1, values)
    queries = start + _some(settings.length - start, pairs, size, generator).sort(1).values
    order = torch.rand(size, pairs, generator=generator).argsort(1)
    ids.scatter_(1, queries, keys.gather(1, order))
    # A byte for every position, where one is enough.
    positions = queries.to(torch.uint8 if settings.length <= 256 else torch.int32)
    return RecallDataset(ids.to(torch.uint8), positions, values.gather(1, order).to(torch.uint8))


def _some(choices: int, count: int, size: int, generator: torch.Generator) -> Int64[Tensor, "N P"]:
    """Draw `count` different numbers below `choices`, in random order, `size` times."""
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
    """Stack samples, which are of one length."""
    inputs, targets = (torch.stack(parts) for parts in zip(*items, strict=True))
    return Batch(inputs, torch.ones_like(inputs, dtype=torch.bool), targets)


@register
class RecallTask(ClassificationTask):
    """Name the values of keys that were seen before, among distractors."""

    kind: Literal["recall"] = "recall"
    data: RecallSettings = Field(default=RecallSettings(), description="which samples to generate")

    @property
    def classes(self) -> int:
        return self.data.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.data.values

    def check_model(self, model: ModelSpec) -> None:
        if not model.scores_positions:
            raise ValueError(
                f"the model kind {model.kind!r} has no answer at every position; use kind 'language_model'"
            )
        vocabulary = getattr(model.encoder, "vocabulary", 0)
        if vocabulary != self.classes:
            raise ValueError(
                f"model.encoder.vocabulary={vocabulary} must be {self.classes}: "
                "values, keys and distractors of the task"
            )

    @property
    def training_samples(self) -> int | None:
        return self.data.train

    @property
    def least_length(self) -> int:
        return self.data.length

    @property
    def least_memory(self) -> int:
        # A split is drawn at once, in numbers of 8 bytes.
        return 8 * max(self.data.train, self.data.validation, self.data.test) * self.data.length

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = make_recall(self.data)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, partial(show, self.data))
