"""IMDB: film reviews, negative or positive, as bytes: the text task of the Long Range Arena.

A data folder holds one of

| what | where |
|---|---|
| folder | `imdb/aclImdb/{train,test}/{neg,pos}/*.txt` |
| archive | `imdb/aclImdb_v1.tar.gz`, 84 MB, which is unpacked into `imdb/unpacked/` |

25,000 reviews to train on and 25,000 to test on, half of each positive. Nothing is cleaned: a line break is `<br />`,
as it is published.

Reference:
    Maas et al., "Learning Word Vectors for Sentiment Analysis", ACL 2011.
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Int64
from pydantic import Field, model_validator
from torch import Tensor

from sma.errors import DataError, parsing
from sma.files import open_file
from sma.model import ModelSpec
from sma.recipes.io.hub import from_hub
from sma.recipes.io.published import is_visible, published_folder
from sma.recipes.tasks.batch import collate
from sma.recipes.tasks.contract import ClassificationTask, TaskData
from sma.recipes.tasks.documents import DocumentDataset, check_vocabulary, show
from sma.recipes.tasks.python_text import python_documents
from sma.spec import Spec, register

log = logging.getLogger(__name__)

CLASSES = ("neg", "pos")
PYTHON_CLASSES = ("other", "internet")
URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
"""Of the archive."""

REVIEWS = 12_500
"""Of each class, to train on and to test on."""

HUB_NAME = "stanfordnlp/imdb"
_FOLDER, _ARCHIVE = "aclImdb", "aclImdb_v1.tar.gz"


class ImdbSettings(Spec):
    """Which reviews, and how they are split. The same settings and files give the same reviews in the same splits."""

    source: Literal["files", "hub", "python"] = Field(
        default="files",
        description="the published files in the data folder; or the Hub of Hugging Face through the package datasets, "
        "which keeps them in that folder too; or, for trying the pipeline, no reviews but passages of Python's "
        "standard library: is the module about the internet?",
    )
    download: bool = Field(
        default=False, description="get the published archive where the data folder does not hold it"
    )
    split: Literal["held_out", "lra"] = Field(
        default="held_out",
        description="validate on a share of the training reviews, or, as the Long Range Arena, on the test reviews: "
        "then the best checkpoint is chosen on what it is tested on, and the test accuracy is too good",
    )
    validation: float = Field(
        default=0.1,
        gt=0.0,
        lt=1.0,
        description="share of the training reviews of each class, or of Python's modules, that is held out",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the choice of the held-out reviews")
    length: int = Field(default=4000, ge=1, description="bytes that a review is cut to, or that a passage has")

    @model_validator(mode="after")
    def _has_the_split(self) -> Self:
        if self.source == "python" and self.split == "lra":
            raise ValueError("split='lra' is that of the reviews; source='python' has none: use split='held_out'")
        return self


class ImdbData(NamedTuple):
    """The three splits, the SHA-256 of each, and the names of the classes."""

    train: DocumentDataset
    validation: DocumentDataset
    test: DocumentDataset
    hashes: dict[str, str]
    class_names: tuple[str, ...] = CLASSES


def load_imdb(settings: ImdbSettings, folder: str | Path, *, progress: bool = True) -> ImdbData:
    """Return the reviews in three splits, negative ones first, each class in the order of its file names.

    Args:
        settings: source and split.
        folder: the data folder; see the head of this file.
        progress: show a bar while downloading.

    Raises:
        DataError: the reviews (or Python's sources) are not there; what was looked for, and where they come from. Or a
            file is empty or cannot be read; or a share so small that no review of some class is held out.
    """
    if settings.source == "python":
        made = python_documents(settings.length, settings.validation, settings.seed)
        return ImdbData(*made, {name: split.sha256 for name, split in made._asdict().items()}, PYTHON_CLASSES)
    if settings.source == "hub":
        found = from_hub(HUB_NAME, Path(folder), otherwise="files")
        with parsing(f"the data set {HUB_NAME} of the Hub", hint="set task.data.source=files"):
            everything, test = (_of_rows(found[split], settings.length) for split in ("train", "test"))
    else:
        root = _find(Path(folder), settings.download, progress)
        everything, test = (DocumentDataset.of(_read(root / split, settings.length)) for split in ("train", "test"))
    if settings.split == "lra":
        train, validation = everything, test
    else:
        held_out = _held_out(everything.targets, settings)
        train, validation = (everything.select(chosen.nonzero().flatten()) for chosen in (~held_out, held_out))
    hashes = {name: split.sha256 for name, split in (("train", train), ("validation", validation), ("test", test))}
    return ImdbData(train, validation, test, hashes)


def _find(folder: Path, download: bool, progress: bool) -> Path:
    home = folder / "imdb"
    unpacked = home / "unpacked"
    return published_folder(
        [home / _FOLDER, unpacked / _FOLDER],
        [home / _ARCHIVE],
        unpacked,
        url=URL,
        md5=MD5,
        archive_most=1 << 27,  # it has 84 MB, and the reviews 66 MB
        files_most=1 << 28,
        missing=f"there are no IMDB reviews in {home}: "
        f"neither {_FOLDER}/{{train,test}}/{{neg,pos}}/*.txt nor {_ARCHIVE}",
        members=_is_review,
        download=download,
        progress=progress,
    )


def _is_review(name: str) -> bool:
    parts = name.split("/")
    return (
        len(parts) == 4
        and parts[0] == _FOLDER
        and parts[1] in ("train", "test")
        and parts[2] in CLASSES
        and name.endswith(".txt")
    )


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
                        f"{folder / name / path} is empty; the archive was not unpacked well: get the reviews again"
                    )
                yield content, target
        except OSError as error:
            raise DataError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error


def _of_rows(rows: Iterable[Mapping[str, Any]], length: int) -> DocumentDataset:
    # In the order of the text, because that of the Hub is its own business.
    return DocumentDataset.of(
        (document, target)
        for target, document in sorted((int(row["label"]), row["text"].encode()[:length]) for row in rows)
    )


def _held_out(targets: Int64[Tensor, " N"], settings: ImdbSettings) -> Tensor:
    """`(N,)`: true at the reviews to validate on, the same share of each class."""
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
    """Film reviews, read byte by byte; the answer is whether the writer liked the film.

    Or passages of Python's modules; then it is whether the module is about the internet.
    """

    kind: Literal["text"] = "text"
    data: ImdbSettings = Field(
        default=ImdbSettings(), description="where the reviews come from, and how they are split"
    )

    @property
    def classes(self) -> int:
        return len(CLASSES)

    def check_model(self, model: ModelSpec) -> None:
        super().check_model(model)
        check_vocabulary(model)

    def prepare(self, folder: Path, *, progress: bool = True) -> TaskData:
        made = load_imdb(self.data, folder, progress=progress)
        return TaskData(made.train, made.validation, made.test, made.hashes, collate, show, made.class_names)
