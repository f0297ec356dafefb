"""The task ListOps."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from sma.recipes.data.batch import collate
from sma.recipes.data.listops import ListOpsSettings, decode, prepare_listops
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.spec import register


@register
class ListOpsTask(ClassificationTask):
    """Nested MIN, MAX, MED and SM (sum modulo 10) of digits; the answer is a digit."""

    kind: Literal["listops"] = "listops"
    data: ListOpsSettings = Field(default=ListOpsSettings(), description="which expressions to generate")

    @property
    def classes(self) -> int:
        return 10

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        fingerprint = hashlib.sha256(self.data.model_dump_json().encode()).hexdigest()[:12]
        made = prepare_listops(self.data, folder / f"listops-{fingerprint}", progress=progress)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, lambda ids: decode(ids).split())
