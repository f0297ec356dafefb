"""Evaluation of a finished run: a test of its model, compared with the recorded result, and its report again."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sma.checkpoint import load
from sma.errors import CheckpointError
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.claims import run_lock
from sma.recipes.io.names import plain
from sma.recipes.io.run_folder import EVALUATION, EXPERIMENT, SUMMARY, read_summary, refuse_another, write_text
from sma.recipes.reports.figures import attempt, label
from sma.recipes.tasks.contract import Metric
from sma.recipes.training.devices import check_device
from sma.recipes.training.module import TrainingModule
from sma.recipes.training.objective import Objective, load_objective, objective_class
from sma.recipes.training.options import CallOptions
from sma.recipes.training.progress import Progress
from sma.recipes.training.provenance import commit, hardware
from sma.recipes.training.resuming import changed
from sma.recipes.training.run import prepare
from sma.recipes.training.trainer import make_trainer, run_test


def evaluate(folder: Path, options: CallOptions) -> dict[str, Any]:
    """Test the model of a finished run, print the result, and write `evaluation.json` into the folder of the run, with
    the figure of the breakdown, such as `confusion.png` of a classifier.

    On the machine that trained the model the result equals the recorded one bit for bit. On another machine rounding
    may change a decision of a router.

    Args:
        folder: the run folder.
        options: the folder of the data, the device, and whether to show progress.

    Returns:
        the content of `evaluation.json`: the measures of the test, such as accuracy and loss, and their breakdown, such
        as the confusion matrix; the recorded measures, and whether both are equal.

    Raises:
        SmaError: the folder has no finished run, or the data is not available.
    """
    with _tested(folder, options) as tested:
        spec, recorded, objective, module, logged, device = tested
        metric = spec.task.metric
        measures = {key: logged[name] for key, name in objective.recorded(spec.task).items()}
        before = {key: recorded.get(key) for key in measures}
        breakdown = objective.breakdown(module)
        result = {
            "task": spec.task.kind,
            **measures,
            **({} if breakdown is None else breakdown.record()),
            "recorded": before,
            "reproduced": measures == before,
            "changed_data": changed(recorded.get("data", objective.hashes), objective.hashes),
            "commit": commit(),
            "hardware": hardware(device),
            "date": datetime.now(UTC).date().isoformat(),
        }
        write_text(folder / EVALUATION, json.dumps(result, indent=1))
        print(describe(result, metric, objective.tested(module), recorded))
        if breakdown is not None:
            print(f"\n{breakdown.table()}")
        print(f"\nevaluation        {plain(folder / EVALUATION)}")
        if breakdown is not None:
            title = f"{label(folder.name)}: {spec.task.kind}, {metric.headline(measures[metric.key])}"
            path = folder / breakdown.file
            if attempt(f"the figure {path}", lambda: breakdown.draw(path, title)):
                print(f"figure            {plain(path)}")
        return result


def report(folder: Path, options: CallOptions) -> dict[str, Any]:
    """Test the model of a finished run, print the recorded results, and draw the figures of the run again.

    Args:
        folder: the run folder.
        options: the folder of the data, the device, and whether to show progress.

    Returns:
        the recorded summary of the run.

    Raises:
        SmaError: the folder has no finished run, or the data is not available.
    """
    with _tested(folder, options) as tested:
        spec, recorded = tested.spec, tested.recorded
        made = tested.objective.report(tested.module)
        headline = f"{spec.task.metric.headline(recorded[spec.task.metric.key])}, seed {spec.seed}"
        attempt(
            f"the figure of the run in {folder}",
            lambda: made.draw(folder, f"{_subject(folder, tested.objective)}: {headline}"),
        )
        print(made.describe(recorded, folder))
    return recorded


def _subject(folder: Path, objective: Objective[Any, Any]) -> str:
    """The start of the titles of figures. It is the name of the run if the run belongs to a study."""
    in_study = any((parent / EXPERIMENT).is_file() for parent in folder.resolve().parents[:2])
    return label(folder.resolve().name) if in_study else f"SeqBoat on {label(objective.subject)}"


class _Tested(NamedTuple):
    """A finished run, its recorded summary, and the measures of another test of its model by their logged names."""

    spec: ExperimentSpec
    recorded: dict[str, Any]
    objective: Objective[Any, Any]
    module: TrainingModule
    logged: Mapping[str, float]
    device: str


@contextmanager
def _tested(folder: Path, options: CallOptions) -> Iterator[_Tested]:
    """Test the model of a finished run, and hold the lock of its folder inside the block."""
    spec, recorded = _finished(folder)
    with run_lock(folder):
        check_device(options.accelerator, spec.precision)
        objective = load_objective(spec.task, spec.task.prepare(options.data, progress=options.progress))
        prepare(spec)
        model = load(folder / "model")
        refuse_another(model.spec, spec.model, folder / "model")
        module = objective.module(model, spec.training)
        trainer = make_trainer(
            accelerator=options.accelerator,
            precision=spec.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[Progress()] if options.progress else None,
            enable_model_summary=False,
        )
        logged = run_test(trainer, module, objective.evaluation_batches("test"))
        yield _Tested(spec, recorded, objective, module, logged, trainer.strategy.root_device.type)


def _finished(folder: Path) -> tuple[ExperimentSpec, dict[str, Any]]:
    """The experiment and the summary of a finished run."""
    for name in (EXPERIMENT, SUMMARY):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"there is no finished run in {str(folder)!r}: {name} is missing; give the folder of a finished run"
            )
    spec = load_experiment(folder / EXPERIMENT)
    return spec, read_summary(folder, *objective_class(spec.task).recorded(spec.task))


def describe(result: Mapping[str, Any], metric: Metric, tested: str, recorded: Mapping[str, Any]) -> str:
    """The result as text: both values of every measure, whether they are equal, and the possible reasons if not.

    Args:
        result: the content of `evaluation.json`.
        metric: the metric of the task.
        tested: the items over which the metric was computed.
        recorded: the summary of the run.
    """
    before: Mapping[str, Any] = result["recorded"]
    lines = []
    for name, then in before.items():
        digits, of = (metric.digits, f" of {tested}") if name == metric.key else ("{:.6f}".format, "")
        lines.append(f"{name.replace('_', ' '):<17} {digits(result[name])}{of}, recorded {digits(then)}")
    if result["reproduced"]:
        lines.append("reproduced        exactly")
    else:
        reasons = [f"the data differs ({', '.join(result['changed_data'])})"] if result["changed_data"] else []
        reasons += [
            f"the {name} is {result[name]} now and was {recorded.get(name)}"
            for name in ("hardware", "commit")
            if recorded.get(name) != result[name]
        ]
        why = "; ".join(reasons) or (
            "data, hardware and commit are those of the run: versions of torch, or the model in the folder, may differ"
        )
        difference = metric.difference(result[metric.key] - before[metric.key])
        lines.append(f"reproduced        no, {difference}: {why}")
    if result["changed_data"] and result["reproduced"]:
        lines.append(f"data              not that of the run: {', '.join(result['changed_data'])} has another hash")
    return "\n".join(lines)
