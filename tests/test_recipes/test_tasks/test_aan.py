"""Pairs of papers from small files in the format of the release: cut and memory-mapped texts, and broken lines."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sma.errors import DataError, SpecError
from sma.recipes.experiment import load_experiment
from sma.recipes.io import published
from sma.recipes.reports.classification import measure_activation
from sma.recipes.tasks.batch import collate_pairs
from sma.recipes.tasks.documents import bytes_of
from sma.recipes.tasks.listops.expressions import FILES as LISTOPS_FILES
from sma.recipes.tasks.listops.task import ListOpsTask
from sma.recipes.tasks.retrieval import FILES, AANSettings, RetrievalTask, load_aan, read_pairs
from sma.recipes.training.run import run_experiment
from sma.spec import kinds

HEAD = b"Source\tTarget\n"


def line(label, first, second, ends=b"\n"):
    return b"\t".join([label, b"P05-1001", b"W98-12", first, second]) + ends


# Quotes and arbitrary bytes are ordinary text; the last line has no line end.
PAIRS = [
    (1, b'a "quoted, text', b"second \xc3\xa9"),
    (0, b"", b"x" * 50),
    (1, b"y" * 31, b"\xff\xfe\x00"),
    (0, b"no quote' \" here", b"z"),
    (0, b"five", b"six"),
]
CONTENT = b"".join(line(b"1.0" if label else b"0.0", *texts) for label, *texts in PAIRS).removesuffix(b"\n")


def release(folder, content=CONTENT):
    folder.mkdir(parents=True)
    for name in FILES.values():
        (folder / name).write_bytes(content)
    return folder


def archive_of(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {**files, "lra_release/lra_release/pathfinder32/img.png": b"image"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def pairs_of(dataset):
    return [
        (target, *map(bytes_of, documents)) for documents, target in (dataset[number] for number in range(len(dataset)))
    ]


@pytest.mark.parametrize("length", [1, 31, 4000])
def test_texts_are_the_columns_cut_to_the_length(length, tmp_path):
    (tmp_path / "file.tsv").write_bytes(CONTENT)
    made, sha256 = read_pairs(tmp_path / "file.tsv", length)
    expected = [(label, first[:length], second[:length]) for label, first, second in PAIRS]
    assert pairs_of(made) == expected
    assert made.lengths.tolist() == [max(len(first), len(second)) for _, first, second in expected]
    assert sha256 == hashlib.sha256(CONTENT).hexdigest()


_texts = st.binary(max_size=60).map(lambda text: text.translate(None, b"\t\n\r"))


@settings(max_examples=15)
@given(
    pairs=st.lists(st.tuples(st.sampled_from([b"0.0", b"1.0", b"0", b"1"]), _texts, _texts), min_size=1, max_size=8),
    crlf=st.booleans(),
)
def test_texts_without_tabs_and_line_ends_are_read_back(pairs, crlf, tmp_path_factory):
    path = tmp_path_factory.mktemp("aan") / "file.tsv"
    path.write_bytes(b"".join(line(*pair, ends=b"\r\n" if crlf else b"\n") for pair in pairs))
    made, _ = read_pairs(path, 45)
    assert pairs_of(made) == [(int(float(label)), first[:45], second[:45]) for label, first, second in pairs]


def test_texts_are_memory_mapped(tmp_path):
    (tmp_path / "file.tsv").write_bytes(CONTENT)
    made, _ = read_pairs(tmp_path / "file.tsv", 4000)
    assert isinstance(made.content, np.memmap)
    (first, second), _ = made[2]
    assert first.dtype == second.dtype == torch.int64


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        pytest.param(
            b"1.0\ta\tb\tc\n",
            r"file\.tsv, line 3: columns separated by tabs: 4; 5 are required: label",
            id="four columns",
        ),
        pytest.param(
            b"1.0\ta\tb\tc\td\te\n", r"line 3: columns separated by tabs: 6; 5 are required", id="six columns"
        ),
        pytest.param(b"2.0\ta\tb\tc\td\n", r"line 3: label b'2\.0' is neither 0\.0 nor 1\.0", id="label"),
        pytest.param(b"x" * 99 + b"\ta\tb\tc\td\n", r"line 3: label b'x+\.\.\.x*' is neither", id="long label"),
    ],
)
def test_error_names_a_broken_line(broken, complaint, tmp_path):
    good = line(b"1.0", b"first", b"second")
    (tmp_path / "file.tsv").write_bytes(good + good + broken + good)
    with pytest.raises(DataError, match=complaint):
        read_pairs(tmp_path / "file.tsv", 4000)


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b"  \n"])
def test_blank_lines_and_a_byte_order_mark_are_skipped(blank, tmp_path):
    lines = CONTENT.split(b"\n")
    (tmp_path / "file.tsv").write_bytes(b"\xef\xbb\xbf" + blank.join(line + b"\n" for line in lines) + blank)
    assert pairs_of(read_pairs(tmp_path / "file.tsv", 31)[0]) == [
        (label, first[:31], second[:31]) for label, first, second in PAIRS
    ]


def test_errors_name_empty_and_missing_files(tmp_path):
    (tmp_path / "file.tsv").touch()
    with pytest.raises(DataError, match=r"file\.tsv is empty; at least one pair is required"):
        read_pairs(tmp_path / "file.tsv", 4000)
    with pytest.raises(DataError, match=r"cannot read '.*none\.tsv': No such file"):
        read_pairs(tmp_path / "none.tsv", 4000)


@pytest.mark.parametrize("place", ["tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data"])
def test_release_is_found_at_every_known_path(place, tmp_path):
    release(tmp_path / place)
    made = load_aan(AANSettings(), tmp_path)
    assert pairs_of(made.test) == PAIRS
    assert made.hashes == dict.fromkeys(FILES.values(), hashlib.sha256(CONTENT).hexdigest())


@pytest.mark.parametrize("name", ["lra_release.gz", "lra_release.tar.gz"])
def test_release_is_unpacked_without_its_images(name, tmp_path):
    archive_of(tmp_path / name, {f"lra_release/lra_release/tsv_data/{file}": CONTENT for file in FILES.values()})
    assert pairs_of(load_aan(AANSettings(), tmp_path).train) == PAIRS
    assert not list(tmp_path.rglob("*.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "lra_release_text"]


def test_release_is_downloaded_on_request(tmp_path, monkeypatch):
    def fetch(url, path, *, sha256, md5, most, progress):
        assert (url, sha256, md5) == ("https://storage.googleapis.com/long-range-arena/lra_release.gz", None, None)
        archive_of(path, {f"lra_release/lra_release/tsv_data/{file}": CONTENT for file in FILES.values()})
        return path

    monkeypatch.setattr(published, "fetch", fetch)
    assert len(load_aan(AANSettings(download=True), tmp_path).test) == len(PAIRS)


def test_error_names_an_archive_that_lacks_the_folder(tmp_path):
    archive_of(tmp_path / "lra_release.gz", {"lra_release/lra_release/listops-1000/basic_train.tsv": HEAD})
    with pytest.raises(
        DataError,
        match=r"lra_release_text, unpacked from .*lra_release\.gz, has no tsv_data where it should be; delete both",
    ):
        load_aan(AANSettings(), tmp_path)


def test_error_names_a_file_missing_from_the_release(tmp_path):
    (release(tmp_path / "tsv_data") / "new_aan_pairs.eval.tsv").unlink()
    with pytest.raises(DataError, match=r"tsv_data lacks new_aan_pairs\.eval\.tsv; it must hold"):
        load_aan(AANSettings(), tmp_path)


def test_listops_is_read_from_the_release(tmp_path):
    files = {
        f"lra_release/lra_release/listops-1000/{name}": HEAD + b"( ( ( [MAX 2 ) 9 ) ] )\t9\n"
        for name in LISTOPS_FILES.values()
    }
    archive_of(tmp_path / "lra_release.gz", files)
    data = ListOpsTask(source="released").prepare(tmp_path, progress=False)
    ids, target = data.test[0]
    assert (data.show(ids), target) == (["[MAX", "2", "9", "]"], 9)
    assert set(data.hashes) == set(LISTOPS_FILES.values())


def test_pairs_are_padded_to_one_length_and_stored_in_adjacent_rows():
    samples = [
        ((torch.tensor([1, 2]), torch.tensor([3])), 1),
        ((torch.tensor([], dtype=torch.int64), torch.tensor([4, 5, 6])), 0),
    ]
    batch = collate_pairs(samples)
    assert batch.inputs.tolist() == [[1, 2, 0], [3, 0, 0], [0, 0, 0], [4, 5, 6]]
    assert batch.valid.sum(1).tolist() == [2, 1, 0, 3]
    assert batch.targets.tolist() == [1, 0]


def test_empty_batch_of_pairs_is_refused():
    with pytest.raises(DataError, match="a batch of no samples"):
        collate_pairs([])


EXPERIMENT = {
    "task": {"kind": "retrieval", "data": {"length": 40}},
    "model": {
        "kind": "pair_classifier",
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
    "training": {"updates": 2, "batch_size": 3, "learning_rate": 0.01, "evaluate_every": 1},
}


def test_model_is_trained_and_evaluated_on_the_files(tmp_path):
    release(tmp_path / "tsv_data")
    spec = load_experiment(EXPERIMENT)
    assert isinstance(spec.task, RetrievalTask)
    assert kinds("task")["retrieval"] is RetrievalTask
    data = spec.task.prepare(tmp_path, progress=False)
    finished = run_experiment(spec, tmp_path / "run", data, accelerator="cpu", progress=False)
    assert finished.summary["test_accuracy"] * 5 == pytest.approx(
        round(finished.summary["test_accuracy"] * 5), abs=1e-5
    )
    assert finished.summary["data"] == dict(data.hashes)
    # The figures show both documents of a pair, one after the other.
    shown = {"".join(example.texts) for example in finished.report.examples}
    whole = {"".join(data.show(torch.cat(data.test[number][0]))) for number in range(len(PAIRS))}
    assert shown <= whole
    grouped = measure_activation(finished.module.model, data.test, data._replace(group="".join))
    assert set(grouped.by_group) == whole
    assert all(example.active.shape == (1, len(example.texts)) for example in finished.report.examples)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("encoder.vocabulary=256", r"model\.encoder\.vocabulary=256 must be at least 257"),
        ("head.classes=3", r"model\.head\.classes=3 must be 2, the classes of the task 'retrieval'"),
        (
            "model.kind=sequence_classifier",
            r"kind 'sequence_classifier' does not fit the task 'retrieval'; use kind 'pair_classifier'",
        ),
    ],
)
def test_model_that_cannot_learn_the_task_is_refused(setting, complaint):
    with pytest.raises(SpecError, match=complaint):
        load_experiment(EXPERIMENT, [setting])
