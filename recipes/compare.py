"""SeqBoat beside its baselines on one task, at equal updates or equal time: one table.

python -m sma.recipes.compare --task digits
python -m sma.recipes.compare --task listops --models transformer,seqboat --seeds 3 --out runs/compare
python -m sma.recipes.compare --task digits,listops,pathfinder --out runs/compare
python -m sma.recipes.compare --resume runs/compare
"""

if not __package__:  # a script: its Python may not have the package
    __import__("environment")

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import SettingsConfigDict

from sma.errors import CheckpointError, SmaError, SpecError, did_you_mean, parsing
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.command import exit_code, parse
from sma.recipes.io.names import plain, shell_word
from sma.recipes.io.run_folder import (
    EXPERIMENT,
    SUMMARY,
    difference,
    is_list_of,
    read_checked,
    read_json,
    read_summary,
    refuse_another,
    write_text,
)
from sma.recipes.reports.comparison import comma_separated, markdown, markdown_of_several
from sma.recipes.studies.baselines import BASELINES, baseline
from sma.recipes.studies.efficiency import WORKS, efficiency
from sma.recipes.studies.grid import LOG, failure, in_words, train_all, unfinished
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.options import RunOptions, asked_experiment, check_fits, folder_of
from sma.spec import dump_yaml

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "digits", "speech")
CHOSEN, EFFICIENCY, SEVERAL = "compared.json", "efficiency.json", "tasks.json"
TABLE, VALUES = "table.md", "table.csv"
MEASURES = ("milliseconds", "megabytes")
AGAIN = "start a new comparison"
NEEDED = (
    "task",
    "chance",
    "majority",
    "data",
    "parameters",
    "updates",
    "test_accuracy",
    "activation_rate",
    "tokens_per_second",
    "seconds",
)
"""What a comparison reads from the summaries of its runs."""


class Options(RunOptions):
    """Train SeqBoat and its baselines on one task and print their table."""

    model_config = SettingsConfigDict(cli_prog_name="compare")

    task: str = Field(
        default="listops", description=f"what to learn: {', '.join(TASKS)}, or several with commas between"
    )
    preset: Literal["tiny", "paper"] = Field(
        default="tiny", description="the SeqBoat experiment that the others are made of"
    )
    models: str | None = Field(
        default=None, description=f"which to train, with commas between; default {','.join(BASELINES)}"
    )
    seeds: int = Field(
        default=1, ge=1, le=100, description="runs of every model, with the seeds from the experiment's own on"
    )
    minutes: float | None = Field(
        default=None,
        gt=0.0,
        description="train each model so long, in as many updates as its speed allows, instead of equal updates",
    )
    jobs: int = Field(
        default=1, ge=1, description="runs side by side; the speeds of training are then not to be compared"
    )
    length: int = Field(default=4096, ge=1, description="tokens of the rows on which speed and memory are measured")

    @property
    def name(self) -> str:
        return f"{self.task}_{self.preset}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run(parse(Options, sys.argv[1:] if arguments is None else arguments)))


def run(options: Options) -> dict[str, Any]:
    """Compare on one task, or on several, each in a folder of its own below that of the comparison, with one table of
    all.

    Returns:
        the summary of the task, see `summarise`; of several, theirs by task.

    Raises:
        SmaError: a sentence for the user: an unknown name, a folder of something else, or which runs failed.
    """
    if options.resume is not None:
        _refuse_changes(options)
        if not (options.resume / SEVERAL).is_file():
            return compare(options)
    elif len(_tasks(options.task)) == 1:
        return compare(options)
    named = options.model_copy(update={"task": f"compare-{options.task.replace(',', '-').replace(' ', '')}"})
    with folder_of(named, SEVERAL, "comparison of several tasks") as (out, began):
        if began:
            tasks = read_checked(out / SEVERAL, lambda found: is_list_of(found, TASKS), "a list of tasks", AGAIN)
            if options.resume is None and tasks != _tasks(options.task):
                raise CheckpointError(
                    f"{str(out)!r} holds a comparison of other tasks: {', '.join(tasks)}; give another --out"
                )
        else:
            tasks = _tasks(options.task)
            # All before the first is trained: what is wrong with one of them is said at once, and --resume knows what
            # was asked for.
            wanted = [(task, _asked(options.model_copy(update={"task": task}))) for task in tasks]
            write_text(out / SEVERAL, json.dumps(tasks))
            for task, asked in wanted:
                _write_down(*asked, out / task)
        summaries: dict[str, Any] = {}
        for task in tasks:
            how = {"task": task, "out": out / task} if options.auto_resume else {"resume": out / task}
            summaries[task] = compare(options.model_copy(update=how))
            write_text(out / TABLE, markdown_of_several(summaries))
            write_text(out / SUMMARY, json.dumps(summaries, indent=1))
        print(f"\n{markdown_of_several(summaries)}\ntable    {plain(out / TABLE)}\nsummary  {plain(out / SUMMARY)}")
    return summaries


def _refuse_changes(options: Options) -> None:
    given = sorted(
        options.model_fields_set
        & {"task", "preset", "models", "seeds", "minutes", "length", "set", "seed", "spec", "out"}
    )
    if given:
        names = ", ".join(f"--{name}" for name in given)
        raise SpecError(f"--resume goes on with the comparison as it was; leave {names} out, or start a new one")


def _tasks(given: str) -> list[str]:
    tasks = [task.strip() for task in given.split(",")]
    for task in tasks:
        if task not in TASKS:
            raise SpecError(f"unknown task {task!r}{did_you_mean(task, TASKS, 'tasks')}")
    return tasks


def compare(options: Options) -> dict[str, Any]:
    """Train what is not finished yet, measure, and write `table.md`, `table.csv` and `summary.json` after every run.

    A run that fails does not stop the others; its traceback stands in `log.txt` of its folder.

    Returns:
        the summary, see `summarise`.

    Raises:
        SmaError: a sentence for the user: an unknown name, a folder of something else, or which runs failed.
    """
    asked = _asked(options) if options.resume is None else None
    with folder_of(options, CHOSEN, "comparison") as (out, began):
        if asked is not None and not (began and (out / EXPERIMENT).exists()):
            _write_down(*asked, out)
        spec, chosen = _begun(out)
        if asked is not None:
            refuse_another(spec, asked[0], out / EXPERIMENT)
            if chosen != asked[1]:
                raise CheckpointError(
                    f"{str(out)!r} holds another comparison: {difference(chosen, asked[1])}; give another --out"
                )
        return _compare(spec, chosen, out, options)


def _compare(spec: ExperimentSpec, chosen: Mapping[str, Any], out: Path, options: Options) -> dict[str, Any]:
    check_fits(spec, options)
    data = spec.task.prepare(options.data, progress=options.progress)
    specs = _experiments(spec, chosen, data, out)
    left = unfinished(specs, out)
    print(
        f"{spec.task.kind}: {len(specs)} runs, {len(left)} to do, {options.jobs} at a time -> {plain(out)}", flush=True
    )
    for number, name in enumerate(
        train_all(left, out, data, cache=options.data, accelerator=options.accelerator, jobs=options.jobs), 1
    ):
        print(f"[{number}/{len(left)}] {name}: {in_words(out / name)}", flush=True)
        _write(specs, chosen, data, out)
    for model in chosen["models"]:
        folders = [out / name for name in specs if name.rsplit("-", 1)[0] == model]
        first = next((folder for folder in folders if (folder / SUMMARY).is_file()), None)
        if first is not None and not any((folder / EFFICIENCY).is_file() for folder in folders):
            device = "cuda" if read_summary(first).get("device") == "cuda" else "cpu"
            print(f"measuring {model} at {chosen['length']:,} tokens on {device}", flush=True)
            write_text(
                first / EFFICIENCY, json.dumps(efficiency(first, chosen["length"], device=device, threads=spec.threads))
            )
    summary = _write(specs, chosen, data, out)
    print(
        "\n"
        f"{markdown(summary)}\n"
        f"table    {plain(out / TABLE)}\n"
        f"values   {plain(out / VALUES)}\n"
        f"summary  {plain(out / SUMMARY)}"
    )
    failed = [name for name in left if failure(out / name) is not None]
    if failed:
        count, again = f"{len(failed)} of {len(left)} runs failed", f"--resume {shell_word(out)} tries again"
        raise SmaError(f"{count}: {', '.join(failed)}; {LOG} of each says why, and {again}")
    return summary


def _asked(options: Options) -> tuple[ExperimentSpec, dict[str, Any]]:
    """The SeqBoat experiment, and what else was chosen."""
    models = list(BASELINES) if options.models is None else [name.strip() for name in options.models.split(",")]
    spec = asked_experiment(options)
    for name in models:
        baseline(name, spec)  # says what is wrong before anything is made
    return spec, {"models": models, "seeds": options.seeds, "minutes": options.minutes, "length": options.length}


def _write_down(spec: ExperimentSpec, chosen: Mapping[str, Any], out: Path) -> None:
    # In this order: a folder is one of a comparison by the first, and --auto-resume writes the second where a start was
    # killed.
    write_text(out / CHOSEN, json.dumps(chosen))
    write_text(out / EXPERIMENT, dump_yaml(spec))


class _Chosen(BaseModel):
    """What `_write_down` wrote besides the experiment."""

    model_config = ConfigDict(extra="forbid", strict=True)

    models: list[str]
    seeds: int = Field(ge=1, le=100)
    minutes: float | None = Field(gt=0.0)
    length: int = Field(ge=1)


def _begun(out: Path) -> tuple[ExperimentSpec, dict[str, Any]]:
    """What `_write_down` wrote."""
    found = read_json(out / CHOSEN, AGAIN)
    with parsing(repr(str(out / CHOSEN)), CheckpointError, AGAIN):
        _Chosen.model_validate(found)
    return load_experiment(out / EXPERIMENT), found


def _experiments(
    spec: ExperimentSpec, chosen: Mapping[str, Any], data: TaskData, out: Path
) -> dict[str, ExperimentSpec]:
    """Every run by the name of its folder."""
    specs = {}
    for model in chosen["models"]:
        mine = baseline(model, spec)
        if chosen["minutes"] is not None:
            first = out / f"{model}-{spec.seed}" / EXPERIMENT
            # A run that began goes on with as many updates as it was given.
            updates = (
                load_experiment(first).training.updates
                if first.is_file()
                else updates_in(60 * chosen["minutes"], mine, data)
            )
            mine = with_updates(mine, updates)
        for seed in range(spec.seed, spec.seed + chosen["seeds"]):
            specs[f"{model}-{seed}"] = mine.replace(seed=seed)
    return specs


def updates_in(seconds: float, spec: ExperimentSpec, data: TaskData, tried: int = 12) -> int:
    """About how many updates a model makes in a time, by the mean of some; under a budget at the rates of its whole
    schedule.
    """
    from sma.recipes.training.classification import Classification

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    training = spec.training
    objective = Classification(spec.task, data)  # type: ignore[arg-type]
    learner = objective.module(spec.model.build(), training)
    optimizer = torch.optim.AdamW(learner.parameters())
    times = []
    for number, batch in enumerate(
        objective.training_batches(training.replace(updates=max(tried + 1, training.updates)), spec.seed)
    ):
        if learner.controller is not None:
            learner.controller.updates.fill_(number * training.updates // tried)
            with torch.no_grad():
                decisions = learner.model(batch.inputs, batch.valid).decisions
            learner.controller.move(learner.controller.count(decisions, batch.valid), speed=1.0)
        since = time.perf_counter()
        learner.loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - since)
        if number == tried:
            break
    return max(2, round(seconds / statistics.fmean(times[2:])))


def with_updates(spec: ExperimentSpec, updates: int) -> ExperimentSpec:
    """The same experiment in another number of updates; its warm-up and its evaluations keep their shares."""
    training = spec.training
    share = updates / training.updates
    changes: dict[str, Any] = {
        "updates": updates,
        "warmup": int(training.warmup * share),
        "evaluate_every": max(1, round(training.evaluate_every * share)),
    }
    if training.budget is not None:
        budget = training.budget
        changes["budget"] = budget.replace(hold=int(budget.hold * share), anneal=int(budget.anneal * share))
    return spec.replace(training=training.replace(**changes))


def _write(specs: Mapping[str, ExperimentSpec], chosen: Mapping[str, Any], data: TaskData, out: Path) -> dict[str, Any]:
    summary = summarise(specs, chosen, data, out)
    for name, text in (
        (TABLE, markdown(summary)),
        (VALUES, comma_separated(summary)),
        (SUMMARY, json.dumps(summary, indent=1)),
    ):
        write_text(out / name, text)
    return summary


def summarise(
    specs: Mapping[str, ExperimentSpec], chosen: Mapping[str, Any], data: TaskData, out: Path
) -> dict[str, Any]:
    """What stands in the folders of all runs that there are.

    Returns:
        `models`: by name `accuracy`, `activation_rate` and `tokens_per_second` (a list each, one entry per seed),
        `seeds`, `parameters`, `updates`, and `inference` and `training` (`milliseconds`, `megabytes`) and `measured_on`
        where they were measured; and what all have in common.
    """
    models: dict[str, Any] = {}
    read: list[Mapping[str, Any]] = []
    failed = []
    for name in specs:
        model, seed = name.rsplit("-", 1)
        if (reason := failure(out / name)) is not None:
            failed.append({"model": model, "seed": int(seed), "error": reason})
        if not (out / name / SUMMARY).is_file():
            continue
        run = read_summary(out / name, *NEEDED)
        read.append(run)
        row = models.setdefault(
            model, {"parameters": run["parameters"], "updates": run["updates"], "seeds": [], **_lists()}
        )
        row["seeds"].append(int(seed))
        row["accuracy"].append(run["test_accuracy"])
        row["activation_rate"].append(_mean(run["activation_rate"]))
        row["tokens_per_second"].append(run["tokens_per_second"])
        row["seconds"].append(run["seconds"])
        if (out / name / EFFICIENCY).is_file():
            measured = read_checked(
                out / name / EFFICIENCY, _is_efficiency, "what was measured", "delete it to measure again"
            )
            row["measured_on"] = measured.pop("hardware", "the CPU")  # of older versions, which knew no other
            measured.pop("device", None)
            row.update(measured)
    return {
        **({key: read[0][key] for key in ("task", "chance", "majority", "data")} if read else {}),
        **{key: ", ".join(sorted({str(run.get(key)) for run in read})) for key in ("commit", "hardware", "date")},
        "test_samples": len(data.test),
        "length": chosen["length"],
        "minutes": chosen["minutes"],
        "models": models,
        "failed": failed,
    }


def _is_efficiency(value: Any) -> bool:
    """Whether a value is what `efficiency` gives."""
    measured = [value.get(name) for name in WORKS] if isinstance(value, dict) else [None]
    return all(
        isinstance(each, dict) and all(isinstance(each.get(name), int | float) for name in MEASURES)
        for each in measured
    )


def _lists() -> dict[str, list[float]]:
    return {name: [] for name in ("accuracy", "activation_rate", "tokens_per_second", "seconds")}


def _mean(rates: Sequence[float]) -> float | None:
    return sum(rates) / len(rates) if rates else None


if __name__ == "__main__":
    sys.exit(main())
