"""Recreation of the report of a run or a study."""

from pathlib import Path
from typing import Any

from sma.errors import CheckpointError, did_you_mean, parsing, quote
from sma.recipes.io.run_folder import EXPERIMENT, read_json
from sma.recipes.studies.comparison import SEVERAL, Comparison, report_tasks
from sma.recipes.studies.contract import Study
from sma.recipes.studies.folder import NEW, STUDY, read_study
from sma.recipes.studies.rates import Rates
from sma.recipes.studies.reach import Reach
from sma.recipes.studies.recall import Recall
from sma.recipes.studies.routed import Routed
from sma.recipes.studies.router_grid import RouterTable
from sma.recipes.studies.study import report_study
from sma.recipes.training.options import CallOptions

STUDIES: tuple[Study[Any, Any], ...] = (Comparison(), RouterTable(), Routed(), Recall(), Reach(), Rates())


def report_folder(folder: Path, options: CallOptions) -> dict[str, Any]:
    """Write the figures and tables of a run or a study again, from the files of its folder; returns its summary.

    Raises:
        SmaError: the folder holds neither or is damaged; the message is for the user.
    """
    study = None if (folder / SEVERAL).is_file() else _study_in(folder)
    if study is None and not (folder / SEVERAL).is_file():
        if not (folder / EXPERIMENT).is_file():
            raise CheckpointError(
                f"the folder {str(folder)!r} holds no run, no study and no sweep: {EXPERIMENT} is missing; "
                "give a folder of sma train, sma compare or sma sweep"
            )
        from sma.recipes.training import evaluation  # Lightning takes seconds to import, and a study needs no test

        return evaluation.report(folder, options)
    options.refuse(["accelerator"], "the report of a study needs no training and no test")
    return report_tasks(folder, options) if study is None else report_study(study, folder, options)


def _study_in(folder: Path) -> Study[Any, Any] | None:
    """The study of the folder; None if there is none."""
    path = folder / STUDY
    if (
        not path.is_file()
    ):  # possibly of an earlier version, in which two studies share a file name: take the one that fits
        older = [study for study in STUDIES if (folder / study.older).is_file()]
        return next((study for study in older[:-1] if _fits(study, folder)), older[-1] if older else None)
    with parsing(repr(str(path)), CheckpointError, NEW):
        name = read_json(path, NEW)["study"]
    known = {study.name: study for study in STUDIES}
    if name not in known:
        raise CheckpointError(
            f"{str(path)!r} belongs to an unknown study {quote(name)}{did_you_mean(str(name), known, 'studies')}"
        )
    return known[name]


def _fits(study: Study[Any, Any], folder: Path) -> bool:
    try:
        read_study(study, folder)
    except CheckpointError:
        return False
    return True
