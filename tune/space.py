"""Search spaces: the fields of an experiment that a sweep changes, and the distributions of their values.

A space maps field paths to distributions, in YAML or in Python:

    training.learning_rate: {kind: loguniform, low: 0.001, high: 0.01}
    layers.layer.modules.attention.window: {kind: choice, values: [8, 16, 32]}
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sma.errors import SpecError, quote
from sma.mistakes import SENTENCES
from sma.paths import override, parse_path
from sma.recipes.experiment import ExperimentSpec, full_path
from sma.spec import dump_spec
from sma.tune.distributions import Choice, DistributionSpec, Fixed, comparable

if TYPE_CHECKING:
    from optuna import Trial

DRAWS = 50
"""Number of random combinations that are tried on the experiment before a sweep starts."""

PATHS = 100
"""Maximum number of fields of a space."""

Space = Mapping[str, DistributionSpec]


def with_values(experiment: ExperimentSpec, values: Mapping[str, Any]) -> ExperimentSpec:
    """The experiment with some values changed, by field path.

    Raises:
        SpecError: a path does not exist, or the values do not fit.
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
    """The number by which the search represents the experiment's own value at a path; None if it is never drawn.

    Choices are compared after validation: `{kind: sma}` equals a router of this kind with all defaults written out.
    """
    value = value_at(experiment, path)
    if isinstance(distribution, Choice):
        for code, choice in enumerate(distribution.values):
            try:
                if comparable(value_at(with_values(experiment, {path: choice}), path)) == comparable(value):
                    return code
            except SpecError:  # a value that fits other values of the space, but not the unchanged experiment
                continue
    return distribution.encode(value)


def searched(space: Space) -> list[str]:
    """The paths whose values differ between trials."""
    return [path for path, distribution in space.items() if not isinstance(distribution, Fixed)]


def largest(space: Space) -> dict[str, Any]:
    """The last value of every path: the high ends of the ranges."""
    return {path: distribution.probes[-1] for path, distribution in space.items()}


def check_space(space: Space, experiment: ExperimentSpec) -> None:
    """Try the ends and the inside of every range, every choice, and some random combinations on an experiment.

    Raises:
        SpecError: the space is empty; a path does not exist, occurs twice, or changes a field by which trials are
            compared; or the experiment refuses a value.
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
            raise SpecError(f"the experiment refuses {_describe_combination(values, changed)}: {error}{hint}") from None


def _tries(space: Space) -> Iterator[tuple[dict[str, Any], str]]:
    """Combinations of values, each with a description.

    These are the first probes of all paths, every other probe of one path with the first ones of the others, the
    largest values of all paths, and random draws.
    """
    first = {path: distribution.probes[0] for path, distribution in space.items()}
    yield first, next(iter(space)) if len(space) == 1 else "the fixed and first values together"
    for path, distribution in space.items():
        for value in distribution.probes[1:]:
            yield {**first, path: value}, path
    yield largest(space), "all largest values together"
    for number, trial in enumerate(itertools.islice(random_trials(), DRAWS)):
        drawn = {path: distribution.draw(trial, path) for path, distribution in space.items()}
        yield drawn, f"the values of random draw {number}"


def random_trials() -> Iterator["Trial"]:
    """Yield trials of Optuna whose values are drawn at random, always the same."""
    import optuna  # here, because the help of the commands is available without it

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    while True:
        yield study.ask()


def _describe_combination(values: Mapping[str, Any], changed: str) -> str:
    """A description of the combination: the one value that differs from the first ones, or all values."""
    if changed in values:
        return f"a value of the search space, {changed}={quote(values[changed])}"
    return (
        f"{changed} "
        f"({', '.join(f'{path}={quote(value)}' for path, value in itertools.islice(values.items(), SENTENCES))})"
    )


def _hint(space: Space, experiment: ExperimentSpec, values: Mapping[str, Any], changed: str) -> str:
    """A remedy for the error message: integers, or other values of the fixed fields."""
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
    """Check that no path sets the field of another path, or a part that contains it."""
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
