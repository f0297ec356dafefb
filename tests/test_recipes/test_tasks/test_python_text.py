"""Passages of Python's modules: their sources, disjoint splits of modules, and labels."""

from itertools import chain
from pathlib import PurePosixPath

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sma.errors import DataError, SpecError
from sma.recipes.tasks import python_text
from sma.recipes.tasks.documents import bytes_of
from sma.recipes.tasks.python_text import INTERNET, deal_modules, python_documents, python_modules, python_pairs
from sma.recipes.tasks.retrieval import AANSettings, RetrievalTask, load_aan
from sma.recipes.tasks.text import ImdbSettings, TextTask, load_imdb

SPLITS = ("train", "validation", "test")


def made_up_modules(count=20, passages=6, length=8):
    """Modules whose even bytes give the module and odd bytes the passage; every second one is about the internet."""
    internet = sorted(INTERNET)
    names = [f"{internet[number]}/a.py" if number % 2 else f"m{number}.py" for number in range(count)]
    return {
        name: b"".join(bytes([65 + number, 65 + place] * (length // 2)) for place in range(passages))
        for number, name in enumerate(names)
    }


def module_of(passage):
    assert len(set(passage[::2])) == 1
    return passage[0] - 65


def texts(split):
    return [(bytes_of(ids), target) for ids, target in (split[number] for number in range(len(split)))]


def pairs_of(pairs):
    content = pairs.content.tobytes()
    return [
        (content[a:b], content[c:d], target)
        for (a, b, c, d), target in zip(pairs.spans.tolist(), pairs.targets.tolist(), strict=True)
    ]


def test_modules_are_the_sources_of_the_standard_library_without_tests_and_tables():
    modules = python_modules()
    assert list(modules) == sorted(modules)
    assert {"json/decoder.py", "socket.py", "textwrap.py"} <= set(modules)
    assert b"class JSONDecoder" in modules["json/decoder.py"]
    parts = {part for name in modules for part in PurePosixPath(name).parts}
    assert parts & {"test", "tests", "site-packages", "encodings", "__pycache__"} == set()
    assert len({name for name in modules if name.split("/")[0].removesuffix(".py") in INTERNET}) > 50


def test_python_without_sources_gives_an_error_message(tmp_path, monkeypatch):
    monkeypatch.setattr(python_text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        DataError, match=r"came without the sources of its standard library \(looked for \*\.py in .*\); install them"
    ):
        python_modules()


@given(st.integers(5, 60), st.floats(0.2, 0.7), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_every_module_is_in_one_split_whatever_the_order_of_names(count, validation, seed):
    names = [f"m{number}.py" for number in range(count)]
    parts = deal_modules(names, validation, seed)
    assert sorted(chain(*parts.values())) == sorted(names)
    assert len(parts["test"]) == round(0.2 * count)
    assert len(parts["validation"]) == round(validation * (count - len(parts["test"])))
    assert parts == deal_modules(reversed(names), validation, seed)


def test_seed_decides_the_split_of_a_module():
    names = list(made_up_modules())
    assert deal_modules(names, 0.2, 0) != deal_modules(names, 0.2, 1)


@pytest.mark.parametrize(
    ("count", "validation", "split"), [(2, 0.5, "test"), (20, 0.01, "validation"), (5, 0.9, "train")]
)
def test_split_without_a_module_is_refused(count, validation, split):
    names = [f"m{number}.py" for number in range(count)]
    with pytest.raises(
        DataError, match=rf"validation={validation} leaves none of the {count} modules for the split '{split}'"
    ):
        deal_modules(names, validation, 0)


def test_documents_are_whole_passages_half_of_each_class_and_no_module_is_in_two_splits():
    modules = made_up_modules()
    made = python_documents(8, 0.25, 0, modules)
    seen = {}
    for name, split in zip(SPLITS, made, strict=True):
        for passage, target in texts(split):
            place = 8 * (passage[1] - 65)
            assert passage == list(modules.values())[module_of(passage)][place : place + 8]
            assert target == module_of(passage) % 2
            assert seen.setdefault(module_of(passage), name) == name
        assert split.targets.sum() * 2 == len(split) > 0
        assert len({text for text, _ in texts(split)}) == len(split)
        assert set(split.lengths.tolist()) == {8}


def test_remainder_of_a_module_shorter_than_a_passage_is_dropped():
    modules = {name: content + b"rest" for name, content in made_up_modules().items()}
    for with_rest, without in zip(
        python_documents(8, 0.25, 0, modules), python_documents(8, 0.25, 0, made_up_modules()), strict=True
    ):
        assert with_rest.sha256 == without.sha256


def test_split_without_a_passage_of_some_class_is_refused():
    with pytest.raises(
        DataError, match=r"the split 'train' has no passage of 49 bytes of some class; lower the length"
    ):
        python_documents(49, 0.25, 0, made_up_modules())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [2, 8, 12])
def test_pairs_are_a_passage_and_its_continuation_or_a_passage_of_another_module(seed, length):
    modules = made_up_modules()
    seen = {}
    for name, pairs in python_pairs(length, 0.25, seed, modules).items():
        found = pairs_of(pairs)
        for first, second, target in found:
            assert len(first) == len(second) == length
            assert (module_of(first) == module_of(second)) == bool(target)
            if target:
                assert first + second in list(modules.values())[module_of(first)]
            for passage in (first, second):
                assert seen.setdefault(module_of(passage), name) == name
        spans = pairs.spans
        assert torch.equal(spans[:, 1] - spans[:, 0], torch.full((len(found),), length))
        # Neither passage alone determines the label: each occurs equally often with both labels.
        for column in (0, 2):
            with_either = [sorted(spans[pairs.targets == target, column].tolist()) for target in (0, 1)]
            assert with_either[0] == with_either[1]


def test_split_with_most_passages_from_one_module_is_refused():
    modules = {f"m{number}.py": b"x" * (1000 if number < 12 else 16) for number in range(15)}
    refused = r"\d+ of the \d+ passages of the split '\w+' are of one module, at most half may be; lower the length"
    with pytest.raises(DataError, match=refused):
        python_pairs(8, 0.1, 0, modules)


def test_limits_hold_and_the_seed_selects_the_passages(monkeypatch):
    monkeypatch.setattr(python_text, "LIMITS", {"train": 20, "validation": 6, "test": 4})
    modules = made_up_modules()
    assert [len(split) for split in python_documents(8, 0.25, 0, modules)] == [20, 6, 4]
    assert [len(pairs.targets) for pairs in python_pairs(8, 0.25, 0, modules).values()] == [20, 6, 4]
    assert python_documents(8, 0.25, 0, modules)[0].sha256 != python_documents(8, 0.25, 1, modules)[0].sha256


def test_same_modules_in_another_order_give_the_same_hashes():
    modules = made_up_modules()
    backwards = dict(reversed(modules.items()))
    pairs, again = python_pairs(8, 0.25, 0, modules), python_pairs(8, 0.25, 0, backwards)
    assert {split: part.sha256 for split, part in pairs.items()} == {
        split: part.sha256 for split, part in again.items()
    }
    assert len({part.sha256 for part in pairs.values()}) == 3
    documents, others = python_documents(8, 0.25, 0, modules), python_documents(8, 0.25, 0, backwards)
    assert [split.sha256 for split in documents] == [split.sha256 for split in others]


def test_loaders_of_reviews_and_papers_give_python_passages_without_a_data_folder(tmp_path):
    folder = tmp_path / "none"
    reviews = load_imdb(ImdbSettings(source="python", length=100, validation=0.2, seed=3), folder)
    expected = python_documents(100, 0.2, 3)
    assert reviews.hashes == {name: split.sha256 for name, split in zip(SPLITS, expected, strict=True)}
    papers = load_aan(AANSettings(source="python", length=100, validation=0.2, seed=3), folder)
    pairs = python_pairs(100, 0.2, 3)
    assert papers.hashes == {name: part.sha256 for name, part in pairs.items()}
    (first, second), target = papers.test[0]
    assert (bytes_of(first), bytes_of(second), target) == pairs_of(pairs["test"])[0]
    assert not folder.exists()


def test_class_names_describe_python_passages(tmp_path):
    assert TextTask(data={"source": "python", "length": 100}).prepare(tmp_path).class_names == ("other", "internet")
    assert RetrievalTask(data={"source": "python", "length": 100}).prepare(tmp_path).class_names == (
        "elsewhere",
        "continued",
    )


def test_lra_split_is_refused_for_python_passages():
    with pytest.raises(SpecError, match=r"split='lra' requires reviews; with source='python' use split='held_out'"):
        ImdbSettings(source="python", split="lra")
