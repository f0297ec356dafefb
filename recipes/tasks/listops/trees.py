"""The trees of ListOps, drawn level by level from the distribution of the Long Range Arena.

A node is a leaf with probability 0.75 and an operator otherwise; all nodes at the maximum depth are leaves. So the
number k of leaves before the next operator of a level has probability 0.75^k 0.25, and is drawn by one random number.
The size of a tree follows from its operators. Digits are drawn only for trees of an accepted size, because nine of ten
are rejected.

Trees are drawn in numbered chunks, each from its own seed, so the result does not depend on the number of processes.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial

from pydantic import Field, model_validator

from sma.errors import DataError
from sma.recipes.io.workers import in_order
from sma.spec import Spec

GENERATOR_VERSION = 1  # raise it whenever the same settings would give other bytes
DRAWS_PER_CHUNK = 4096
_BARREN_CHUNKS = 32  # number of consecutive chunks without a new tree after which the search ends

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
_PER_SKIP = 1.0 / math.log(0.75)
_LEAF_TEXTS = [f" {digit} )" for digit in range(10)]
# Of the 256 values of a byte, the first 250 give every last digit equally often.
_LAST_DIGIT = bytes(byte % 10 for byte in range(256))
_UNEVEN_BYTES = bytes(range(250, 256))

Level = tuple[int, list[tuple[int, int]]]


class ListOpsSettings(Spec):
    """Settings of the generated expressions. The same settings give the same bytes."""

    min_length: int = Field(
        default=500, ge=0, description="every expression has more tokens than this; parentheses do not count"
    )
    max_length: int = Field(
        default=2000,
        ge=2,
        le=1_000_000,
        description="every expression has fewer tokens than this; parentheses do not count",
    )
    max_depth: int = Field(
        default=10,
        ge=1,
        le=1_000_000,
        description="depth of the deepest digit; an expression that is a single digit has depth 1",
    )
    min_arity: int = Field(default=2, ge=1, description="minimum number of arguments of an operator")
    max_arity: int = Field(default=10, ge=1, le=1_000_000, description="maximum number of arguments of an operator")
    train: int = Field(default=96_000, ge=1, description="number of training expressions")
    validation: int = Field(default=2_000, ge=1, description="number of validation expressions")
    test: int = Field(default=2_000, ge=1, description="number of test expressions")
    seed: int = Field(default=0, ge=0, description="seed of the generator")

    @model_validator(mode="after")
    def _some_tree_fits(self) -> "ListOpsSettings":
        if self.max_arity < self.min_arity:
            raise ValueError(f"max_arity={self.max_arity} must be at least min_arity={self.min_arity}")
        if self.max_length < self.min_length + 2:
            raise ValueError(
                f"no length lies between min_length={self.min_length} and max_length={self.max_length}, which are "
                f"themselves excluded; raise max_length to {self.min_length + 2} or more"
            )
        largest = 1
        for _ in range(self.max_depth - 1):
            if largest > self.min_length:
                break
            largest = 2 + self.max_arity * largest
        if largest <= self.min_length:
            raise ValueError(
                f"the largest tree of max_depth={self.max_depth} and max_arity={self.max_arity} has {largest} tokens, "
                f"not more than min_length={self.min_length}; raise max_depth or max_arity, or lower min_length"
            )
        return self

    @property
    def total(self) -> int:
        """Number of expressions of all splits."""
        return self.train + self.validation + self.test

    @property
    def bytes_each(self) -> int:
        """Minimum bytes of an expression in its file: six per token, with its parentheses and blanks."""
        return max(4, 6 * self.min_length)

    @property
    def memory_each(self) -> int:
        """Minimum bytes of an expression in memory: its hash and split during generation, later its token ids."""
        return max(96, self.min_length + 25)


PAPER = ListOpsSettings()
"""Settings of the Long Range Arena: 501 to 1,999 tokens, depth 10, 2 to 10 arguments, 96,000 / 2,000 / 2,000
expressions, about 660 MB.
"""

TINY = ListOpsSettings(min_length=10, max_length=100, max_depth=5, max_arity=5, train=60_000)
"""The same distribution with 11 to 99 tokens, depth 5, 2 to 5 arguments, 60,000 / 2,000 / 2,000 expressions, about
11 MB.
"""


def generate_lines(
    settings: ListOpsSettings, *, workers: int | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Generator[tuple[int, bytes], None, None]:
    r"""Yield `settings.total` different expressions, each as its split (0 train, 1 validation, 2 test) and its line
    `source\ttarget\n`.

    Trees that are found early are more probable, so the splits are assigned at random: all three have the same
    distribution.

    Args:
        settings: settings of the expressions.
        workers: number of processes; None: one per core that this process may use. The lines do not depend on it. The
            processes end when the generator is exhausted or closed.
        on_progress: function that is called after every chunk with the number of expressions so far and in all.

    Raises:
        SpecError: `workers` is below 1.
        DataError: there are too few different trees, or a worker process died.
    """
    splits = _assign_splits(settings)
    seen: set[bytes] = set()
    barren = 0
    with closing(in_order(partial(draw_chunk, settings), itertools.count(), workers=workers)) as chunks:
        for lines in chunks:
            barren += 1
            for line in lines:
                key = hashlib.blake2b(line, digest_size=16).digest()
                if key in seen:
                    continue
                yield splits[len(seen)], line
                barren = 0
                seen.add(key)
                if len(seen) == settings.total:
                    break
            if on_progress is not None:
                on_progress(len(seen), settings.total)
            if len(seen) == settings.total:
                return
            if barren == _BARREN_CHUNKS:
                raise DataError(
                    f"found only {len(seen)} different trees of {settings.total}, none in the last "
                    f"{barren * DRAWS_PER_CHUNK} draws; lower the number, or widen the bounds of length, depth or arity"
                )


def draw_chunk(settings: ListOpsSettings, number: int) -> list[bytes]:
    r"""Draw the trees of a chunk; returns those of an accepted size, with duplicates, as lines `source\ttarget\n`."""
    rng = random.Random(f"listops {GENERATOR_VERSION} {settings.seed} {number}")
    shapes = (_draw_shape(rng, settings) for _ in range(DRAWS_PER_CHUNK))
    return ["{}\t{}\n".format(*_fill(rng, shape)).encode() for shape in shapes if shape is not None]


def _assign_splits(settings: ListOpsSettings) -> list[int]:
    rng = random.Random(f"listops splits {GENERATOR_VERSION} {settings.seed}")
    splits = [0] * settings.train + [1] * settings.validation + [2] * settings.test
    return [split for _, split in sorted((rng.random(), split) for split in splits)]


def _draw_shape(rng: random.Random, settings: ListOpsSettings) -> list[Level] | None:
    """Draw the operators of a tree: for every level its number of nodes, and position and arity of each operator.

    Returns None if the size of the tree is not accepted.
    """
    uniform, log = rng.random, math.log
    limit, smallest, arities = settings.max_length, settings.min_arity, settings.max_arity - settings.min_arity + 1
    levels: list[Level] = []
    size = nodes = 1
    for _ in range(settings.max_depth - 1):
        operators = []
        below = 0
        position = int(log(1.0 - uniform()) * _PER_SKIP)
        while position < nodes:
            arity = smallest + int(uniform() * arities)
            size += 1 + arity  # a leaf of size 1 becomes an operator of size 2 with `arity` leaves
            if size >= limit:
                return None
            operators.append((position, arity))
            below += arity
            position += 1 + int(log(1.0 - uniform()) * _PER_SKIP)
        levels.append((nodes, operators))
        nodes = below
        if not nodes:
            break
    if nodes:
        levels.append((nodes, []))
    return levels if size > settings.min_length else None


def _fill(rng: random.Random, levels: list[Level]) -> tuple[str, int]:
    """Draw the digits and operators of a shape, from the deepest level upwards; returns the source and its value."""
    uniform = rng.random
    texts: list[str] = []
    values: list[int] = []
    for nodes, operators in reversed(levels):
        digits = _draw_digits(rng, nodes)
        rendered = [_LEAF_TEXTS[digit] for digit in digits]
        first = 0
        for position, arity in operators:
            last = first + arity
            operator = int(uniform() * 4)
            digits[position] = _REDUCTIONS[operator](values[first:last])
            rendered[position] = f" {'( ' * (arity + 1)}{OPERATORS[operator]}{''.join(texts[first:last])} ] ) )"
            first = last
        texts, values = rendered, digits
    # Every text has the form of an argument, " argument )", which the root is not.
    return texts[0][1:-2], values[0]


def _draw_digits(rng: random.Random, count: int) -> list[int]:
    digits = b""
    while len(digits) < count:
        digits += rng.randbytes(count + 32).translate(_LAST_DIGIT, _UNEVEN_BYTES)
    return list(digits[:count])


def _median(values: list[int]) -> int:
    values.sort()
    return (values[len(values) // 2] + values[(len(values) - 1) // 2]) // 2


_REDUCTIONS: tuple[Callable[[list[int]], int], ...] = (min, max, _median, lambda values: sum(values) % 10)
