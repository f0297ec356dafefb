"""The task ListOps."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.recipes.tasks.batch import collate
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.listops.expressions import (
    FILES,
    ListOpsData,
    ListOpsSettings,
    decode,
    load_listops,
    prepare_listops,
)
from sma.recipes.tasks.lra import release_folder
from sma.spec import register


@register
class ListOpsTask(ClassificationTask):
    """Nested MIN, MAX, MED and SM (sum modulo 10) of digits; the answer is a digit."""

    kind: Literal["listops"] = "listops"
    data: ListOpsSettings = Field(default=ListOpsSettings(), description="which expressions to generate")
    source: Literal["generated", "released"] = Field(
        default="generated",
        description="generate the expressions of `data`, or read the Long Range Arena's "
        "listops-1000/basic_{train,val,test}.tsv in the data folder, whatever `data` says",
    )
    download: bool = Field(
        default=False,
        description="with source=released: get the release, 7.7 GB, where the data folder does not hold it",
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
        data = self.data
        return (
            (data.train + data.validation + data.test) * (self.least_length + 16) if self.source == "generated" else 0
        )

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        if self.source == "released":
            files = list(FILES.values())
            made = load_listops(
                release_folder(
                    folder, "listops-1000", files, download=self.download, progress=progress, option="task.download"
                )
            )
        else:
            made = self._generated(folder, progress)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, lambda ids: decode(ids).split())

    def _generated(self, folder: Path, progress: bool) -> ListOpsData:
        fingerprint = hashlib.sha256(self.data.model_dump_json().encode()).hexdigest()[:12]
        return prepare_listops(self.data, folder / f"listops-{fingerprint}", progress=progress)
