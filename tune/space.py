"""Search spaces: which fields of an experiment a sweep may change, and to what.

A space maps field paths to distributions, in YAML or in Python:

    training.learning_rate: {kind: loguniform, low: 0.001, high: 0.01}
    layers.layer.modules.attention.window: {kind: choice, values: [8, 16, 32]}
"""

import itertools
import math
import random
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, model_validator

from sma.errors import SpecError, quote
from sma.mistakes import SENTENCES
from sma.paths import override, parse_path
from sma.recipes.experiment import ExperimentSpec, full_path
from sma.spec import Spec, dump_spec, register

DRAWS = 50
"""Combinations drawn at random that are tried on the experiment before a sweep starts."""

CHOICES = 1000
"""Values of a choice at most: every one is tried on the experiment."""
PATHS = 100
"""Fields of a space at most."""

_INSIDE = 0.381966
"""Where between its ends a range is probed: at no whole number where the ends are whole ones."""


class Ask(Protocol):
    """What draws numbers: a trial of Optuna."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Draw a number."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Draw a whole number."""

    def suggest_categorical(self, name: str, choices: list[int]) -> int:
        """Draw one of several."""


class DistributionSpec(Spec):
    """Root of the kinds of distributions."""

    family: ClassVar[str] = "distribution"
    kind: str

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that are tried on the experiment before a sweep starts: the ends of a range and one inside, every
        choice.
        """
        raise TypeError(f"{type(self).__name__} must define probes")

    def draw(self, ask: Ask, name: str) -> Any:
        """Draw a value."""
        raise TypeError(f"{type(self).__name__} must define draw(self, ask, name)")

    def encode(self, value: Any) -> int | float | None:
        """The number under which the search knows a value; None where the distribution never draws it."""
        raise TypeError(f"{type(self).__name__} must define encode(self, value)")


class _Range(DistributionSpec):
    """What distributions from `low` to `high` share."""

    low: float
    high: float

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if not self.low < self.high:
            raise ValueError(
                f"low={self.low} must be below high={self.high}; for one value use {{kind: fixed, value: {self.low}}}"
            )
        if not math.isfinite(float(self.high) - float(self.low)):
            raise ValueError(
                f"low={self.low} and high={self.high} are too far apart for their difference to be a number"
            )
        return self

    @property
    def probes(self) -> tuple[Any, ...]:
        return self.low, self._inside, self.high

    @property
    def _inside(self) -> float:
        return self.low + _INSIDE * (self.high - self.low)

    def encode(self, value: Any) -> int | float | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and self.low <= value <= self.high and self._reaches(value) else None

    def _reaches(self, value: float) -> bool:
        return True


def _short(value: float) -> float:
    """Without what floating point adds: 0.30000000000000004 where a user reads 0.3 in the specs."""
    return float(f"{value:.12g}")


def _multiple(length: float, step: float) -> bool:
    return math.isclose(length / step, round(length / step), rel_tol=0.0, abs_tol=1e-6)


@register
class Uniform(_Range):
    """Any number between `low` and `high`, all alike."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(description="the smallest value")
    high: float = Field(description="the largest value")

    def draw(self, ask: Ask, name: str) -> float:
        return ask.suggest_float(name, self.low, self.high)


@register
class LogUniform(_Range):
    """Any number between `low` and `high`, whose logarithms are all alike."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0.0, description="the smallest value")
    high: float = Field(gt=0.0, description="the largest value")

    @property
    def _inside(self) -> float:
        return math.exp(math.log(self.low) + _INSIDE * (math.log(self.high) - math.log(self.low)))

    def draw(self, ask: Ask, name: str) -> float:
        return ask.suggest_float(name, self.low, self.high, log=True)


@register
class QUniform(_Range):
    """The numbers `low`, `low + step`, … `high`, all alike."""

    kind: Literal["quniform"] = "quniform"
    low: float = Field(description="the smallest value")
    high: float = Field(description="the largest value; a whole number of steps above the smallest")
    step: float = Field(gt=0.0, description="from one value to the next")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if not math.isfinite((self.high - self.low) / self.step) or not _multiple(self.high - self.low, self.step):
            raise ValueError(f"high={self.high} must be a whole number of steps of {self.step} above low={self.low}")
        return self

    @property
    def _inside(self) -> float:
        # If this and the low end are whole numbers, all of them are.
        return _short(self.low + self.step)

    def draw(self, ask: Ask, name: str) -> float:
        return _short(ask.suggest_float(name, self.low, self.high, step=self.step))

    def _reaches(self, value: float) -> bool:
        return _multiple(value - self.low, self.step)


@register
class Int(_Range):
    """Whole numbers from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    low: int = Field(description="the smallest value")
    high: int = Field(description="the largest value")
    log: bool = Field(
        default=False, description="draw the logarithms alike: 1 to 2 as often as 512 to 1,024; low must be 1 or more"
    )

    @model_validator(mode="after")
    def _has_a_logarithm(self) -> Self:
        if self.log and self.low < 1:
            raise ValueError(f"low={self.low} must be at least 1 with log=true")
        return self

    @property
    def _inside(self) -> int:
        return (self.low + self.high) // 2

    def draw(self, ask: Ask, name: str) -> int:
        return ask.suggest_int(name, self.low, self.high, log=self.log)

    def _reaches(self, value: float) -> bool:
        return value == int(value)


def _same(value: Any) -> Any:
    """What is equal for equal values: 0 and 0.0 are, 1 and true are not."""
    if isinstance(value, Mapping):
        return frozenset((name, _same(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_same, value))
    return isinstance(value, bool), value if isinstance(value, Hashable) else id(value)


@register
class Choice(DistributionSpec):
    """One of some values: numbers, words, null, or whole parts of a spec."""

    kind: Literal["choice"] = "choice"
    values: tuple[Any, ...] = Field(min_length=1, max_length=CHOICES, description="which; two at least, and different")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len(self.values) == 1:
            one = quote(self.values[0])
            raise ValueError(f"values=[{one}] leave no choice; for one value use {{kind: fixed, value: {one}}}")
        seen = set()
        for value in self.values:
            same = _same(value)
            if same in seen:
                raise ValueError(f"{quote(value)} stands twice in values={quote(list(self.values))}")
            seen.add(same)
        return self

    @property
    def probes(self) -> tuple[Any, ...]:
        return self.values

    def draw(self, ask: Ask, name: str) -> Any:
        return self.values[ask.suggest_categorical(name, list(range(len(self.values))))]

    def encode(self, value: Any) -> int | None:
        return next((place for place, known in enumerate(self.values) if _same(known) == _same(value)), None)


@register
class Fixed(DistributionSpec):
    """One value, set in every trial but the first, which is the experiment as it is: what the other fields of the space
    rest on.
    """

    kind: Literal["fixed"] = "fixed"
    value: Any = Field(description="which")

    @property
    def probes(self) -> tuple[Any, ...]:
        return (self.value,)

    def draw(self, ask: Ask, name: str) -> Any:
        return self.value

    def encode(self, value: Any) -> int | None:
        return 0


Space = Mapping[str, DistributionSpec]


def with_values(experiment: ExperimentSpec, values: Mapping[str, Any]) -> ExperimentSpec:
    """The experiment with some values changed, by field path.

    Raises:
        SpecError: there is no such path, or the values do not fit.
    """
    named = {full_path(path): value for path, value in values.items()}
    return ExperimentSpec.model_validate(override(ExperimentSpec, dump_spec(experiment), named))


def value_at(experiment: ExperimentSpec, path: str) -> Any:
    """The value of an experiment at a field path; None where the part that would hold it is null."""
    node: Any = dump_spec(experiment)
    for step in parse_path(full_path(path)):
        if isinstance(node, Mapping):
            node = node.get(str(step))
        elif isinstance(node, list) and isinstance(step, int) and step < len(node):
            node = node[step]
        else:
            return None
    return node


def starting_code(experiment: ExperimentSpec, path: str, distribution: DistributionSpec) -> int | float | None:
    """The number under which the search knows the experiment's own value at a path; None where the distribution never
    draws it.

    A choice is compared as the experiment would hold it: `{kind: sma}` is the router that stands there with its
    defaults written out.
    """
    value = value_at(experiment, path)
    if isinstance(distribution, Choice):
        for place, choice in enumerate(distribution.values):
            try:
                if _same(value_at(with_values(experiment, {path: choice}), path)) == _same(value):
                    return place
            except SpecError:  # a value that fits other values of the space, and not the experiment as it is
                continue
    return distribution.encode(value)


class Dice:
    """Draws at random, without an estimator; see `Ask`."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Draw a number."""
        if step is not None:
            return low + step * self.random.randint(0, round((high - low) / step))
        return (
            min(high, math.exp(self.random.uniform(math.log(low), math.log(high))))
            if log
            else self.random.uniform(low, high)
        )

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Draw a whole number."""
        return int(self.suggest_float(name, low, high + 0.999, log=True)) if log else self.random.randint(low, high)

    def suggest_categorical(self, name: str, choices: list[int]) -> int:
        """Draw one of several."""
        return self.random.choice(choices)


def searched(space: Space) -> list[str]:
    """The paths that differ between trials."""
    return [path for path, distribution in space.items() if not isinstance(distribution, Fixed)]


def largest(space: Space) -> dict[str, Any]:
    """The last value of every path: the high ends of the ranges."""
    return {path: distribution.probes[-1] for path, distribution in space.items()}


def check_space(space: Space, experiment: ExperimentSpec) -> None:
    """Try the ends and the inside of every range, every choice, and some random combinations on an experiment.

    Raises:
        SpecError: the space is empty, a path leads nowhere, stands there twice or changes what trials are compared by,
            or the experiment refuses a value.
    """
    if not searched(space):
        raise SpecError(
            "the search space is empty: no field differs between trials; write path: distribution, such as "
            "training.learning_rate: {kind: loguniform, low: 0.001, high: 0.01}"
        )
    if len(space) > PATHS:
        raise SpecError(f"the search space has {len(space):,} fields, and {PATHS} are the most; leave some out")
    _check_comparable(space)
    _check_apart(space)
    for path in space:
        override(ExperimentSpec, dump_spec(experiment), {full_path(path): None})
    for values, changed in _tries(space):
        try:
            with_values(experiment, values)
        except SpecError as error:
            hint = _hint(space, experiment, values, changed)
            raise SpecError(f"the experiment refuses {_words(values, changed)}: {error}{hint}") from None


def _tries(space: Space) -> Iterator[tuple[dict[str, Any], str]]:
    """All first probes together, then every probe of every path with the others at their first, all last ones, and
    random draws.
    """
    first = {path: distribution.probes[0] for path, distribution in space.items()}
    yield first, next(iter(space)) if len(space) == 1 else "the fixed and first values together"
    for path, distribution in space.items():
        for value in distribution.probes[1:]:
            yield {**first, path: value}, path
    yield largest(space), "all largest values together"
    dice = Dice()
    for number in range(DRAWS):
        yield (
            {path: distribution.draw(dice, path) for path, distribution in space.items()},
            f"the values of random draw {number}",
        )


def _words(values: Mapping[str, Any], changed: str) -> str:
    """What was tried: the one value that differs from the first ones, or all of them."""
    if changed in values:
        return f"a value of the search space, {changed}={quote(values[changed])}"
    return (
        f"{changed} "
        f"({', '.join(f'{path}={quote(value)}' for path, value in itertools.islice(values.items(), SENTENCES))})"
    )


def _hint(space: Space, experiment: ExperimentSpec, values: Mapping[str, Any], changed: str) -> str:
    """What would help: whole numbers, or other values of the fixed fields."""
    if changed not in values:
        fixed = [path for path, distribution in space.items() if isinstance(distribution, Fixed)][:SENTENCES]
        return (
            f"; the fixed values can be changed: {' '.join(f'--set {path}=VALUE' for path in fixed)}" if fixed else ""
        )
    value = values[changed]
    if not isinstance(value, float) or value.is_integer() or not math.isfinite(value):
        return ""
    try:
        with_values(experiment, {**values, changed: round(value)})
    except SpecError:
        return ""
    return f"; for whole numbers write {changed}: {{kind: int, …}}"


def _check_apart(space: Space) -> None:
    """Refuse paths of which one sets what the other sets."""
    for (one, steps), (other, others) in itertools.combinations(
        ((path, parse_path(full_path(path))) for path in space), 2
    ):
        if steps == others:
            raise SpecError(f"{quote(one)} and {quote(other)} are the same field; leave one of them out of the space")
        if steps[: len(others)] == others or others[: len(steps)] == steps:
            raise SpecError(
                f"{quote(one)} and {quote(other)} set the same part, one as a whole; leave one of them out of the space"
            )


def _check_comparable(space: Space) -> None:
    for path in space:
        full = full_path(path)
        if full == "training.updates":
            raise SpecError(
                f"{path!r} cannot be searched: all trials train equally long; "
                "set it for all of them with --set training.updates=N"
            )
        if parse_path(full)[0] == "task":
            raise SpecError(
                f"{quote(path)} cannot be searched: all trials learn from the same data; "
                "set it for all of them with --set PATH=VALUE"
            )
