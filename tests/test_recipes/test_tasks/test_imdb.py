"""IMDB from small made-up copies of its folder, its archive and the Hub: splits, and the cut bytes of every review."""

import hashlib
import io
import sys
import tarfile
import types

import pytest
import torch

from sma.errors import DataError
from sma.recipes.io import published
from sma.recipes.tasks import text as imdb
from sma.recipes.tasks.documents import VOCABULARY_SIZE, DocumentDataset, bytes_of, show
from sma.recipes.tasks.text import ImdbSettings, load_imdb

SPLITS = ("train", "validation", "test")
SHORT = ImdbSettings(validation=0.25, length=40)


@pytest.fixture(autouse=True)
def any_archive(monkeypatch):
    """Accept made-up archives: check no hash."""
    monkeypatch.setattr(imdb, "MD5", None)


def review(split, name, number):
    """A review that contains its name, a line break and a non-ASCII byte; its length depends on its number."""
    return f"{split} {name} {number}<br /><br />".encode() + b"\xe9" + b"!" * number


REVIEWS = {
    f"{split}/{name}/{number}_{number % 10}.txt": review(split, name, number)
    for split, count in (("train", 12), ("test", 5))
    for name in ("neg", "pos")
    for number in range(count)
}


def make_folder(root, reviews=REVIEWS):
    # In reverse: nothing may depend on the order in which files were written.
    for place, content in reversed(reviews.items()):
        path = root / "imdb" / "aclImdb" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def make_archive(root):
    (root / "imdb").mkdir(parents=True)
    others = {
        "README": b"about",
        "train/neg/._0_0.txt": b"\0\5\x16\7",
        "train/unsup/0_0.txt": b"no label",
        "train/labeledBow.feat": b"0:1",
        "imdb.vocab": b"the",
    }
    with tarfile.open(root / "imdb" / "aclImdb_v1.tar.gz", "w:gz") as tar:
        for place, content in {**others, **REVIEWS}.items():
            member = tarfile.TarInfo(f"aclImdb/{place}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return root


def texts(split):
    return [(bytes_of(ids), target) for ids, target in (split[number] for number in range(len(split)))]


def expected(split, length):
    places = sorted(place for place in REVIEWS if place.startswith(split))
    return [(REVIEWS[place][:length], int("/pos/" in place)) for place in places]


@pytest.mark.parametrize("make", [make_folder, make_archive])
@pytest.mark.parametrize("length", [7, 40, 4000])
def test_lra_split_also_validates_on_the_test_reviews(make, length, tmp_path):
    made = load_imdb(ImdbSettings(split="lra", length=length), make(tmp_path))
    assert (tuple(made.hashes), made.class_names) == (("train", "validation", "test"), ("neg", "pos"))
    assert texts(made.train) == expected("train", length)
    assert texts(made.validation) == texts(made.test) == expected("test", length)
    assert made.hashes["validation"] == made.hashes["test"]


@pytest.mark.parametrize("make", [make_folder, make_archive])
def test_held_out_reviews_are_a_share_of_each_class_and_in_no_other_split(make, tmp_path):
    made = load_imdb(SHORT, make(tmp_path))
    assert sorted(texts(made.train) + texts(made.validation)) == sorted(expected("train", 40))
    assert torch.cat([made.validation.targets]).tolist() == [0] * 3 + [1] * 3
    assert texts(made.test) == expected("test", 40)


def test_archive_is_unpacked_once(tmp_path):
    make_archive(tmp_path)
    first = load_imdb(SHORT, tmp_path)
    assert sorted(path.name for path in (tmp_path / "imdb").iterdir()) == ["aclImdb_v1.tar.gz", "unpacked"]
    assert not (tmp_path / "imdb" / "unpacked" / "aclImdb" / "train" / "unsup").exists()
    assert list(tmp_path.rglob("._*")) == []
    (tmp_path / "imdb" / "aclImdb_v1.tar.gz").unlink()
    assert load_imdb(SHORT, tmp_path).hashes == first.hashes


@pytest.mark.parametrize("name", ["._0_0.txt", ".DS_Store", ".hidden.txt"])
def test_hidden_files_among_the_reviews_are_not_read(name, tmp_path):
    make_folder(tmp_path, {**REVIEWS, f"train/pos/{name}": b"\0\5\x16\7"})
    made = load_imdb(ImdbSettings(split="lra"), tmp_path)
    assert texts(made.train) == expected("train", 4000)


def test_number_of_reviews_that_differs_from_the_published_one_gives_a_warning(tmp_path, caplog, monkeypatch):
    make_folder(tmp_path)
    assert imdb.REVIEWS == 12_500
    monkeypatch.setattr(imdb, "REVIEWS", 5)
    load_imdb(SHORT, tmp_path)
    said = "train/{} holds 12 reviews, 5 are published; unless you mean to use others, get https"
    assert len(caplog.messages) == 2
    for message, name in zip(caplog.messages, ("neg", "pos"), strict=True):
        assert said.format(name) in message


def test_seed_decides_which_reviews_are_held_out(tmp_path):
    made, again, other = (
        load_imdb(SHORT.model_copy(update={"seed": seed}), make_folder(tmp_path)) for seed in (0, 0, 1)
    )
    assert made.hashes == again.hashes
    assert made.hashes["train"] != other.hashes["train"]
    assert made.hashes["test"] == other.hashes["test"]


def test_samples_are_bytes_plus_one(tmp_path):
    made = load_imdb(ImdbSettings(split="lra"), make_folder(tmp_path))
    ids, target = made.train[1]
    assert (ids.dtype, ids.tolist(), target) == (torch.int64, [byte + 1 for byte in review("train", "neg", 10)], 0)
    assert made.train.lengths.tolist() == [len(text) for text, _ in expected("train", 4000)]
    assert max(int(made.train[number][0].max()) for number in range(24)) < VOCABULARY_SIZE


def test_hashes_cover_bytes_lengths_and_classes(tmp_path):
    made = load_imdb(ImdbSettings(split="lra"), make_folder(tmp_path))
    documents = expected("test", 4000)
    content = b"".join(text for text, _ in documents)
    content += b"".join(len(text).to_bytes(8, "little") for text, _ in documents) + bytes(
        target for _, target in documents
    )
    assert made.hashes["test"] == hashlib.sha256(content).hexdigest()


def test_select_returns_the_documents_at_the_given_indices():
    documents = DocumentDataset.of([(b"one", 1), (b"", 0), (b"three", 2), (b"four", 1)])
    assert texts(documents.select(torch.tensor([3, 1, 2]))) == [(b"four", 1), (b"", 0), (b"three", 2)]
    assert texts(documents.select(torch.tensor([], dtype=torch.int64))) == []


def test_positions_are_shown_as_readable_text():
    assert show(torch.tensor([byte + 1 for byte in b"a <\n\xff"])) == ["a", "␣", "<", "\\x0a", "\\xff"]


def test_error_names_a_missing_class(tmp_path):
    make_folder(tmp_path, {place: text for place, text in REVIEWS.items() if "train/pos" not in place})
    with pytest.raises(DataError, match=r"cannot read .*train/pos: No such file"):
        load_imdb(SHORT, tmp_path)
    (tmp_path / "imdb" / "aclImdb" / "train" / "pos").mkdir()
    with pytest.raises(DataError, match=r"train/pos holds no \*\.txt; the reviews of https"):
        load_imdb(SHORT, tmp_path)


def test_error_names_an_empty_review(tmp_path):
    make_folder(tmp_path, {**REVIEWS, "test/pos/3_3.txt": b""})
    with pytest.raises(DataError, match=r"test/pos/3_3\.txt is empty; the archive was not fully unpacked"):
        load_imdb(SHORT, tmp_path)


def test_share_that_holds_out_nothing_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"validation=0\.01 holds out 0 of 12 neg reviews; at least one is required on each side"
    ):
        load_imdb(ImdbSettings(validation=0.01), make_folder(tmp_path))


def test_download_gets_the_published_archive(tmp_path, monkeypatch):
    asked = []

    def fetch(url, path, *, sha256, md5, most, progress):
        asked.append((url, sha256, md5))
        path.parent.parent.joinpath("made").mkdir()
        make_archive(tmp_path / "made")
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "made" / "imdb" / path.name).rename(path)
        return path

    monkeypatch.setattr(published, "fetch", fetch)
    monkeypatch.setattr(imdb, "MD5", "published")
    made = load_imdb(SHORT.model_copy(update={"download": True}), tmp_path)
    assert texts(made.test) == expected("test", 40)
    assert asked == [(imdb.URL, None, "published")]


def test_hub_gives_the_same_reviews_in_any_order(tmp_path, monkeypatch):
    def load_dataset(name, cache_dir):
        assert (name, cache_dir) == ("stanfordnlp/imdb", str(tmp_path / "huggingface"))
        return {
            split: [{"text": f"{split} {number}é", "label": number % 2} for number in order]
            for split in ("train", "test")
        }

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    settings = ImdbSettings(source="hub", split="lra", length=9)
    order = range(6)
    made = load_imdb(settings, tmp_path)
    assert sorted(texts(made.test)) == sorted((f"test {number}é".encode()[:9], number % 2) for number in range(6))
    order = [3, 1, 5, 0, 2, 4]
    assert load_imdb(settings, tmp_path).hashes == made.hashes
