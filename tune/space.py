"""Search spaces: which fields of an experiment a sweep may change, and to what.

A space maps field paths to distributions, in YAML or in Python:

    training.learning_rate: {kind: loguniform, low: 0.001, high: 0.01}
    layers.layer.modules.attention.window: {kind: choice, values: [8, 16, 32]}
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol, Self

from pydantic import Field, model_validator

from sma.errors import SpecError
from sma.paths import override, parse_path
from sma.recipes.experiment import ExperimentSpec, full_path
from sma.spec import Spec, dump_spec, register

MOST_STEPS = 10_000


class Ask(Protocol):
    """What draws numbers: a trial of Optuna."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
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
        """Values that are tried on the experiment before a sweep starts: the ends of a range, every choice."""
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
            raise ValueError(f"low={self.low} must be below high={self.high}; for one value use {{kind: fixed, value: {self.low}}}")
        return self

    @property
    def probes(self) -> tuple[Any, ...]:
        return self.low, self.high

    def encode(self, value: Any) -> int | float | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and self.low <= value <= self.high and self._reaches(value) else None

    def _reaches(self, value: float) -> bool:
        return True


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
        if not _multiple(self.high - self.low, self.step):
            raise ValueError(f"high={self.high} must be a whole number of steps of {self.step} above low={self.low}")
        return self

    def draw(self, ask: Ask, name: str) -> float:
        # Counted, because adding up steps in floating point gives 0.30000000000000004 where a user reads 0.3 in the specs.
        return float(f"{ask.suggest_float(name, self.low, self.high, step=self.step):.12g}")

    def _reaches(self, value: float) -> bool:
        return _multiple(value - self.low, self.step)


@register
class Int(_Range):
    """Whole numbers from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    low: int = Field(description="the smallest value")
    high: int = Field(description="the largest value")
    log: bool = Field(default=False, description="draw the logarithms alike: 1 to 2 as often as 512 to 1,024; low must be 1 or more")

    @model_validator(mode="after")
    def _has_a_logarithm(self) -> Self:
        if self.log and self.low < 1:
            raise ValueError(f"low={self.low} must be at least 1 with log=true")
        return self

    def draw(self, ask: Ask, name: str) -> int:
        return ask.suggest_int(name, self.low, self.high, log=self.log)

    def _reaches(self, value: float) -> bool:
        return value == int(value)


@register
class Choice(DistributionSpec):
    """One of some values: numbers, words, null, or whole parts of a spec."""

    kind: Literal["choice"] = "choice"
    values: tuple[Any, ...] = Field(min_length=1, description="which; two at least, and different")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len(self.values) == 1:
            raise ValueError(f"values={list(self.values)} leave no choice; for one value use {{kind: fixed, value: {self.values[0]!r}}}")
        for one, other in itertools.combinations(self.values, 2):
            if one == other and type(one) is type(other):
                raise ValueError(f"{one!r} stands twice in values={list(self.values)}")
        return self

    @property
    def probes(self) -> tuple[Any, ...]:
        return self.values

    def draw(self, ask: Ask, name: str) -> Any:
        return self.values[ask.suggest_categorical(name, list(range(len(self.values))))]

    def encode(self, value: Any) -> int | None:
        return next((place for place, known in enumerate(self.values) if known == value and type(known) is type(value)), None)


@register
class Fixed(DistributionSpec):
    """One value, set in every trial but the first, which is the experiment as it is: what the other fields of the space rest on."""

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


def searched(space: Space) -> list[str]:
    """The paths that differ between trials."""
    return [path for path, distribution in space.items() if not isinstance(distribution, Fixed)]


def check_space(space: Space, experiment: ExperimentSpec) -> None:
    """Try every end of a range and every choice on an experiment.

    Raises:
        SpecError: the space is empty, a path leads nowhere or changes what trials are compared by, or the experiment refuses a value.
    """
    if not searched(space):
        raise SpecError(
            "the search space is empty: no field differs between trials; write path: distribution, such as "
            "training.learning_rate: {kind: loguniform, low: 0.001, high: 0.01}"
        )
    _check_comparable(space)
    for path in space:
        override(ExperimentSpec, dump_spec(experiment), {full_path(path): None})
    middle = {path: distribution.probes[0] for path, distribution in space.items()}
    for values, changed in _tries(space, middle):
        try:
            with_values(experiment, values)
        except SpecError as error:
            raise SpecError(f"the experiment refuses a value of the search space, {changed}: {error}") from None


def _tries(space: Space, middle: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every probe of every path with the others at their first probe; then all last ones together."""
    for path, distribution in space.items():
        for value in distribution.probes:
            yield {**middle, path: value}, f"{path}={value!r}"
    yield {path: distribution.probes[-1] for path, distribution in space.items()}, "all largest values together"


def _check_comparable(space: Space) -> None:
    for path in space:
        full = full_path(path)
        if full == "training.updates":
            raise SpecError(
                f"{path!r} cannot be searched: all trials train equally long; set it for all of them with --set training.updates=N"
            )
        if parse_path(full)[0] == "task":
            raise SpecError(
                f"{path!r} cannot be searched: all trials learn from the same data; set it for all of them with --set {path}=VALUE"
            )
