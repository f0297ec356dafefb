"""The commands that train one model, or test the model of a finished run again."""

from typing import Annotated, Any

from pydantic import Field

from sma.recipes.io.names import plain
from sma.recipes.io.option_parser import Folder, Metavar, Name
from sma.recipes.io.presets import shipped, tasks
from sma.recipes.training.options import CallOptions, OneRunOptions, RunOptions

TASKS = tasks(shipped("presets"))
PRESETS = tuple(dict.fromkeys(preset for presets in TASKS.values() for preset in presets))

PRESET_HELP = (
    "tiny: minutes on two cores; paper: the setting of the paper, if there is one; standard: the usual setting of "
    "mqar; binary: ListOps of two arguments per operator"
)


class TrainOptions(RunOptions):
    """Train SeqBoat on a task, test it, and write the results into a run folder."""

    task: Name = Field(default="", description=f"the task: {', '.join(TASKS)}")
    preset: Annotated[str, Metavar(f"{{{','.join(PRESETS)}}}")] = Field(default=PRESETS[0], description=PRESET_HELP)

    @property
    def name(self) -> str:
        return f"{self.task}_{self.preset}"


class EvaluateOptions(CallOptions):
    """Test the model of a finished run again, and compare the result with the recorded one."""

    run: Folder = Field(description="the folder of the run")


def train_or_evaluate(options: OneRunOptions) -> dict[str, Any]:
    """Train and test SeqBoat, or with `--evaluate` test the model of a run again; see `train`."""
    if options.evaluate is None:
        return train(options)
    options.refuse_all_but(["evaluate"], "--evaluate tests the run as it was")
    return _evaluate(options.evaluate, options)


def evaluate_run(options: EvaluateOptions) -> dict[str, Any]:
    """Test the model of a finished run; returns the content of `evaluation.json`.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    return _evaluate(options.run, options)


def _evaluate(folder: Folder, options: CallOptions) -> dict[str, Any]:
    from sma.recipes.training.evaluation import evaluate

    return evaluate(folder, options)


def train(options: RunOptions) -> dict[str, Any]:
    """Train and test SeqBoat with these options; returns the summary of the run.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    # The import of the tasks is not needed for --help and mistyped options.
    from sma.recipes.training.start import experiment

    with experiment(options) as start:
        if start.summary is not None:
            return start.summary
        spec, out = start.spec, start.out
        # Lightning takes seconds to import, which is not needed for a wrong --set.
        from sma.recipes.reports.figures import label
        from sma.recipes.training.objective import load_objective
        from sma.recipes.training.run import run_experiment

        data = spec.task.prepare(options.data, progress=options.progress)
        objective = load_objective(spec.task, data)
        sizes = f"{objective.size}, {spec.model.num_parameters():,} parameters, {spec.training.updates:,} updates"
        print(f"SeqBoat on {plain(objective.subject)}: {sizes} -> {plain(out)}", flush=True)
        finished = run_experiment(
            spec,
            out,
            data,
            resume=start.resume,
            accelerator=options.accelerator,
            progress=options.progress,
            title=f"SeqBoat on {label(objective.subject)}",
        )
        print(finished.report.describe(finished.summary, out))
        return finished.summary
