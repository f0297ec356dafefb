"""AAN: pairs of papers as bytes, classified by whether one cites the other. The retrieval task of the Long Range Arena.

The files are those of the release, `tsv_data/new_aan_pairs.{train,eval,test}.tsv`, without header and quoting. They
have five columns separated by tabs: label (0.0 or 1.0), names of both papers, texts of both papers; 147,086 / 18,090 /
17,437 pairs, 1.5 GB. A file is read once for its hash and the spans of its texts. Later only the texts of the current
batch are loaded into memory.

Reference:
    Radev et al., "The ACL Anthology Network Corpus", Language Resources and Evaluation 47, 2013.
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

import codecs
import hashlib
from array import array
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from sma import pairs  # noqa: F401 registers the kind of model that reads pairs
from sma.errors import DataError, quote
from sma.model import ModelSpec
from sma.recipes.io.lines import lines_of
from sma.recipes.io.mapped import map_file
from sma.recipes.tasks.batch import collate_pairs
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.documents import PairDataset, check_vocabulary, show
from sma.recipes.tasks.lra import release_folder
from sma.recipes.tasks.python_text import python_pairs
from sma.spec import Spec, register

CLASSES = ("unrelated", "cited")
PYTHON_CLASSES = ("elsewhere", "continued")
FOLDER = "tsv_data"
FILES = {"train": "new_aan_pairs.train.tsv", "validation": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
"""File names of the splits in the release."""

_LABELS = {b"0.0": 0, b"1.0": 1, b"0": 0, b"1": 1}
_COLUMNS = 5
_REQUIRED = "5 are required: label, name and name, text and text"


class AANSettings(Spec):
    """The pairs and their splits, determined by the settings and the files."""

    source: Literal["release", "python"] = Field(
        default="release",
        description="release: that of the Long Range Arena; python: for trials of the pipeline, passages of Python's "
        "standard library, classified by whether the second continues the first or is of another module",
    )
    download: bool = Field(
        default=False,
        description="download the release of the Long Range Arena, 7.7 GB, if it is not in the data folder",
    )
    length: int = Field(default=4000, ge=1, description="maximum bytes of a document, or bytes of a passage")
    validation: float = Field(
        default=0.1, gt=0.0, lt=1.0, description="with source=python: share of the modules that is held out"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="with source=python: seed of the splits and the pairs")


def load_aan(settings: AANSettings, folder: str | Path, *, progress: bool = True) -> TaskData:
    """Return the pairs of the release in the data folder `folder`, or those of Python's modules.

    See `sma.recipes.tasks.lra` for the folders that are searched for the release.

    Raises:
        DataError: a file is missing or broken, or Python's sources are missing; the message has the file and the line.
    """
    if settings.source == "python":
        pairs = python_pairs(settings.length, settings.validation, settings.seed).values()
        return TaskData.of(pairs, show, collate=collate_pairs, class_names=PYTHON_CLASSES)
    found = release_folder(folder, FOLDER, list(FILES.values()), download=settings.download, progress=progress)
    splits, hashes = zip(*(read_pairs(found / name, settings.length) for name in FILES.values()), strict=True)
    names = dict(zip(FILES.values(), hashes, strict=True))
    return TaskData.of(splits, show, hashes=names, collate=collate_pairs, class_names=CLASSES)


def read_pairs(path: str | Path, length: int) -> tuple[PairDataset, str]:
    """Read the spans of the texts of a file, each cut to `length` bytes; also returns the SHA-256 of the file.

    Raises:
        DataError: the file cannot be read, is empty, or has a broken line; the message has the line.
    """
    path = Path(path)
    total, spans, targets, start = hashlib.sha256(), array("q"), array("b"), 0
    for number, line in lines_of(path):
        total.update(line)
        line_start, start = start, start + len(line)
        if not line.strip(b" \r\n"):
            continue
        if (tabs := line.count(b"\t")) != _COLUMNS - 1:
            raise DataError(f"{path}, line {number}: columns separated by tabs: {tabs + 1}; {_REQUIRED}")
        columns = line.rstrip(b"\r\n").split(b"\t")
        label = _LABELS.get(columns[0].removeprefix(codecs.BOM_UTF8) if number == 1 else columns[0])
        if label is None:
            raise DataError(f"{path}, line {number}: label {quote(columns[0][:100], 50)} is neither 0.0 nor 1.0")
        targets.append(label)
        first = line_start + sum(map(len, columns[:3])) + 3
        second = first + len(columns[3]) + 1
        spans.extend((first, first + min(len(columns[3]), length), second, second + min(len(columns[4]), length)))
    if not targets:
        raise DataError(f"{path} is empty; at least one pair is required")
    content = map_file(path, "u1", (start,))
    return PairDataset(
        content, torch.tensor(spans, dtype=torch.int64).view(-1, 4), torch.tensor(targets, dtype=torch.int64)
    ), total.hexdigest()


@register
class RetrievalTask(ClassificationTask):
    """Two papers, each read byte by byte by the same encoder; the answer is whether one cites the other.

    With `source=python`, two passages of Python's modules; the answer is whether the second continues the first.
    """

    kind: Literal["retrieval"] = "retrieval"
    data: AANSettings = Field(default=AANSettings(), description="source of the pairs, and their splits")

    rows_per_sample: ClassVar[int] = 2

    @property
    def classes(self) -> int:
        return len(CLASSES)

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_vocabulary(model)

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        return load_aan(self.data, folder, progress=progress)
