"""Passages of Python's standard library: small real text without a download, for trials of tasks on documents.

A document is the unchanged source of a module. The splits have different modules, so no tested module was trained on.
The text differs between versions of Python: compare results by its SHA-256.

The passages replace reviews and papers only for trials of the pipeline. Accuracies on them are not comparable.
"""

import platform
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch

from sma.errors import DataError
from sma.recipes.tasks.documents import DocumentDataset, PairDataset

TEST = 0.2
"""Fraction of the modules in the test split."""

LIMITS = {"train": 20_000, "validation": 1_000, "test": 2_000}
"""Maximum number of samples of a split."""

# fmt: off
INTERNET = frozenset({
    "asynchat", "asyncio", "asyncore", "base64", "binhex", "cgi", "cgitb", "email", "ftplib", "html", "http",
    "imaplib", "ipaddress", "json", "mailbox", "mailcap", "mimetypes", "netrc", "nntplib", "poplib", "quopri",
    "selectors", "smtpd", "smtplib", "socket", "socketserver", "ssl", "telnetlib", "urllib", "uu", "uuid",
    "webbrowser", "wsgiref", "xml", "xmlrpc"
})
# fmt: on
"""Modules and packages of the library reference's chapters on networking, internet data, markup and internet
protocols.
"""

# Modules without prose, such as tables, and modules that some installations lack.
_LEFT_OUT = frozenset(
    {
        "antigravity",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "this",
        "tkinter",
        "turtle",
        "turtledemo",
    }
)


def python_modules() -> dict[str, bytes]:
    """Return the sources of the standard library's modules by their paths, such as `json/decoder.py`, sorted.

    Raises:
        DataError: the installation of Python lacks them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for name in sys.stdlib_module_names - _LEFT_OUT:
        paths += [root / f"{name}.py"] if (root / f"{name}.py").is_file() else sorted((root / name).rglob("*.py"))
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    try:
        found = {name: (root / name).read_bytes() for name in names if not {"test", "tests"} & set(name.split("/"))}
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror or error}; use the published data") from error
    if not found:
        raise DataError(
            f"Python {platform.python_version()} came without the sources of its standard library (looked for *.py in "
            f"{root}); install them, or use the published data"
        )
    return found


def deal_modules(names: Iterable[str], validation: float, seed: int) -> dict[str, list[str]]:
    """Assign modules to the three splits.

    Args:
        names: names of the modules.
        validation: fraction of the validation split in the modules outside the test split, which has a fraction `TEST`.
        seed: seed of the assignment.

    Raises:
        DataError: a split would have no module.
    """
    names = sorted(names)
    generator = torch.Generator().manual_seed(seed)
    order = [names[number] for number in torch.randperm(len(names), generator=generator).tolist()]
    test = round(TEST * len(order))
    held_out = round(validation * (len(order) - test))
    parts = {"train": order[test + held_out :], "validation": order[test : test + held_out], "test": order[:test]}
    for split, part in parts.items():
        if not part:
            raise DataError(f"validation={validation} leaves none of the {len(order)} modules for the split {split!r}")
    return parts


def python_documents(
    length: int, validation: float, seed: int, modules: Mapping[str, bytes] | None = None
) -> list[DocumentDataset]:
    """Cut modules into passages with class 1 for modules of `INTERNET`; returns the three splits.

    Every split has equally many passages of both classes.

    Args:
        length: bytes of every passage.
        validation: see `deal_modules`.
        seed: seed of the splits, and of the choice if there are more than `LIMITS` passages.
        modules: sources by their paths; None: `python_modules()`.

    Raises:
        DataError: a split would have no passage of some class.
    """
    modules = python_modules() if modules is None else modules
    splits = []
    for split, names in deal_modules(modules, validation, seed).items():
        generator = torch.Generator().manual_seed(seed)
        classes: tuple[list[bytes], list[bytes]] = ([], [])
        for name in names:
            content, target = modules[name], name.split("/")[0].removesuffix(".py") in INTERNET
            classes[target].extend(
                content[start : start + length] for start in range(0, len(content) - length + 1, length)
            )
        count = min(len(classes[0]), len(classes[1]), LIMITS[split] // 2)
        if not count:
            raise DataError(
                f"the split {split!r} has no passage of {length} bytes of some class; "
                "lower the length, or change validation"
            )
        splits.append(
            DocumentDataset.of(
                (passages[number], target)
                for target, passages in enumerate(classes)
                for number in torch.randperm(len(passages), generator=generator)[:count].tolist()
            )
        )
    return splits


def python_pairs(
    length: int, validation: float, seed: int, modules: Mapping[str, bytes] | None = None
) -> dict[str, PairDataset]:
    """Pair every first passage with its continuation (1), and with a passage of another module of the split (0).

    Every second passage also occurs once with each target, so no single passage determines the target.

    Args:
        length: bytes of every passage.
        validation: see `deal_modules`.
        seed: seed of the splits, of the choice of passages, and of the pairs.
        modules: sources by their paths; None: `python_modules()`.

    Raises:
        DataError: a split would have no module, or more than half of its passages of one.
    """
    modules = python_modules() if modules is None else modules
    long = {name: content for name, content in modules.items() if len(content) >= 2 * length}
    return {
        split: _pairs([long[name] for name in names], length, seed, split)
        for split, names in deal_modules(long, validation, seed).items()
    }


def _pairs(contents: Sequence[bytes], length: int, seed: int, split: str) -> PairDataset:
    generator = torch.Generator().manual_seed(seed)
    bounds = list(pairwise(accumulate(map(len, contents), initial=0)))
    firsts = torch.tensor([start for begin, end in bounds for start in range(begin, end - 2 * length + 1, 2 * length)])
    firsts = firsts[torch.randperm(len(firsts), generator=generator)[: LIMITS[split] // 2]]
    owners = torch.bucketize(firsts, torch.tensor([end for _, end in bounds]), right=True)
    most = int(owners.bincount().max())
    if 2 * most > len(firsts):
        raise DataError(
            f"{most} of the {len(firsts)} passages of the split {split!r} are of one module, "
            "at most half may be; lower the length"
        )
    # In the order of modules, two passages belong to different modules if their distance is the size of the largest.
    order = owners.argsort(stable=True)
    others = torch.empty_like(order)
    others[order] = order.roll(most)
    seconds = torch.cat((firsts, firsts[others])) + length
    firsts = firsts.repeat(2)
    spans = torch.stack((firsts, firsts + length, seconds, seconds + length), 1)
    targets = torch.cat((torch.ones(len(others)), torch.zeros(len(others)))).long()
    return PairDataset(np.frombuffer(b"".join(contents), dtype=np.uint8), spans, targets)
