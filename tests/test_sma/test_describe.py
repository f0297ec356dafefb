"""Descriptions of models against the predictions of their specs and against the models that are built."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sma
from sma.describe import describe
from sma.errors import SpecError
from sma.spec import kinds, load_spec
from sma.yaml_text import read_yaml

SHIPPED = Path(sma.__file__).parent / "recipes" / "specs"

LISTOPS = """\
seqboat_listops: sequence_classifier, width 80, 6 layers, rows of 2,000 tokens

part                kind               parameters  at rate 0.25   share  all active  ratio
encoder             token_embedding         1,280             -       -           -      -
layers 0-5          6 alike               392,196       254,635  100.0%     780,776   0.33
  backbone          ema                    61,920        39,894   15.7%      39,894   1.00
  router            sma                       978           960    0.4%         960   1.00
  routed attention  gau                   289,458       175,380   68.9%     701,522   0.25
  bypass            linear                 38,880        38,400   15.1%      38,400   1.00
  norm              layer_norm (post)         960             -       -           -      -
  one of them                              65,366        42,439   16.7%     130,129   0.33
head                mean_pool_mlp          14,560             -       -           -      -
total                                     408,036       254,635  100.0%     780,776   0.33

at rate 0.25  MACs per token, if each routed sub-module runs on this share of the tokens
share         of these MACs; encoder, norms and head are not counted
all active    MACs per token, if each runs on every token
ratio         of the two: the remaining share of the work
"""

HYBRID = """\
kind: sequence_encoder
width: 16
encoder: {kind: real_number}
sinusoid: true
layers:
  repeat: 3
  layer:
    - backbone: {kind: ema, bidirectional: false}
      modules:
        look: {kind: gau, query_size: 8, hidden_size: 16, window: 4, bidirectional: false}
        think: {kind: gated_mlp, hidden_size: 24}
      norm: {kind: rms_norm}
    - backbone: {kind: conv}
      router: {kind: random, rate: 0.5}
      modules: {think: {kind: gated_mlp, hidden_size: 24}}
      bypass: identity
      norm: {kind: rms_norm}
"""


def test_listops_has_as_many_parameters_as_in_the_paper():
    spec = load_spec(SHIPPED / "seqboat_listops.yaml")
    assert spec.num_parameters() == 408_036
    assert sum(parameter.numel() for parameter in spec.build().parameters()) == 408_036
    # The authors count 21 symbols.
    assert load_spec(spec.model_dump(), overrides={"encoder.vocabulary": 21}).num_parameters() == 408_436


def test_listops_has_the_dropout_of_the_authors():
    spec = load_spec(SHIPPED / "seqboat_listops.yaml")
    (layer,) = set(spec.layer_specs)
    assert (spec.embedding_dropout, layer.dropout, layer.dropout_on, spec.head_spec.dropout) == (
        0.1,
        0.1,
        "modules",
        0.1,
    )
    assert (layer.modules["attention"].value_dropout, layer.modules["attention"].attention_dropout) == (0.0, 0.0)


def test_description_of_listops():
    spec = load_spec(SHIPPED / "seqboat_listops.yaml")
    assert describe(spec, name="seqboat_listops").as_text() + "\n" == LISTOPS


def _least(family: str, kind: str) -> dict[str, object]:
    """A kind with its required fields only."""
    fields = kinds(family)[kind].model_fields
    return {
        "kind": kind,
        **{name: 0.5 if field.annotation is float else 4 for name, field in fields.items() if field.is_required()},
    }


_modules = st.sampled_from(sorted(kinds("sub-module"))).map(lambda kind: _least("sub-module", kind))
_layers = st.fixed_dictionaries(
    {
        "backbone": st.none() | _modules,
        "router": st.sampled_from(sorted(kinds("router"))).map(lambda kind: _least("router", kind)),
        "modules": st.dictionaries(st.sampled_from(["a", "b", "c"]), _modules),
        "bypass": st.sampled_from(["linear", "identity"]),
        "norm": st.none()
        | st.tuples(st.sampled_from(sorted(kinds("norm"))), st.sampled_from(["pre", "post"])).map(
            lambda drawn: {"kind": drawn[0], "place": drawn[1]}
        ),
    }
)
_models = st.fixed_dictionaries(
    {
        "kind": st.just("sequence_classifier"),
        "width": st.sampled_from([8, 16]),
        "encoder": st.sampled_from(sorted(kinds("encoder"))).map(lambda kind: _least("encoder", kind)),
        "sinusoid": st.booleans(),
        "layers": st.lists(_layers, max_size=3).flatmap(lambda layers: st.permutations(layers + layers[:1])),
        "head": st.sampled_from(sorted(kinds("head"))).map(lambda kind: _least("head", kind)),
    }
)


@given(data=_models, length=st.integers(1, 300), rate=st.floats(0, 1))
def test_totals_are_those_of_the_spec_and_of_the_built_model(data, length, rate):
    spec = load_spec(data)
    described = describe(spec, length=length, rate=rate)
    counted = sum(parameter.numel() for parameter in spec.build().parameters())
    assert described.total.parameters == spec.num_parameters() == counted
    assert described.total.all_active == spec.macs(length, 1.0).total
    if all(layer.router.kind == "sma" for layer in spec.layer_specs if layer.modules):
        assert described.total.macs == spec.macs(length, rate).total


@given(data=_models, length=st.integers(1, 300), rate=st.floats(0, 1))
def test_each_group_of_layers_agrees_with_the_prediction_of_its_layer(data, length, rate):
    spec = load_spec(data)
    described = describe(spec, length=length, rate=rate)
    assert sorted(index for group in described.layers for index in group.indices) == list(range(len(spec.layer_specs)))
    own = {"always": 1.0, "never": 0.0, "random": 0.5, "expert_choice": 0.5}
    for group in described.layers:
        layers = [spec.layer_specs[index] for index in group.indices]
        assert all(layer == layers[0] for layer in layers)
        assert group.one.parameters == layers[0].num_parameters(spec.width)
        expected = layers[0].macs(spec.width, length, own.get(layers[0].router.kind, rate))
        assert group.one.macs == expected.total
        assert (group.all.parameters, group.all.macs) == (
            len(layers) * group.one.parameters,
            len(layers) * group.one.macs,
        )


@given(data=_models)
def test_a_description_fits_a_terminal(data):
    assert max(map(len, describe(load_spec(data), name="model").as_text().splitlines())) <= 100


def test_equal_layers_are_one_entry_at_any_index():
    described = describe(load_spec(read_yaml(HYBRID, "test")))
    assert [(group.indices, group.all.name) for group in described.layers] == [
        ((0, 2, 4), "layers 0, 2, 4"),
        ((1, 3, 5), "layers 1, 3, 5"),
    ]


def test_many_ranges_of_layers_are_truncated_in_the_table_only():
    described = describe(load_spec(read_yaml(HYBRID, "test"), overrides={"layers.repeat": 9}))
    assert "layers 0, 2, 4, ...  9 alike" in described.as_text()
    assert described.as_dict()["layers"][0]["layers"] == list(range(0, 18, 2))


def test_consecutive_layers_are_shown_as_ranges():
    block = read_yaml(HYBRID, "test")["layers"]["layer"]
    described = describe(load_spec(read_yaml(HYBRID, "test"), overrides={"layers.layer": [*block, block[1]]}))
    assert [group.all.name for group in described.layers] == ["layers 0, 3, 6", "layers 1-2, 4-5, 7-8"]


def test_routers_with_a_fixed_rate_keep_it():
    text = describe(load_spec(read_yaml(HYBRID, "test")), rate=0.1).as_text()
    assert "random (rate 0.5)" in text
    assert "(routers whose rate is shown: on that share)" in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("  routed think")] == ["0.10", "0.50"]


@pytest.mark.parametrize(
    ("router", "rate"),
    [
        pytest.param({"kind": "always"}, 1.0, id="always"),
        pytest.param({"kind": "never"}, 0.0, id="never"),
        pytest.param({"kind": "random", "rate": 0.5}, 0.5, id="random"),
        pytest.param({"kind": "expert_choice", "share": 0.25}, 0.25, id="expert_choice"),
        pytest.param({"kind": "threshold"}, 0.1, id="threshold"),
    ],
)
def test_a_routed_sub_module_is_counted_at_the_rate_of_its_router(router, rate):
    modules = {"think": {"kind": "gated_mlp", "hidden_size": 8}}
    spec = load_spec(
        {
            "kind": "sequence_encoder",
            "width": 4,
            "encoder": {"kind": "linear", "features": 1},
            "layers": [{"router": router, "modules": modules}],
        }
    )
    part = next(part for part in describe(spec, length=1000, rate=0.1).layers[0].parts if part.name == "routed think")
    assert part.macs == rate * part.all_active


def test_a_model_without_layers_has_a_table_too():
    text = describe(load_spec(read_yaml(HYBRID, "test"), overrides={"layers": []}), name="empty").as_text()
    assert text.startswith("empty: sequence_encoder, width 16, 0 layers, rows of 2,000 tokens\n")
    assert [line.split() for line in text.splitlines() if line.startswith("total")] == [["total", "33", *"----"]]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        pytest.param({"length": 0}, "length=0 must be at least 1 token", id="length"),
        pytest.param(
            {"rate": -0.5},
            "rate=-0.5 must lie between 0 and 1: the share of the tokens that run a routed sub-module",
            id="rate",
        ),
        pytest.param({"rate": float("nan")}, "rate=nan must lie between 0 and 1", id="nan"),
    ],
)
def test_impossible_rows_are_refused(asked, complaint):
    with pytest.raises(SpecError, match=complaint):
        describe(load_spec(read_yaml(HYBRID, "test")), **asked)
