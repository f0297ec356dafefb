"""Names given by users are shown on one line, and are harmless to terminals and tables."""

import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sma.recipes.io.names import markdown_cell, markdown_table, plain, shell_word

# Any characters, lone surrogates too: Python decodes a file name that is not UTF-8 to surrogates.
NAMES = st.text(st.characters(codec=None), max_size=300)


@given(NAMES)
def test_plain_text_is_one_printable_line_of_valid_utf_8(name):
    shown = plain(name)
    assert shown.isprintable()
    assert shown.encode("utf-8").decode("utf-8") == shown


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"])))
def test_printable_text_is_unchanged(name):
    assert plain(name) == name


@given(NAMES, st.integers(1, 50))
def test_cut_text_keeps_both_ends_within_the_limit(name, limit):
    whole, shown = plain(name), plain(name, limit)
    assert len(shown) <= limit
    if len(whole) > limit:
        before, after = shown.split("…", 1) if "…" not in whole else (whole[:1], "")
        assert whole.startswith(before)
        assert whole.endswith(after)
    else:
        assert shown == whole


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("a\nb", "a\\nb", id="newline"),
        pytest.param("\x1b[31mred", "\\x1b[31mred", id="terminal escape"),
        pytest.param("caf\udce9", "caf\\udce9", id="not UTF-8"),
        pytest.param("a\u202etxt.exe", "a\\u202etxt.exe", id="right to left"),
        pytest.param("שלום 🙂 [red]", "שלום 🙂 [red]", id="printable"),
    ],
)
def test_unprintable_characters_are_escaped(name, shown):
    assert plain(name) == shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", ["a b", "it's", "a\n\t\x1b[31m'\\b", "caf\udce9 é", "$x `y` \\", "-n"])
def test_shell_reads_a_quoted_word_back(name):
    word = shell_word(name)
    assert word.isprintable()
    read = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert read.stdout == os.fsencode(name)


@given(st.lists(st.lists(NAMES, min_size=3, max_size=3), min_size=1, max_size=4))
def test_table_has_a_line_per_row_and_a_cell_per_value(rows):
    head, *others = rows
    lines = markdown_table(head, others).split("\n")
    assert len(lines) == len(rows) + 1
    for line in (lines[0], *lines[2:]):
        assert line.replace("\\|", "").count("|") == 4


def test_vertical_bar_in_a_cell_is_escaped():
    assert markdown_cell("a|b") == "a\\|b"
    assert markdown_table(["x", "y|z"], [["1", "2"]]) == "| x | y\\|z |\n| --- | ---: |\n| 1 | 2 |"
