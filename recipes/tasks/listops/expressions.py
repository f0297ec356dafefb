r"""ListOps, the reasoning task of Long Range Arena: nested MIN, MAX, MED and SM (sum modulo 10) over digits; the value
is the class.

Files are Long Range Arena's: `basic_{train,val,test}.tsv`, a header, and one expression per line as a nested binary
application, `( ( ( [MAX 2 ) 9 ) ] )\t9`. Parentheses say nothing that the brackets do not say, and are dropped.
Generated and released files are read alike.

Reference:
    Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", arXiv 1804.06028.
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

import codecs
from array import array
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import DataError, did_you_mean, quote
from sma.memory import check_memory
from sma.recipes.io.generated import HashedFile, cached_files, sha256_of
from sma.recipes.io.lines import lines_of
from sma.recipes.tasks.listops.trees import (
    GENERATOR_VERSION,
    OPERATORS,
    PAPER,
    TINY,
    ListOpsSettings,
    evaluate_expression,
    generate_lines,
)

__all__ = [
    "FILES",
    "NUM_CLASSES",
    "PAPER",
    "TINY",
    "VOCABULARY",
    "ListOpsData",
    "ListOpsDataset",
    "ListOpsSettings",
    "ListOpsSplit",
    "decode",
    "encode",
    "evaluate_expression",
    "load_listops",
    "prepare_listops",
    "read_listops",
]

VOCABULARY = ("<pad>", *OPERATORS, "]", *"0123456789")
"""The symbol of every token id; 0 is padding."""

NUM_CLASSES = 10

FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
"""Long Range Arena's file of every split."""

LONGEST_LINE = 1 << 24
"""Bytes of a line at most: more than the longest expression takes that can be generated."""

_HEADER = b"Source\tTarget"
_IDS = {symbol: number for number, symbol in enumerate(VOCABULARY) if number}
_TARGETS = {str(digit).encode(): digit for digit in range(NUM_CLASSES)}
# While a line is parsed, letters that no symbol contains stand for the operators: one byte per symbol.
_LETTERS = {operator.encode(): bytes([letter]) for operator, letter in zip(OPERATORS, b"abcd", strict=True)}
_NO_SYMBOL = 255
_TO_IDS = bytearray([_NO_SYMBOL]) * 256
for _symbol, _id in _IDS.items():
    _TO_IDS[_LETTERS.get(_symbol.encode(), _symbol.encode())[0]] = _id
_CHARACTERS = "".join(["() ", *_IDS]).encode()
_EMPTY_LISTS = [bytes([_IDS[operator], _IDS["]"]]) for operator in OPERATORS]
_STEPS = np.array([{"[": 1, "]": -1}.get(symbol[0], 0) for symbol in VOCABULARY], dtype=np.int64)


@dataclass(frozen=True)
class ListOpsSplit:
    """All expressions of one file, one after another.

    Shape:
        ids `(T,)`, one byte per token; offsets `(N+1,)`: expression i is `ids[offsets[i]:offsets[i + 1]]`; targets
            `(N,)`.
    """

    ids: UInt8[Tensor, " T"]
    offsets: Int64[Tensor, " N_plus_1"]
    targets: Int64[Tensor, " N"]


class ListOpsDataset(Dataset[tuple[Tensor, int]]):
    """Expressions as `(ids, target)`: int64 ids of shape `(L,)`, parentheses dropped, and the value 0 to 9.

    Args:
        split: what `read_listops` returns.
    """

    def __init__(self, split: ListOpsSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = range(len(self))[index]
        first, last = self.split.offsets[number : number + 2].tolist()
        return self.split.ids[first:last].long(), int(self.split.targets[number])

    @property
    def lengths(self) -> Int64[Tensor, " N"]:
        """Tokens of every expression, for batches of similar lengths."""
        return self.split.offsets.diff()


class ListOpsData(NamedTuple):
    """The three splits, and the SHA-256 of every file they were read from, by name."""

    train: ListOpsDataset
    validation: ListOpsDataset
    test: ListOpsDataset
    hashes: dict[str, str]


def prepare_listops(
    settings: ListOpsSettings,
    folder: str | Path,
    *,
    workers: int | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> ListOpsData:
    """Return the data of `settings`, generated into `folder` unless it is there already.

    The files depend on the settings alone, not on the number of processes. They appear in `folder` when all of them are
    whole.

    Args:
        settings: `PAPER`, `TINY` or your own.
        folder: a folder for this data alone; made if missing.
        workers: processes that generate; None: one per core that this process may use.
        progress: whether to show a bar while generating; or a function to call with the numbers of expressions found
            and wanted.

    Raises:
        DataError: the folder holds other data or a changed file, has no room for the files, or cannot be written; the
            memory has no room for the expressions; or there are too few different trees.
        SpecError: `workers` is below 1.
    """
    recipe = {"generator": "listops", "version": GENERATOR_VERSION, "settings": settings.model_dump(mode="json")}

    def write(files: Mapping[str, HashedFile]) -> None:
        outputs = [files[name] for name in FILES.values()]
        for output in outputs:
            output.write(_HEADER + b"\n")
        columns = (TextColumn("ListOps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, auto_refresh=False, disable=progress is not True) as bar:
            on_progress = progress if callable(progress) else _refreshing(bar, settings.total)
            with closing(generate_lines(settings, workers=workers, on_progress=on_progress)) as lines:
                for split, line in lines:
                    outputs[split].write(line)

    what = f"a data set of {settings.total:,} expressions"
    check_memory(
        settings.total * settings.memory_each,
        what,
        error=DataError,
        hint="lower train, validation, test or min_length of task.data",
    )
    needed = settings.total * settings.bytes_each
    hashes = cached_files(Path(folder), recipe, list(FILES.values()), write, needed=needed, what=what)
    return _load(Path(folder), hashes)


def load_listops(folder: str | Path) -> ListOpsData:
    """Return the data of a folder with Long Range Arena's three files, released or generated.

    Raises:
        DataError: a file is missing or broken.
    """
    return _load(Path(folder), {name: sha256_of(Path(folder) / name) for name in FILES.values()})


def read_listops(path: str | Path) -> ListOpsSplit:
    """Read one of Long Range Arena's files. Targets are taken as they stand, not recomputed.

    Raises:
        DataError: the file cannot be read, is empty, or has a broken line; names the line.
    """
    ids, offsets, targets = bytearray(), array("q", [0]), array("q")
    lines = lines_of(path, LONGEST_LINE)
    _check_header(next(lines, (1, b""))[1], path)
    for number, line in lines:
        if not line.strip(b" \r\n"):
            continue
        source, _, target = line.rstrip(b"\r\n").partition(b"\t")
        found = _parse(source)
        if found is None or target not in _TARGETS:
            found = _parse_slowly(line, f"{path}, line {number}")
        ids += found
        offsets.append(len(ids))
        targets.append(_TARGETS[target])
    if not targets:
        raise DataError(f"{path} holds a header and no expressions; at least one line is required")
    return ListOpsSplit(torch.frombuffer(ids, dtype=torch.uint8), torch.tensor(offsets), torch.tensor(targets))


def encode(source: str) -> Int64[Tensor, " L"]:
    """Return the token ids of one expression, with or without parentheses.

    Raises:
        DataError: it has an unknown symbol, or is not one whole expression.
    """
    return torch.tensor(list(_check_expression(source, "expression")))


def decode(ids: Iterable[int] | Tensor) -> str:
    """Return the expression of some token ids, symbols with blanks between and no parentheses; padding is skipped.

    Raises:
        DataError: a number is no token id.
    """
    numbers = [int(number) for number in ids]
    for number in numbers:
        if not 0 <= number < len(VOCABULARY):
            raise DataError(f"token id {number} is not in the vocabulary; ids are 0 to {len(VOCABULARY) - 1}")
    return " ".join(VOCABULARY[number] for number in numbers if number)


def _load(folder: Path, hashes: dict[str, str]) -> ListOpsData:
    train, validation, test = (ListOpsDataset(read_listops(folder / name)) for name in FILES.values())
    return ListOpsData(train, validation, test, hashes)


def _refreshing(bar: Progress, total: int) -> Callable[[int, int], None]:
    """Return a callback that redraws `bar` at every percent: no thread of the bar's own is alive when processes are
    forked.
    """
    task = bar.add_task("ListOps", total=total)
    shown = -1

    def on_progress(found: int, wanted: int) -> None:
        nonlocal shown
        percent = 100 * found // wanted
        bar.update(task, completed=found, refresh=percent > shown)
        shown = percent

    return on_progress


def _check_header(line: bytes, path: str | Path) -> None:
    if not line:
        raise DataError(f"{path} is empty; the header 'Source<TAB>Target' and one line per expression are required")
    if line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n") != _HEADER:
        raise DataError(f"{path}, line 1: {quote(line[:100], 50)} where the header 'Source<TAB>Target' is required")


def _parse(source: bytes) -> bytes | None:
    """Return the token ids of a correct expression with single blanks, by whole-line operations; None for anything
    else.
    """
    if source.translate(None, _CHARACTERS):
        return None
    for operator, letter in _LETTERS.items():
        source = source.replace(operator, letter)
    if source[1::2].strip(b" "):
        return None
    ids = source[::2].translate(_TO_IDS, b"()")
    return None if _NO_SYMBOL in ids or _flaw(ids) else ids


def _flaw(ids: bytes) -> str | None:
    """Return what keeps the ids from being one whole expression."""
    if not ids:
        return "the expression is empty; a digit or an operator is required"
    for pair in _EMPTY_LISTS:
        if pair in ids:
            return f"operator {VOCABULARY[pair[0]]!r} has no arguments; at least one is required"
    depths = _STEPS[np.frombuffer(ids, dtype=np.uint8)].cumsum()
    if depths.min() < 0:
        return (
            f"symbol {int((depths < 0).argmax()) + 1} is a ']' that closes nothing; "
            "every ']' needs an operator before it"
        )
    if depths[-1]:
        return f"{int(depths[-1])} operators are not closed; every operator needs its ']'"
    end = int((depths == 0).argmax()) + 1
    if end < len(ids):
        return f"the expression ends at symbol {end} of {len(ids)}; one expression per line is required"
    return None


def _parse_slowly(line: bytes, where: str) -> bytes:
    """Parse a line that the fast way refused: raise what is wrong with it, or return its ids if only its blanks are
    unusual.
    """
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8; the file is damaged"
        ) from error
    columns = text.split("\t")
    if len(columns) != 2:
        raise DataError(
            f"{where}: columns separated by tabs: {len(columns)}; exactly 2 are required, the expression and its value"
        )
    ids = _check_expression(columns[0], where)
    if columns[1].encode() not in _TARGETS:
        raise DataError(f"{where}: target {quote(columns[1], 50)} is not a digit 0 to 9")
    return ids


def _check_expression(source: str, where: str) -> bytes:
    symbols = [symbol for symbol in source.split() if symbol not in ("(", ")")]
    for number, symbol in enumerate(symbols, start=1):
        if symbol not in _IDS:
            near = did_you_mean(symbol[:100], _IDS) or ";"
            raise DataError(
                f"{where}: symbol {number} is {quote(symbol, 50)}, "
                f"which is unknown{near} known symbols: {' '.join(_IDS)}"
            )
    ids = bytes(_IDS[symbol] for symbol in symbols)
    if flaw := _flaw(ids):
        raise DataError(f"{where}: {flaw}")
    return ids
