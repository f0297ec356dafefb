"""IMDB from a small made-up copy of its folder, its archive and the Hub: every review in one split, its bytes as they
stand, cut.
"""

import hashlib
import io
import sys
import tarfile
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sma.errors import DataError, SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.io import published
from sma.recipes.tasks import text as imdb
from sma.recipes.tasks.documents import VOCABULARY_SIZE, DocumentDataset, bytes_of, show
from sma.recipes.tasks.text import ImdbSettings, TextTask, load_imdb
from sma.recipes.training.run import run_experiment
from sma.spec import kinds

SPLITS = ("train", "validation", "test")
SHORT = ImdbSettings(validation=0.25, length=40)


@pytest.fixture(autouse=True)
def any_archive(monkeypatch):
    """The archives here are made up."""
    monkeypatch.setattr(imdb, "MD5", None)


def review(split, name, number):
    """A review that says what it is, with a line break, a byte that is no ASCII, and a length of its own."""
    return f"{split} {name} {number}<br /><br />".encode() + b"\xe9" + b"!" * number


REVIEWS = {
    f"{split}/{name}/{number}_{number % 10}.txt": review(split, name, number)
    for split, count in (("train", 12), ("test", 5))
    for name in ("neg", "pos")
    for number in range(count)
}


def make_folder(root, reviews=REVIEWS):
    # Backwards: nothing may depend on the order in which files were written.
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
def test_lra_split_is_the_published_one_with_the_test_reviews_twice(make, length, tmp_path):
    made = load_imdb(ImdbSettings(split="lra", length=length), make(tmp_path))
    assert texts(made.train) == expected("train", length)
    assert texts(made.validation) == texts(made.test) == expected("test", length)
    assert made.hashes["validation"] == made.hashes["test"]


@pytest.mark.parametrize("make", [make_folder, make_archive])
def test_held_out_reviews_are_a_share_of_each_class_and_of_no_other_split(make, tmp_path):
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


def test_several_at_once_read_the_same_reviews_from_one_archive(tmp_path):
    make_archive(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(lambda _: load_imdb(SHORT, tmp_path).hashes, range(4)))
    assert hashes == [load_imdb(SHORT, make_folder(tmp_path / "folder")).hashes] * 4


def test_archive_that_somebody_put_there_must_have_the_published_hash(tmp_path, monkeypatch):
    make_archive(tmp_path)
    found = hashlib.md5((tmp_path / "imdb" / "aclImdb_v1.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(imdb, "MD5", "0" * 32)
    with pytest.raises(
        DataError,
        match=rf"aclImdb_v1\.tar\.gz is not the file that https.* should give; move it away.* is {found}, expected 0",
    ):
        load_imdb(SHORT, tmp_path)
    monkeypatch.setattr(imdb, "MD5", found)
    assert texts(load_imdb(SHORT, tmp_path).test) == expected("test", 40)


@pytest.mark.parametrize("name", ["._0_0.txt", ".DS_Store", ".hidden.txt"])
def test_what_systems_leave_among_the_reviews_is_not_read(name, tmp_path):
    make_folder(tmp_path, {**REVIEWS, f"train/pos/{name}": b"\0\5\x16\7"})
    made = load_imdb(ImdbSettings(split="lra"), tmp_path)
    assert texts(made.train) == expected("train", 4000)


def test_number_of_reviews_is_the_published_one_or_said(tmp_path, caplog, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setattr(imdb, "REVIEWS", 5)
    load_imdb(SHORT, tmp_path)
    said = "train/{} holds 12 reviews, 5 are published; unless you mean to use others, get https"
    assert len(caplog.messages) == 2
    for message, name in zip(caplog.messages, ("neg", "pos"), strict=True):
        assert said.format(name) in message


def test_number_of_published_reviews():
    assert imdb.REVIEWS == 12_500


def test_seed_decides_what_is_held_out(tmp_path):
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


def test_hashes_are_those_of_bytes_lengths_and_classes(tmp_path):
    made = load_imdb(ImdbSettings(split="lra"), make_folder(tmp_path))
    documents = expected("test", 4000)
    content = b"".join(text for text, _ in documents)
    content += b"".join(len(text).to_bytes(8, "little") for text, _ in documents) + bytes(
        target for _, target in documents
    )
    assert made.hashes["test"] == hashlib.sha256(content).hexdigest()


def test_selected_documents_are_those_of_their_numbers():
    documents = DocumentDataset.of([(b"one", 1), (b"", 0), (b"three", 2), (b"four", 1)])
    assert texts(documents.select(torch.tensor([3, 1, 2]))) == [(b"four", 1), (b"", 0), (b"three", 2)]
    assert texts(documents.select(torch.tensor([], dtype=torch.int64))) == []


def test_texts_of_positions_are_readable():
    assert show(torch.tensor([byte + 1 for byte in b"a <\n\xff"])) == ["a", "␣", "<", "\\x0a", "\\xff"]


def test_missing_reviews_are_a_sentence(tmp_path):
    with pytest.raises(
        DataError,
        match=r"there are no IMDB reviews in .*imdb: neither aclImdb/\{train,test\}.* nor aclImdb_v1\.tar\.gz; put",
    ):
        load_imdb(SHORT, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_class_is_named(tmp_path):
    make_folder(tmp_path, {place: text for place, text in REVIEWS.items() if "train/pos" not in place})
    with pytest.raises(DataError, match=r"cannot read .*train/pos: No such file"):
        load_imdb(SHORT, tmp_path)
    (tmp_path / "imdb" / "aclImdb" / "train" / "pos").mkdir()
    with pytest.raises(DataError, match=r"train/pos holds no \*\.txt; the reviews of https"):
        load_imdb(SHORT, tmp_path)


def test_empty_review_is_named(tmp_path):
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


def test_missing_package_of_the_hub_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError,
        match=r"task\.data\.source=hub reads stanfordnlp/imdb .* pip install datasets, or set task\.data\.source=files",
    ):
        load_imdb(ImdbSettings(source="hub"), tmp_path)


def test_hub_that_cannot_be_reached_is_a_sentence(tmp_path, monkeypatch):
    def load_dataset(name, cache_dir):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DataError,
        match=r"cannot get stanfordnlp/imdb from the Hub: no route; check .*, or set task\.data\.source=files",
    ):
        load_imdb(ImdbSettings(source="hub"), tmp_path)


EXPERIMENT = {
    "task": {"kind": "text", "data": {"validation": 0.25, "length": 40}},
    "model": {
        "kind": "sequence_classifier",
        "width": 4,
        "encoder": {"kind": "token_embedding", "vocabulary": 257, "padding": 0},
        "layers": [
            {
                "backbone": {"kind": "ema", "state_size": 2},
                "modules": {"attention": {"kind": "gau", "query_size": 2, "hidden_size": 4, "window": 4}},
            }
        ],
        "head": {"kind": "mean_pool_mlp", "hidden": 4, "classes": 2},
    },
    "training": {"updates": 2, "batch_size": 5, "learning_rate": 0.01, "evaluate_every": 1},
}


def test_from_the_archive_to_a_trained_and_evaluated_model(tmp_path):
    spec = load_experiment(EXPERIMENT)
    assert isinstance(spec.task, TextTask)
    assert kinds("task")["text"] is TextTask
    data = spec.task.prepare(make_archive(tmp_path), progress=False)
    assert data.class_names == ("neg", "pos")
    assert set(data.hashes) == set(SPLITS)
    summary = run_experiment(spec, tmp_path / "run", data, accelerator="cpu", progress=False).summary
    assert summary["test_accuracy"] * 10 == pytest.approx(round(summary["test_accuracy"] * 10), abs=1e-5)
    assert summary["data"] == dict(data.hashes)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        (
            "encoder.vocabulary=256",
            r"model\.encoder\.vocabulary=256 must be at least 257: padding, and one for every byte",
        ),
        ("encoder={kind: real_number}", r"model\.encoder\.vocabulary=0 must be at least 257"),
        ("head.classes=3", r"model\.head\.classes=3 must be 2, the classes of the task 'text'"),
        (
            "model.kind=pair_classifier",
            r"the model kind 'pair_classifier' does not fit the task 'text'; use kind 'sequence_classifier'",
        ),
    ],
)
def test_model_that_cannot_learn_the_task_is_refused(setting, complaint):
    with pytest.raises(SpecError, match=complaint):
        load_experiment(EXPERIMENT, [setting])
