"""Options of the commands that train."""

from typing import ClassVar, Literal

from pydantic import Field

from sma.recipes.io.command import CommandOptions
from sma.recipes.io.folders import cache_folder
from sma.recipes.io.option_parser import File, Folder, Setting


class CallOptions(CommandOptions):
    """The options of one call of a command, which the folder of a run does not keep."""

    repeatable: ClassVar[frozenset[str]] = frozenset({"data", "accelerator", "progress"})

    data: Folder = Field(default_factory=cache_folder, description="folder in which data is kept between runs")
    accelerator: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="the device")
    progress: bool = Field(default=True, description="show progress")


class ExperimentOptions(CallOptions):
    """The options that select an experiment."""

    spec: File | None = Field(default=None, description="your own experiment instead of a preset: a YAML file")
    set: list[Setting] = Field(
        default=[],
        description="change a field before validation, such as layers.layer.router.temperature_scale=0.5; "
        "may be repeated",
    )
    seed: int | None = Field(
        default=None, description="seed of the weights, the sample order and dropout; default: that of the preset"
    )

    @property
    def name(self) -> str:
        """The name of the preset, such as `listops_tiny`."""
        raise TypeError(f"{type(self).__name__} must define name")


class RunOptions(ExperimentOptions):
    """The options of every recipe that trains."""

    out: Folder | None = Field(default=None, description="the run folder; default: runs/TASK-PRESET-TIME")
    resume: Folder | None = Field(default=None, description="resume the run in this folder")
    auto_resume: bool = Field(
        default=False,
        description="resume the run in the folder --out if it has one, otherwise start it: for a command that a job "
        "scheduler repeats",
    )


class OneRunOptions(RunOptions):
    """The options of the recipes that train one model."""

    evaluate: Folder | None = Field(
        default=None, description="test the model of the finished run in this folder again, instead of training"
    )
