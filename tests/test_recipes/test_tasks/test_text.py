"""Byte corpora: splits, hashes, enwik8 as a file and as a zip, and errors about unsuitable files."""

import hashlib
import os
import platform
import random
import struct
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import DataError, SpecError
from sma.recipes.tasks.language import corpus as text
from sma.recipes.tasks.language.corpus import PYTHON_TEXT, TextSettings, load_text, python_text
from sma.recipes.tasks.language.task import LanguageTask

SMALL = 2_000
WIKI = random.Random(0).randbytes(SMALL)


@pytest.fixture
def small_enwik8(monkeypatch):
    """Expect an enwik8 of 2,000 bytes: the code checks only its size and its hash."""
    monkeypatch.setattr(text, "ENWIK8_BYTES", SMALL)
    monkeypatch.setattr(text, "ENWIK8_SHA256", hashlib.sha256(WIKI).hexdigest())


def write(path, content):
    path.write_bytes(content)
    return TextSettings(file=str(path))


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return TextSettings(file=str(path))


def joined(corpus):
    return bytes(torch.cat((corpus.train, corpus.validation, corpus.test)).tolist())


def sizes(corpus):
    return [len(corpus.train), len(corpus.validation), len(corpus.test)]


@given(
    content=st.binary(min_size=40, max_size=400),
    held_out=st.one_of(st.none(), st.floats(0.1, 0.4)),
    validation=st.floats(0.05, 0.4),
)
def test_splits_are_the_text_in_order(tmp_path, content, held_out, validation):
    settings = write(tmp_path / "text", content).replace(held_out=held_out, validation=validation)
    corpus = load_text(settings)
    assert joined(corpus) == content
    assert sizes(corpus)[1:] == [round(validation * len(content)), round((held_out or 0.1) * len(content))]
    assert corpus.before_test.tolist() == list(content[: -len(corpus.test)])
    assert {part.dtype for part in corpus[:3]} == {torch.uint8}


@given(content=st.binary(min_size=40, max_size=80), other=st.binary(min_size=40, max_size=80))
def test_hash_depends_only_on_the_bytes(tmp_path, content, other):
    hashes = [
        load_text(write(tmp_path / name, data)).sha256
        for name, data in [("one", content), ("two", content), ("three", other)]
    ]
    assert hashes[0] == hashes[1] == hashlib.sha256(content).hexdigest()
    assert (hashes[2] == hashes[0]) == (other == content)


def test_default_text_comes_with_python():
    corpus = load_text()
    content = joined(corpus)
    assert content == python_text()
    assert corpus.name == f"pydoc_data.topics of Python {platform.python_version()}"
    assert corpus.sha256 == hashlib.sha256(content).hexdigest()
    assert len(content) > 300_000
    shares = [size / len(content) for size in sizes(corpus)]
    assert shares == pytest.approx([0.85, 0.05, 0.1], abs=1e-5)
    assert "import" in content.decode()


def test_default_text_does_not_depend_on_the_order_of_its_pages(monkeypatch):
    from pydoc_data.topics import topics

    expected = python_text()
    monkeypatch.setattr("pydoc_data.topics.topics", dict(reversed(topics.items())))
    assert python_text() == expected


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="the hash is that of Python 3.11.7")
def test_default_text_of_a_python_version_never_changes():
    settings = PYTHON_TEXT.replace(sha256="2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4")
    assert sizes(load_text(settings)) == [396_265, 23_310, 46_620]


def test_python_without_help_pages_gives_an_error_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(
        DataError,
        match=r"came without pydoc_data.topics, its help pages; install the complete standard library, or give a text",
    ):
        load_text()


@pytest.mark.usefixtures("small_enwik8")
def test_zip_equals_file(tmp_path):
    file = load_text(write(tmp_path / "enwik8", WIKI))
    zipped = load_text(write_zip(tmp_path / "download.ZIP", {"readme": b"hello", "enwik8": WIKI}))
    assert joined(zipped) == joined(file) == WIKI
    assert sizes(zipped) == sizes(file) == [1_800, 100, 100]
    assert (zipped.sha256, zipped.name) == (file.sha256, file.name) == (hashlib.sha256(WIKI).hexdigest(), "enwik8")
    assert sorted(os.listdir(tmp_path)) == ["download.ZIP", "enwik8"]


@pytest.mark.usefixtures("small_enwik8")
def test_splits_of_enwik8_follow_the_settings(tmp_path):
    settings = write(tmp_path / "enwik8", WIKI).replace(held_out=0.1, validation=0.2)
    assert sizes(load_text(settings)) == [1_400, 400, 200]


def test_whole_enwik8_has_the_splits_of_the_literature(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "ENWIK8_SHA256", hashlib.sha256(bytes(100_000_000)).hexdigest())
    corpus = load_text(write_zip(tmp_path / "enwik8.zip", {"enwik8": bytes(100_000_000)}))
    assert sizes(corpus) == [90_000_000, 5_000_000, 5_000_000]


def test_path_may_be_relative_or_start_with_the_home_folder(tmp_path, monkeypatch):
    write(tmp_path / "mine.txt", WIKI)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for file in ["mine.txt", "~/mine.txt"]:
        corpus = load_text(TextSettings(file=file))
        assert (corpus.name, joined(corpus)) == ("mine.txt", WIKI)


def test_requested_hash_is_checked(tmp_path):
    settings = write(tmp_path / "mine.txt", WIKI)
    found, other = hashlib.sha256(WIKI).hexdigest(), "0" * 64
    assert load_text(settings.replace(sha256=found)).sha256 == found
    with pytest.raises(
        DataError,
        match=f"mine.txt has the SHA-256 {found}, and {other} is required: the file was changed, or is another",
    ):
        load_text(settings.replace(sha256=other))
    with pytest.raises(
        DataError,
        match=f"and {other} is required: versions of Python differ; sha256=null accepts",
    ):
        load_text(TextSettings(sha256=other))


def test_every_split_has_its_hash(tmp_path):
    corpus = load_text(write(tmp_path / "mine.txt", WIKI))
    parts = {"train": WIKI[:1_700], "validation": WIKI[1_700:1_800], "test": WIKI[1_800:]}
    assert corpus.hashes == {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


@pytest.mark.parametrize("kept", ["enwik8", "enwik8.zip"])
@pytest.mark.parametrize("asked", ["enwik8", "enwik8.zip"])
@pytest.mark.usefixtures("small_enwik8")
def test_enwik8_is_found_in_the_data_folder_zipped_or_not(tmp_path, monkeypatch, kept, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_zip(tmp_path / "data" / kept, {"enwik8": WIKI}) if kept.endswith("zip") else write(
        tmp_path / "data" / kept, WIKI
    )
    corpus = LanguageTask(data={"file": asked}).prepare(tmp_path / "data", progress=False)
    assert (joined(corpus), corpus.name) == (WIKI, "enwik8")


def test_working_folder_takes_precedence_over_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "books").mkdir(parents=True)
    (tmp_path / "books").mkdir()
    settings = TextSettings(file="books/mine.txt")
    write(tmp_path / "data" / "books" / "mine.txt", WIKI[::-1])
    assert joined(load_text(settings, tmp_path / "data")) == WIKI[::-1]
    write(tmp_path / "books" / "mine.txt", WIKI)
    assert joined(load_text(settings, tmp_path / "data")) == WIKI


@pytest.mark.usefixtures("small_enwik8")
def test_enwik8_is_downloaded_on_request_if_missing(tmp_path, monkeypatch):
    calls = []

    def fetch(url, path, **keywords):
        calls.append((url, path, keywords))
        write_zip(path, {"enwik8": WIKI})
        return path

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(text, "fetch", fetch)
    for _ in range(2):
        assert (
            joined(load_text(TextSettings(file="enwik8.zip", download=True), tmp_path / "data", progress=False)) == WIKI
        )
    keywords = {"sha256": text.ENWIK8_ZIP_SHA256, "most": 72_890_950, "progress": False}
    assert calls == [("http://mattmahoney.net/dc/enwik8.zip", tmp_path / "data" / "enwik8.zip", keywords)]


@pytest.mark.parametrize("content", [pytest.param(b"", id="empty"), pytest.param(b"short", id="short")])
def test_text_too_short_to_split_is_refused(tmp_path, content):
    with pytest.raises(
        DataError,
        match=f"mine.txt has {len(content)} bytes, which gives .* for test; at least 2 each are required: give a",
    ):
        load_text(write(tmp_path / "mine.txt", content))


def test_error_of_a_missing_file_lists_the_searched_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError,
        match=r"no file 'enwik8' \(looked for .*enwik8, .*enwik8.zip\); "
        r"give a text file, enwik8 or enwik8.zip .*; leave file out",
    ):
        load_text(TextSettings(file="enwik8"))
    with pytest.raises(
        DataError, match=r"no file 'enwik8.zip' \(looked for .*/enwik8, .*/data/enwik8.zip, .*data.download=true puts"
    ):
        load_text(TextSettings(file="enwik8.zip"), tmp_path / "data")


@pytest.mark.parametrize("name", ["folder", "folder.zip"])
def test_folder_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}' is a folder; a plain file is required"):
        load_text(TextSettings(file=str(tmp_path / name)))


@pytest.mark.parametrize("name", ["enwik8", "enwik8.txt", "enwik8.zip"])
def test_part_of_enwik8_is_refused(tmp_path, name):
    settings = write_zip(tmp_path / name, {"enwik8": WIKI}) if name.endswith("zip") else write(tmp_path / name, WIKI)
    with pytest.raises(
        DataError,
        match=rf"enwik8 in .*{name} has 2,000 bytes; it must have exactly 100,000,000: download it again, or give",
    ):
        load_text(settings)


@pytest.mark.usefixtures("small_enwik8")
def test_other_bytes_named_enwik8_are_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"enwik8 in .* has the SHA-256 [0-9a-f]+; that of enwik8 is [0-9a-f]+: download it again, or give",
    ):
        load_text(write_zip(tmp_path / "enwik8.zip", {"enwik8": WIKI[::-1]}))


@pytest.mark.parametrize(
    ("members", "held"),
    [
        pytest.param({}, "nothing", id="empty"),
        pytest.param({"enwik9": b"", "readme.txt": b""}, "'enwik9', 'readme.txt'", id="others"),
    ],
)
def test_zip_without_enwik8_is_refused(tmp_path, members, held):
    with pytest.raises(
        DataError, match=rf"mine.zip does not hold 'enwik8', but {held}; give a text file, enwik8 or enwik8.zip"
    ):
        load_text(write_zip(tmp_path / "mine.zip", members))


def test_file_that_is_not_a_zip_is_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"enwik8 in .*mine.zip cannot be read: File is not a zip file; the zip is damaged or of another kind",
    ):
        load_text(write(tmp_path / "mine.zip", WIKI))


def bomb(path, claimed=None):
    """A small zip with an enwik8 of 500,000,000 zeros; its headers state the size `claimed`, if given."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("enwik8", "w") as member,
    ):
        for _ in range(500):
            member.write(bytes(1_000_000))
    content = path.read_bytes()
    said = struct.pack("<I", 500_000_000)
    path.write_bytes(content if claimed is None else content.replace(said, struct.pack("<I", claimed)))
    return TextSettings(file=str(path))


def test_zip_that_holds_more_than_enwik8_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    settings = bomb(tmp_path / "enwik8.zip")
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(
        DataError, match=r"enwik8 in .*enwik8.zip has 500,000,000 bytes; it must have exactly 100,000,000"
    ):
        load_text(settings)


@pytest.mark.usefixtures("small_enwik8")
def test_zip_with_a_false_size_is_read_only_up_to_that_size(tmp_path):
    with pytest.raises(
        DataError, match=r"enwik8 in .*enwik8.zip cannot be read: Bad CRC-32 for file 'enwik8'; the zip is damaged"
    ):
        load_text(bomb(tmp_path / "enwik8.zip", claimed=SMALL))


@pytest.mark.parametrize("name", ["enwik8", "mine.txt", "enwik8.zip"])
def test_devices_and_pipes_are_refused_at_once(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=rf"{name}' is a device; a plain file is required"):
        load_text(TextSettings(file=str(tmp_path / name)))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}' is a named pipe; a plain file is required"):
        load_text(TextSettings(file=str(tmp_path / name)))


def test_text_larger_than_memory_is_refused_before_reading(tmp_path):
    with (tmp_path / "mine.txt").open("wb") as file:
        file.truncate(1 << 43)  # a sparse file
    with pytest.raises(
        DataError, match=r"the text .*mine.txt needs 8,796,093,022,208 bytes .*, and .* are free; give a shorter one"
    ):
        load_text(TextSettings(file=str(tmp_path / "mine.txt")))
    (tmp_path / "mine.txt").rename(tmp_path / "enwik8")
    with pytest.raises(DataError, match=r"enwik8 in .* has 8,796,093,022,208 bytes; it must have exactly 100,000,000"):
        load_text(TextSettings(file=str(tmp_path / "enwik8")))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        pytest.param("a\0b", r"there can be no file 'a\\x00b': it has a zero byte; give a text file", id="zero byte"),
        pytest.param("x" * 5000, r"there can be no file 'xx.*xx': File name too long; give", id="long"),
        pytest.param(
            "~nobody-of-that-name/x", r"there can be no file '~nobody-of-that-name/x': .*home.*; give", id="home"
        ),
    ],
)
def test_invalid_file_names_are_refused(name, complaint):
    with pytest.raises(DataError, match=complaint) as caught:
        load_text(TextSettings(file=name))
    assert len(str(caught.value)) < 500


@pytest.mark.usefixtures("small_enwik8")
def test_damaged_zip_is_refused(tmp_path):
    settings = write_zip(tmp_path / "enwik8.zip", {"enwik8": WIKI})
    damaged = bytearray((tmp_path / "enwik8.zip").read_bytes())
    damaged[SMALL // 2] ^= 0xFF
    (tmp_path / "enwik8.zip").write_bytes(damaged)
    with pytest.raises(
        DataError,
        match=r"enwik8 in .*enwik8.zip cannot be read: .*; the zip is damaged or of another kind: download it again",
    ):
        load_text(settings)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param(
            {"held_out": 0.0},
            "held_out=0.0 must be greater than 0.0; held_out: fraction of the bytes",
            id="nothing-held-out",
        ),
        pytest.param(
            {"validation": 1.0},
            "validation=1.0 must be less than 1.0; validation: fraction of the bytes",
            id="all-validation",
        ),
        pytest.param(
            {"held_out": 0.5, "validation": 0.5},
            "held_out=0.5 and validation=0.5 leave nothing to train on; their sum",
            id="no-training",
        ),
        pytest.param(
            {"sha256": "abc"}, "sha256='abc': .*; sha256: required SHA-256 of the bytes, 64 lower-case", id="no-hash"
        ),
        pytest.param(
            {"download": True}, "download=true is for enwik8 only, and file is None; set file=enwik8.zip", id="no-file"
        ),
        pytest.param(
            {"download": True, "file": "a.txt"},
            "download=true is for enwik8 only, and file is 'a.txt'; set",
            id="other-file",
        ),
        pytest.param({"file": ""}, "file='': .*; file: a local text file, enwik8 or enwik8.zip", id="no-name"),
    ],
)
def test_invalid_settings_are_refused(fields, complaint):
    with pytest.raises(SpecError, match=complaint):
        TextSettings(**fields)
