"""Readers given a pipe, a device, an endless line or a huge image instead of a file neither block nor read it whole."""

import os
import re
import struct
import zlib

import numpy as np
import pytest

from sma.errors import DataError
from sma.recipes.io import lines, published
from sma.recipes.io.generated import MANIFEST, cached_files, digest_of
from sma.recipes.io.lines import lines_of
from sma.recipes.tasks.grey import read_array
from sma.recipes.tasks.image import CifarSettings, load_cifar, read_batch
from sma.recipes.tasks.listops import expressions as listops
from sma.recipes.tasks.listops.expressions import read_listops
from sma.recipes.tasks.pathfinder import release as pathfinder_folder
from sma.recipes.tasks.pathfinder.release import list_release, read_images
from sma.recipes.tasks.retrieval import AANSettings, load_aan, read_pairs
from sma.recipes.tasks.speech.commands import LISTS, load_clips
from sma.recipes.tasks.text import ImdbSettings, load_imdb
from tests.test_recipes.test_tasks.test_imdb import make_folder
from tests.test_recipes.test_tasks.test_pathfinder import make_release
from tests.test_recipes.tiny_speech import write_corpus


def place_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def place_device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def place_loop(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path)


PLACES = [
    pytest.param(place_pipe, "is a named pipe; a plain file is required", id="pipe"),
    pytest.param(place_device, "is a device; a plain file is required", id="device"),
    pytest.param(place_loop, "Too many levels of symbolic links", id="loop"),
]


def imdb(folder):
    make_folder(folder)
    return folder / "imdb" / "aclImdb" / "train" / "pos" / "3_3.txt", lambda: load_imdb(
        ImdbSettings(split="lra"), folder, progress=False
    )


def recordings(folder):
    return write_corpus(folder) / "no" / "04_nohash_0.wav", lambda: load_clips(folder, progress=False)


def lists_of_recordings(folder):
    return write_corpus(folder) / LISTS[0], lambda: load_clips(folder, progress=False)


def lists_of_images(folder):
    root, _ = make_release(folder)
    return root / "metadata" / "9.npy", lambda: list_release(root)


def images(folder):
    root, _ = make_release(folder)
    records = list_release(root)
    return root / records[0].path, lambda: read_images(root, 32, records)


def manifests(folder):
    return folder / MANIFEST, lambda: cached_files(folder, {"version": 1}, ["a"], lambda files: files["a"].write(b"x"))


READERS = [
    pytest.param(lambda folder: (folder / "x.tsv", lambda: read_listops(folder / "x.tsv")), id="listops"),
    pytest.param(lambda folder: (folder / "x.tsv", lambda: read_pairs(folder / "x.tsv", 9)), id="aan"),
    pytest.param(lambda folder: (folder / "x.bin", lambda: read_batch(folder / "x.bin")), id="cifar"),
    pytest.param(lambda folder: (folder / "x.npy", lambda: read_array(folder / "x.npy", (3,))), id="npy"),
    pytest.param(lambda folder: (folder / "x", lambda: digest_of(folder / "x")), id="hash"),
    pytest.param(imdb, id="imdb"),
    pytest.param(recordings, id="recordings"),
    pytest.param(lists_of_images, id="lists of images"),
    pytest.param(images, id="images"),
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("place", "complaint"), PLACES)
def test_path_that_is_not_a_plain_file_is_refused_at_once(reader, place, complaint, tmp_path):
    path, read = reader(tmp_path)
    place(path)
    with pytest.raises(DataError, match=complaint):
        read()


@pytest.mark.parametrize(
    "reader", [pytest.param(lists_of_recordings, id="lists"), pytest.param(manifests, id="manifest")]
)
@pytest.mark.parametrize(("place", "complaint"), PLACES[:2])
def test_path_of_an_optional_file_that_is_not_plain_is_refused_at_once(reader, place, complaint, tmp_path):
    path, read = reader(tmp_path)
    place(path)
    with pytest.raises(DataError, match=complaint):
        read()


@pytest.mark.parametrize("read", [read_listops, lambda path: read_pairs(path, 9)], ids=["listops", "aan"])
@pytest.mark.parametrize(
    "start", [b"", b"Source\tTarget\n", b"1.0\ta\tb\tc\td\n"], ids=["first", "after a header", "after a pair"]
)
def test_endless_line_is_read_only_up_to_a_limit(read, start, tmp_path, monkeypatch):
    with (tmp_path / "x.tsv").open("wb") as file:
        file.write(start)
        file.truncate(1 << 40)  # a sparse file of zeros
    with pytest.raises(
        DataError,
        match=r"x\.tsv, line [12](:| has more than [0-9,]+ bytes, which no line here has; the file is damaged)",
    ):
        read(tmp_path / "x.tsv")


def test_longest_line_is_read_and_a_longer_one_is_not(tmp_path):
    (tmp_path / "x").write_bytes(b"1234\n567\n89")
    assert list(lines_of(tmp_path / "x", 5)) == [(1, b"1234\n"), (2, b"567\n"), (3, b"89")]
    with pytest.raises(DataError, match=r"x, line 1 has more than 4 bytes"):
        list(lines_of(tmp_path / "x", 4))
    assert listops.LONGEST_LINE < lines.LONGEST


def test_wrong_line_is_quoted_in_part(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"Source\tTarget\n" + b"9" * 10_000_000 + b"\t5\n")
    with pytest.raises(DataError, match=r"line 2: symbol 1 is '99+\.\.\.9*', which is unknown") as caught:
        read_listops(tmp_path / "x.tsv")
    assert len(str(caught.value)) < 500
    (tmp_path / "x.tsv").write_bytes(b"\t" * 10_000_000)
    with pytest.raises(DataError, match=r"line 1: columns separated by tabs: 10000001; 5 are required"):
        read_pairs(tmp_path / "x.tsv", 9)


def test_huge_length_limit_of_documents_takes_no_memory(tmp_path):
    make_folder(tmp_path)
    cut, whole = (
        load_imdb(ImdbSettings(split="lra", length=length), tmp_path, progress=False) for length in (1_000_000, 10**18)
    )
    assert cut.hashes == whole.hashes


@pytest.mark.parametrize("name", ["²", "٣", "1_000", "9" * 5000, "-1", " 1"])
def test_name_of_a_list_that_only_looks_like_a_number_is_refused(name, tmp_path, monkeypatch):
    root, _ = make_release(tmp_path)
    listed = [*(root / "metadata").iterdir(), root / "metadata" / f"{name}.npy"]
    monkeypatch.setattr(pathfinder_folder.Path, "iterdir", lambda folder: iter(listed))
    with pytest.raises(DataError, match=re.escape(f"{name}.npy is not named after the number of a batch")):
        list_release(root)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(b"imgs/9 sample_0.png\0 0 1\n", r"9\.npy is not text", id="zero byte"),
        pytest.param(
            b"imgs/9 " + b"x" * 5000 + b" 0 1\n",
            r"line 1 names 'imgs/9/x+\.\.\.x*', which cannot be read: File name",
            id="long",
        ),
        pytest.param(b"x" * 1_000_000, r"line 1: 'x+\.\.\.x*' is not 'folder file number label", id="line"),
        pytest.param(b"imgs 9 0 1\n", r"line 1 names 'imgs/9', which is not a plain file", id="folder"),
    ],
)
def test_invalid_lines_of_a_list_are_refused(content, complaint, tmp_path):
    root, _ = make_release(tmp_path)
    (root / "metadata" / "9.npy").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        list_release(root)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, depth=8, colour=0):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunks)
        + chunk(b"IDAT", zlib.compress(bytes(32 * 33)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            png(20_000, 20_000),
            r"png cannot be read: .*decompression bomb.*; it is truncated or damaged",
            id="400 megapixels",
        ),
        pytest.param(
            png(12_000, 9_000),
            r"png is an image of 12000 x 9000 pixels, mode L; 32 x 32 grey ones",
            id="108 megapixels",
        ),
        pytest.param(png(2**31 - 1, 1), r"png (cannot be read|is an image of)", id="wide"),
        pytest.param(png(0, 32), r"png (cannot be read|is an image of)", id="no width"),
        pytest.param(png(32, 32, depth=1), r"png is an image of 32 x 32 pixels, mode 1;", id="black and white"),
        pytest.param(png(32, 32, depth=16), r"png is an image of 32 x 32 pixels, mode I;16;", id="16 bits"),
        pytest.param(
            png(32, 32, colour=3), r"png (is an image of 32 x 32 pixels, mode P;|cannot be read)", id="palette"
        ),
        pytest.param(png(32, 32, colour=4), r"png is an image of 32 x 32 pixels, mode LA;", id="alpha"),
        pytest.param(png(32, 32, depth=200), r"png cannot be read", id="depth"),
        pytest.param(
            png(32, 32, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))),
            r"png' is longer than 69,632 bytes|cannot be",
            id="text",
        ),
        pytest.param(
            png(32, 32, chunk(b"tEXt", b"a\0" + bytes(100_000))),
            r"png' is longer than 69,632 bytes, which no file",
            id="long",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_images_that_the_release_cannot_have_are_refused(content, complaint, tmp_path):
    root, _ = make_release(tmp_path)
    records = list_release(root)
    (root / records[0].path).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read_images(root, 32, records)


def npy(shape, dtype="|u1", order=False, content=b"abc", version=b"\x01\0"):
    header = repr({"descr": dtype, "fortran_order": order, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + content


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            npy((10**15,)),
            r"holds an array of the shape \(1000000000000000,\) and the dtype dtype\('uint8'\); \(3,\)",
            id="large",
        ),
        pytest.param(npy((3, 1)), r"holds an array of the shape \(3, 1\)", id="shape"),
        pytest.param(
            npy((3,), "<f8"), r"and the dtype dtype\('float64'\); \(3,\) and uint8 are required: delete", id="dtype"
        ),
        pytest.param(npy((3,), "|O"), r"and the dtype dtype\('O'\)", id="objects"),
        pytest.param(npy((3,), order=True), r"holds an array of", id="by columns"),
        pytest.param(
            npy((3,), content=b"ab"), r"bytes, and [0-9]+ are required for numbers of the shape \(3,\)", id="short"
        ),
        pytest.param(
            npy((3,), content=b"abcd"), r"bytes, and [0-9]+ are required for numbers of the shape \(3,\)", id="long"
        ),
        pytest.param(npy("x" * 500), r"x\.npy cannot be read: .*; delete .* to generate it again", id="no shape"),
        pytest.param(npy((3,), version=b"\x07\0"), r"x\.npy cannot be read: ", id="version"),
        pytest.param(npy((3,))[:9], r"x\.npy cannot be read: ", id="cut"),
        pytest.param(b"", r"x\.npy cannot be read: ", id="empty"),
        pytest.param(b"\x93NUMPY\x01\0\xff\xff" + b"[" * 65535, r"x\.npy cannot be read: ", id="deep"),
    ],
)
def test_arrays_in_another_format_are_refused(content, complaint, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read_array(tmp_path / "x.npy", (3,))


def test_array_is_read(tmp_path):
    (tmp_path / "x.npy").write_bytes(npy((3,)))
    assert read_array(tmp_path / "x.npy", (3,)).tolist() == list(b"abc")
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert read_array(tmp_path / "x.npy", (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            b"[" * 100_000,
            r"manifest\.json cannot be read: RecursionError.*; delete .* to generate it again",
            id="deep",
        ),
        pytest.param(b"1" * 10_000, r"manifest\.json cannot be read: .*; delete", id="long number"),
        pytest.param(b" " * 2_000_000, r"manifest\.json' is longer than 1,048,576 bytes", id="long"),
        pytest.param(b"null", r"manifest\.json does not list the files of a data set", id="null"),
        pytest.param(b'{"files": []}', r"manifest\.json does not list the files of a data set", id="list"),
        pytest.param(
            b'{"files": {}, "version": "' + b"x" * 500_000 + b'"}',
            r"version is 'x+\.\.\.x*' there, 1 is required",
            id="long text",
        ),
        pytest.param(
            b'{"files": {}, "' + b"x" * 500_000 + b'": 1, "version": 1}',
            r"\('x+\.\.\.x*' is 1 there, None is required",
            id="long key",
        ),
        pytest.param(
            b'{"files": {}, ' + b'"x%d": 1, ' * 9 % (*range(9),) + b'"version": 1}',
            r"'x7' is 1 there, None is required\)",
            id="many",
        ),
        pytest.param(b'{"files": {"a": [[]]}, "version": 1}', r"a was changed since it was generated", id="hash"),
    ],
)
def test_foreign_manifests_are_refused_with_a_short_error_message(content, complaint, tmp_path):
    (tmp_path / MANIFEST).write_bytes(content)
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(DataError, match=complaint) as caught:
        cached_files(tmp_path, {"version": 1}, ["a"], lambda files: files["a"].write(b"x"))
    assert len(str(caught.value)) < 1200


def test_recording_with_a_control_character_in_its_name_is_refused(tmp_path):
    root = write_corpus(tmp_path)
    (root / "no" / "04_nohash_0.wav").rename(root / "no" / "a\nyes.wav")
    with pytest.raises(
        DataError, match=r"the name of the recording 'no/a\\nyes\.wav' has control characters; rename it"
    ):
        load_clips(tmp_path, progress=False)


@pytest.mark.parametrize("load", [load_imdb, load_cifar, load_aan], ids=lambda load: load.__name__)
def test_unreadable_folder_gives_an_error_message(load, tmp_path, monkeypatch):
    settings = {load_imdb: ImdbSettings(), load_cifar: CifarSettings(), load_aan: AANSettings()}[load]
    with pytest.raises(
        DataError, match=r"cannot look for data in '.*xxx.*': File name too long; choose another folder"
    ) as caught:
        load(settings, tmp_path / ("x" * 5000), progress=False)
    assert len(str(caught.value)) < 600

    def denied(path):
        raise PermissionError(13, "Permission denied")  # root may read every folder

    monkeypatch.setattr(published.Path, "is_dir", denied)
    with pytest.raises(DataError, match=r"cannot look for data in '.*': Permission denied; choose another folder"):
        load(settings, tmp_path, progress=False)
