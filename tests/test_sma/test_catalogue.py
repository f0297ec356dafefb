"""The lists of kinds and of their fields against the registry and the spec classes."""

import pytest

from sma.catalogue import describe_kind, find_kinds, list_kinds
from sma.errors import SpecError
from sma.spec import families, kinds

GAU = """\
gau: a sub-module (GAUSpec in sma.modules.gau)
One-head attention with a gate

{kind: gau, query_size: ..., hidden_size: ...}

field              type             default        allowed
query_size         integer          required       at least 1
    channels of a query and a key, Z
hidden_size        integer          required       at least 1
    channels of a value and of the gate, H
window             integer or null  null           at least 1
    active tokens in reach on each side, W; use window=null to attend to all
bidirectional      true or false    true
    attend to later tokens too; false is causal
attention          word             softmax        softmax, relu2, laplace
    function from scores to weights
"""


def test_list_has_a_sentence_for_every_kind():
    out = list_kinds()
    for family in families():  # a sentence may also end with the name of a family
        block = f"\n{out}".split(f"\n{family}\n", 1)[1].split("\n\n")[0]
        for kind in kinds(family):
            (line,) = [
                line
                for line in block.splitlines()
                if line.split()[0] == kind and line.startswith("  ") and line[2] != " "
            ]
            assert len(line.split()) > 2
    assert max(map(len, out.splitlines())) <= 100
    assert not set("\\$`") & set(out)
    assert not {"dots", "lfloor", "rfloor", "cdot", "odot", "frac", "mathrm", "top"} & set(out.split())


def test_list_of_one_family_names_its_kinds():
    # The second line of a sentence has a deeper indentation.
    lines = [line for line in list_kinds("norm").splitlines() if not line.startswith("   ")]
    assert [line.split()[0] for line in lines] == ["norm", *kinds("norm")]


@pytest.mark.parametrize(
    ("family", "kind"), [pytest.param(family, kind, id=kind) for family in families() for kind in kinds(family)]
)
def test_fields_of_a_kind_are_those_of_its_spec(family, kind):
    (spec_class,) = find_kinds(kind, family)
    text = describe_kind(spec_class)
    assert f"({spec_class.__name__} in {spec_class.__module__})" in text
    flat = " ".join(text.split())
    for name, field in spec_class.model_fields.items():
        if name != "kind":
            assert any(line.split()[0] == name for line in text.splitlines() if line.strip())
            assert " ".join(field.description.split()) in flat, "a field without a description explains nothing"
    assert max(map(len, text.splitlines())) <= 100
    assert "\\" not in text.split("\n\n")[0], "a formula that a terminal cannot show"


def test_fields_of_gau():
    assert describe_kind(*find_kinds("gau")).startswith(GAU)


def test_parts_without_a_kind_are_described():
    layer = describe_kind(*find_kinds("layer"))
    assert layer.startswith("LayerSpec in sma.layer\n")
    assert "modules              sub-module by name" in layer
    repeat = describe_kind(*find_kinds("repeat"))
    assert "{repeat: ..., layer: ...}" in repeat
    assert "layer   layer or list of layer" in repeat


def test_an_unknown_kind_is_refused():
    with pytest.raises(SpecError, match="unknown kind 'laye'; did you mean 'layer'"):
        find_kinds("laye")
