"""Benchmark of a choice by the levels of trees: the heights, the choices, and both ways of a short training."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.listops_levels import CHOICES, CLOSE, heights, main
from sma.recipes.tasks.listops.expressions import VOCABULARY

DIGITS = st.integers(0, 9).map(str)
OPERATORS = st.sampled_from([token for token in VOCABULARY if token.startswith("[")])
TREES = st.recursive(
    DIGITS, lambda trees: st.tuples(OPERATORS, st.lists(trees, min_size=1, max_size=3)), max_leaves=12
).filter(lambda tree: not isinstance(tree, str))


def _height(tree):
    return 0 if isinstance(tree, str) else 1 + max(map(_height, tree[1]))


def _walk(tree, parent=0):
    """The tokens of a tree, each with the height of its own subtree and of its parent's."""
    if isinstance(tree, str):
        return [(tree, 0, parent)]
    operator, arguments = tree
    height = _height(tree)
    inside = [token for argument in arguments for token in _walk(argument, height)]
    return [(operator, height, 0), *inside, ("]", height, parent)]


@given(st.lists(TREES, min_size=1, max_size=3))
def test_heights_are_those_of_the_trees(trees):
    rows = [_walk(tree) for tree in trees]
    longest = max(map(len, rows))
    ids = torch.tensor([[VOCABULARY.index(token) for token, _, _ in row] + [0] * (longest - len(row)) for row in rows])
    own, parent = heights(ids)
    for number, row in enumerate(rows):
        padding = [0] * (longest - len(row))
        assert own[number].tolist() == [height for _, height, _ in row] + padding
        assert parent[number].tolist() == [above for _, _, above in row] + padding


def test_choices_of_an_expression():
    words = ["[MAX", "3", "[MIN", "4", "5", "]", "]"]
    ids = torch.tensor([[VOCABULARY.index(word) for word in words]])
    first, second, third = (mask[0, :, 0].tolist() for mask in CHOICES["levels"](ids, 3))
    assert [word for word, on in zip(words, first, strict=True) if on] == ["[MIN", "4", "5", "]"]
    assert [word for word, on in zip(words, second, strict=True) if on] == ["[MAX", "3", "]", "]"]
    assert not any(third)
    assert torch.equal(CHOICES["levels"](ids, 1)[0], torch.ones(1, 7, 1, dtype=torch.bool))
    assert all(torch.equal(mask[..., 0], ids == CLOSE) for mask in CHOICES["brackets"](ids, 2))


@pytest.mark.parametrize("words", [[], ["--imitate"], ["--choice", "brackets"]], ids=["replay", "imitate", "brackets"])
def test_a_short_training_is_measured(words, tmp_path, capsys):
    sizes = ["train=64", "validation=8", "test=40", "max_length=15"]
    settings = [f"task.data.{size}" for size in sizes] + ["training.updates=3", "training.warmup=1", "layers.repeat=2"]
    options = [word for setting in settings for word in ("--set", setting)]
    assert main([*words, *options, "--data", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["updates"], found["imitate"]) == (40, 3, "--imitate" in words)
    assert 0 <= found["accuracy"] <= 1
    if "--imitate" not in words:
        assert found["agreement"] == [1.0, 1.0]
