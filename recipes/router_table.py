"""Every router with every sub-module, at equal updates, and the most important ones with three seeds: one table.

python recipes/router_table.py --out runs/routers
python recipes/router_table.py --only sma,always --modules gau,conv
python recipes/router_table.py --resume runs/routers
"""

if not __package__:  # a script: its Python may not have the package
    __import__("environment")

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from sma.errors import SmaError, SpecError, did_you_mean
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.command import exit_code, parse
from sma.recipes.io.names import plain
from sma.recipes.io.run_folder import (
    EXPERIMENT,
    SUMMARY,
    is_list_of,
    read_checked,
    read_summary,
    refuse_another,
    write_text,
)
from sma.recipes.reports.routers import comma_separated, markdown, repeated
from sma.recipes.studies.grid import LOG, failure, in_words, train_all, unfinished
from sma.recipes.studies.router_grid import MIXED, ROUTERS, Cell, cell_experiment, columns, grid
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.options import RunOptions, asked_experiment, check_fits, folder_of
from sma.spec import dump_yaml
from sma.stats import operation_count

CHOSEN = "chosen.json"
TABLE, VALUES = "table.md", "table.csv"


NEEDED = (
    "task",
    "chance",
    "majority",
    "updates",
    "data",
    "test_accuracy",
    "activation_rates",
    "tokens_per_second",
    "seconds",
)
"""What the table reads from the summaries of its runs."""


class Options(RunOptions):
    """Train every router with every sub-module, and write the table of accuracy, rates, operations and speed."""

    model_config = SettingsConfigDict(cli_prog_name="router_table")

    preset: Literal["tiny"] = Field(default="tiny", description="52 runs of less than a minute on one core each")
    only: str | None = Field(
        default=None, description=f"routers to train, with commas between; default {','.join(ROUTERS)}"
    )
    modules: str | None = Field(
        default=None, description=f"columns to train, such as gau,{MIXED}; default every sub-module, and all in one"
    )
    jobs: int = Field(
        default=2, ge=1, description="runs side by side, each in a process of its own; 1 trains in this one"
    )

    @property
    def name(self) -> str:
        return f"listops_router_table_{self.preset}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run(parse(Options, sys.argv[1:] if arguments is None else arguments)))


def run(options: Options) -> dict[str, Any]:
    """Train the runs that are not finished yet, and write `table.md`, `table.csv` and `summary.json` after every one.

    A run that fails does not stop the others; its traceback stands in `log.txt` of its folder.

    Returns:
        the summary: `runs` holds of every finished run its `modules` (the column), `router`, `seed`, `accuracy` on the
        test split, `rates` (of every sub-module of every layer), `operations_per_token`, `tokens_per_second` and
        `seconds`; `failed` the reason of every other that was tried; `repeated` the spread over seeds.

    Raises:
        SmaError: a sentence for the user: an unknown name, a folder of something else, or which runs failed.
    """
    with _table(options) as (spec, specs, chosen, out):
        return _train(options, spec, specs, chosen, out)


def _train(
    options: Options, spec: ExperimentSpec, specs: Mapping[Cell, ExperimentSpec], chosen: Sequence[Cell], out: Path
) -> dict[str, Any]:
    left = unfinished({cell.name: each for cell, each in specs.items()}, out)
    left = {cell.name: left[cell.name] for cell in chosen if cell.name in left}
    data = spec.task.prepare(options.data, progress=options.progress)
    print(
        f"{len(chosen)} runs of {spec.training.updates:,} updates, "
        f"{len(left)} to do, {options.jobs} at a time -> {plain(out)}",
        flush=True,
    )
    started = time.perf_counter()
    earlier = {"seconds": 0.0, "jobs": 1}
    if (out / SUMMARY).exists():
        earlier = read_checked(out / SUMMARY, _is_summary, "the summary of a table", "delete it to count the time anew")
    jobs = max(earlier["jobs"], min(options.jobs, len(left)))

    def write() -> dict[str, Any]:
        seconds = round(earlier["seconds"] + time.perf_counter() - started, 1)
        summary = _summary(specs, out, data) | {"jobs": jobs, "seconds": seconds}
        for name, text in (
            (TABLE, markdown(summary)),
            (VALUES, comma_separated(summary)),
            (SUMMARY, json.dumps(summary, indent=1)),
        ):
            write_text(out / name, text)
        return summary

    ended = train_all(left, out, data, cache=options.data, accelerator=options.accelerator, jobs=options.jobs)
    for number, name in enumerate(ended, 1):
        print(f"[{number}/{len(left)}] {name}: {in_words(out / name)}", flush=True)
        write()
    summary = write()
    print(
        "\n"
        f"{markdown(summary)}\n"
        f"table    {plain(out / TABLE)}\n"
        f"values   {plain(out / VALUES)}\n"
        f"summary  {plain(out / SUMMARY)}"
    )
    failed = [name for name in left if failure(out / name) is not None]
    if failed:
        raise SmaError(
            f"{len(failed)} of {len(left)} runs failed: {', '.join(failed)}; "
            f"{LOG} of each says why, and --resume {out} tries again"
        )
    return summary


@contextmanager
def _table(options: Options) -> Iterator[tuple[ExperimentSpec, dict[Cell, ExperimentSpec], list[Cell], Path]]:
    """Yield the experiment that the table is made of, those of the whole grid, the runs to train, and the folder,
    locked.
    """
    asked = None
    if options.resume is None:
        asked = asked_experiment(options)
        if not columns(asked):
            raise SpecError(
                "the table needs an experiment whose layers have sub-modules; set model.layers.layer.modules"
            )
        chosen = {
            "routers": _names(options.only, ROUTERS, "router"),
            "modules": _names(options.modules, columns(asked), "column"),
        }
        for cell in grid(asked):
            cell_experiment(asked, cell)  # says what is wrong before anything is made
    elif options.set or options.seed is not None or options.spec is not None:
        raise SpecError(
            "--resume goes on with the table as it was; leave --set, --seed and --spec out, or start a new one"
        )
    with folder_of(options, CHOSEN, "table") as (out, began):
        if not began and asked is not None:
            write_text(out / EXPERIMENT, dump_yaml(asked))
            write_text(out / CHOSEN, json.dumps(chosen))
        spec = load_experiment(out / EXPERIMENT)
        refuse_another(spec, asked or spec, out / EXPERIMENT)
        check_fits(spec, options)
        known = columns(spec)
        before = read_checked(
            out / CHOSEN, lambda found: _is_chosen(found, known), "the rows and columns of a table", "start a new one"
        )
        routers = before["routers"] if options.only is None else _names(options.only, ROUTERS, "router")
        modules = before["modules"] if options.modules is None else _names(options.modules, known, "column")
        specs = {cell: cell_experiment(spec, cell) for cell in grid(spec)}
        yield spec, specs, _among(specs, routers, modules), out


def _is_chosen(value: Any, known: Sequence[str]) -> bool:
    return (
        isinstance(value, dict)
        and is_list_of(value.get("routers"), ROUTERS)
        and is_list_of(value.get("modules"), known)
    )


def _is_summary(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("seconds"), int | float) and type(value.get("jobs")) is int


def _among(cells: Iterable[Cell], routers: Sequence[str], modules: Sequence[str]) -> list[Cell]:
    return [cell for cell in cells if cell.router in routers and cell.column in modules]


def _names(given: str | None, known: Sequence[str], what: str) -> list[str]:
    names = list(known) if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise SpecError(f"unknown {what} {name!r}{did_you_mean(name, known, f'{what}s')}")
    return names


def _summary(specs: Mapping[Cell, ExperimentSpec], out: Path, data: TaskData) -> dict[str, Any]:
    """What stands in the folders of all runs that there are, in the order of the grid."""
    length = max(1, round(float(data.test.lengths.double().mean())))
    read: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for cell, spec in specs.items():
        folder = out / cell.name
        named = {"modules": cell.column, "router": cell.router, "seed": cell.seed}
        if (folder / SUMMARY).is_file():
            read.append(read_summary(folder, *NEEDED))
            runs.append(named | _result(spec, read[-1], length))
        elif (reason := failure(folder)) is not None:
            failed.append(named | {"error": reason})
    first = next(iter(specs))
    return {
        **({key: read[0][key] for key in ("task", "chance", "majority", "updates", "data")} if read else {}),
        # A table that was resumed later can have several.
        **{key: ", ".join(sorted({str(run.get(key)) for run in read})) for key in ("commit", "hardware", "date")},
        "test_samples": len(data.test),
        "length": length,
        "seeds": list(dict.fromkeys([first.seed, *(run["seed"] for run in runs)])),
        "runs": runs,
        "repeated": repeated(runs),
        "failed": failed,
    }


def _result(spec: ExperimentSpec, run: Mapping[str, Any], length: int) -> dict[str, Any]:
    rates = run["activation_rates"]
    return {
        "accuracy": run["test_accuracy"],
        "rates": rates,
        "operations_per_token": operation_count(spec.model, length, rates).per_token,
        "tokens_per_second": run["tokens_per_second"],
        "seconds": run["seconds"],
    }


if __name__ == "__main__":
    sys.exit(main())
