"""The command `report`: recreates the figures and tables of a run, a study or a sweep from its folder."""

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
    """Recreate the figures and tables of a run, a comparison, another study or a sweep from the files of its folder.
    The model of a run is tested again; nothing is trained.
    """

    folder: FolderOrURI = Field(description="the folder of the run, the study or the sweep, or the URI of a sweep")


def report(options: ReportOptions) -> dict[str, Any]:
    """Write the figures and tables of a folder again; returns its summary.

    Raises:
        SmaError: the report cannot be written; the message is for the user.
    """
    folder = expand(Path(options.folder))
    if "://" in options.folder or (folder / SWEEP).is_file():
        options.refuse(["data", "accelerator", "progress"], "the report of a sweep uses the records of its trials only")
        check_extra(options.program, "tune")
        from sma.tune import __main__ as sweeps  # needs the extra

        return sweeps.report(sweeps.ReportOptions(folder=options.folder))
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {options.folder!r}; give the folder of a run, a study or a sweep")
    from sma.recipes.studies.report import report_folder  # not needed for --help

    return report_folder(folder, options)
