"""SeqBoat on the tasks of the Long Range Arena.

python recipes/seqboat_lra.py --task listops --preset tiny
python recipes/seqboat_lra.py --resume RUN
python recipes/seqboat_lra.py --evaluate RUN
"""

if not __package__:  # a script: its Python may not have the package
    __import__("environment")

import sys
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.recipes.io.command import exit_code, parse
from sma.recipes.io.names import plain
from sma.recipes.reports.classification import describe_run, draw
from sma.recipes.training.options import OneRunOptions, Start, experiment


class Options(OneRunOptions):
    """Train SeqBoat on a task of the Long Range Arena and evaluate it."""

    model_config = SettingsConfigDict(cli_prog_name="seqboat_lra")

    task: Literal["listops", "text", "retrieval", "image", "pathfinder", "pathx", "digits"] = Field(
        default="listops", description="what to learn"
    )
    preset: Literal["tiny", "paper"] = Field(default="tiny", description="minutes on two cores, or the paper's setting")

    @property
    def name(self) -> str:
        return f"{self.task}_{self.preset}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run(parse(Options, sys.argv[1:] if arguments is None else arguments)))


def run(options: OneRunOptions) -> dict[str, Any]:
    """Train and evaluate as the options say; returns the summary, or with `--evaluate` what stands in
    `evaluation.json`.

    Raises:
        SmaError: a sentence for the user.
    """
    if options.evaluate is not None:
        from sma.recipes.training.evaluation import evaluate

        return evaluate(options.evaluate, options)
    with experiment(options) as start:
        return _train(start, options) if start.summary is None else start.summary


def _train(start: Start, options: OneRunOptions) -> dict[str, Any]:
    spec, out = start.spec, start.out
    # Lightning takes seconds to import; --help and a wrong --set need not wait for it.
    from sma.recipes.training.classification import run_experiment

    data = spec.task.prepare(options.data, progress=options.progress)
    title = f"SeqBoat on {spec.task.kind}"
    sizes = (
        f"{len(data.train):,} samples, {spec.model.num_parameters():,} parameters, {spec.training.updates:,} updates"
    )
    print(f"{title}: {sizes} -> {plain(out)}", flush=True)
    finished = run_experiment(
        spec,
        out,
        data,
        resume=start.resume,
        accelerator=options.accelerator,
        progress=options.progress,
        figures=lambda done: draw(
            done.report, out, f"{title}: test accuracy {done.summary['test_accuracy']:.1%}, seed {spec.seed}"
        ),
    )
    print(describe_run(finished.summary, finished.report, out))
    return finished.summary


if __name__ == "__main__":
    sys.exit(main())
