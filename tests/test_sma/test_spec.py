"""Specs are frozen, equal after every round trip, and raise clear errors."""

import copy
import json
import math
import pickle
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import sma.spec
from sma import LayerSpec, build, load_spec
from sma.errors import SpecError
from sma.mistakes import field_path
from sma.modules.conv import ConvSpec
from sma.modules.gau import GAUSpec
from sma.norms import LayerNormSpec
from sma.routers import SMARouterSpec
from sma.spec import FrozenDict, dump_spec, dump_yaml, families, find_kind, kinds, read_spec_file
from sma.yaml_text import read_yaml
from tests.specs import KINDS, every_kind, of_class

MODEL: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": 4,
    "encoder": {"kind": "token_embedding", "vocabulary": 5},
    "layers": {"repeat": 2, "layer": {"modules": {"attention": {"kind": "gau", "query_size": 2, "hidden_size": 3}}}},
    "head": {"kind": "mean_pool_linear", "classes": 3},
}


@every_kind
@given(data=st.data())
def test_spec_survives_every_round_trip(family, kind, data):
    spec = data.draw(of_class(kinds(family)[kind]))
    text = dump_yaml(spec)
    journeys = {
        "plain data": load_spec(dump_spec(spec), family),
        "JSON": load_spec(json.loads(json.dumps(dump_spec(spec), allow_nan=False)), family),
        "YAML": load_spec(read_yaml(text, "text"), family),
        "pickle": pickle.loads(pickle.dumps(spec)),
        "copy": copy.copy(spec),
        "deep copy": copy.deepcopy(spec),
        "replace": spec.replace(),
    }
    for name, other in journeys.items():
        assert type(other) is type(spec), name
        assert other == spec, name
        assert hash(other) == hash(spec), name
        assert dump_yaml(other) == text, name


@every_kind
@given(data=st.data())
def test_dump_writes_every_field(family, kind, data):
    spec = data.draw(of_class(kinds(family)[kind]))
    assert set(dump_spec(spec)) == set(type(spec).model_fields)
    assert dump_spec(spec)["kind"] == kind


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family)
        for family in ("sub-module", "router", "norm", "encoder", "head", "model", "position")
    ],
)
def test_every_family_is_tested(family):
    assert family in families()
    assert any(family == name for name, _, _ in KINDS)


class TestFrozen:
    def test_no_field_can_be_set_or_deleted(self):
        spec = SMARouterSpec()
        with pytest.raises(ValidationError, match="Instance is frozen"):
            spec.temperature_scale = 2.0
        with pytest.raises(ValidationError, match="Instance is frozen"):
            del spec.temperature_scale

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda modules: modules.__setitem__("b", None), id="set"),
            pytest.param(lambda modules: modules.__delitem__("a"), id="delete"),
            pytest.param(lambda modules: modules.update(b=None), id="update"),
            pytest.param(lambda modules: modules.setdefault("b"), id="setdefault"),
            pytest.param(lambda modules: modules.pop("a"), id="pop"),
            pytest.param(lambda modules: modules.popitem(), id="popitem"),
            pytest.param(lambda modules: modules.clear(), id="clear"),
            pytest.param(lambda modules: modules.__ior__({"b": None}), id="merge"),
        ],
    )
    @pytest.mark.parametrize(
        "journey", [lambda spec: spec, copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec)), copy.copy]
    )
    def test_no_mapping_of_a_spec_can_be_changed(self, journey, change):
        spec = journey(LayerSpec.model_validate({"modules": {"a": {"kind": "identity"}}}))
        with pytest.raises(TypeError, match=r"specs are frozen: make a changed copy with spec\.replace\(field=value\)"):
            change(spec.modules)
        assert list(spec.modules) == ["a"]

    def test_changing_the_source_data_never_changes_a_spec(self):
        modules = {"a": {"kind": "conv"}}
        spec = LayerSpec.model_validate({"modules": modules})
        modules["a"]["kernel_size"], modules["b"] = 9, {"kind": "identity"}
        assert spec == LayerSpec(modules=FrozenDict(a=ConvSpec()))

    def test_equal_specs_have_equal_hashes_for_any_order_of_fields(self):
        one, other = ({name: {"kind": "identity"} for name in names} for names in (["a", "b"], ["b", "a"]))
        specs = [LayerSpec.model_validate({"modules": modules}) for modules in (one, other)]
        assert specs[0] == specs[1]
        assert hash(specs[0]) == hash(specs[1])

    def test_replace_validates_the_copy(self):
        spec = GAUSpec(query_size=2, hidden_size=3)
        assert spec.replace(window=4) == GAUSpec(query_size=2, hidden_size=3, window=4)
        assert spec.window is None
        with pytest.raises(SpecError, match="GAUSpec: window=0 must be at least 1; window: active tokens in reach"):
            spec.replace(window=0)
        with pytest.raises(SpecError, match=r"GAUSpec: unknown field 'windw'; did you mean 'window'\?"):
            spec.replace(windw=4)


def _model(**changes: Any) -> dict[str, Any]:
    return {**MODEL, **changes}


def _module(**fields: Any) -> dict[str, Any]:
    return _model(layers=[{}, {"modules": {"attention": fields}}])


SUB_MODULES = "known kinds: attention, chunked_gau, conv, ema, gated_mlp, gau, identity, local_attention, s4d"
GAU_FIELDS = (
    "fields: query_size, hidden_size, window, bidirectional, attention, position, value_dropout, attention_dropout"
)
ENDS = "; width: channels of every token, D"


class TestErrors:
    @pytest.mark.parametrize(
        ("data", "sentence"),
        [
            pytest.param(
                _module(kind="gua"),
                f"unknown sub-module kind 'gua' in layers[1].modules.attention; did you mean 'gau'? {SUB_MODULES}",
                id="near kind",
            ),
            pytest.param(
                _module(kind="xyz"),
                f"unknown sub-module kind 'xyz' in layers[1].modules.attention; {SUB_MODULES}",
                id="far kind",
            ),
            pytest.param(
                _module(kind=3),
                f"unknown sub-module kind 3 in layers[1].modules.attention; {SUB_MODULES}",
                id="kind of a number",
            ),
            pytest.param(
                _module(kind="sma.modules.gau.GAUSpec"),
                f"unknown sub-module kind 'sma.modules.gau.GAUSpec' in layers[1].modules.attention; {SUB_MODULES}",
                id="a path to import",
            ),
            pytest.param(
                _module(window=3),
                f"a sub-module needs a 'kind' in layers[1].modules.attention; {SUB_MODULES}",
                id="no kind",
            ),
            pytest.param(
                _model(head="linear"),
                "a head must be a mapping with a 'kind' in head, not 'linear'; write for example {kind: …}",
                id="a word for a mapping",
            ),
            pytest.param(
                _module(kind="gau", query_size=2, hidden_size=2, windw=3),
                f"GAUSpec in layers[1].modules.attention: unknown field 'windw'; did you mean 'window'? {GAU_FIELDS}",
                id="near field",
            ),
            pytest.param(
                {**MODEL, "foo": 1, "bar": 2},
                "SequenceClassifierSpec: unknown fields 'foo', 'bar'; fields: "
                "width, encoder, sinusoid, embedding_dropout, layers, shared_router, final_norm, head",
                id="two fields",
            ),
            pytest.param(
                _module(kind="gau", hidden_size=2),
                "GAUSpec in layers[1].modules.attention: 'query_size' is required; query_size: "
                "channels of a query and a key, Z",
                id="missing field",
            ),
            pytest.param(
                _module(kind="gau", query_size=2, hidden_size=2, window=0),
                "GAUSpec in layers[1].modules.attention: window=0 must be at least 1; "
                "window: active tokens in reach on each side, W; use window=null to attend to all",
                id="too small",
            ),
            pytest.param(
                _module(kind="conv", kernel_size=4, bidirectional=True),
                "ConvSpec in layers[1].modules.attention: "
                "kernel_size=4 must be odd when bidirectional=true, so that it has a middle",
                id="two fields that do not fit",
            ),
            pytest.param(
                _module(kind="conv", activation="sillu"),
                "ConvSpec in layers[1].modules.attention: activation='sillu' must be 'silu' or 'none'; did you mean "
                "'silu'?; activation: applied to the result",
                id="not one of the choices",
            ),
            pytest.param(_model(width=0), f"SequenceClassifierSpec: width=0 must be at least 1{ENDS}", id="top level"),
            pytest.param(
                _model(width="wide"),
                f"SequenceClassifierSpec: width='wide': input should be a valid integer, not text, true or false{ENDS}",
                id="a word for a number",
            ),
            pytest.param(
                _model(width=5, sinusoid=True),
                "SequenceClassifierSpec: width=5 must be even with sinusoid=true: "
                "half of the channels are sines, half cosines",
                id="sinusoid of an odd width",
            ),
            pytest.param(
                _model(layers=3),
                "LayerSpec in layers: 3: input should be a valid dictionary or instance of LayerSpec",
                id="a number of layers",
            ),
            pytest.param(
                _model(layers={"repeat": 0, "layer": {"norm": {"kind": "layer"}}}),
                "RepeatSpec in layers: repeat=0 must be at least 1; repeat: number of repetitions\n"
                "unknown norm kind 'layer' in layers.layer.norm; did you mean 'layer_norm'? "
                "known kinds: batch_norm, layer_norm, rms_norm, scale_norm",
                id="one sentence per wrong field",
            ),
        ],
    )
    @pytest.mark.usefixtures("shipped_kinds")
    def test_message_names_the_mistake_its_place_and_the_remedy(self, data, sentence):
        exactly = f"^{re.escape(sentence)}$"
        with pytest.raises(SpecError, match=exactly):
            load_spec(data)
        with pytest.raises(SpecError, match=exactly):
            find_kind("model", "sequence_classifier")(**{name: value for name, value in data.items() if name != "kind"})

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        ("family", "kind", "name"),
        [
            pytest.param(family, kind, name, id=f"{kind}.{name}")
            for family, kind, spec_class in KINDS
            for name, field in spec_class.model_fields.items()
            if field.annotation is float
        ],
    )
    def test_numbers_must_be_finite(self, family, kind, name, value):
        with pytest.raises(SpecError, match=rf"Spec: {name}=-?(nan|inf): input should be a finite number"):
            load_spec({"kind": kind, name: value}, family)

    @pytest.mark.usefixtures("shipped_kinds")
    def test_unknown_family(self):
        for call in (
            lambda: kinds("ruoter"),
            lambda: load_spec({"kind": "sma"}, "ruoter"),
            lambda: sma.spec.json_schema("ruoter"),
        ):
            with pytest.raises(
                SpecError,
                match=r"unknown family 'ruoter'; did you mean 'router'\? families: encoder, head, model, norm, pos",
            ):
                call()

    def test_a_spec_of_another_family(self):
        with pytest.raises(
            SpecError,
            match=r"a norm must be a mapping with a 'kind' in norm, not SMARouterSpec\(\); write",
        ):
            LayerSpec(norm=SMARouterSpec())

    @pytest.mark.parametrize(
        "call", [LayerSpec.model_validate, lambda data: LayerSpec(**data), lambda data: build(_model(layers=[data]))]
    )
    def test_every_way_to_make_a_spec_raises_a_spec_error(self, call):
        with pytest.raises(
            SpecError, match=r"LayerSpec( in layers\[0\])?: unknown field 'dropuot'; did you mean 'dropout'\?"
        ):
            call({"dropuot": 0.1})

    def test_path_of_a_field(self):
        assert field_path(("layers", 2, "modules", "attention")) == "layers[2].modules.attention"
        assert field_path(()) == ""


class TestFiles:
    def test_yaml_json_and_python_give_the_same_spec(self, tmp_path):
        (tmp_path / "spec.json").write_text(json.dumps(MODEL))
        (tmp_path / "spec.yaml").write_text(
            """
            kind: sequence_classifier  # a comment
            width: 4
            encoder: {kind: token_embedding, vocabulary: 5}
            layers:
              repeat: 2
              layer:
                modules:
                  attention: {kind: gau, query_size: 2, hidden_size: 3, window: null}
            head: {kind: mean_pool_linear, classes: 3}
            """
        )
        from_files = [load_spec(tmp_path / name) for name in ("spec.json", "spec.yaml")] + [
            load_spec(str(tmp_path / "spec.yaml"))
        ]
        assert from_files == [load_spec(MODEL)] * 3
        assert dump_spec(from_files[0]) == dump_spec(from_files[1])

    def test_numbers_with_an_exponent_and_no_point_are_numbers(self, tmp_path):
        (tmp_path / "norm.yaml").write_text("{kind: layer_norm, epsilon: 1e-6}")  # a text in YAML 1.1
        assert load_spec(tmp_path / "norm.yaml", "norm") == LayerNormSpec(epsilon=1e-6)

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            pytest.param(
                b"kind: sma\nkind: always\n",
                r"spec\.yaml is not valid YAML: the key 'kind' is repeated in one mapping \(line 2\)",
                id="twice",
            ),
            pytest.param(
                b"kind: x\nhead:\n  a: 1\n  b: 2\n  a: 3\n",
                r"spec\.yaml is not valid YAML: the key 'a' is repeated in one mapping \(line 5\)",
                id="twice further in",
            ),
            pytest.param(
                b"kind: [", r"spec\.yaml is not valid YAML: while parsing a flow (node|sequence)", id="syntax"
            ),
            pytest.param(
                b"!!python/object:os.system {}",
                r"spec\.yaml is not valid YAML: the tag '!!python/object:os\.system' does not fit",
                id="objects",
            ),
            pytest.param(
                b"- 1\n- 2\n",
                r"spec\.yaml must hold a mapping of fields, not list; its first line is usually 'kind: …'",
                id="a list",
            ),
            pytest.param(b"", r"spec\.yaml must hold a mapping of fields, not NoneType; its first line", id="empty"),
            pytest.param(
                b"\xff\xfe\x00",
                r"spec\.yaml is not UTF-8 text; save it as UTF-8",
                id="bytes",
            ),
        ],
    )
    def test_broken_file_is_refused(self, tmp_path, text, complaint):
        (tmp_path / "spec.yaml").write_bytes(text)
        with pytest.raises(SpecError, match=complaint):
            load_spec(tmp_path / "spec.yaml")

    def test_missing_file_is_refused(self, tmp_path):
        with pytest.raises(
            SpecError, match=r"cannot read '.*none\.yaml': No such file or directory; give the path of a YAML or JS"
        ):
            read_spec_file(tmp_path / "none.yaml")
        with pytest.raises(
            SpecError, match=r"'.*' is a folder; a plain file is required; give the path of a YAML or JSON file"
        ):
            read_spec_file(tmp_path)
