"""The contract of a study: its options, its settings, the runs of its grid, and its table."""

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
    """Return the field of `StudyOptions.variants`, whose description lists the known variants.

    `--arms`, `--models` and `--only` are its names in earlier versions.
    """
    return Field(
        default=None,
        validation_alias=AliasChoices("variants", "arms", "models", "only"),
        description=f"variants to train, separated by commas; default {','.join(known) or 'all'}",
    )


class StudyOptions(RunOptions):
    """The options of every study."""

    # Without the target the environment variable MODELS would be read, because a prefix does not apply to aliases.
    model_config = SettingsConfigDict(env_prefix_target="all")

    repeatable: ClassVar[frozenset[str]] = RunOptions.repeatable | {"jobs"}

    variants: Names | None = variants_field()
    seeds: int | None = Field(
        default=1,
        ge=1,
        le=100,
        description="number of runs of every variant, with consecutive seeds from that of the experiment",
    )
    jobs: int = Field(
        default=1,
        ge=1,
        description="number of concurrent runs, each in its own process; 1 trains in this process. "
        "The speeds of concurrent runs cannot be compared",
    )


class Chosen(BaseModel):
    """The settings of a study besides its experiment, in the format of `study.json`.

    Attributes:
        study: name of the study.
        variants: names of the variants.
        seeds: number of seeds of every variant.
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
        spec: the experiment from which the runs are derived.
        chosen: all settings since the start of the study.
        now: the same, with the selections of this command.
        out: the folder.
    """

    spec: ExperimentSpec
    chosen: Asked
    now: Asked
    out: Path


class Study(Generic[Options, Asked]):
    """A grid of runs derived from one experiment, and its table; subclasses define both.

    Attributes:
        name: name of the study in `study.json`.
        chosen: class of the settings.
        older: file of the settings in earlier versions.
        selections: fields of `chosen` that select runs and may change on resuming, with the noun for one of their
            values.
        figures: files that `conclude` draws into the folder.
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
        """The known values of each of `selections`."""
        raise TypeError(f"{type(self).__name__} must define names")

    def upgrade(self, older: Any) -> dict[str, Any]:
        """Convert the content of the file `older` to fields of `chosen` other than `study`."""
        raise TypeError(f"{type(self).__name__} must define upgrade")

    def runs(
        self, spec: ExperimentSpec, chosen: Asked, data: TaskData, out: Path, accelerator: str = "auto"
    ) -> list[Run]:
        """All runs of the grid; runs that `selects` omits are listed if they are finished."""
        raise TypeError(f"{type(self).__name__} must define runs")

    def selects(self, run: Run, chosen: Asked) -> bool:
        """Whether a run of the grid is to be trained."""
        return run.variant in chosen.variants

    def check(self, spec: ExperimentSpec, chosen: Asked) -> None:
        """Check that the runs can be derived from an experiment, before anything is written.

        Raises:
            SpecError: the runs cannot be derived from the experiment.
        """

    def summarise(self, results: Results, chosen: Asked, out: Path) -> dict[str, Any]:
        """Entries that the study adds to its summary or replaces."""
        return {}

    def conclude(self, summary: Summary, begun: Begun[Asked], data: TaskData) -> dict[str, Any]:
        """Measure and draw results of the finished runs; returns the added entries of the summary."""
        return {}

    def table(self, summary: Summary) -> Table:
        """The table of a summary."""
        raise TypeError(f"{type(self).__name__} must define table")
