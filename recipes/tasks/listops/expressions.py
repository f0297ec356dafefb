r"""ListOps, the reasoning task of the Long Range Arena: nested MIN, MAX, MED and SM (sum modulo 10) of digits.

The files are `basic_{train,val,test}.tsv`, generated or released: a header, then one expression and its value per line.
An expression is a nested binary application, `( ( ( [MAX 2 ) 9 ) ] )\t9`. Its parentheses are redundant, and are
skipped. The value is the class.

Reference:
    Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", arXiv 1804.06028.
    Tay et al., "Long Range Arena", arXiv 2011.04006.
"""

import codecs
import statistics
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sma.errors import DataError, did_you_mean, quote
from sma.memory import check_memory
from sma.recipes.io.generated import HashedFile, cached_files, digest_of
from sma.recipes.io.lines import lines_of
from sma.recipes.io.progress import Counter
from sma.recipes.tasks.contract import TaskData
from sma.recipes.tasks.documents import DocumentDataset
from sma.recipes.tasks.listops.trees import (
    GENERATOR_VERSION,
    OPERATORS,
    PAPER,
    TINY,
    ListOpsSettings,
    generate_lines,
)

__all__ = [
    "FILES",
    "NUM_CLASSES",
    "PAPER",
    "TINY",
    "VOCABULARY",
    "ListOpsDataset",
    "ListOpsSettings",
    "decode",
    "encode",
    "evaluate_expression",
    "load_listops",
    "prepare_listops",
    "read_listops",
]

VOCABULARY = ("<pad>", *OPERATORS, "]", *"0123456789")
"""Symbols of the token ids; 0 is padding."""

NUM_CLASSES = 10

FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
"""File names of the splits in the Long Range Arena."""

LONGEST_LINE = 1 << 24
"""Maximum bytes of a line, more than those of the longest expression that can be generated."""

_HEADER = b"Source\tTarget"
_IDS = {symbol: number for number, symbol in enumerate(VOCABULARY) if number}
_TARGETS = {str(digit).encode(): digit for digit in range(NUM_CLASSES)}
# The parser replaces every operator by a letter that no symbol contains, so that a symbol is one byte.
_LETTERS = {operator.encode(): bytes([letter]) for operator, letter in zip(OPERATORS, b"abcd", strict=True)}
_NO_SYMBOL = 255
_ID_OF_BYTE = {_LETTERS.get(symbol.encode(), symbol.encode())[0]: number for symbol, number in _IDS.items()}
_TO_IDS = bytes(_ID_OF_BYTE.get(byte, _NO_SYMBOL) for byte in range(256))
_CHARACTERS = "".join(["() ", *_IDS]).encode()
_EMPTY_LISTS = [bytes([_IDS[operator], _IDS["]"]]) for operator in OPERATORS]
_FUNCTIONS: dict[str, Callable[[list[int]], float]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": statistics.median,
    "[SM": lambda values: sum(values) % 10,
}
_STEPS = np.array([{"[": 1, "]": -1}.get(symbol[0], 0) for symbol in VOCABULARY], dtype=np.int64)


class ListOpsDataset(DocumentDataset):
    """Expressions as `(ids, target)`: int64 ids of shape `(L,)` without parentheses, and the value 0 to 9.

    `content` has one byte per token, its id.
    """

    first_id: ClassVar[int] = 0


def prepare_listops(
    settings: ListOpsSettings,
    folder: str | Path,
    *,
    workers: int | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> TaskData:
    """Return the data of the settings, after generating it in `folder` if it is not there; see `cached_files`.

    The files depend on the settings only, not on the number of processes.

    Args:
        settings: such as `PAPER` or `TINY`.
        folder: a folder for this data alone; created if missing.
        workers: number of processes that generate; None: one per core that this process may use.
        progress: whether to show a progress bar; or a function that is called with the number of expressions so far
            and in all.

    Raises:
        DataError: the folder holds other data or a changed file, has too little space, or cannot be written; there is
            too little memory; or there are too few different trees.
        SpecError: `workers` is below 1.
    """
    recipe = {"generator": "listops", "version": GENERATOR_VERSION, "settings": settings.model_dump(mode="json")}

    def write(files: Mapping[str, HashedFile]) -> None:
        outputs = [files[name] for name in FILES.values()]
        for output in outputs:
            output.write(_HEADER + b"\n")
        with Counter("ListOps", settings.total, shown=progress is True) as counter:
            on_progress = progress if callable(progress) else lambda found, total: counter.update(found)
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


def load_listops(folder: str | Path) -> TaskData:
    """Return the data of a folder with the three files, released or generated.

    Raises:
        DataError: a file is missing or broken.
    """
    return _load(Path(folder), {name: digest_of(Path(folder) / name) for name in FILES.values()})


def read_listops(path: str | Path) -> ListOpsDataset:
    """Read one of the files. Targets are read, not recomputed.

    Raises:
        DataError: the file cannot be read, is empty, or has a broken line; the message has the line.
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
    return ListOpsDataset(np.frombuffer(ids, dtype=np.uint8), torch.tensor(offsets), torch.tensor(targets))


def encode(source: str) -> Int64[Tensor, " L"]:
    """Return the token ids of one expression, with or without parentheses.

    Raises:
        DataError: the source has an unknown symbol, or is not one complete expression.
    """
    return torch.tensor(list(_check_expression(source, "expression")))


def evaluate_expression(tokens: Sequence[str]) -> int:
    """Return the value of one expression; parentheses are skipped.

    Raises:
        DataError: the tokens are not one complete expression.
    """
    operators, values = list[str](), [list[int]()]
    for symbol in (VOCABULARY[number] for number in _check_expression(" ".join(tokens), "expression")):
        if symbol in _FUNCTIONS:
            operators.append(symbol)
            values.append([])
        elif symbol == "]":
            value = _FUNCTIONS[operators.pop()](values.pop())
            values[-1].append(int(value))
        else:
            values[-1].append(int(symbol))
    return values[0][0]


def decode(ids: Iterable[int] | Tensor) -> str:
    """Return the expression of token ids, as symbols separated by blanks, without parentheses; padding is skipped.

    Raises:
        DataError: a number is not a token id.
    """
    numbers = [int(number) for number in ids]
    for number in numbers:
        if not 0 <= number < len(VOCABULARY):
            raise DataError(f"token id {number} is not in the vocabulary; ids are 0 to {len(VOCABULARY) - 1}")
    return " ".join(VOCABULARY[number] for number in numbers if number)


def _load(folder: Path, hashes: Mapping[str, str]) -> TaskData:
    splits = [read_listops(folder / name) for name in FILES.values()]
    return TaskData.of(splits, lambda ids: decode(ids).split(), hashes=hashes, group=_outermost)


def _outermost(symbols: Sequence[str]) -> str:
    """The outermost operator of an expression, such as `outermost MAX`."""
    return f"outermost {symbols[0][1:]}" if symbols[0] in OPERATORS else "single digit"


def _check_header(line: bytes, path: str | Path) -> None:
    if not line:
        raise DataError(f"{path} is empty; the header 'Source<TAB>Target' and one line per expression are required")
    if line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n") != _HEADER:
        raise DataError(f"{path}, line 1: {quote(line[:100], 50)} where the header 'Source<TAB>Target' is required")


def _parse(source: bytes) -> bytes | None:
    """Return the token ids of a correct expression with single blanks, by vectorised operations; None for other
    sources.
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
    """Return the reason why the ids are not one complete expression; None if they are."""
    if not ids:
        return "the expression is empty; a digit or an operator is required"
    for pair in _EMPTY_LISTS:
        if pair in ids:
            return f"operator {VOCABULARY[pair[0]]!r} has no arguments; at least one is required"
    depths = _STEPS[np.frombuffer(ids, dtype=np.uint8)].cumsum()
    if depths.min() < 0:
        return (
            f"symbol {int((depths < 0).argmax()) + 1} is a ']' that closes no operator; "
            "every ']' needs an operator before it"
        )
    if depths[-1]:
        return f"{int(depths[-1])} operators are not closed; every operator needs its ']'"
    end = int((depths == 0).argmax()) + 1
    if end < len(ids):
        return f"the expression ends at symbol {end} of {len(ids)}; one expression per line is required"
    return None


def _parse_slowly(line: bytes, where: str) -> bytes:
    """Return the ids of a line that `_parse` refused only for its blanks, or raise an error with the reason."""
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
