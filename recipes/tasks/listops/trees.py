"""The trees of ListOps: the distribution of Long Range Arena, drawn level by level.

A node is a leaf with probability 0.75 and an operator otherwise; at the greatest depth all are leaves. So k leaves
stand before the next operator of a level with probability 0.75^k 0.25, and one random number skips them all. The size
of a tree follows from its operators alone; only trees of the wanted size get digits, which makes the nine of ten that
are thrown away cheap.

Trees are drawn in numbered chunks, each from a seed of its own, so what is generated does not depend on how many
processes share the work.
"""

import hashlib
import itertools
import math
import random
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial

from pydantic import Field, model_validator

from sma.errors import DataError, did_you_mean
from sma.recipes.io.workers import in_order
from sma.spec import Spec

GENERATOR_VERSION = 1  # raise it whenever the same settings would give other bytes
DRAWS_PER_CHUNK = 4096
_BARREN_CHUNKS = 32  # this many chunks without one new tree: there are hardly any left

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
_LEAF_PROBABILITY = 0.75
_PER_SKIP = 1.0 / math.log(_LEAF_PROBABILITY)
_LEAF_TEXTS = [f" {digit} )" for digit in range(10)]
# Of the 256 values of a byte, the first 250 give every last digit equally often.
_LAST_DIGIT = bytes(byte % 10 for byte in range(256))
_UNEVEN_BYTES = bytes(range(250, 256))

Level = tuple[int, list[tuple[int, int]]]


class ListOpsSettings(Spec):
    """Which ListOps data to generate. The same settings give the same bytes."""

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
    min_arity: int = Field(default=2, ge=1, description="fewest arguments of an operator")
    max_arity: int = Field(default=10, ge=1, le=1_000_000, description="most arguments of an operator")
    train: int = Field(default=96_000, ge=1, description="expressions to train on")
    validation: int = Field(default=2_000, ge=1, description="expressions to validate on")
    test: int = Field(default=2_000, ge=1, description="expressions to test on")
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
        """Expressions in all splits together."""
        return self.train + self.validation + self.test

    @property
    def bytes_each(self) -> int:
        """Bytes that an expression has in its file at least: six for a token, with the parentheses and blanks around
        it.
        """
        return max(4, 6 * self.min_length)

    @property
    def memory_each(self) -> int:
        """Bytes of memory that an expression takes at least, while it is generated (its hash, its split) or later, as
        token ids.
        """
        return max(96, self.min_length + 25)


PAPER = ListOpsSettings()
"""Long Range Arena's data: 501 to 1,999 tokens, depth 10, 2 to 10 arguments, 96,000 / 2,000 / 2,000 expressions, about
660 MB.
"""

TINY = ListOpsSettings(min_length=10, max_length=100, max_depth=5, max_arity=5, train=60_000)
"""The same distribution cut to 11 to 99 tokens, depth 5, 2 to 5 arguments; 60,000 / 2,000 / 2,000 expressions, about 11
MB.
"""


def generate_lines(
    settings: ListOpsSettings, *, workers: int | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Generator[tuple[int, bytes], None, None]:
    r"""Yield `settings.total` different expressions, each as its split (0 train, 1 validation, 2 test) and its line
    `source\ttarget\n`.

    The earliest trees found are the likelier ones, so the splits are dealt out at random: all three have the same
    distribution.

    Args:
        settings: what to generate.
        workers: processes that draw; None: one per core that this process may use. The lines do not depend on it.
            The processes end when the generator is exhausted or closed.
        on_progress: called with the numbers of expressions found and wanted after every chunk of draws.

    Raises:
        SpecError: `workers` is below 1.
        DataError: there are fewer different trees than asked for, or a worker process died.
    """
    splits = _deal_splits(settings)
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
                    f"found only {len(seen)} different trees of the {settings.total} asked for, none in the last "
                    f"{barren * DRAWS_PER_CHUNK} draws; ask for fewer, or widen the bounds of length, depth or arity"
                )


def draw_chunk(settings: ListOpsSettings, number: int) -> list[bytes]:
    r"""Draw the trees of one chunk and return those of the wanted size, equal ones included, as lines
    `source\ttarget\n`.
    """
    rng = random.Random(f"listops {GENERATOR_VERSION} {settings.seed} {number}")
    lines = []
    for _ in range(DRAWS_PER_CHUNK):
        shape = _draw_shape(rng, settings)
        if shape is not None:
            source, value = _fill(rng, shape)
            lines.append(f"{source}\t{value}\n".encode())
    return lines


def evaluate_expression(tokens: Sequence[str]) -> int:
    """Return the value of one expression, read token by token; parentheses are skipped.

    Raises:
        DataError: the tokens are not one whole expression.
    """
    pending: list[tuple[str, list[int]]] = [("", [])]
    for token in tokens:
        if token in ("(", ")"):
            continue
        if token in OPERATORS:
            pending.append((token, []))
        elif token == "]":
            if len(pending) == 1:
                raise DataError("']' without an operator before it")
            operator, arguments = pending.pop()
            if not arguments:
                raise DataError(f"operator {operator!r} without arguments; it needs at least one")
            pending[-1][1].append(_apply(operator, arguments))
        elif len(token) == 1 and token in "0123456789":
            pending[-1][1].append(int(token))
        else:
            near = did_you_mean(token, OPERATORS)
            raise DataError(
                f"unknown symbol {token!r}{near or ';'} known symbols: {' '.join(OPERATORS)} ] and the digits 0 to 9"
            )
    if len(pending) > 1:
        raise DataError(f"{len(pending) - 1} operators are not closed; every operator needs its ']'")
    values = pending[0][1]
    if len(values) != 1:
        raise DataError(f"{len(values)} expressions where exactly one is required")
    return values[0]


def _apply(operator: str, arguments: list[int]) -> int:
    if operator == "[MIN":
        return min(arguments)
    if operator == "[MAX":
        return max(arguments)
    if operator == "[MED":
        return int(statistics.median(arguments))
    return sum(arguments) % 10


def _deal_splits(settings: ListOpsSettings) -> list[int]:
    rng = random.Random(f"listops splits {GENERATOR_VERSION} {settings.seed}")
    splits = [0] * settings.train + [1] * settings.validation + [2] * settings.test
    return [split for _, split in sorted((rng.random(), split) for split in splits)]


def _draw_shape(rng: random.Random, settings: ListOpsSettings) -> list[Level] | None:
    """Draw where a tree has operators: per level its number of nodes and the (position, arity) of its operators; None
    outside the size.
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
            size += 1 + arity  # a leaf of size 1 becomes an operator of size 2 with leaves below
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
    """Draw the digits and operators of a shape from the deepest level upwards; return the text and the value of the
    tree.
    """
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
    # Every text stands as an argument, " argument )"; the root is nobody's argument.
    return texts[0][1:-2], values[0]


def _draw_digits(rng: random.Random, count: int) -> list[int]:
    digits = b""
    while len(digits) < count:
        digits += rng.randbytes(count + 32).translate(_LAST_DIGIT, _UNEVEN_BYTES)
    return list(digits[:count])


def _median(values: list[int]) -> int:
    values.sort()
    return (values[len(values) // 2] + values[(len(values) - 1) // 2]) // 2


def _sum_modulo_10(values: list[int]) -> int:
    return sum(values) % 10


_REDUCTIONS: tuple[Callable[[list[int]], int], ...] = (min, max, _median, _sum_modulo_10)
