"""Evaluate a finished run again: its model, its data, its test split, and the figure that was recorded beside the one
that comes out.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch.utils.data import DataLoader

from sma.checkpoint import load
from sma.errors import CheckpointError, SpecError
from sma.model import LanguageModel
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.claims import run_lock
from sma.recipes.io.names import plain
from sma.recipes.io.run_folder import EVALUATION, EXPERIMENT, SUMMARY, read_summary, refuse_another, write_text
from sma.recipes.reports.confusion import Confusion, draw_confusion
from sma.recipes.reports.figures import attempt, label
from sma.recipes.tasks.contract import ClassificationTask
from sma.recipes.tasks.language.task import LanguageTask
from sma.recipes.training.classification import Classifier
from sma.recipes.training.classification import evaluation_loader as classifying_loader
from sma.recipes.training.devices import check_device
from sma.recipes.training.language import LanguageLearner, evaluation_loader
from sma.recipes.training.loop import commit, hardware, prepare
from sma.recipes.training.module import Learner
from sma.recipes.training.options import RunOptions
from sma.recipes.training.resuming import changed
from sma.recipes.training.trainer import make_trainer, run_test


class Again(NamedTuple):
    """The test of a run, to be made again.

    Attributes:
        learner: with the model of the run.
        loader: the test split.
        figures: what is compared: by the name in the summary, the name under which it is measured.
        hashes: of the data.
    """

    learner: Learner
    loader: DataLoader[Any]
    figures: Mapping[str, str]
    hashes: Mapping[str, str]


def evaluate(folder: Path, options: RunOptions) -> dict[str, Any]:
    """Test the model of a finished run, print the result and write `evaluation.json`, and `confusion.png` of a
    classifier, into its folder.

    On the machine that trained it, the recorded figures come out to the last bit; on another, rounding may flip a
    decision of a router.

    Args:
        folder: of the run.
        options: where data is kept, the device, whether to show progress.

    Returns:
        what stands in `evaluation.json`: accuracy, loss, the accuracy of every class and the confusion matrix, or bits
        per character; what was recorded, and whether both are the same.

    Raises:
        SmaError: there is no finished run in the folder, or its data cannot be had.
    """
    if (
        options.set
        or options.seed is not None
        or options.spec is not None
        or options.resume is not None
        or options.out is not None
    ):
        raise SpecError("--evaluate tests the run as it was; leave --set, --seed, --spec, --resume and --out out")
    _check_finished(folder)
    with run_lock(folder):
        return _evaluate(folder, options)


def _evaluate(folder: Path, options: RunOptions) -> dict[str, Any]:
    spec, recorded = _finished(folder)
    check_device(options.accelerator, spec.precision)
    data = spec.task.prepare(options.data, progress=options.progress)
    prepare(spec)
    test = _again(spec, folder, data)
    trainer = make_trainer(
        accelerator=options.accelerator,
        precision=spec.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
    )
    measured = run_test(trainer, test.learner, test.loader)
    figures = {name: measured[logged] for name, logged in test.figures.items()}
    before = {name: recorded.get(name) for name in figures}
    confusion, answers = None, f"{len(data.test):,} held-out bytes"
    if isinstance(test.learner, Classifier):
        confusion = Confusion.of(test.learner.confusion.compute(), data.class_names)
        answers = f"{confusion.samples:,} answers"
    result = {
        "task": spec.task.kind,
        **figures,
        **({} if confusion is None else confusion.record()),
        "recorded": before,
        "reproduced": figures == before,
        "changed_data": changed(recorded.get("data", test.hashes), test.hashes),
        "commit": commit(),
        "hardware": hardware(trainer.strategy.root_device.type),
        "date": datetime.now(UTC).date().isoformat(),
    }
    write_text(folder / EVALUATION, json.dumps(result, indent=1))
    print(describe(result, answers, recorded))
    if confusion is not None:
        print(f"\n{confusion.table()}")
    print(f"\nevaluation        {plain(folder / EVALUATION)}")
    if confusion is not None:
        title, path = (
            f"{label(folder.name)}: {spec.task.kind}, test accuracy {figures['test_accuracy']:.1%}",
            folder / "confusion.png",
        )
        if attempt(f"the figure {path}", lambda: draw_confusion(confusion, path, title)):
            print(f"figure            {plain(path)}")
    return result


def _again(spec: ExperimentSpec, folder: Path, data: Any) -> Again:
    model, task = load(folder / "model"), spec.task
    refuse_another(model.spec, spec.model, folder / "model")
    if isinstance(task, ClassificationTask):
        classifier = Classifier(model, spec.training, task.classes)
        names = ("test_accuracy", "test_loss")
        return Again(classifier, classifying_loader(data.test, data), dict(zip(names, names, strict=True)), data.hashes)
    if isinstance(task, LanguageTask):
        learner = LanguageLearner(cast(LanguageModel, model), spec.training, task.carry_state)
        figures = {"bits_per_character": "test_bits_per_character"}
        return Again(learner, evaluation_loader(data.test, task), figures, data.hashes)
    raise SpecError(
        f"the run in {str(folder)!r} learned {task.kind!r}; --evaluate tests classifiers and language models"
    )


def describe(result: Mapping[str, Any], answers: str, recorded: Mapping[str, Any]) -> str:
    """The result in words: both figures, whether they are the same, and what may be why not.

    Args:
        result: what stands in `evaluation.json`.
        answers: of how many of what the figures are.
        recorded: the summary of the run.
    """
    before: Mapping[str, Any] = result["recorded"]
    shown, (first, *_) = {"test_accuracy": "{:.4%}"}, before
    lines = []
    for name, then in before.items():
        form = shown.get(name, "{:.6f}")
        of = f" of {answers}" if name == first else ""
        lines.append(f"{name.replace('_', ' '):<17} {form.format(result[name])}{of}, recorded {form.format(then)}")
    if result["reproduced"]:
        lines.append("reproduced        exactly")
    else:
        reasons = [f"the data differs ({', '.join(result['changed_data'])})"] if result["changed_data"] else []
        for name in ("hardware", "commit"):
            if recorded.get(name) != result[name]:
                reasons.append(f"the {name} is {result[name]} now and was {recorded.get(name)}")
        why = "; ".join(reasons) or (
            "data, hardware and commit are those of the run: versions of torch, or the model in the folder, may differ"
        )
        difference = result[first] - before[first]
        by = f"{100 * difference:+.4f} points" if first == "test_accuracy" else f"{difference:+.6f}"
        lines.append(f"reproduced        no, {by}: {why}")
    if result["changed_data"] and result["reproduced"]:
        lines.append(f"data              not that of the run: {', '.join(result['changed_data'])} has another hash")
    return "\n".join(lines)


def _check_finished(folder: Path) -> None:
    for name in (EXPERIMENT, SUMMARY):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"there is no finished run in {str(folder)!r}: {name} is missing; "
                "give the folder of a run that came to its end"
            )


def _finished(folder: Path) -> tuple[ExperimentSpec, dict[str, Any]]:
    _check_finished(folder)
    spec = load_experiment(folder / EXPERIMENT)
    measured = ("bits_per_character",) if isinstance(spec.task, LanguageTask) else ("test_accuracy", "test_loss")
    return spec, read_summary(folder, *(measured if isinstance(spec.task, LanguageTask | ClassificationTask) else ()))
