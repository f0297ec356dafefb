"""Comparison of SeqBoat with its baselines on one or several tasks, at equal updates or equal time."""

import json
import re
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field

from sma.errors import CheckpointError, SpecError, did_you_mean, quote
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.claims import run_lock
from sma.recipes.io.names import plain
from sma.recipes.io.option_parser import Names, Settings
from sma.recipes.io.run_folder import EXPERIMENT, SUMMARY, read_checked, read_summary, write_text
from sma.recipes.reports.comparison import FIGURE, WORKS, comparison_table, draw_parts, tasks_table
from sma.recipes.reports.figures import attempt
from sma.recipes.reports.results import Summary
from sma.recipes.reports.table import Table
from sma.recipes.studies.baselines import BASELINES, baseline, with_parameters
from sma.recipes.studies.contract import Begun, Chosen, Study, StudyOptions, variants_field
from sma.recipes.studies.efficiency import efficiency
from sma.recipes.studies.folder import NEW, asked_study, refuse_changes, write_down
from sma.recipes.studies.grid import Results, Run
from sma.recipes.studies.study import TABLE, conduct, refuse_failures, report_study, run_study
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.devices import check_device
from sma.recipes.training.options import CallOptions
from sma.recipes.training.start import folder_of

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "digits", "speech", "recall", "mqar")
EFFICIENCY, SEVERAL = "efficiency.json", "tasks.json"
MEASURES = ("milliseconds", "megabytes")
_PART = re.compile(r"\w[\w.=,+-]*").fullmatch


class ComparisonOptions(StudyOptions):
    """The options of the comparison."""

    task: str = Field(default="listops", description=f"the task: {', '.join(TASKS)}, or several separated by commas")
    preset: Literal["tiny", "paper", "binary"] = Field(
        default="tiny", description="the SeqBoat experiment from which the baselines are derived"
    )
    variants: Names | None = variants_field(tuple(BASELINES))
    minutes: float | None = Field(
        default=None,
        gt=0.0,
        description="training time of each model, in minutes; default: equal updates",
    )
    length: int = Field(
        default=4096, ge=1, description="number of tokens of the rows on which speed and memory are measured"
    )
    speed: bool = Field(default=True, description="measure speed and memory")
    equal_parameters: bool = Field(
        default=False, description="give every baseline the width with the number of parameters nearest to SeqBoat's"
    )
    vary: list[Settings] = Field(
        default=[],
        description="compare once under each of several settings, such as --vary task.data.length=64,task.data.pairs=4 "
        "--vary task.data.length=128,task.data.pairs=8",
    )

    @property
    def name(self) -> str:
        return f"{self.task}_{self.preset}"


class ComparisonChosen(Chosen):
    """The settings of a comparison.

    Attributes:
        minutes: training time of each model, in minutes; None trains for equal updates.
        length: number of tokens of the rows on which speed and memory are measured.
        speed: whether speed and memory are measured.
        equal_parameters: whether the widths of the baselines are chosen for SeqBoat's number of parameters.
    """

    minutes: float | None = Field(gt=0.0)
    length: int = Field(ge=1)
    speed: bool = True
    equal_parameters: bool = False


class Comparison(Study[ComparisonOptions, ComparisonChosen]):
    """All baselines of a SeqBoat experiment, with their speed and memory."""

    name = "compare"
    chosen = ComparisonChosen
    older = "compared.json"
    selections: ClassVar[Mapping[str, str]] = {"variants": "model"}

    def settings(self, options: ComparisonOptions) -> dict[str, Any]:
        own = ("minutes", "length", "speed", "equal_parameters")
        return {**super().settings(options), **{name: getattr(options, name) for name in own}}

    def names(self, spec: ExperimentSpec) -> dict[str, Sequence[str]]:
        return {"variants": tuple(BASELINES)}

    def upgrade(self, older: Any) -> dict[str, Any]:
        return {"variants" if field == "models" else field: value for field, value in dict(older).items()}

    def check(self, spec: ExperimentSpec, chosen: ComparisonChosen) -> None:
        for name in chosen.variants:
            baseline(name, spec)

    def runs(
        self, spec: ExperimentSpec, chosen: ComparisonChosen, data: TaskData, out: Path, accelerator: str = "auto"
    ) -> list[Run]:
        runs = []
        for name in chosen.variants:
            model = with_parameters(name, spec) if chosen.equal_parameters else baseline(name, spec)
            if chosen.minutes is not None:
                first = out / f"{name}-{spec.seed}" / EXPERIMENT
                # A started run keeps its number of updates.
                updates = (
                    load_experiment(first).training.updates
                    if first.is_file()
                    else updates_in(60 * chosen.minutes, model, data, accelerator)
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
        return {
            "rows": rows,
            "minutes": chosen.minutes,
            "measured_length": chosen.length if chosen.speed else None,
        }

    def conclude(self, summary: Summary, begun: Begun[ComparisonChosen], data: TaskData) -> dict[str, Any]:
        """Measure the models whose speed and memory are unknown, each with its first finished run."""
        measured = set()
        for row in summary["rows"] if begun.chosen.speed else []:
            if WORKS[0] in row or row["variant"] in measured:
                continue
            measured.add(row["variant"])
            folder, length = begun.out / row["name"], begun.chosen.length
            device = "cuda" if read_summary(folder).get("device") == "cuda" else "cpu"
            print(f"measuring {row['variant']} at {length:,} tokens on {device}", flush=True)
            try:
                found = efficiency(folder, length, device=device, threads=begun.spec.threads)
            except CheckpointError as error:  # for example a model of a GPU, on a machine without one
                print(f"warning: {row['variant']} is not measured: {error}", file=sys.stderr, flush=True)
                continue
            write_text(folder / EFFICIENCY, json.dumps(found))
        return {}

    def table(self, summary: Summary) -> Table:
        return comparison_table(summary)


def run_comparison(options: ComparisonOptions) -> dict[str, Any]:
    """Compare on one task, or on several tasks and settings, each in its own subfolder, with one common table.

    Returns:
        the summary of the task, or the summaries of several by folder.

    Raises:
        SmaError: a name is unknown, the folder has other content, or runs failed; the message is for the user.
    """
    study = Comparison()
    if options.resume is not None:
        refuse_changes(study, options)
        if not (options.resume / SEVERAL).is_file():
            return run_study(study, options)
    elif len(_parts(options)) == 1 and not options.vary:
        task = options.task.strip()
        return run_study(study, options if task == options.task else options.model_copy(update={"task": task}))
    named = options.model_copy(update={"task": f"compare-{options.task.replace(',', '-').replace(' ', '')}"})
    with folder_of(named, SEVERAL, "study of several tasks") as (out, began):
        parts = _begun_parts(options, out) if began else _begin_parts(study, options, out)
        finished = {part: out / part / SUMMARY for part in parts if (out / part / SUMMARY).is_file()}
        summaries: dict[str, Any] = {
            part: read_checked(path, _is_summary, "the summary of a study", NEW) for part, path in finished.items()
        }
        failures: list[str] = []
        for part, asked in parts.items():
            how = {**asked, "out": out / part} if options.auto_resume else {"resume": out / part, "out": None}
            summaries[part], failed, _ = conduct(study, options.model_copy(update=how))
            failures += [f"{part}/{name}" for name in failed]
            _write_tasks({each: summaries[each] for each in parts if each in summaries}, out)
        _show_tasks({part: summaries[part] for part in parts}, out)
        refuse_failures(failures, out, options)
    return summaries


def report_tasks(out: Path, options: CallOptions) -> dict[str, Any]:
    """Write the tables and the summaries of a comparison on several tasks again; returns the summaries by task.

    Raises:
        SmaError: the command fails; the message is for the user.
    """
    with run_lock(out):
        summaries = {part: report_study(Comparison(), out / part, options) for part in _read_parts(out)}
        _write_tasks(summaries, out)
        _show_tasks(summaries, out)
    return summaries


def _write_tasks(summaries: Mapping[str, Any], out: Path) -> None:
    write_text(out / TABLE, tasks_table(summaries))
    write_text(out / SUMMARY, json.dumps(summaries, indent=1))


def _show_tasks(summaries: Mapping[str, Any], out: Path) -> None:
    attempt(f"the figure of the comparison in {out}", lambda: draw_parts(summaries, out))
    print(f"\n{tasks_table(summaries)}\ntable    {plain(out / TABLE)}\nsummary  {plain(out / SUMMARY)}")
    if (out / FIGURE).is_file():
        print(f"figure   {plain(out / FIGURE)}")


def _begin_parts(study: Comparison, options: ComparisonOptions, out: Path) -> dict[str, dict[str, Any]]:
    parts = _parts(options)
    # All of them before the first training, so that a mistake is an error at once and --resume finds all settings.
    asked = [(out / part, *asked_study(study, options.model_copy(update=how))) for part, how in parts.items()]
    write_text(out / SEVERAL, json.dumps(list(parts)))
    for folder, spec, chosen in asked:
        write_down(folder, spec, chosen)
    return parts


def _begun_parts(options: ComparisonOptions, out: Path) -> dict[str, dict[str, Any]]:
    begun = _read_parts(out)
    if options.resume is not None:
        return {part: {} for part in begun}
    parts = _parts(options)
    if begun != list(parts):
        raise CheckpointError(f"{str(out)!r} holds a study of other tasks: {', '.join(begun)}; give another --out")
    return parts


def _read_parts(out: Path) -> list[str]:
    parts: list[str] = read_checked(out / SEVERAL, _are_parts, "a list of tasks", NEW)
    return parts


def _is_summary(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("rows"), list)


def _are_parts(value: Any) -> bool:
    """Whether a value is a list of tasks or of settings of a comparison."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) and _PART(each) for each in value)


def _parts(options: ComparisonOptions) -> dict[str, dict[str, Any]]:
    """The options of every part of a comparison, by the name of its folder: a task, its varied settings, or both.

    Raises:
        SpecError: a task is unknown, or two parts have the same settings.
    """
    tasks = _tasks(options.task)
    parts: dict[str, dict[str, Any]] = {}
    for task in tasks:
        own: dict[str, Any] = {"task": task} if len(tasks) > 1 else {}
        if not options.vary:
            parts[task] = own
        for given in options.vary:
            settings = re.split(r",(?=[\w.]+=)", given)
            part = {**own, "set": [*options.set, *settings]}
            name = _folder([*own.values(), *map(_short, settings)])
            if name in parts and part != parts[name]:  # fields of the same name
                name = _folder([*own.values(), *settings])
            if name in parts:
                raise SpecError(f"--vary {quote(given)} is given twice; give every combination of settings once")
            parts[name] = part
    return parts


def _folder(words: Sequence[str]) -> str:
    """The name of the folder of a part."""
    return re.sub(r"[^\w.=,+-]", "", ",".join(words))


def _short(setting: str) -> str:
    """A setting without the path of its field."""
    path, _, value = setting.partition("=")
    return f"{path.rpartition('.')[2]}={value}"


def _tasks(given: str) -> list[str]:
    tasks = [task.strip() for task in given.split(",")]
    for task in tasks:
        if task not in TASKS:
            raise SpecError(f"unknown task {task!r}{did_you_mean(task, TASKS, 'tasks')}")
    if len(set(tasks)) < len(tasks):
        raise SpecError(f"--task {given!r} names a task twice; give each one once")
    return tasks


def read_efficiency(path: Path) -> dict[str, Any]:
    """Read a measurement of `efficiency` in the format of a row.

    Raises:
        CheckpointError: the file is damaged.
    """
    measured = read_checked(path, _is_efficiency, "a measurement", "delete it to measure again")
    # Earlier versions measured on the CPU only and did not write the device.
    return {**{work: measured[work] for work in WORKS}, "measured_on": measured.get("hardware", "the CPU")}


def _is_efficiency(value: Any) -> bool:
    """Whether a value is a result of `efficiency`."""
    measured = [value.get(name) for name in WORKS] if isinstance(value, dict) else [None]
    return all(
        isinstance(each, dict) and all(isinstance(each.get(name), int | float) for name in MEASURES)
        for each in measured
    )


def updates_in(seconds: float, spec: ExperimentSpec, data: TaskData, accelerator: str = "auto", tried: int = 12) -> int:
    """Estimate the number of updates in a time from some timed updates on the device of the training; with a budget, at
    the rates of its schedule.
    """
    # Lightning takes seconds to import, which --help does not need.
    from lightning.fabric.utilities import move_data_to_device

    from sma.recipes.training.objective import load_objective

    device = torch.device(check_device(accelerator, spec.precision))
    narrow = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(spec.precision)

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    training = spec.training.replace(graph=False)  # the updates are made here
    objective = load_objective(spec.task, data)
    module = objective.module(spec.model.build(), training).to(device)
    controller = module.controller
    if controller is not None:  # each update uses the next rate of the schedule
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
            with torch.autocast(device.type, narrow, enabled=narrow is not None):
                loss = cast(torch.Tensor, module.training_step(move_data_to_device(batch, device), number))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - since)
    return max(2, round(seconds / statistics.fmean(times[2:])))


def with_updates(spec: ExperimentSpec, updates: int) -> ExperimentSpec:
    """The same experiment with another number of updates; warm-up, evaluations and budget are scaled."""
    training = spec.training
    share = updates / training.updates
    changes: dict[str, Any] = {
        "updates": updates,
        "warmup": int(training.warmup * share),
        "evaluate_every": max(1, round(training.evaluate_every * share)),
    }
    if training.budget is not None:
        budget = training.budget
        changes["budget"] = budget.replace(
            hold=int(budget.hold * share),
            anneal=int(budget.anneal * share),
            until=None if budget.until is None else max(1, int(budget.until * share)),
            period=max(2, round(budget.period * share)),
        )
    return spec.replace(training=training.replace(**changes))
