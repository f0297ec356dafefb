"""The ListOps generator against a naive one written from the definition of the task."""

import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sma.errors import DataError, SpecError
from sma.recipes.tasks.listops import trees as listops_trees
from sma.recipes.tasks.listops.expressions import evaluate_expression
from sma.recipes.tasks.listops.trees import (
    PAPER,
    TINY,
    ListOpsSettings,
    draw_chunk,
    generate_lines,
)

OPERATORS = ["[MIN", "[MAX", "[MED", "[SM"]
SMALL = ListOpsSettings(
    min_length=4, max_length=40, max_depth=4, max_arity=4, train=300, validation=40, test=60, seed=3
)


# Oracles: the literal definition over nested lists [operator, argument, …].


def naive_tree(rng, given_settings, depth=1):
    if depth == given_settings.max_depth or rng.random() < 0.75:
        return rng.randrange(10)
    arity = rng.randint(given_settings.min_arity, given_settings.max_arity)
    children = [naive_tree(rng, given_settings, depth + 1) for _ in range(arity)]
    return [rng.choice(["[MIN", "[MAX", "[MED", "[SM"]), *children]


def size_of(tree):
    return 1 if isinstance(tree, int) else 2 + sum(size_of(child) for child in tree[1:])


def depth_of(tree):
    return 1 if isinstance(tree, int) else 1 + max(depth_of(child) for child in tree[1:])


def nodes_of(tree):
    yield tree
    if isinstance(tree, list):
        for child in tree[1:]:
            yield from nodes_of(child)


def nested_binary(tree):
    if isinstance(tree, int):
        return str(tree)
    text = tree[0]
    for part in [*(nested_binary(child) for child in tree[1:]), "]"]:
        text = f"( {text} {part} )"
    return text


def parsed(tokens):
    tokens = iter(tokens)

    def node(token):
        return (
            [token, *(node(child) for child in iter(lambda: next(tokens), "]"))]
            if token.startswith("[")
            else int(token)
        )

    tree = node(next(tokens))
    assert next(tokens, None) is None
    return tree


def tokens_of(source):
    return [token for token in source.split() if token not in "()"]


def samples(lines):
    """The (source, value) pairs of generated lines."""
    pairs = [line.decode().rstrip("\n").split("\t") for line in lines]
    return [(source, int(value)) for source, value in pairs]


def chi_square(counts, expected):
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


@st.composite
def small_settings(draw):
    min_arity = draw(st.integers(1, 3))
    max_arity = draw(st.integers(max(min_arity, 2), 5))
    min_length = draw(st.integers(0, 12))
    return ListOpsSettings(
        min_length=min_length,
        max_length=draw(st.integers(min_length + 2, 80)),
        max_depth=draw(st.integers(5, 7)),
        min_arity=min_arity,
        max_arity=max_arity,
        seed=draw(st.integers(0, 1000)),
    )


@contextmanager
def processes_started_by(method):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


@settings(max_examples=25, deadline=None)
@given(small_settings())
def test_every_tree_is_within_bounds_and_has_the_value_of_the_evaluator(chosen):
    for source, value in samples(draw_chunk(chosen, 0)[:150]):
        tokens = tokens_of(source)
        tree = parsed(tokens)
        assert chosen.min_length < size_of(tree) == len(tokens) < chosen.max_length
        assert depth_of(tree) <= chosen.max_depth
        assert all(
            chosen.min_arity <= len(node) - 1 <= chosen.max_arity for node in nodes_of(tree) if isinstance(node, list)
        )
        assert source == nested_binary(tree)
        assert value == evaluate_expression(tokens) == evaluate_expression(source.split())


def test_paper_trees_are_within_bounds_and_have_the_value_of_the_evaluator():
    lines = samples(draw_chunk(PAPER, 0))
    assert len(lines) > 200
    for source, value in lines[:60]:
        tokens = tokens_of(source)
        tree = parsed(tokens)
        assert 500 < size_of(tree) == len(tokens) < 2000
        assert depth_of(tree) <= 10
        assert value == evaluate_expression(tokens)
    assert max(depth_of(parsed(tokens_of(source))) for source, _ in lines[:60]) == 10


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(ListOpsSettings(min_length=0, max_length=10**6, max_depth=6, max_arity=4), id="unbounded"),
        pytest.param(TINY, id="tiny"),
        pytest.param(ListOpsSettings(min_length=50, max_length=400, max_depth=8), id="mid"),
    ],
)
def test_sizes_have_the_distribution_of_a_naive_recursive_generator(chosen):
    ours = [len(tokens_of(source)) for number in range(3) for source, _ in samples(draw_chunk(chosen, number))]
    rng = random.Random(1)
    drawn = [size_of(naive_tree(rng, chosen)) for _ in range(3 * listops_trees.DRAWS_PER_CHUNK)]
    naive = [size for size in drawn if chosen.min_length < size < chosen.max_length]
    assert abs(len(ours) - len(naive)) < 4 * (len(ours) + len(naive)) ** 0.5
    for bound in (sorted(naive)[len(naive) * part // 5] for part in range(1, 5)):
        share, naive_share = (sum(size <= bound for size in sizes) / len(sizes) for sizes in (ours, naive))
        assert abs(share - naive_share) < 4 * (0.25 / len(ours) + 0.25 / len(naive)) ** 0.5


def test_leaves_operators_arities_and_digits_have_their_probabilities():
    # Without bounds on the size, every node above the maximum depth is an independent draw.
    free = ListOpsSettings(min_length=0, max_length=10**6, max_depth=4, max_arity=10)
    trees = [parsed(tokens_of(source)) for number in range(2) for source, _ in samples(draw_chunk(free, number))]
    assert len(trees) == 2 * listops_trees.DRAWS_PER_CHUNK
    level = trees
    for _ in range(3):
        leaves = sum(isinstance(node, int) for node in level)
        assert abs(leaves / len(level) - 0.75) < 4 * (0.75 * 0.25 / len(level)) ** 0.5
        level = [child for node in level if isinstance(node, list) for child in node[1:]]
    assert all(isinstance(node, int) for node in level)
    nodes = list(itertools.chain.from_iterable(map(nodes_of, trees)))
    operators = [node for node in nodes if isinstance(node, list)]
    digits = [node for node in nodes if isinstance(node, int)]
    # Bounds: chi-square with 3, 8, 9 degrees of freedom, far beyond the 99.9th percentile.
    assert chi_square([sum(node[0] == name for node in operators) for name in OPERATORS], [len(operators) / 4] * 4) < 20
    assert (
        chi_square(
            [sum(len(node) == arity + 1 for node in operators) for arity in range(2, 11)], [len(operators) / 9] * 9
        )
        < 30
    )
    assert chi_square([digits.count(digit) for digit in range(10)], [len(digits) / 10] * 10) < 32


def test_digits_and_operators_stay_uniform_among_paper_trees():
    tokens = [token for source, _ in samples(draw_chunk(PAPER, 1)[:150]) for token in tokens_of(source)]
    assert chi_square([tokens.count(name) for name in OPERATORS], [sum(map(tokens.count, OPERATORS)) / 4] * 4) < 20
    counts = [tokens.count(str(digit)) for digit in range(10)]
    assert chi_square(counts, [sum(counts) / 10] * 10) < 32


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        pytest.param("7", 7, id="digit"),
        pytest.param("[MIN 4 2 9 ]", 2, id="min"),
        pytest.param("[MAX 4 2 9 ]", 9, id="max"),
        pytest.param("[SM 4 2 9 ]", 5, id="sum-modulo-10"),
        pytest.param("[MED 4 2 9 ]", 4, id="median-odd"),
        pytest.param("[MED 8 3 ]", 5, id="median-of-two-is-cut"),
        pytest.param("[MED 9 1 2 6 ]", 4, id="median-even"),
        pytest.param("( ( ( [MAX 2 ) 9 ) ] )", 9, id="parentheses"),
        pytest.param("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]", 5, id="nested"),
    ],
)
def test_evaluator_computes_known_values(expression, value):
    assert evaluate_expression(expression.split()) == value


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        pytest.param("", "the expression is empty", id="empty"),
        pytest.param("1 2", "the expression ends at symbol 1 of 2", id="two"),
        pytest.param("[MIN ]", r"operator '\[MIN' has no arguments", id="no-arguments"),
        pytest.param("[MIN 1", r"1 operators are not closed; every operator needs its '\]'", id="open"),
        pytest.param("1 ]", r"symbol 2 is a '\]' that closes no operator", id="closed-twice"),
        pytest.param("[MIM 1 ]", r"symbol 1 is '\[MIM', which is unknown; did you mean '\[MI?[NM]'", id="unknown"),
    ],
)
def test_evaluator_refuses_invalid_expressions(expression, complaint):
    with pytest.raises(DataError, match=complaint):
        evaluate_expression(expression.split())


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        pytest.param({"max_arity": 1}, "max_arity=1 must be at least min_arity=2", id="arity"),
        pytest.param({"max_length": 501}, "no length lies between min_length=500 and max_length=501", id="length"),
        pytest.param(
            {"max_depth": 3},
            "the largest tree of max_depth=3 and max_arity=10 has 122 tokens, not more than min_length=500",
            id="depth",
        ),
        pytest.param({"train": 0}, "train", id="no-samples"),
        pytest.param({"max_len": 5}, "max_len", id="unknown-field"),
    ],
)
def test_settings_that_no_tree_fits_are_refused_at_construction(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        ListOpsSettings(**fields)


def test_paper_settings_are_those_of_long_range_arena():
    assert PAPER.model_dump(exclude={"seed"}) == {
        "min_length": 500, "max_length": 2000, "max_depth": 10, "min_arity": 2, "max_arity": 10,
        "train": 96_000, "validation": 2_000, "test": 2_000,
    }  # fmt: skip


def test_zero_workers_are_refused():
    with pytest.raises(SpecError, match="workers=0 must be at least 1; leave it out to use every core"):
        list(generate_lines(SMALL, workers=0))


def test_splits_have_their_sizes_and_share_no_tree():
    lines = list(generate_lines(SMALL, workers=1))
    assert [sum(split == number for split, _ in lines) for number in range(3)] == [300, 40, 60]
    assert len({line for _, line in lines}) == 400


def test_splits_have_one_distribution_even_if_likely_trees_run_out():
    # Each of the 400 trees of size 4 is ten times as likely as one of the 4,000 of size 5, so they are found first.
    scarce = ListOpsSettings(
        min_length=3, max_length=6, max_depth=2, max_arity=3, train=1000, validation=1000, test=500
    )
    sizes = {0: [], 1: [], 2: []}
    for split, line in generate_lines(scarce, workers=1):
        sizes[split].append(len(tokens_of(line.decode().split("\t")[0])))
    shares = [sizes[split].count(4) / len(sizes[split]) for split in range(3)]
    assert max(shares) - min(shares) < 0.08


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_lines_do_not_depend_on_the_number_of_processes(method):
    many = TINY.model_copy(update={"train": 3000})  # more than ten chunks
    with processes_started_by(method):
        assert list(generate_lines(many, workers=2)) == list(generate_lines(many, workers=1))


def test_the_same_seed_gives_the_same_lines_and_another_seed_gives_others():
    first, again, other = (
        list(generate_lines(SMALL.model_copy(update={"seed": seed}), workers=1)) for seed in (3, 3, 4)
    )
    assert first == again
    assert not {line for _, line in first if len(line) > 60} & {line for _, line in other}


def test_error_for_too_few_different_trees_states_the_number():
    only_digits = ListOpsSettings(min_length=0, max_length=5, max_depth=1, train=5, validation=5, test=5)
    with pytest.raises(
        DataError, match=r"found only 10 different trees of 15, none.*lower the number, or widen the bounds"
    ):
        list(generate_lines(only_digits, workers=1))


def die(settings, number):
    os._exit(1)


def test_death_of_a_worker_raises_a_data_error(monkeypatch):
    monkeypatch.setattr(listops_trees, "draw_chunk", die)
    with (
        processes_started_by("fork"),
        pytest.raises(DataError, match="a process that generates data died; with too little memory"),
    ):
        list(generate_lines(SMALL, workers=2))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes from /proc")
def test_workers_end_with_a_killed_parent():
    script = """
import multiprocessing
from sma.recipes.tasks.listops.trees import PAPER, generate_lines
for _ in generate_lines(PAPER, workers=2):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        children = parent.stdout.readline().split()
        parent.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_progress_counts_up_to_the_requested_number():
    seen = []
    for _ in generate_lines(SMALL, workers=1, on_progress=lambda found, wanted: seen.append((found, wanted))):
        pass
    assert seen == sorted(seen)
    assert seen[-1] == (400, 400)
