"""What a study is: its options, what is asked for, the runs of its grid, and its table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from pydantic_settings import SettingsConfigDict

from sma.recipes.experiment import ExperimentSpec
from sma.recipes.io.option_parser import Names
from sma.recipes.reports.results import Summary
from sma.recipes.reports.table import Table
from sma.recipes.studies.grid import Results, Run
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.options import RunOptions
from sma.recipes.training.start import requested_experiment


def variants_field(known: Sequence[str] = ()) -> Any:
    """Return the field of `StudyOptions.variants`, whose description lists what there is.

    `--arms`, `--models` and `--only` are its names in earlier versions.
    """
    return Field(
        default=None,
        validation_alias=AliasChoices("variants", "arms", "models", "only"),
        description=f"which to train, with commas between; default {','.join(known) or 'all'}",
    )


class StudyOptions(RunOptions):
    """The options of every study."""

    # Without the target a variable MODELS of the environment would be read: a prefix leaves aliases alone.
    model_config = SettingsConfigDict(env_prefix_target="all")

    repeatable: ClassVar[frozenset[str]] = RunOptions.repeatable | {"jobs"}

    variants: Names | None = variants_field()
    seeds: int | None = Field(
        default=1, ge=1, le=100, description="runs of every variant, with the seeds from the experiment's own on"
    )
    jobs: int = Field(
        default=1,
        ge=1,
        description="runs at a time, each in a process of its own; 1 trains in this one. "
        "The speeds of runs side by side cannot be compared",
    )


class Chosen(BaseModel):
    """What a study was asked for besides its experiment, as `study.json` keeps it.

    Attributes:
        study: the name of the study.
        variants: what is compared.
        seeds: of every variant.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    study: str
    variants: list[str] = Field(min_length=1)
    seeds: int | None = Field(ge=1, le=100)


Options = TypeVar("Options", bound=StudyOptions)
Asked = TypeVar("Asked", bound=Chosen)


class Begun(NamedTuple, Generic[Asked]):
    """A study whose folder is locked.

    Attributes:
        spec: the experiment that the runs are made of.
        chosen: all that was asked for since the study began.
        now: the same with what this command trains.
        out: the folder.
    """

    spec: ExperimentSpec
    chosen: Asked
    now: Asked
    out: Path


class Study(Generic[Options, Asked]):
    """A grid of runs that are made of one experiment, and its table; subclasses define both.

    Attributes:
        name: of the study, as `study.json` keeps it.
        chosen: the class of what is asked for.
        older: the file in which earlier versions kept that.
        selections: the fields of `chosen` that select runs, which a command that resumes may change, and the noun for
            one of their values.
        figures: the files that `conclude` draws into the folder.
    """

    name: ClassVar[str]
    chosen: type[Asked]
    older: ClassVar[str]
    selections: ClassVar[Mapping[str, str]] = {"variants": "variant"}
    figures: ClassVar[Sequence[str]] = ()

    def experiment(self, options: Options) -> ExperimentSpec:
        """The experiment of the options."""
        return requested_experiment(options)

    def settings(self, options: Options) -> dict[str, Any]:
        """The values of the fields of `chosen` that do not select runs."""
        return {"seeds": options.seeds}

    def names(self, spec: ExperimentSpec) -> dict[str, Sequence[str]]:
        """The values that there are of each of `selections`."""
        raise TypeError(f"{type(self).__name__} must define names")

    def upgrade(self, older: Any) -> dict[str, Any]:
        """What earlier versions wrote into the file `older` as fields of `chosen`, besides `study`."""
        raise TypeError(f"{type(self).__name__} must define upgrade")

    def runs(self, spec: ExperimentSpec, chosen: Asked, data: TaskData, out: Path) -> list[Run]:
        """All runs of the grid; those that `selects` leaves out are listed where they are finished."""
        raise TypeError(f"{type(self).__name__} must define runs")

    def selects(self, run: Run, chosen: Asked) -> bool:
        """Whether a run of the grid is to be trained."""
        return run.variant in chosen.variants

    def check(self, spec: ExperimentSpec, chosen: Asked) -> None:
        """Check that the runs can be made of an experiment, before anything is written.

        Raises:
            SpecError: they cannot.
        """

    def summarise(self, results: Results, chosen: Asked, out: Path) -> dict[str, Any]:
        """What the study adds to its summary, or replaces in it."""
        return {}

    def conclude(self, summary: Summary, begun: Begun[Asked], data: TaskData) -> dict[str, Any]:
        """Measure and draw what needs the finished runs; returns what is added to the summary."""
        return {}

    def table(self, summary: Summary) -> Table:
        """The table of a summary."""
        raise TypeError(f"{type(self).__name__} must define table")
