"""Field paths: every value of a spec can be set by its path before validation."""

import copy
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sma import load_spec
from sma.errors import SpecError
from sma.model import ModelSpec
from sma.modules.conv import ConvSpec
from sma.norms import BatchNormSpec, RMSNormSpec
from sma.paths import field_paths, override, parse_path
from sma.spec import dump_spec
from tests.specs import of_family

REPEATED: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": 4,
    "encoder": {"kind": "token_embedding", "vocabulary": 5},
    "layers": {"repeat": 2, "layer": {"modules": {"attention": {"kind": "gau", "query_size": 2, "hidden_size": 3}}}},
    "head": {"kind": "mean_pool_linear", "classes": 3},
}
LISTED = {**REPEATED, "layers": [{}, {"norm": {"kind": "rms_norm"}}]}
NESTED = {**REPEATED, "layers": {"repeat": 2, "layer": [{}, {"backbone": {"kind": "ema"}}]}}


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        ("width", ("width",)),
        ("layers[2].router.kind", ("layers", 2, "router", "kind")),
        ("layers.2.router.kind", ("layers", 2, "router", "kind")),
        ("layers[0][1].x", ("layers", 0, 1, "x")),
        ("modules.conv_2.kernel_size", ("modules", "conv_2", "kernel_size")),
    ],
)
def test_path_is_split_into_steps(path, steps):
    assert parse_path(path) == steps


@pytest.mark.parametrize("path", ["", ".", "a..b", "a.", "a[", "a[x]", "a]", "[", "a[-1]", "a.[0]b."])
def test_malformed_path_is_refused(path):
    with pytest.raises(
        SpecError,
        match=r"is not a field path; write names joined by dots, such as layers\.layer\.router\.temperature_scale",
    ):
        parse_path(path)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        pytest.param(
            "layers[99999999999]", r"'layers\[99999999999\]': '99999999999' is not an index of a list of 2", id="far"
        ),
        pytest.param(f"layers[{'9' * 5000}]", "'layers.*99.* is not an index of a list of 2", id="5,000 digits"),
        pytest.param(
            "layers.\N{SUPERSCRIPT TWO}",
            "'\N{SUPERSCRIPT TWO}' is not an index of a list of 2",
            id="a digit that is no number",
        ),
        pytest.param(
            "layers.\N{ARABIC-INDIC DIGIT ONE}",
            "'\N{ARABIC-INDIC DIGIT ONE}' is not an index",
            id="a digit of another script",
        ),
        pytest.param("x" * 100_000, "unknown field path 'xxx.*xxx': there is no 'xxx.*xxx' here", id="long"),
        pytest.param("a." * 5000 + "a", "is not a field path; write names joined by dots", id="many steps"),
        pytest.param(
            "head.kind[0].x",
            r"'head\.kind\[0\]\.x' leads into 'mean_pool_linear', which has no fields",
            id="into a word",
        ),
    ],
)
def test_paths_and_indices_of_any_size_give_short_messages(path, complaint):
    with pytest.raises(SpecError, match=complaint) as caught:
        load_spec(LISTED, overrides={path: 1})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", [["gau"], {"a": 1}, 3, None, True])
def test_a_kind_that_is_not_text_is_refused(kind):
    data = {**LISTED, "layers": [{"modules": {"a": {"kind": kind}}}]}
    with pytest.raises(SpecError, match=r"sub-module kind|needs a 'kind'"):
        load_spec(data, overrides={"layers[0].modules.a.window": 3})


def _get(data: Any, path: str) -> Any:
    for step in parse_path(path):
        data = data[step]
    return data


@given(spec=of_family("model"))
def test_every_listed_path_leads_to_its_value_and_can_be_set(spec):
    data = dump_spec(spec)
    paths = list(field_paths(data))
    assert len(paths) == len(set(paths))
    for path in paths:
        value = _get(data, path)
        assert override(ModelSpec, data, {path: value}) == data
        changed = override(ModelSpec, data, {path: "something else"})
        assert _get(changed, path) == "something else"
        assert override(ModelSpec, changed, {path: value}) == data
    assert load_spec(data, overrides={path: _get(data, path) for path in paths}) == spec


@given(spec=of_family("model"))
def test_paths_cover_every_value(spec):
    def leaves(node: Any) -> int:
        parts = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
        if isinstance(node, list) and not (parts and isinstance(parts[0], dict)):
            return 1
        return sum(map(leaves, parts)) if isinstance(node, dict | list) else 1

    assert len(list(field_paths(dump_spec(spec)))) == leaves(dump_spec(spec))


@pytest.mark.parametrize(
    ("data", "path", "value"),
    [
        pytest.param(REPEATED, "width", 8, id="top"),
        pytest.param(REPEATED, "layers.repeat", 3, id="repeat"),
        pytest.param(REPEATED, "layers.layer.modules.attention.window", 64, id="a module's field"),
        pytest.param(REPEATED, "layers.layer.modules.attention.position.max_positions", 7, id="a default part's field"),
        pytest.param(REPEATED, "layers.layer.router.temperature_scale", 0.5, id="a default router's field"),
        pytest.param(REPEATED, "layers.layer.dropout", 0.5, id="a field left out"),
        pytest.param(REPEATED, "layers.layer.modules.extra", {"kind": "conv"}, id="a new module"),
        pytest.param(REPEATED, "layers.layer.norm", {"kind": "batch_norm"}, id="a whole part"),
        pytest.param(REPEATED, "layers.layer.modules", {}, id="no modules"),
        pytest.param(LISTED, "layers[1].norm.epsilon", 0.1, id="an item"),
        pytest.param(LISTED, "layers.0.bypass", "identity", id="an item by a dot"),
        pytest.param(LISTED, "layers[0].router.temperature_scale", 0.5, id="an item's default part"),
        pytest.param(NESTED, "layers.layer[1].backbone.state_size", 2, id="an item of a repeated list"),
    ],
)
def test_value_is_set_and_everything_else_stays(data, path, value):
    kept = copy.deepcopy(data)
    before, after = dump_spec(load_spec(data)), dump_spec(load_spec(data, overrides={path: value}))
    assert data == kept
    assert load_spec(data, overrides={path: value}) != load_spec(data)
    changed = {
        name
        for name in field_paths(after)
        if name not in set(field_paths(before)) or _get(after, name) != _get(before, name)
    }
    prefix = path.replace("layers.0.", "layers[0].")
    assert changed == {prefix} or all(name.startswith(prefix + ".") for name in changed)


def test_values_are_set_before_validation_and_may_complete_a_spec():
    incomplete = {
        "kind": "sequence_classifier",
        "encoder": {"kind": "token_embedding"},
        "layers": [{"norm": {}}],
        "head": {},
    }
    values = {
        "width": 4,
        "encoder.vocabulary": 5,
        "layers[0].norm.kind": "rms_norm",
        "head.kind": "mean_pool_linear",
        "head.classes": 2,
    }
    assert load_spec(incomplete, overrides=values).head.classes == 2
    with pytest.raises(SpecError, match="'vocabulary' is required"):
        load_spec(incomplete, overrides={name: value for name, value in values.items() if name != "encoder.vocabulary"})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"layers.layer.norm.kind": "rms_norm", "layers.layer.norm.epsilon": 0.5}, "epsilon=0.5"),
        ({"layers.layer.norm.epsilon": 0.5, "layers.layer.norm.kind": "rms_norm"}, "epsilon=0.5"),
        ({"layers.layer.backbone.kind": "ema"}, "EMASpec"),
        ({"layers.layer.modules.extra.kind": "identity"}, "'extra': IdentitySpec"),
        ({"final_norm.kind": "scale_norm"}, "final_norm=ScaleNormSpec"),
    ],
)
def test_values_may_create_a_part_that_is_null_or_missing(values, sentence):
    assert sentence in repr(load_spec(REPEATED, overrides=values))


@pytest.mark.parametrize(
    ("path", "value", "others", "expected"),
    [
        pytest.param("modules.attention", "conv", {}, ConvSpec(), id="fields of the old kind are dropped"),
        pytest.param("norm", "rms_norm", {}, RMSNormSpec(epsilon=0.5), id="fields of both kinds are kept"),
        pytest.param(
            "modules.attention",
            "conv",
            {"kernel_size": 9},
            ConvSpec(kernel_size=9),
            id="fields of the new kind are set",
        ),
    ],
)
def test_setting_a_kind_keeps_the_fields_of_the_new_kind(path, value, others, expected):
    layer = {**REPEATED["layers"]["layer"], "norm": {"kind": "batch_norm", "epsilon": 0.5, "momentum": 0.5}}
    data = {**REPEATED, "layers": [layer]}
    values = {f"layers[0].{path}.{name}": each for name, each in {"kind": value, **others}.items()}
    spec = load_spec(data, overrides=values).layers[0]
    assert (spec.norm if path == "norm" else spec.modules["attention"]) == expected


def test_later_values_apply_on_top_of_earlier_ones():
    for norm in ({"kind": "batch_norm"}, BatchNormSpec()):
        kept = copy.deepcopy(norm)
        values = {"layers.layer.norm": norm, "layers.layer.norm.momentum": 0.5}
        assert load_spec(REPEATED, overrides=values).layers.layer.norm.momentum == 0.5
        assert norm == kept


def test_a_validated_spec_can_be_overridden():
    spec = load_spec(REPEATED)
    changed = override(ModelSpec, dump_spec(spec), {"width": 8})
    assert load_spec(changed).width == 8
    mixed = {**REPEATED, "layers": spec.layers}
    assert load_spec(mixed, overrides={"layers.repeat": 5}).layers.repeat == 5


@pytest.mark.parametrize(
    ("data", "path", "complaint"),
    [
        pytest.param(
            REPEATED,
            "widht",
            "unknown field path 'widht': there is no 'widht' here; did you mean 'width'? fields: "
            "width, encoder, sinusoid, embedding_dro",
            id="top",
        ),
        pytest.param(
            REPEATED,
            "layers.layer.modules.attention.windw",
            "unknown field path 'layers.layer.modules.attention.windw': there is no 'windw' here; "
            "did you mean 'window'? fields: query_s",
            id="a module's field",
        ),
        pytest.param(
            REPEATED,
            "layers.layer.modules.atention.window",
            "there is no 'atention' here; did you mean 'attention'? fields: attention",
            id="a module",
        ),
        pytest.param(
            REPEATED,
            "layers.layer.rooter.kind",
            "there is no 'rooter' here; did you mean 'router'? fields: backbone",
            id="a part",
        ),
        pytest.param(
            LISTED,
            "layers[2].bypass",
            "'layers[2].bypass': 2 is not an index of a list of 2; count from 0",
            id="beyond the list",
        ),
        pytest.param(
            LISTED,
            "layers.bypass",
            "'layers.bypass': 'bypass' is not an index of a list of 2; count from 0",
            id="a name in a list",
        ),
        pytest.param(REPEATED, "width.x", "'width.x' leads into 4, which has no fields", id="into a number"),
        pytest.param(
            REPEATED, "layers.repeat.x", "'layers.repeat.x' leads into 2, which has no fields", id="into another number"
        ),
        pytest.param(
            REPEATED,
            "layers.layer.norm.epsilon",
            "a norm needs a 'kind' in layers.layer.norm; known",
            id="into a part that is null",
        ),
    ],
)
def test_unknown_path_is_refused(data, path, complaint):
    with pytest.raises(SpecError, match=re.escape(complaint)):
        load_spec(data, overrides={path: 1})


@given(path=st.text(alphabet="ab.[]01", max_size=6))
def test_no_path_raises_anything_but_a_spec_error(path):
    try:
        load_spec(REPEATED, overrides={path: 1})
    except SpecError as error:
        assert str(error)  # noqa: PT017
