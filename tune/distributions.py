"""Distributions from which a sweep draws the values of a field, and their codes for the search."""

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sma.errors import quote
from sma.spec import Spec, register

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

CHOICES = 1000
"""Maximum number of values of a choice. Every value is tried on the experiment."""

_INSIDE = 0.381966
"""Fraction of a range at which it is probed. It is irrational, so that integer ends give a non-integer probe."""


class DistributionSpec(Spec):
    """Base class of the kinds of distributions."""

    family: ClassVar[str] = "distribution"
    kind: str

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that are tried on the experiment before a sweep starts: the ends of a range and one value inside, or
        every choice.
        """
        raise TypeError(f"{type(self).__name__} must define probes")

    def draw(self, trial: "BaseTrial", name: str) -> Any:
        """Draw a value for the parameter `name` of a trial of Optuna."""
        raise TypeError(f"{type(self).__name__} must define draw(self, trial, name)")

    def encode(self, value: Any) -> int | float | None:
        """The number by which the search represents a value; None if the distribution never draws the value."""
        raise TypeError(f"{type(self).__name__} must define encode(self, value)")


class _Range(DistributionSpec):
    """Base class of the distributions between `low` and `high`."""

    low: float = Field(description="the smallest value")
    high: float = Field(description="the largest value")

    @model_validator(mode="after")
    def _is_not_empty(self) -> Self:
        if not self.low < self.high:
            raise ValueError(
                f"low={self.low} must be below high={self.high}; for one value use {{kind: fixed, value: {self.low}}}"
            )
        if not math.isfinite(float(self.high) - float(self.low)):
            raise ValueError(f"low={self.low} and high={self.high} are too far apart: their difference must be finite")
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
    """A value rounded to 12 significant digits, such as 0.3 for 0.30000000000000004."""
    return float(f"{value:.12g}")


def _multiple(length: float, step: float) -> bool:
    return math.isclose(length / step, round(length / step), rel_tol=0.0, abs_tol=1e-6)


@register
class Uniform(_Range):
    """Uniform distribution of the numbers between `low` and `high`."""

    kind: Literal["uniform"] = "uniform"

    def draw(self, trial: "BaseTrial", name: str) -> float:
        return trial.suggest_float(name, self.low, self.high)


@register
class LogUniform(_Range):
    """Log-uniform distribution of the numbers between `low` and `high`."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0.0, description="the smallest value")
    high: float = Field(gt=0.0, description="the largest value")

    @property
    def _inside(self) -> float:
        return math.exp(math.log(self.low) + _INSIDE * (math.log(self.high) - math.log(self.low)))

    def draw(self, trial: "BaseTrial", name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=True)


@register
class QUniform(_Range):
    """Uniform distribution of the numbers `low`, `low + step`, … `high`."""

    kind: Literal["quniform"] = "quniform"
    high: float = Field(description="the largest value; a whole number of steps above the smallest")
    step: float = Field(gt=0.0, description="difference between consecutive values")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if not math.isfinite((self.high - self.low) / self.step) or not _multiple(self.high - self.low, self.step):
            raise ValueError(f"high={self.high} must be a whole number of steps of {self.step} above low={self.low}")
        return self

    @property
    def _inside(self) -> float:
        # If this value and the low end are integers, all values are.
        return _short(self.low + self.step)

    def draw(self, trial: "BaseTrial", name: str) -> float:
        return _short(trial.suggest_float(name, self.low, self.high, step=self.step))

    def _reaches(self, value: float) -> bool:
        return _multiple(value - self.low, self.step)


@register
class Int(_Range):
    """Uniform or log-uniform distribution of the integers from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    low: int = Field(description="the smallest value")
    high: int = Field(description="the largest value")
    log: bool = Field(
        default=False, description="draw log-uniformly: 1 to 2 as often as 512 to 1,024; low must be 1 or more"
    )

    @model_validator(mode="after")
    def _has_a_logarithm(self) -> Self:
        if self.log and self.low < 1:
            raise ValueError(f"low={self.low} must be at least 1 with log=true")
        return self

    @property
    def _inside(self) -> int:
        return (self.low + self.high) // 2

    def draw(self, trial: "BaseTrial", name: str) -> int:
        return trial.suggest_int(name, self.low, self.high, log=self.log)

    def _reaches(self, value: float) -> bool:
        return value == int(value)


def comparable(value: Any) -> Any:
    """A hashable key that is equal for equal values: 0 and 0.0 are equal, 1 and true are not."""
    if isinstance(value, Mapping):
        return frozenset((name, comparable(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(comparable, value))
    return isinstance(value, bool), value if isinstance(value, Hashable) else id(value)


@register
class Choice(DistributionSpec):
    """Uniform choice between given values: numbers, strings, null, or parts of a spec."""

    kind: Literal["choice"] = "choice"
    values: tuple[Any, ...] = Field(
        min_length=1, max_length=CHOICES, description="the values; at least two, all different"
    )

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len(self.values) == 1:
            one = quote(self.values[0])
            raise ValueError(f"values=[{one}] must be at least two; for one value use {{kind: fixed, value: {one}}}")
        seen = set()
        for value in self.values:
            same = comparable(value)
            if same in seen:
                raise ValueError(f"{quote(value)} occurs twice in values={quote(list(self.values))}; remove one")
            seen.add(same)
        return self

    @property
    def probes(self) -> tuple[Any, ...]:
        return self.values

    def draw(self, trial: "BaseTrial", name: str) -> Any:
        return self.values[trial.suggest_categorical(name, list(range(len(self.values))))]

    def encode(self, value: Any) -> int | None:
        return next((code for code, known in enumerate(self.values) if comparable(known) == comparable(value)), None)


@register
class Fixed(DistributionSpec):
    """One value, set in every trial but trial 0, which is the unchanged experiment. Other fields may require it."""

    kind: Literal["fixed"] = "fixed"
    value: Any = Field(description="the value")

    @property
    def probes(self) -> tuple[Any, ...]:
        return (self.value,)

    def draw(self, trial: "BaseTrial", name: str) -> Any:
        return self.value

    def encode(self, value: Any) -> int | None:
        return 0
