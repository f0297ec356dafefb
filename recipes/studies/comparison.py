"""SeqBoat beside its baselines on one task or several, at equal updates or equal time."""

import json
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field

from sma.errors import CheckpointError, SpecError, did_you_mean
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.claims import run_lock
from sma.recipes.io.names import plain
from sma.recipes.io.option_parser import Names
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY, is_list_of, read_checked, read_summary, write_text
from sma.recipes.reports.comparison import WORKS, comparison_table, tasks_table
from sma.recipes.reports.results import Summary
from sma.recipes.reports.table import Table
from sma.recipes.studies.baselines import BASELINES, baseline
from sma.recipes.studies.contract import Begun, Chosen, Study, StudyOptions, variants_field
from sma.recipes.studies.efficiency import efficiency
from sma.recipes.studies.folder import NEW, asked_study, refuse_changes, write_down
from sma.recipes.studies.grid import Results, Run
from sma.recipes.studies.study import TABLE, conduct, refuse_failures, report_study, run_study
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.options import CallOptions
from sma.recipes.training.start import folder_of

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "digits", "speech")
EFFICIENCY, SEVERAL = "efficiency.json", "tasks.json"
MEASURES = ("milliseconds", "megabytes")


class ComparisonOptions(StudyOptions):
    """The options of the comparison."""

    task: str = Field(
        default="listops", description=f"what to learn: {', '.join(TASKS)}, or several with commas between"
    )
    preset: Literal["tiny", "paper"] = Field(
        default="tiny", description="the SeqBoat experiment that the others are made of"
    )
    variants: Names | None = variants_field(tuple(BASELINES))
    minutes: float | None = Field(
        default=None,
        gt=0.0,
        description="train each model so long, in as many updates as its speed allows, instead of equal updates",
    )
    length: int = Field(default=4096, ge=1, description="tokens of the rows on which speed and memory are measured")

    @property
    def name(self) -> str:
        return f"{self.task}_{self.preset}"


class ComparisonChosen(Chosen):
    """What a comparison was asked for.

    Attributes:
        minutes: of the training of each model, instead of equal updates.
        length: tokens of the rows on which speed and memory are measured.
    """

    minutes: float | None = Field(gt=0.0)
    length: int = Field(ge=1)


class Comparison(Study[ComparisonOptions, ComparisonChosen]):
    """Every baseline of a SeqBoat experiment, with its speed and memory."""

    name = "compare"
    chosen = ComparisonChosen
    older = "compared.json"
    selections: ClassVar[Mapping[str, str]] = {"variants": "model"}

    def settings(self, options: ComparisonOptions) -> dict[str, Any]:
        return {**super().settings(options), "minutes": options.minutes, "length": options.length}

    def names(self, spec: ExperimentSpec) -> dict[str, Sequence[str]]:
        return {"variants": tuple(BASELINES)}

    def upgrade(self, older: Any) -> dict[str, Any]:
        return {"variants" if field == "models" else field: value for field, value in dict(older).items()}

    def check(self, spec: ExperimentSpec, chosen: ComparisonChosen) -> None:
        for name in chosen.variants:
            baseline(name, spec)

    def runs(self, spec: ExperimentSpec, chosen: ComparisonChosen, data: TaskData, out: Path) -> list[Run]:
        runs = []
        for name in chosen.variants:
            model = baseline(name, spec)
            if chosen.minutes is not None:
                first = out / f"{name}-{spec.seed}" / EXPERIMENT
                # A run that began keeps the updates that it was given.
                updates = (
                    load_experiment(first).training.updates
                    if first.is_file()
                    else updates_in(60 * chosen.minutes, model, data)
                )
                model = with_updates(model, updates)
            for seed in range(spec.seed, spec.seed + (chosen.seeds or 1)):
                runs.append(Run(f"{name}-{seed}", name, seed, model.replace(seed=seed)))
        return runs

    def summarise(self, results: Results, chosen: ComparisonChosen, out: Path) -> dict[str, Any]:
        costs: dict[str, Any] = {}
        for row in results.rows:
            if (path := out / row["name"] / EFFICIENCY).is_file():
                costs[row["variant"]] = read_efficiency(path)
        rows = [row | costs.get(row["variant"], {}) for row in results.rows]
        return {"rows": rows, "minutes": chosen.minutes, "measured_length": chosen.length}

    def conclude(self, summary: Summary, begun: Begun[ComparisonChosen], data: TaskData) -> dict[str, Any]:
        """Measure the models whose speed and memory are not known, each by its first finished run."""
        measured = set()
        for row in summary["rows"]:
            if WORKS[0] in row or row["variant"] in measured:
                continue
            measured.add(row["variant"])
            folder, length = begun.out / row["name"], begun.chosen.length
            device = "cuda" if read_summary(folder).get("device") == "cuda" else "cpu"
            print(f"measuring {row['variant']} at {length:,} tokens on {device}", flush=True)
            found = efficiency(folder, length, device=device, threads=begun.spec.threads)
            write_text(folder / EFFICIENCY, json.dumps(found))
        return {}

    def table(self, summary: Summary) -> Table:
        return comparison_table(summary)


def run_comparison(options: ComparisonOptions) -> dict[str, Any]:
    """Compare on one task, or on several, each in a folder of its own below that of the comparison, with one table of
    all.

    Returns:
        the summary of the task, or of several theirs by task.

    Raises:
        SmaError: an error message for the user: an unknown name, a folder of something else, or which runs failed.
    """
    study = Comparison()
    if options.resume is not None:
        refuse_changes(study, options)
        if not (options.resume / SEVERAL).is_file():
            return run_study(study, options)
    elif len(_tasks(options.task)) == 1:
        return run_study(study, options)
    named = options.model_copy(update={"task": f"compare-{options.task.replace(',', '-').replace(' ', '')}"})
    with folder_of(named, SEVERAL, "study of several tasks") as (out, began):
        tasks = _begun_tasks(options, out) if began else _begin_tasks(study, options, out)
        summaries: dict[str, Any] = {}
        failures: list[str] = []
        for task in tasks:
            how = {"task": task, "out": out / task} if options.auto_resume else {"resume": out / task, "out": None}
            summaries[task], failed, _ = conduct(study, options.model_copy(update=how))
            failures += [f"{task}/{name}" for name in failed]
            _write_tasks(summaries, out)
        _show_tasks(summaries, out)
        refuse_failures(failures, out, options)
    return summaries


def report_tasks(out: Path, options: CallOptions) -> dict[str, Any]:
    """Write the tables and the summaries of a comparison on several tasks again; returns the summaries by task.

    Raises:
        SmaError: an error message for the user.
    """
    with run_lock(out):
        summaries = {task: report_study(Comparison(), out / task, options) for task in _read_tasks(out)}
        _write_tasks(summaries, out)
        _show_tasks(summaries, out)
    return summaries


def _write_tasks(summaries: Mapping[str, Any], out: Path) -> None:
    write_text(out / TABLE, tasks_table(summaries))
    write_text(out / SUMMARY, json.dumps(summaries, indent=1))


def _show_tasks(summaries: Mapping[str, Any], out: Path) -> None:
    print(f"\n{tasks_table(summaries)}\ntable    {plain(out / TABLE)}\nsummary  {plain(out / SUMMARY)}")


def _begin_tasks(study: Comparison, options: ComparisonOptions, out: Path) -> list[str]:
    tasks = _tasks(options.task)
    # All before the first is trained: what is wrong with one of them is an error at once, and --resume finds what was
    # asked for.
    asked = [(out / task, *asked_study(study, options.model_copy(update={"task": task}))) for task in tasks]
    write_text(out / SEVERAL, json.dumps(tasks))
    for folder, spec, chosen in asked:
        write_down(folder, spec, chosen)
    return tasks


def _begun_tasks(options: ComparisonOptions, out: Path) -> list[str]:
    tasks = _read_tasks(out)
    if options.resume is None and tasks != _tasks(options.task):
        raise CheckpointError(f"{str(out)!r} holds a study of other tasks: {', '.join(tasks)}; give another --out")
    return tasks


def _read_tasks(out: Path) -> list[str]:
    tasks: list[str] = read_checked(out / SEVERAL, lambda found: is_list_of(found, TASKS), "a list of tasks", NEW)
    return tasks


def _tasks(given: str) -> list[str]:
    tasks = [task.strip() for task in given.split(",")]
    for task in tasks:
        if task not in TASKS:
            raise SpecError(f"unknown task {task!r}{did_you_mean(task, TASKS, 'tasks')}")
    return tasks


def read_efficiency(path: Path) -> dict[str, Any]:
    """Read what `efficiency` measured, as a row holds it.

    Raises:
        CheckpointError: the file is damaged.
    """
    measured = read_checked(path, _is_efficiency, "what was measured", "delete it to measure again")
    # Earlier versions measured on the CPU only, and did not write where.
    return {**{work: measured[work] for work in WORKS}, "measured_on": measured.get("hardware", "the CPU")}


def _is_efficiency(value: Any) -> bool:
    """Whether a value is what `efficiency` returns."""
    measured = [value.get(name) for name in WORKS] if isinstance(value, dict) else [None]
    return all(
        isinstance(each, dict) and all(isinstance(each.get(name), int | float) for name in MEASURES)
        for each in measured
    )


def updates_in(seconds: float, spec: ExperimentSpec, data: TaskData, tried: int = 12) -> int:
    """Estimate the number of updates in a time by the mean of some updates; with a budget, at the rates of its whole
    schedule.
    """
    # Lightning takes seconds to import; --help need not wait for it.
    from sma.recipes.training.objective import load_objective

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    training = spec.training
    objective = load_objective(spec.task, data)
    module = objective.module(spec.model.build(), training)
    controller = module.controller
    if controller is not None:  # each update moves to the next rate of the schedule at once
        move = controller.move
        module.steer = lambda decisions, valid: move(  # type: ignore[method-assign]
            controller.count(decisions, valid), speed=1.0
        )
    optimizer = torch.optim.AdamW(module.parameters())
    batches = objective.training_batches(training.replace(updates=max(tried + 1, training.updates)), spec.seed)
    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module has no trainer to log to
        for number, batch in zip(range(tried + 1), batches, strict=False):
            if controller is not None:
                controller.updates.fill_(number * training.updates // tried)
            since = time.perf_counter()
            cast(torch.Tensor, module.training_step(batch, number)).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - since)
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
