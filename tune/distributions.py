"""Distributions: what a sweep may draw for a field, and how the search knows a value again."""

import math
import random
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, model_validator

from sma.errors import quote
from sma.spec import Spec, register

CHOICES = 1000
"""Values of a choice at most: every one is tried on the experiment."""

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


def comparable(value: Any) -> Any:
    """What is equal for equal values: 0 and 0.0 are, 1 and true are not."""
    if isinstance(value, Mapping):
        return frozenset((name, comparable(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(comparable, value))
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
            same = comparable(value)
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
        return next((place for place, known in enumerate(self.values) if comparable(known) == comparable(value)), None)


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
