"""YAML text: the values of YAML 1.2, merge keys, limits, and output with the same meaning in YAML 1.1."""

import json
import math
import re
import time

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from sma.errors import SpecError
from sma.yaml_text import LIMIT, NODES, read_fields, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, float(text)) for text in ("1e-3", "4E-3", "1e3", ".5", "1.", "-1.5e+3", "01.5", "1e-08")),
        *((text, int(text)) for text in ("0", "-7", "+7", "01750", "0000")),
        ("0x1F", 31),
        ("0o17", 15),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, False) for text in ("false", "False", "FALSE")),
        *((text, None) for text in ("", "~", "null", "Null", "NULL", "# nothing")),
        *((text, text) for text in ("yes", "no", "on", "off", "y", "n", "Yes", "ON", "tRUE", "nULL", "=", "<<")),
        *(
            (text, text)
            for text in (
                "1_000",
                "12:30",
                "1:2:3",
                "2001-01-01",
                "2001-99-99",
                "0b1",
                "0x_",
                "0o8",
                "1e",
                "e3",
                ".",
                "-",
                "+.e1",
            )
        ),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("!!str 12", "12"),
        ("!!float 3", 3.0),
        ("!!int '5'", 5),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
    ],
)
def test_scalars_have_the_values_of_yaml_1_2(text, value):
    found = read_yaml(f"[{text}]" if text not in ("", "# nothing", ".") else text, "text")
    found = found[0] if isinstance(found, list) else found
    assert (found, type(found)) == (value, type(value))


def test_nan_is_a_float():
    assert math.isnan(read_yaml(".nan", "text"))


@pytest.mark.parametrize("name", ["on", "off", "yes", "no", "y", "12:30", "1e", "2001-01-01"])
def test_keys_that_are_values_in_yaml_1_1_stay_text(name):
    assert read_yaml(f"{name}: 1", "text") == {name: 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a: &a {x: 1, y: 2}\nb: {<<: *a}", {"x": 1, "y": 2}, id="alone"),
        pytest.param("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", {"x": 3, "y": 2}, id="overridden after it"),
        pytest.param("a: &a {x: 1, y: 2}\nb: {x: 3, <<: *a}", {"x": 3, "y": 2}, id="overridden before it"),
        pytest.param(
            "a: &a {x: 1}\nc: &c {x: 5, z: 6}\nb: {<<: [*a, *c], w: 0}",
            {"x": 1, "z": 6, "w": 0},
            id="a list, the first wins",
        ),
        pytest.param("b: {<<: {x: 1}, y: 2}", {"x": 1, "y": 2}, id="without an anchor"),
        pytest.param(
            "a: &a {x: 1}\nc: &c {<<: *a, y: 2}\nb: {<<: *c, z: 3}", {"x": 1, "y": 2, "z": 3}, id="of one that merges"
        ),
        pytest.param("a: &a {x: {p: 1, q: 2}}\nb: {<<: *a, x: {p: 3}}", {"x": {"p": 3}}, id="parts are replaced whole"),
        pytest.param("b: {'<<': 1}", {"<<": 1}, id="a name in quotes is no merge key"),
    ],
)
def test_merge_key_adds_the_fields_of_other_mappings(text, expected):
    found = read_yaml(text, "text")["b"]
    assert found == expected
    assert found == yaml.safe_load(text)["b"]


MANY = ", ".join
NESTED_ALIASES = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{MANY([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
CHAINED_ALIASES = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 500))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("a: 1\na: 2", r"the key 'a' is repeated in one mapping \(line 2\)", id="twice"),
        pytest.param(
            "a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}",
            r"the key 'x' is repeated in one mapping \(line 2\)",
            id="twice, merged",
        ),
        pytest.param(
            "<<: {a: 1}\n<<: {b: 1}",
            r"the key '<<' is repeated in one mapping; write <<: \[\*one, \*other\]",
            id="two merges",
        ),
        pytest.param("\n<<: 3", r"'<<' takes a mapping, or a list of mappings \(line 2\)", id="a number merged"),
        pytest.param(
            "<<: [{a: 1}, 2]", "'<<' takes a mapping, or a list of mappings", id="a list with a number merged"
        ),
        pytest.param("&a [*a]", r"the alias '\*a' is inside its own value \(line 1\)", id="recursive list"),
        pytest.param("&a {b: *a}", r"the alias '\*a' is inside its own value", id="recursive mapping"),
        pytest.param("&a {<<: *a}", r"the alias '\*a' is inside its own value", id="recursive merge"),
        pytest.param("? &a [*a]\n: 1", r"the alias '\*a' is inside its own value", id="recursive key"),
        pytest.param("*a", "found undefined alias 'a'", id="unknown alias"),
        *(
            pytest.param(
                f"a: 1\n{key}: 2",
                rf"the key {shown} must be a word; put it in quotes if it is a name \(line 2\)",
                id=f"key {key}",
            )
            for key, shown in {
                "1": "1",
                "true": "True",
                "1.5": "1.5",
                "~": "None",
                "? [x]\n": r"\['x'\]",
                "{x: 1}": r"\{'x': 1\}",
            }.items()
        ),
        pytest.param("!!int x", r"'x' is not !!int \(line 1\)", id="no integer"),
        pytest.param("!!bool yes", "'yes' is not !!bool", id="no switch"),
        pytest.param("!!null x", "'x' is not !!null", id="not nothing"),
        *(
            pytest.param(
                f"a: {tag} {value}",
                rf"the tag '{re.escape(tag)}' does not fit, or is not supported in specs; leave it out",
                id=tag,
            )
            for tag, value in {
                "!!python/object:os.system": "{}",
                "!!python/name:os.system": "x",
                "!!python/object/apply:os.system": "[ls]",
                "!!binary": "aa",
                "!!set": "{a}",
                "!!omap": "[a: 1]",
                "!!timestamp": "2001-01-01",
                "!mine": "x",
                "!!seq": "{a: 1}",
                "!!map": "[a]",
                "!!int": "[1]",
            }.items()
        ),
        pytest.param("a: 1\n---\nb: 2", r"but found another document \(line 2\)", id="two documents"),
        pytest.param("a: \0", r"the character #x0000 is not allowed \(line 1\)", id="NUL"),
        pytest.param("a: 1\nb: \udcff", r"the character #xdcff is not allowed \(line 2\)", id="surrogate"),
        pytest.param(r'"\ud83d"', r"holds half of a character \(line 1\)", id="half a pair"),
        pytest.param("a:\n\tb: 1", r"found character '\\t' that cannot start any token \(line 2\)", id="tab"),
        pytest.param("[" * 3000, "more than 64 deep", id="3,000 brackets"),
        pytest.param("{a: " * 3000, "more than 64 deep", id="3,000 braces"),
        pytest.param("- " * 3000, "more than 64 deep", id="3,000 dashes"),
        pytest.param("? " * 3000, "more than 64 deep", id="3,000 keys"),
        pytest.param(
            "a: " + "9" * 5000, r"has 5,000 characters; no number in a spec has more than 100 \(line 1\)", id="digits"
        ),
        pytest.param("0x" + "f" * 5000, "has 5,002 characters; no number", id="hexadecimal digits"),
        pytest.param(f"[{'1,' * NODES}]", "there are more than 50,000 values", id="values"),
        pytest.param(
            NESTED_ALIASES, r"there are more than 50,000 values, aliases expanded \(line 6\)", id="nested aliases"
        ),
        pytest.param(
            CHAINED_ALIASES,
            "with aliases expanded, lists and mappings are nested more than 64",
            id="deep aliases",
        ),
        pytest.param(f"*{'a' * 100_000}", r"found undefined alias 'a{1,250}\.\.\. \(line 1\)", id="a long name"),
    ],
)
def test_values_that_no_spec_can_hold_give_a_short_error_message(text, complaint):
    began = time.process_time()
    with pytest.raises(SpecError, match=rf"^mine\.yaml is not valid YAML: .*{complaint}") as caught:
        read_yaml(text, "mine.yaml")
    assert len(str(caught.value)) < 500
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param("%YAML 1." + "9" * 5000 + "\n---\na", "mine.yaml cannot be read: Exceeds the limit", id="version"),
        pytest.param(r'"\UFFFFFFFF"', "mine.yaml cannot be read: ", id="escape"),
        pytest.param(
            "a" * (LIMIT + 1), "mine.yaml has 1,048,577 characters; no spec has more than 1,048,576", id="long"
        ),
        pytest.param(b"a: \xff", "mine.yaml is not UTF-8 text; save it as UTF-8", id="bytes"),
        pytest.param("a: 1".encode("utf-16"), "mine.yaml is not UTF-8 text; save it as UTF-8", id="UTF-16"),
    ],
)
def test_text_that_cannot_be_parsed_is_refused(content, complaint):
    with pytest.raises(SpecError, match=complaint) as caught:
        read_yaml(content, "mine.yaml")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("content", "what"), [("", "NoneType"), ("[1]", "list"), ("word", "str"), ("3", "int")])
def test_fields_that_are_not_a_mapping_are_refused(content, what):
    with pytest.raises(
        SpecError, match=rf"mine\.yaml must hold a mapping of fields, not {what}; its first line is usually 'kind: …'"
    ):
        read_fields(content, "mine.yaml")


def test_byte_order_mark_is_ignored():
    assert read_yaml(b"\xef\xbb\xbfkind: x", "text") == read_yaml("\ufeffkind: x", "text") == {"kind": "x"}


WORDS = st.one_of(
    st.text(),
    st.sampled_from(
        [
            "on",
            "Yes",
            "n",
            "1e-3",
            "4E3",
            "12:30",
            "0o7",
            "01750",
            "1_0",
            "0b1",
            "~",
            "",
            "null",
            "=",
            "<<",
            ".5",
            "-.inf",
            "# x",
        ]
    ),
    st.from_regex(r"[-+]?[0-9._:xobe]{1,6}", fullmatch=True),
)
DATA = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)


@given(DATA)
@example({"on": ["1e-3", "12:30", 1e-5, 1e20, "yes", "a\tb", "\x85", "\u2028 x", "x\n y\n", " ", "🙂", "\x00"]})
@example({"a" * 2000: "b " * 2000})
def test_written_text_has_the_same_value_in_every_reader(data):
    text = write_yaml(data)
    for found in (read_yaml(text, "text"), yaml.safe_load(text)):
        assert repr(found) == repr(data)  # also distinguishes 1, 1.0 and true, and 0.0 from -0.0


@given(DATA, st.sampled_from([None, 2, "\t"]))
@example({"a": ["\N{GRINNING FACE}/\x80"]}, "\t")
def test_json_is_yaml(data, indent):
    try:
        text = json.dumps(data, indent=indent, allow_nan=False)
    except ValueError:  # infinities are not in JSON
        return
    assert repr(read_yaml(text, "text")) == repr(data)
