"""The task ListOps."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.listops.expressions import (
    FILES,
    ListOpsSettings,
    load_listops,
    prepare_listops,
)
from sma.recipes.tasks.lra import release_folder
from sma.spec import register


@register
class ListOpsTask(ClassificationTask):
    """Nested MIN, MAX, MED and SM (sum modulo 10) of digits; the class is the value, a digit."""

    kind: Literal["listops"] = "listops"
    data: ListOpsSettings = Field(default=ListOpsSettings(), description="settings of the generated expressions")
    source: Literal["generated", "released"] = Field(
        default="generated",
        description="generated: generate the expressions of `data`; released: read the Long Range Arena's "
        "listops-1000/basic_{train,val,test}.tsv in the data folder, and ignore `data`",
    )
    download: bool = Field(
        default=False,
        description="with source=released: download the release, 7.7 GB, if it is not in the data folder",
    )

    @property
    def classes(self) -> int:
        return 10

    @property
    def training_samples(self) -> int | None:
        return self.data.train if self.source == "generated" else None

    @property
    def least_length(self) -> int:
        return self.data.min_length + 1 if self.source == "generated" else 1

    @property
    def least_memory(self) -> int:
        # A byte per token, and an offset and a target of 8 bytes per expression.
        return self.data.total * (self.least_length + 16) if self.source == "generated" else 0

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        if self.source == "released":
            names = list(FILES.values())
            return load_listops(
                release_folder(
                    folder, "listops-1000", names, download=self.download, progress=progress, option="task.download"
                )
            )
        fingerprint = hashlib.sha256(self.data.model_dump_json().encode()).hexdigest()[:12]
        return prepare_listops(self.data, folder / f"listops-{fingerprint}", progress=progress)
