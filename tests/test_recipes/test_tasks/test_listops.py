"""ListOps data: files of Long Range Arena, generated or released, and errors about broken ones."""

import csv
import errno
import json
import multiprocessing
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import DataError
from sma.recipes.io import generated as files
from sma.recipes.tasks.batch import collate
from sma.recipes.tasks.listops import expressions as listops
from sma.recipes.tasks.listops import trees as listops_trees
from sma.recipes.tasks.listops.expressions import (
    FILES,
    VOCABULARY,
    ListOpsSettings,
    decode,
    encode,
    evaluate_expression,
    load_listops,
    prepare_listops,
    read_listops,
)

SMALL = ListOpsSettings(
    min_length=4, max_length=40, max_depth=4, max_arity=4, train=300, validation=40, test=60, seed=3
)
HEADER = b"Source\tTarget\n"


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def application(operator, arguments):
    """An expression as a pair: in the spelling of Long Range Arena, and without parentheses."""
    nested = operator
    for part in [*(argument[0] for argument in arguments), "]"]:
        nested = f"( {nested} {part} )"
    return nested, " ".join([operator, *(argument[1] for argument in arguments), "]"])


EXPRESSIONS = st.recursive(
    st.sampled_from([(digit, digit) for digit in "0123456789"]),
    lambda argument: st.builds(
        application, st.sampled_from(["[MIN", "[MAX", "[MED", "[SM"]), st.lists(argument, min_size=1, max_size=5)
    ),
)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, prepare_listops(SMALL, folder, workers=1, progress=False)


def test_output_of_a_generator_version_never_changes(small_data):
    _, data = small_data
    assert listops_trees.GENERATOR_VERSION == 1, "new version: record its hash here"
    assert data.hashes["basic_train.tsv"] == "b0c29db84621372fc32ef89a8b2310843f9545b91235cf9a2c048aebf99cecd9"


def test_manifest_holds_settings_version_and_the_hash_of_every_file(small_data):
    folder, data = small_data
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {"generator": "listops", "version": 1, "settings": SMALL.model_dump(), "files": data.hashes}
    assert data.hashes == {name: files.digest_of(folder / name) for name in FILES.values()}
    assert set(files_in(folder)) == {*FILES.values(), "manifest.json"}


def test_second_call_reads_the_data_of_the_first(tmp_path, monkeypatch):
    first = prepare_listops(SMALL, tmp_path, workers=1, progress=False)
    monkeypatch.setattr(listops, "generate_lines", None)
    second = prepare_listops(SMALL, tmp_path, progress=False)
    assert second.hashes == first.hashes
    assert torch.equal(second.train[0][0], first.train[0][0])


@pytest.mark.parametrize(
    ("owner", "name"), [(listops, "generate_lines"), (listops_trees, "draw_chunk"), (files.HashedFile, "write")]
)
@pytest.mark.parametrize(
    ("raised", "expected", "complaint"),
    [
        pytest.param(KeyboardInterrupt("stop"), KeyboardInterrupt, "stop", id="interrupt"),
        pytest.param(
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            DataError,
            "cannot keep data in .*: No space left on",
            id="full-disk",
        ),
    ],
)
def test_failed_generation_leaves_nothing(tmp_path, monkeypatch, owner, name, raised, expected, complaint):
    def fail(*arguments, **keywords):
        raise raised

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(expected, match=complaint):
        prepare_listops(SMALL, tmp_path, workers=1, progress=False)
    assert files_in(tmp_path) == {}


def test_workers_end_when_writing_fails(tmp_path, monkeypatch):
    def fail(self, content):
        if content != HEADER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.HashedFile, "write", fail)
    with pytest.raises(DataError, match="No space left on device") as caught:
        prepare_listops(SMALL, tmp_path, workers=2, progress=False)
    assert caught.value.__traceback__ is not None  # the traceback keeps the frames alive
    assert multiprocessing.active_children() == []


def test_changed_file_is_refused(tmp_path):
    prepare_listops(SMALL, tmp_path, workers=1, progress=False)
    with (tmp_path / "basic_val.tsv").open("ab") as file:
        file.write(b"5\t5\n")
    with pytest.raises(
        DataError, match=r"basic_val.tsv was changed since it was generated; delete it to generate it again"
    ):
        prepare_listops(SMALL, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("update", "change"),
    [
        pytest.param({"seed": 9}, "seed is 3 there, 9 is required", id="seed"),
        pytest.param(
            {"train": 10, "max_depth": 3},
            "max_depth is 4 there, 3 is required, train is 300 there, 10 is required",
            id="two-fields",
        ),
    ],
)
def test_folder_of_other_settings_is_refused(small_data, update, change):
    with pytest.raises(
        DataError, match=rf"holds data generated with other settings \({change}\); choose another folder, or delete it"
    ):
        prepare_listops(SMALL.model_copy(update=update), small_data[0], progress=False)


def test_progress_counts_up_to_the_requested_number(tmp_path):
    seen = []
    prepare_listops(SMALL, tmp_path, workers=1, progress=lambda found, wanted: seen.append((found, wanted)))
    assert seen[-1] == (400, 400)


def test_progress_bar_is_shown_only_on_request(tmp_path, capsys):
    prepare_listops(SMALL, tmp_path / "silent", workers=1, progress=False)
    assert capsys.readouterr().out == ""
    prepare_listops(SMALL, tmp_path / "shown", workers=1)
    assert "ListOps: 400 of 400" in capsys.readouterr().out


@given(EXPRESSIONS)
def test_decode_undoes_encode(expression):
    nested, plain = expression
    ids = encode(nested)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, encode(plain))
    assert decode(ids) == plain


def test_symbols_have_ids_1_to_15_and_padding_is_0():
    assert len(VOCABULARY) == 16
    assert encode("[SM " + " ".join("0123456789") + " [MIN 1 ] [MAX 1 ] [MED 1 ] ]").unique().tolist() == list(
        range(1, 16)
    )
    assert decode([0, *encode("[MAX 2 9 ]").tolist(), 0, 0]) == "[MAX 2 9 ]"


@pytest.mark.parametrize("number", [-1, 16])
def test_decode_refuses_numbers_outside_the_vocabulary(number):
    with pytest.raises(DataError, match=f"token id {number} is not in the vocabulary; ids are 0 to 15"):
        decode([number])


def test_reader_returns_the_generated_expressions(small_data):
    folder, data = small_data
    lines = (folder / "basic_train.tsv").read_text().splitlines()[1:]
    for (ids, target), line in zip(data.train, lines, strict=True):
        source, value = line.split("\t")
        assert decode(ids).split() == [token for token in source.split() if token not in "()"]
        assert target == int(value)


def test_released_files_are_read_like_generated_ones(small_data, tmp_path):
    # Long Range Arena writes with the csv module, whose lines end in CR LF.
    folder, data = small_data
    for name in FILES.values():
        with (folder / name).open(newline="") as source, (tmp_path / name).open("w", newline="") as copy:
            csv.writer(copy, delimiter="\t").writerows(csv.reader(source, delimiter="\t"))
    assert (tmp_path / "basic_test.tsv").read_bytes().startswith(b"Source\tTarget\r\n")
    released = load_listops(tmp_path)
    for ours, theirs in zip(data[:3], released[:3], strict=True):
        assert ours.sha256 == theirs.sha256
    assert set(released.hashes) == set(FILES.values())


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"( ( ( [MAX 2 ) 9 ) ] )\t9\n", id="release"),
        pytest.param(b"[MAX 2 9 ]\t9\n", id="no-parentheses"),
        pytest.param(b" (  ( ( [MAX  2 ) 9 ) ] ) \t9\r\n", id="many-blanks"),
        pytest.param(b"( ( ( [MAX 2 ) 9 ) ] )\t9", id="no-line-end"),
    ],
)
def test_spelling_of_blanks_and_parentheses_does_not_matter(tmp_path, line):
    (tmp_path / "some.tsv").write_bytes(HEADER + line)
    split = read_listops(tmp_path / "some.tsv")
    assert decode(split.content) == "[MAX 2 9 ]"
    assert split.targets.tolist() == [9]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    (tmp_path / "some.tsv").write_bytes(b"\xef\xbb\xbf" + HEADER + b"\n[MAX 2 9 ]\t9\n  \r\n7\t7\n\n")
    split = read_listops(tmp_path / "some.tsv")
    assert decode(split.content) == "[MAX 2 9 ] 7"
    assert (split.targets.tolist(), split.offsets.tolist()) == ([9, 7], [0, 4, 5])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(
            b"",
            "bad.tsv is empty; the header 'Source<TAB>Target' and one line per expression are required",
            id="empty-file",
        ),
        pytest.param(HEADER, "bad.tsv holds a header and no expressions; at least one line is required", id="no-lines"),
        pytest.param(
            b"5\t5\n", r"bad.tsv, line 1: b'5\\t5\\n' where the header 'Source<TAB>Target' is required", id="no-header"
        ),
        pytest.param(HEADER + b"5\n", "line 2: columns separated by tabs: 1; exactly 2 are required", id="one-column"),
        pytest.param(
            HEADER + b"5\t5\n5\t5\t5\n",
            "line 3: columns separated by tabs: 3; exactly 2 are required",
            id="three-columns",
        ),
        pytest.param(
            HEADER + b"\n \r\n", "bad.tsv holds a header and no expressions; at least one line", id="blank-lines"
        ),
        pytest.param(
            HEADER + b"\n5\n", "line 3: columns separated by tabs: 1; exactly 2 are required", id="after-a-blank-line"
        ),
        pytest.param(HEADER + b"\t\n", "line 2: the expression is empty", id="tab-alone"),
        pytest.param(
            HEADER + b"\t5\n", "line 2: the expression is empty; a digit or an operator is required", id="no-source"
        ),
        pytest.param(HEADER + b"( )\t5\n", "line 2: the expression is empty", id="only-parentheses"),
        pytest.param(HEADER + b"5\t\n", "line 2: target '' is not a digit 0 to 9", id="no-target"),
        pytest.param(HEADER + b"5\t10\n", "line 2: target '10' is not a digit 0 to 9", id="target-too-large"),
        pytest.param(
            HEADER + b"[MAXX 1 2 ]\t2\n",
            r"line 2: symbol 1 is '\[MAXX', which is unknown; did you mean '\[MAX'\? known symbols: \[MIN",
            id="unknown",
        ),
        pytest.param(HEADER + b"[MAX 1 12 ]\t2\n", "line 2: symbol 3 is '12', which is unknown", id="two-digits"),
        pytest.param(HEADER + b"a 1 2 ]\t2\n", "line 2: symbol 1 is 'a', which is unknown", id="letter"),
        pytest.param(HEADER + b"[MAX 1]2 ]\t2\n", r"line 2: symbol 2 is '1\]2', which is unknown", id="no-blanks"),
        pytest.param(HEADER + b"[MAX1 2 ]\t2\n", r"line 2: symbol 1 is '\[MAX1', which is unknown", id="glued"),
        pytest.param(
            HEADER + b"[MAX " + b"7" * 50 + b" ]\t2\n",
            r"line 2: symbol 2 is '7+\.\.\.7*', which is unknown",
            id="long-symbol",
        ),
        pytest.param(
            HEADER + b"[MAX 1 [MIN 2 3 ]\t2\n",
            r"line 2: 1 operators are not closed; every operator needs its '\]'",
            id="not-closed",
        ),
        pytest.param(
            HEADER + b"[MAX 1 ] ]\t2\n", r"line 2: symbol 4 is a '\]' that closes no operator", id="closed-twice"
        ),
        pytest.param(
            HEADER + b"[MAX 1 ] 2\t2\n",
            "line 2: the expression ends at symbol 3 of 4; one expression per line",
            id="two-expressions",
        ),
        pytest.param(
            HEADER + b"[MAX ( ] )\t2\n",
            r"line 2: operator '\[MAX' has no arguments; at least one is required",
            id="no-arguments",
        ),
        pytest.param(
            HEADER + b"[MAX \xff 2 ]\t2\n",
            "line 2: byte 0xff at column 6 is not UTF-8; the file is damaged",
            id="not-utf-8",
        ),
        pytest.param(HEADER + "[MAX ² 2 ]\t2\n".encode(), "line 2: symbol 2 is '²', which is unknown", id="not-ascii"),
    ],
)
def test_error_of_a_broken_file_names_file_and_line(tmp_path, content, complaint):
    (tmp_path / "bad.tsv").write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        read_listops(tmp_path / "bad.tsv")
    assert str(tmp_path / "bad.tsv") in str(caught.value)


def test_missing_file_raises_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot read '.*none.tsv': No such file or directory"):
        read_listops(tmp_path / "none.tsv")
    with pytest.raises(DataError, match=r"cannot read '.*basic_train.tsv': No such file or directory"):
        load_listops(str(tmp_path))


def test_dataset_gives_ids_and_targets_by_index(small_data):
    dataset = small_data[1].validation
    assert dataset.lengths.tolist() == [len(ids) for ids, _ in dataset]
    for ids, target in dataset:
        assert ids.dtype == torch.int64
        assert target == evaluate_expression(decode(ids).split())
    assert torch.equal(dataset[-1][0], dataset[39][0])
    with pytest.raises(IndexError, match="out of range"):
        dataset[40]


def test_data_loader_shuffles_samples_into_batches(small_data):
    split = small_data[1].train
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(split, 32, shuffle=True, collate_fn=collate, generator=generator)
    read = [
        (ids[valid].tolist(), int(target))
        for batch in loader
        for ids, valid, target in zip(batch.inputs, batch.valid, batch.targets, strict=True)
    ]
    kept = [(ids.tolist(), int(target)) for ids, target in (split[number] for number in range(len(split)))]
    assert read != kept
    assert sorted(read) == sorted(kept)


def test_group_of_an_expression_is_its_outermost_operator(small_data):
    texts = ("[MAX 1 [SM 2 3 ] ]", "[SM 0 [MIN 1 ] ]", "[MED 5 ]", "[MIN 4 [MAX 1 ] ]", "7")
    groups = [small_data[1].group(text.split()) for text in texts]
    assert groups == ["outermost MAX", "outermost SM", "outermost MED", "outermost MIN", "single digit"]
