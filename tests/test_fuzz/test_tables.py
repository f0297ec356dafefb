"""Damaged tables and lists are read or refused with an error that names the file."""

import json
import logging
import random
from pathlib import Path

import pytest

from sma.recipes.io.generated import MANIFEST, cached_files
from sma.recipes.tasks.listops.expressions import encode, read_listops
from sma.recipes.tasks.pathfinder.release import list_release, split_records
from sma.recipes.tasks.retrieval import read_pairs
from sma.recipes.tasks.speech.commands import _lines_of, _read_list
from sma.recipes.tasks.text import CLASSES, ImdbSettings, load_imdb
from tests.test_fuzz.harness import Target, fuzz, mutate

_LISTOPS = b"Source\tTarget\n" + b"".join(
    b"( ( ( [MAX 2 ) 9 ) ] )\t9\n" + b"( ( ( [SM ( ( ( [MIN 4 ) 7 ) ] ) ) 3 ) ] )\t7\n" + b"[MED 1 2 3 ]\t2\n"
    for _ in range(4)
)
_AAN = b"".join(
    b"%d.0\tA%d\tB%d\tsome text of the first\tand \xc3\xa9 of the second\n" % (n % 2, n, n) for n in range(8)
)
_LIST = b"".join(b"imgs/0 sample_%d.png %d %d 14 0.5\n" % (n, n, n % 2) for n in range(8))
_WORDS = (
    b"\t",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\xff",
    b"\xe2\x80\xa8",
    "²".encode(),
    b"[MAX",
    b"]",
    b"(",
    b"[MIN " * 3000,
    b"9" * 6000,
    b"../",
    b"/",
    b"1e999",
)


def _damage(rng: random.Random, content: bytes) -> bytes:
    """Mutate bytes, insert words at random offsets, or shuffle and drop lines."""
    way = rng.random()
    if way < 0.4:
        return mutate(rng, content)
    if way < 0.8:
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content) + 1)
            content = content[:at] + rng.choice(_WORDS) + content[at + rng.choice((0, 0, 1, 5)) :]
        return content
    lines = content.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines[: rng.randrange(len(lines) + 1)])


def _make_listops(rng: random.Random, folder: Path) -> Path:
    (folder / "x.tsv").write_bytes(_damage(rng, _LISTOPS))
    return folder / "x.tsv"


def _read_listops(path: Path) -> None:
    split = read_listops(path)
    if not 0 < int(split.content.min()) <= int(split.content.max()) < 16 or int(split.offsets[-1]) != len(
        split.content
    ):
        raise RuntimeError("read what is no expression")


def _make_expression(rng: random.Random, folder: Path) -> str:
    return _damage(rng, b"( ( ( [MAX 2 ) 9 ) ] )").decode(errors=rng.choice(("replace", "surrogateescape")))


def _make_aan(rng: random.Random, folder: Path) -> Path:
    (folder / "x.tsv").write_bytes(_damage(rng, _AAN))
    return folder / "x.tsv"


def _read_aan(path: Path) -> None:
    pairs, _ = read_pairs(path, 10)
    for number in range(len(pairs)):
        (first, second), _ = pairs[number]
        if len(first) > 10 or len(second) > 10:
            raise RuntimeError("read more of a text than was asked for")


def _make_release(rng: random.Random, folder: Path) -> Path:
    (folder / "imgs" / "0").mkdir(parents=True)
    for number in range(8):
        (folder / "imgs" / "0" / f"sample_{number}.png").write_bytes(b"x" * (number > 0))
    (folder / "metadata").mkdir()
    name = rng.choice(("0", "0", "0", "0", "²", "٣", "00", "-1", "x", "1" * 100, "\udcff", "a\nb"))
    (folder / "metadata" / f"{name}.npy").write_bytes(_damage(rng, _LIST))
    return folder


def _make_manifest(rng: random.Random, folder: Path) -> Path:
    files = {"a": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    odd: list[object] = [None, [], {}, 7, "x" * 9000, {"a": None}, {"a": [[]]}, {"b": "x"}, 1e300, True, files]
    made: dict[str, object] = {"version": 1, "files": files}
    for key in rng.sample(("version", "files", "more"), rng.choice((0, 1, 1, 2))):
        made[key] = rng.choice(odd)
    content = json.dumps(rng.choice((made, made, made, rng.choice(odd)))).encode()
    content = rng.choice(
        (content, content, content, mutate(rng, content), b"[" * 50_000, b'{"files":' * 5000, b"9" * 5000, b"NaN")
    )
    (folder / MANIFEST).write_bytes(content)
    (folder / "a").write_bytes(rng.choice((b"x", b"x", b"y")))
    return folder


def _read_manifest(folder: Path) -> None:
    cached_files(folder, {"version": 1}, ["a"], lambda files: files["a"].write(b"x"))


def _make_names(rng: random.Random, folder: Path) -> Path:
    (folder / "validation_list.txt").write_bytes(_damage(rng, b"yes/0a7c_nohash_0.wav\nno/0b40_nohash_1.wav\n"))
    return folder / "validation_list.txt"


def _read_names(path: Path) -> None:
    _read_list(path)
    _lines_of(path)


def _make_reviews(rng: random.Random, folder: Path) -> Path:
    for split in ("train", "test"):
        for name in CLASSES:
            (folder / "imdb" / "aclImdb" / split / name).mkdir(parents=True)
            for number in range(rng.choice((3, 3, 3, 1, 0))):
                content = rng.choice((b"good", b"bad <br />", b"\xff\0", b"\n", b"good" * 999, b"", b"good", b"good"))
                ends = rng.choice((".txt", ".txt", ".txt", ".TXT", "\udcff.txt", "\n.txt", ".txt~"))
                (folder / "imdb" / "aclImdb" / split / name / f"{number}_1{ends}").write_bytes(content)
    return folder


def _read_reviews(folder: Path) -> None:
    logging.disable()  # the loader logs the number of reviews
    load_imdb(ImdbSettings(validation=0.4, length=100), folder, progress=False)


LISTOPS = Target(_make_listops, _read_listops)
EXPRESSION = Target(_make_expression, encode)
AAN = Target(_make_aan, _read_aan)
RELEASE = Target(_make_release, lambda folder: split_records(list_release(folder)))
MANIFESTS = Target(_make_manifest, _read_manifest)
NAMES = Target(_make_names, _read_names)
REVIEWS = Target(_make_reviews, _read_reviews)


def _make_any(rng: random.Random, folder: Path) -> tuple[Target, object]:
    target = rng.choice((LISTOPS, EXPRESSION, AAN, RELEASE, MANIFESTS, NAMES, REVIEWS))
    return target, target.make(rng, folder)


TABLE = Target(_make_any, lambda given: given[0].read(given[1]))


@pytest.mark.slow
def test_tables_and_lists() -> None:
    counts = fuzz("tests.test_fuzz.test_tables:TABLE", 2500)
    print(counts)
    assert counts.others == {}
    assert counts.named > 0
    assert counts.accepted > 0
