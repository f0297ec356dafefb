"""Specs of sweeps: an experiment, a search space, the number of trials, and the objectives."""

import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from sma.errors import SpecError, did_you_mean, quote
from sma.paths import parse_path, parse_setting
from sma.recipes.experiment import ExperimentSpec, full_path, load_experiment
from sma.recipes.io.presets import shipped
from sma.spec import FrozenMapping, Spec, read_spec_file
from sma.tune.distributions import DistributionSpec, Fixed
from sma.tune.space import check_space, largest, value_at, with_values
from sma.yaml_text import read_fields

Value = TypeVar("Value")

ObjectiveName = Annotated[
    Literal["quality", "rate", "time", "macs"],
    BeforeValidator(lambda name: "macs" if name == "operations" else name),  # its former name
]


class Measure(NamedTuple):
    """A measure by which trials are compared.

    Attributes:
        name: name of the column.
        mode: whether larger (`max`) or smaller (`min`) values are better.
    """

    name: str
    mode: Literal["max", "min"]

    def oriented(self, metrics: Mapping[str, float]) -> float:
        """Its value with the sign for which smaller is better; infinite if it is missing."""
        value = metrics.get(self.name)
        return math.inf if value is None else -value if self.mode == "max" else value


RATE = Measure("rate", "min")
TIME = Measure("microseconds_per_token", "min")
MACS = Measure("macs_per_token", "min")


def present_names(measures: Mapping[str, Value]) -> dict[str, Value]:
    """Measures from a file, with former names of columns replaced by their present ones."""
    return {MACS.name if name == "operations_per_token" else name: value for name, value in measures.items()}


class StoppingSpec(Spec):
    """Asynchronous successive halving: after `grace`, `grace * reduction`, … updates only the best trials continue.

    With several objectives trials at a rung are ranked by the number of trials that dominate them. A trial that none
    dominates continues.

    Reference:
        Li et al., "A system for massively parallel hyperparameter tuning", arXiv 1810.05934; Schmucker et al.,
        "Multi-objective asynchronous successive halving", arXiv 2106.12639.
    """

    grace: int | None = Field(
        default=None,
        ge=1,
        description="updates before which no trial is stopped; null: "
        "a quarter of training.updates, and at least until budgets reach their targets",
    )
    reduction: float = Field(default=2.0, ge=1.1, description="one in this many trials continues to the next rung")


class SweepSpec(Spec):
    """A sweep. Trial 0 is the unchanged experiment; the values of the others are drawn from the search space."""

    experiment: ExperimentSpec = Field(description="the experiment of trial 0, from which the others differ")
    space: FrozenMapping[DistributionSpec] = Field(
        description="the search space: distributions by the paths of the fields that differ between trials"
    )
    samples: int = Field(default=16, ge=1, le=100_000, description="number of trials, including trial 0")
    objectives: tuple[ObjectiveName, ...] = Field(
        default=("quality", "rate"),
        min_length=1,
        description="objectives of the search: quality (the metric of the task, such as accuracy), activation rate, "
        "time per token, MACs per token",
    )
    stopping: StoppingSpec | None = Field(
        default=StoppingSpec(), description="stops low-ranked trials early; null trains all trials to the end"
    )
    restarts: int = Field(
        default=3, ge=0, description="maximum number of restarts of a trial whose process died, from its checkpoint"
    )
    silence: float = Field(
        default=1800.0,
        gt=0.0,
        description="seconds without a batch of training or evaluation after which the process of a trial counts as "
        "dead",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="seed of the search; the trials have the seed of the experiment"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives={list(self.objectives)} must all be different; remove the repeated one")
        self.experiment.task.check_trainable()
        check_space(self.space, self.experiment)
        if self.grace > self.updates:
            raise ValueError(f"stopping.grace={self.grace} must be at most training.updates={self.updates}; lower it")
        return self

    @property
    def updates(self) -> int:
        """Number of updates of every trial that is not stopped."""
        return self.experiment.training.updates

    @property
    def grace(self) -> int:
        """Number of updates before which no trial is stopped."""
        given = self.stopping.grace if self.stopping is not None else None
        if given is not None:
            return given
        # Before a budget has settled, the rates depend on its schedule, not on the trial.
        budgets = [trial.training.budget for trial in (self.experiment, self.trial(largest(self.space)))]
        return max(1, self.updates // 4, *(budget.settled for budget in budgets if budget is not None))

    @property
    def quality(self) -> Measure:
        """The metric of the task, on the validation split."""
        metric = self.experiment.task.metric
        return Measure(metric.name, metric.mode)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The objectives as columns."""
        known = {"quality": self.quality, "rate": RATE, "time": TIME, "macs": MACS}
        return tuple(known[name] for name in self.objectives)

    def trial(self, values: Mapping[str, Any]) -> ExperimentSpec:
        """The experiment of a trial. Without values it is the unchanged experiment.

        Raises:
            SpecError: the values do not fit together.
        """
        return with_values(self.experiment, values) if values else self.experiment

    def value(self, values: Mapping[str, Any], path: str) -> Any:
        """The value of a trial at a path of the space, even if the values of the trial are not valid together."""
        return values[path] if path in values else value_at(self.experiment, path)


def shipped_sweeps() -> list[str]:
    """The names of the sweeps that come with this package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("sma.tune").joinpath("presets").iterdir())


def read_sweep(source: str | Path, experiment: str | Path | None = None) -> dict[str, Any]:
    """Read the file of a sweep, by its path or the name of a shipped one, without validating it.

    Args:
        source: the file or the name. The path of the experiment in a file is relative to the folder of the file.
        experiment: an experiment instead of that of the source. The settings of a shipped sweep are then omitted,
            because they apply to its own experiment.

    Raises:
        SpecError: there is no such name or file, or it has unknown fields.
    """
    names, path = shipped_sweeps(), Path(source)
    if str(source) in names:
        data = read_fields(files("sma.tune").joinpath("presets", f"{source}.yaml").read_bytes(), str(source))
        if experiment is not None:
            data.pop("settings", None)
    elif os.path.exists(path) and not os.path.isdir(path):
        data = read_spec_file(path)
        own = data.get("experiment")
        if isinstance(own, str) and own not in shipped("presets"):
            data["experiment"] = str(path.parent / own)
    else:
        hint = did_you_mean(str(source), names, "shipped sweeps")
        raise SpecError(
            f"there is no file and no shipped sweep {quote(str(source))}{hint}; --space FILE takes your own"
        )
    known = [*SweepSpec.model_fields, "settings"]
    for name in data:
        if name not in known:
            raise SpecError(f"{source}: unknown field {quote(name)}{did_you_mean(str(name), known, 'fields')}")
    return data if experiment is None else {**data, "experiment": str(experiment)}


def make_sweep(
    source: str | Path | Mapping[str, Any],
    *,
    experiment: str | Path | None = None,
    settings: Sequence[str] = (),
    **fields: Any,
) -> SweepSpec:
    """Validate a sweep.

    Args:
        source: a YAML file, the name of a shipped sweep, such as `listops_tiny`, or the mapping itself. Its
            `experiment` may be the name of a preset of the recipes or a file; its `settings`, values by field path, are
            set in all trials.
        experiment: an experiment instead of that of the source, a preset or a file; see `read_sweep`.
        settings: `path=value`, set in all trials after those of the source. It also replaces the value of a field that
            the space fixes.
        fields: fields of `SweepSpec` that replace those of the source, unless they are None.

    Raises:
        SpecError: the sweep is not valid; the message has one line per mistake.
    """
    if isinstance(source, Mapping):
        data = {**source, **({"experiment": experiment} if experiment is not None else {})}
    else:
        data = read_sweep(source, experiment)
    own, base = data.pop("settings", None) or {}, data.get("experiment")
    if not isinstance(own, Mapping):
        raise SpecError(
            f"settings={quote(own)} must map field paths to values, such as settings: {{training.updates: 1200}}"
        )
    if base is None:
        raise SpecError(
            "a sweep needs an experiment; write experiment: NAME, a preset of the recipes, or experiment: FILE"
        )
    if not isinstance(base, ExperimentSpec):
        base = load_experiment(base)
    if own:
        base = with_values(base, own)
    space = {} if data.get("space") is None else data["space"]
    if isinstance(space, Mapping):
        space, settings = _settle(space, settings, base)
    data |= {
        "space": space,
        "experiment": load_experiment(base.model_dump(mode="json"), settings) if settings else base,
    }
    return SweepSpec.model_validate({**data, **{name: value for name, value in fields.items() if value is not None}})


def _settle(
    space: Mapping[str, Any], settings: Sequence[str], experiment: ExperimentSpec
) -> tuple[dict[str, Any], list[str]]:
    """Apply settings to the fixed fields of a space; returns the space, and the settings of the experiment itself.

    Raises:
        SpecError: the sweep searches a field that is set, so the drawn values would replace the setting.
    """
    settled, others = dict(space), []
    for setting in settings:
        path, value = parse_setting(setting)
        steps = parse_path(full_path(path))
        name = next((name for name in space if steps[: len(own := parse_path(full_path(str(name))))] == own), None)
        if name is None:
            others.append(setting)
            continue
        kind = space[name].get("kind") if isinstance(space[name], Mapping) else getattr(space[name], "kind", None)
        if kind != "fixed" or steps != parse_path(full_path(str(name))):
            raise SpecError(
                f"--set {quote(setting)[1:-1]}: the sweep {'fixes' if kind == 'fixed' else 'searches'} {quote(name)}, "
                "which would replace this value in all trials but trial 0; "
                "leave it out, or give your own --space without this field"
            )
        settled[name] = Fixed(value=value)
        # Trial 0 may lack the part: setting the schedule of a budget does not add a budget to it.
        part = full_path(path).rpartition(".")[0]
        if not part or value_at(experiment, part) is not None:
            others.append(setting)
    return settled, others
