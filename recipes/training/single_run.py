"""The commands that train one model, or test the model of a finished run again."""

from typing import Any

from sma.recipes.io.names import plain
from sma.recipes.reports.figures import label
from sma.recipes.training.options import OneRunOptions, Start, experiment


def run(options: OneRunOptions) -> dict[str, Any]:
    """Train and test SeqBoat as the options say.

    Returns:
        the summary of the run, or with `--evaluate` the content of `evaluation.json`.

    Raises:
        SmaError: an error message for the user.
    """
    if options.evaluate is not None:
        from sma.recipes.training.evaluation import evaluate

        return evaluate(options.evaluate, options)
    with experiment(options) as start:
        return _train(start, options) if start.summary is None else start.summary


def _train(start: Start, options: OneRunOptions) -> dict[str, Any]:
    spec, out = start.spec, start.out
    # The import of Lightning takes seconds; --help and a wrong --set need not wait for it.
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
