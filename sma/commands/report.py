"""The command `report`: figures and tables of a run, a study or a sweep again, from what its folder holds."""

from pathlib import Path
from typing import Any

from pydantic import Field

from sma.commands.extras import check_extra
from sma.errors import CheckpointError
from sma.recipes.io.folders import expand
from sma.recipes.io.option_parser import FolderOrURI
from sma.recipes.training.options import CallOptions

SWEEP = "sweep.yaml"


class ReportOptions(CallOptions):
    """Write the figures and tables of a run, of a comparison or another study, or of a sweep again, from what its
    folder holds. The model of a run is tested again; nothing is trained.
    """

    folder: FolderOrURI = Field(description="the folder of the run, the study or the sweep, or the URI of a sweep")


def report(options: ReportOptions) -> dict[str, Any]:
    """Write the figures and tables of a folder again; returns its summary.

    Raises:
        SmaError: an error message for the user.
    """
    folder = expand(Path(options.folder))
    if "://" in options.folder or (folder / SWEEP).is_file():
        options.refuse(["data", "accelerator", "progress"], "a sweep is reported from the records of its trials")
        check_extra(options.program, "tune")
        from sma.tune import __main__ as sweeps  # needs the extra

        return sweeps.report(sweeps.ReportOptions(folder=options.folder))
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {options.folder!r}; give the folder of a run, a study or a sweep")
    from sma.recipes.studies.report import report_folder  # --help need not wait for it

    return report_folder(folder, options)
