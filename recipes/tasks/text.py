"""IMDB: film reviews as bytes, classified as negative or positive. The text task of the Long Range Arena.

The data folder has one of

| what | where |
|---|---|
| folder | `imdb/aclImdb/{train,test}/{neg,pos}/*.txt` |
| archive | `imdb/aclImdb_v1.tar.gz`, 84 MB, which is unpacked into `imdb/unpacked/` |

There are 25,000 training reviews and 25,000 test reviews, half of each positive. The published text is not cleaned: a
line break is `<br />`.

Reference:
    Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011.
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor

from sma.errors import DataError, parsing
from sma.files import open_file
from sma.model import ModelSpec
from sma.recipes.io.hub import from_hub
from sma.recipes.io.published import is_visible, published_folder
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.documents import DocumentDataset, check_vocabulary, show
from sma.recipes.tasks.python_text import python_documents
from sma.spec import Spec, register

log = logging.getLogger(__name__)

CLASSES = ("neg", "pos")
PYTHON_CLASSES = ("other", "internet")
URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
"""MD5 of the archive."""

REVIEWS = 12_500
"""Number of reviews of each class in the training set, and in the test set."""

HUB_NAME = "stanfordnlp/imdb"
_FOLDER, _ARCHIVE = "aclImdb", "aclImdb_v1.tar.gz"


class ImdbSettings(Spec):
    """The reviews and their splits, determined by the settings and the files."""

    source: Literal["files", "hub", "python"] = Field(
        default="files",
        description="files: the published files in the data folder; hub: the Hugging Face Hub, through the package "
        "datasets, which keeps them in that folder; python: for trials of the pipeline, passages of Python's standard "
        "library, classified by whether the module is about the internet",
    )
    download: bool = Field(default=False, description="download the published archive if it is not in the data folder")
    split: Literal["held_out", "lra"] = Field(
        default="held_out",
        description="held_out: validate on a fraction of the training reviews; lra: validate on the test reviews, as "
        "the Long Range Arena does, so that the best checkpoint is selected on them and the test accuracy is too high",
    )
    validation: float = Field(
        default=0.1,
        gt=0.0,
        lt=1.0,
        description="fraction of the training reviews of each class, or of Python's modules, that is held out",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of the selection of held-out reviews")
    length: int = Field(default=4000, ge=1, description="maximum bytes of a review, or bytes of a passage")

    @model_validator(mode="after")
    def _has_the_split(self) -> Self:
        if self.source == "python" and self.split == "lra":
            raise ValueError("split='lra' requires reviews; with source='python' use split='held_out'")
        return self


def load_imdb(settings: ImdbSettings, folder: str | Path, *, progress: bool = True) -> TaskData:
    """Return the reviews in three splits, negative ones first, each class in the order of its file names.

    Args:
        settings: source and split.
        folder: the data folder; see the top of this file.
        progress: whether to show a progress bar of the download.

    Raises:
        DataError: the reviews (or Python's sources) are not found; a file is empty or cannot be read; or the fraction
            is so small that no review of some class is held out.
    """
    if settings.source == "python":
        splits = python_documents(settings.length, settings.validation, settings.seed)
        return TaskData.of(splits, show, class_names=PYTHON_CLASSES)
    if settings.source == "hub":
        found = from_hub(HUB_NAME, Path(folder), otherwise="files")
        with parsing(f"the data set {HUB_NAME} of the Hub", hint="set task.data.source=files"):
            everything, test = (_of_rows(found[split], settings.length) for split in ("train", "test"))
    else:
        home = Path(folder) / "imdb"
        root = published_folder(
            [home / _FOLDER, home / "unpacked" / _FOLDER],
            [home / _ARCHIVE],
            home / "unpacked",
            url=URL,
            md5=MD5,
            archive_most=1 << 27,  # the archive has 84 MB, and the reviews have 66 MB
            files_most=1 << 28,
            missing=f"there are no IMDB reviews in {home}: "
            f"neither {_FOLDER}/{{train,test}}/{{neg,pos}}/*.txt nor {_ARCHIVE}",
            members=_is_review,
            download=settings.download,
            progress=progress,
        )
        everything, test = (DocumentDataset.of(_read(root / split, settings.length)) for split in ("train", "test"))
    if settings.split == "lra":
        train, validation = everything, test
    else:
        held_out = _held_out(everything.targets, settings)
        train, validation = (everything.select(chosen.nonzero().flatten()) for chosen in (~held_out, held_out))
    return TaskData.of((train, validation, test), show, class_names=CLASSES)


def _is_review(name: str) -> bool:
    return re.fullmatch(rf"{_FOLDER}/(train|test)/({'|'.join(CLASSES)})/[^/]*\.txt", name) is not None


def _read(folder: Path, length: int) -> Iterator[tuple[bytes, int]]:
    for target, name in enumerate(CLASSES):
        try:
            paths = sorted(
                entry.name
                for entry in os.scandir(folder / name)
                if entry.name.endswith(".txt") and is_visible(entry.name)
            )
            if not paths:
                raise DataError(f"{folder / name} holds no *.txt; the reviews of {URL} are required there")
            if len(paths) != REVIEWS:
                log.warning(
                    "%s holds %s reviews, %s are published; unless you mean to use others, get %s again",
                    folder / name,
                    f"{len(paths):,}",
                    f"{REVIEWS:,}",
                    URL,
                )
            for path in paths:
                with open_file(folder / name / path) as file:
                    content = file.read(min(length, os.fstat(file.fileno()).st_size))
                if not content:
                    raise DataError(
                        f"{folder / name / path} is empty; the archive was not fully unpacked: get the reviews again"
                    )
                yield content, target
        except OSError as error:
            raise DataError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error


def _of_rows(rows: Iterable[Mapping[str, Any]], length: int) -> DocumentDataset:
    # In the order of the text, because the order of the Hub may change.
    return DocumentDataset.of(
        (document, target)
        for target, document in sorted((int(row["label"]), row["text"].encode()[:length]) for row in rows)
    )


def _held_out(targets: Int64[Tensor, " N"], settings: ImdbSettings) -> Tensor:
    """Mask of the validation reviews, `(N,)`, with the same fraction of each class."""
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for target, name in enumerate(CLASSES):
        mine = (targets == target).nonzero().flatten()
        count = round(settings.validation * len(mine))
        if not 0 < count < len(mine):
            raise DataError(
                f"validation={settings.validation} holds out {count} of {len(mine)} {name} reviews; "
                "at least one is required on each side"
            )
        chosen[mine[torch.randperm(len(mine), generator=generator)[:count]]] = True
    return chosen


@register
class TextTask(ClassificationTask):
    """Film reviews, read byte by byte; the class is whether the review is positive.

    With `source=python`, passages of Python's modules; the class is whether the module is about the internet.
    """

    kind: Literal["text"] = "text"
    data: ImdbSettings = Field(default=ImdbSettings(), description="source of the reviews, and their splits")

    @property
    def classes(self) -> int:
        return len(CLASSES)

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_vocabulary(model)

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        return load_imdb(self.data, folder, progress=progress)
