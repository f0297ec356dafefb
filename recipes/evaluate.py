"""Evaluate a finished run again: its model, its data, its test split, and the figure that was recorded beside the one that comes out."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from lightning import Trainer

from sma.checkpoint import load
from sma.errors import CheckpointError, SpecError
from sma.recipes.command import RunOptions
from sma.recipes.confusion import Confusion, draw_confusion
from sma.recipes.experiment import EVALUATION, EXPERIMENT, SUMMARY, ExperimentSpec, load_experiment, write_text
from sma.recipes.run import commit, hardware, interruptible, prepare
from sma.recipes.tasks import ClassificationTask
from sma.recipes.training import Classifier, evaluation_loader


def evaluate(folder: Path, options: RunOptions) -> dict[str, Any]:
    """Test the model of a finished run, print the result and write `evaluation.json` and `confusion.png` into its folder.

    On the machine that trained it, the recorded figures come out to the last bit; on another, rounding may flip a decision of a router.

    Args:
        folder: of the run.
        options: where data is kept, the device, whether to show progress.

    Returns:
        what stands in `evaluation.json`: accuracy, loss, the accuracy of every class, the confusion matrix, what was recorded, and
        whether both are the same.

    Raises:
        SmaError: there is no finished run of a classifier in the folder, or its data cannot be had.
    """
    spec, recorded = _finished(folder)
    if options.set or options.seed is not None or options.spec is not None or options.resume is not None or options.out is not None:
        raise SpecError("--evaluate tests the run as it was; leave --set, --seed, --spec, --resume and --out out")
    task = cast(ClassificationTask, spec.task)
    data = task.prepare(options.data, progress=options.progress)
    differences = changed(recorded.get("data", {}), data.hashes)
    prepare(spec)
    classifier = Classifier(load(folder / "model"), spec.training, task.classes)
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=spec.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
    )
    with interruptible():
        measured = trainer.test(classifier, evaluation_loader(data.test, data), verbose=False)[0]
    confusion = Confusion.of(classifier.confusion.compute(), data.class_names)
    figures = {name: measured[name] for name in ("test_accuracy", "test_loss")}
    before = {name: recorded.get(name) for name in figures}
    result = {
        "task": task.kind,
        **figures,
        **confusion.record(),
        "recorded": before,
        "reproduced": figures == before,
        "changed_data": differences,
        "commit": commit(),
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_text(folder / EVALUATION, json.dumps(result, indent=1))
    title = f"{folder.name}: {task.kind}, test accuracy {figures['test_accuracy']:.1%}"
    figure = draw_confusion(confusion, folder / "confusion.png", title)
    print(describe(result, confusion, recorded))
    print(f"\nevaluation        {folder / EVALUATION}\nfigure            {figure}")
    return result


def changed(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The splits or files whose hash is not the recorded one, or that there were not."""
    return sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name))


def describe(result: Mapping[str, Any], confusion: Confusion, recorded: Mapping[str, Any]) -> str:
    """The result in words: both figures, whether they are the same and what may be why not, and the table of the classes."""
    accuracy, before = result["test_accuracy"], result["recorded"]["test_accuracy"]
    lines = [
        f"test accuracy     {accuracy:.4%} of {confusion.samples:,} answers, recorded {before:.4%}",
        f"test loss         {result['test_loss']:.6f}, recorded {result['recorded']['test_loss']:.6f}",
    ]
    if result["reproduced"]:
        lines.append("reproduced        exactly")
    else:
        reasons = [f"the data differs ({', '.join(result['changed_data'])})"] if result["changed_data"] else []
        for name in ("hardware", "commit"):
            if recorded.get(name) != result[name]:
                reasons.append(f"the {name} is {result[name]} now and was {recorded.get(name)}")
        why = (
            "; ".join(reasons)
            or "data, hardware and commit are those of the run: versions of torch, or the model in the folder, may differ"
        )
        lines.append(f"reproduced        no, {100 * (accuracy - before):+.4f} points: {why}")
    if result["changed_data"] and result["reproduced"]:
        lines.append(f"data              not that of the run: {', '.join(result['changed_data'])} has another hash")
    return "\n".join([*lines, "", confusion.table()])


def _finished(folder: Path) -> tuple[ExperimentSpec, dict[str, Any]]:
    for name in (EXPERIMENT, SUMMARY):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"there is no finished run in {str(folder)!r}: {name} is missing; give the folder of a run that came to its end"
            )
    spec = load_experiment(folder / EXPERIMENT)
    if not isinstance(spec.task, ClassificationTask):
        raise SpecError(f"the run in {str(folder)!r} learned {spec.task.kind!r}, which has no classes; --evaluate tests classifiers")
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / SUMMARY} is damaged: {error}; the run must be repeated") from error
    return spec, summary
