"""Statistics of decisions against loops over tokens, and MACs against the predictions of specs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

from sma import Decision, build, load_spec
from sma.errors import InputError
from sma.stats import (
    MACCount,
    RateCount,
    activation_rates,
    attention_span,
    count_macs,
    count_rates,
    module_names,
    router_health,
)
from tests.cases import generator, masks, normal, pad

LAYERS = (("attention",), ("mlp", "attention"), ("conv",))

MODEL = {
    "kind": "sequence_encoder",
    "width": 8,
    "encoder": {"kind": "token_embedding", "vocabulary": 5},
    "layers": [
        {"modules": {"attention": {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 3}}},
        {"backbone": {"kind": "ema", "state_size": 2}},
        {"modules": {"attention": {"kind": "attention"}, "mlp": {"kind": "gated_mlp", "hidden_size": 8}}},
    ],
}


def _decision(
    valid: torch.Tensor, names: tuple[str, ...] = ("attention", "mlp"), seed: int = 4, rate: float = 0.5
) -> Decision:
    active = (torch.rand(*valid.shape, len(names), generator=generator(seed)) < rate) & valid[..., None]
    return Decision(active, active.double(), normal(*active.shape, 2), active.double(), names)


def _decisions(valid: torch.Tensor) -> list[Decision]:
    return [_decision(valid, names, seed) for seed, names in enumerate(LAYERS)]


@given(valid=masks())
def test_rates_are_active_valid_tokens_over_valid_tokens(valid):
    decisions = _decisions(valid)
    rates = activation_rates(decisions, valid)
    assert module_names(decisions) == ("attention", "mlp", "conv")
    assert rates.shape == (3, 3)
    for layer, decision in enumerate(decisions):
        for column, name in enumerate(module_names(decisions)):
            if name not in decision.names:
                assert math.isnan(rates[layer, column])
                continue
            active = decision.active[..., decision.names.index(name)]
            tokens = [(b, t) for b in range(valid.shape[0]) for t in range(valid.shape[1]) if valid[b, t]]
            assert rates[layer, column] == sum(bool(active[b, t]) for b, t in tokens) / max(1, len(tokens))


@given(valid=masks(rows=6))
def test_counts_of_parts_sum_to_the_count_of_the_whole(valid):
    whole, cut = _decisions(valid), valid.shape[0] // 2
    parts = [[_rows(decision, rows) for decision in whole] for rows in (slice(cut), slice(cut, None))]
    added = sum(count_rates(part, mask) for part, mask in zip(parts, (valid[:cut], valid[cut:]), strict=True))
    assert isinstance(added, RateCount)
    count = count_rates(whole, valid)
    assert torch.equal(added.active, count.active)
    assert torch.equal(added.valid, count.valid)
    assert torch.equal(added.rates.nan_to_num(-1), activation_rates(whole, valid).nan_to_num(-1))
    assert added.by_layer() == count.by_layer()


def _rows(decision: Decision, rows: slice) -> Decision:
    changed = {name: getattr(decision, name)[rows] for name in ("active", "confidence", "logits", "p_on")}
    return replace(decision, **changed)


def test_rates_by_layer_name_the_sub_modules_of_each_layer():
    active = torch.tensor([[[True, True], [False, True]]])
    decisions = [Decision(active, active.double(), normal(1, 2, 2, 2), active.double(), ("attention", "mlp"))]
    count = count_rates(decisions) + count_rates(decisions)
    assert count.by_layer() == [{"attention": 0.5, "mlp": 1.0}]
    assert (count.names, count.valid.item(), count.active.tolist()) == (("attention", "mlp"), 4, [[2, 4]])


def test_active_padding_is_not_counted():
    valid = torch.tensor([[True, True, False], [False, True, False]])
    everything = torch.ones(2, 3, 1, dtype=torch.bool)
    decision = Decision(everything, everything.double(), normal(2, 3, 1, 2), everything.double(), ("mlp",))
    assert (count_rates([decision], valid).active.item(), activation_rates([decision], valid).item()) == (3, 1.0)


def test_counts_without_a_mask_include_every_token():
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert count_rates(_decisions(valid)).by_layer() == count_rates(_decisions(valid), valid).by_layer()


def test_a_model_that_routes_nothing_has_no_rates():
    assert activation_rates([]).shape == (0, 0)
    assert count_rates([]).by_layer() == []
    assert module_names([]) == ()


def test_counts_are_trees_of_tensors():
    count = count_rates(_decisions(torch.ones(2, 5, dtype=torch.bool)))
    leaves, tree = _pytree.tree_flatten(count)
    assert [leaf.shape for leaf in leaves] == [(3, 3), ()]
    assert _pytree.tree_unflatten(leaves, tree).by_layer() == count.by_layer()


def test_counting_changes_no_decision():
    valid = torch.ones(2, 5, dtype=torch.bool)
    decision = _decision(valid)
    before = decision.active.clone()
    count_rates([decision], valid)
    attention_span(decision, 2, valid)
    assert torch.equal(decision.active, before)


def test_counts_of_different_models_are_not_added():
    valid = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(InputError, match=r"counts of different models cannot be added: layers with .*'conv'.* and "):
        count_rates(_decisions(valid)) + count_rates(_decisions(valid)[:1])


def test_a_mask_of_another_shape_is_refused():
    decisions = _decisions(torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(InputError, match=r"valid is of shape \(2, 4\) .*; expected .* \(B = 2, L = 5\)$"):
        count_rates(decisions, torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("router", "rate"), [pytest.param("always", 1.0, id="always"), pytest.param("never", 0.0, id="never")]
)
def test_rates_of_a_model_are_those_of_its_routers(router, rate):
    data = {
        **MODEL,
        "layers": [{**layer, "router": {"kind": router}} if "modules" in layer else layer for layer in MODEL["layers"]],
    }
    valid = torch.tensor([[True, True, False], [True, False, False]])
    output = build(load_spec(data))(torch.zeros(2, 3, dtype=torch.long), valid)
    assert count_rates(output.decisions, valid).by_layer() == [{"attention": rate}, {"attention": rate, "mlp": rate}]


# Attention span


def _span_by_loop(active: torch.Tensor, valid: torch.Tensor, window: int | None) -> float:
    distances = []
    for row in range(active.shape[0]):
        positions, position = [], 0
        for place in range(active.shape[1]):
            if active[row, place]:
                positions.append(position)
                seen = positions if window is None else positions[-window - 1 :]
                distances.append(position - seen[0])
            position += int(valid[row, place])
    return sum(distances) / max(1, len(distances))


@given(valid=masks(length=12), window=st.sampled_from([1, 2, 5, 100, None]))
def test_span_is_the_mean_distance_to_the_earliest_token_in_reach(valid, window):
    decision = _decision(valid)
    expected = [_span_by_loop(decision.active[..., module], valid, window) for module in range(2)]
    assert attention_span(decision, window, valid).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_span_does_not_depend_on_the_padding(side):
    rows = [torch.ones(7, 1), torch.ones(4, 1)]
    chosen = [_decision(torch.ones(1, row.shape[0], dtype=torch.bool)).active[0] for row in rows]
    active, valid = pad(chosen, side)
    decision = Decision(active, active.double(), normal(*active.shape, 2), active.double(), ("attention", "mlp"))
    total = torch.zeros(2, dtype=torch.float64)
    for part in chosen:
        alone = Decision(
            part[None], part[None].double(), normal(1, *part.shape, 2), part[None].double(), ("attention", "mlp")
        )
        total += attention_span(alone, 2) * part.sum(0)
    assert torch.allclose(attention_span(decision, 2, valid), total / active.sum((0, 1)))


def test_a_window_over_sparse_tokens_spans_more_positions():
    active = torch.zeros(1, 1000, 1, dtype=torch.bool)
    active[:, ::10] = True
    sparse = Decision(active, active.double(), normal(1, 1000, 1, 2), active.double(), ("attention",))
    dense = replace(sparse, active=torch.ones_like(active))
    # Of 100 active tokens, the first 4 reach back 0, 10, 20 and 30 positions, the others 4 steps of 10.
    assert attention_span(sparse, 4).item() == pytest.approx((0 + 10 + 20 + 30 + 96 * 40) / 100)
    assert attention_span(dense, 4).item() == pytest.approx((0 + 1 + 2 + 3 + 996 * 4) / 1000)


def test_span_counts_positions_in_the_stream_where_they_are_given():
    active = torch.ones(1, 3, 1, dtype=torch.bool)
    decision = Decision(active, active.double(), normal(1, 3, 1, 2), active.double(), ("attention",))
    assert attention_span(decision, 1, positions=torch.tensor([[10, 13, 20]])).item() == pytest.approx((0 + 3 + 7) / 3)


def test_span_without_an_active_token_is_zero():
    valid = torch.ones(2, 4, dtype=torch.bool)
    assert attention_span(_decision(valid, rate=0.0), 3).tolist() == [0.0, 0.0]


def test_span_needs_a_window_of_at_least_one():
    with pytest.raises(InputError, match="window=0 must be at least 1; use window=None for all active tokens"):
        attention_span(_decision(torch.ones(1, 2, dtype=torch.bool)), 0)


# Health


@pytest.mark.parametrize(
    ("rate", "health"),
    [
        pytest.param(0.0, "dead", id="never"),
        pytest.param(0.0009, "dead", id="almost-never"),
        pytest.param(0.001, "ok", id="lowest-ok"),
        pytest.param(0.5, "ok", id="half"),
        pytest.param(0.999, "ok", id="highest-ok"),
        pytest.param(0.9991, "saturated", id="almost-always"),
        pytest.param(1.0, "saturated", id="always"),
    ],
)
def test_health_of_a_rate(rate, health):
    assert router_health(rate) == health


def test_thresholds_of_health_can_be_chosen():
    assert router_health(0.05, dead=0.1) == "dead"
    assert router_health(0.8, saturated=0.7) == "saturated"


@pytest.mark.parametrize(
    "rate", [pytest.param(-0.1, id="negative"), pytest.param(1.1, id="above"), pytest.param(math.nan, id="nan")]
)
def test_health_needs_a_rate(rate):
    with pytest.raises(InputError, match=f"the activation rate is {rate}; it must lie between 0 and 1"):
        router_health(rate)


# MACs


@given(rate=st.floats(0, 1), length=st.integers(1, 400))
def test_macs_at_one_rate_are_the_prediction_of_the_spec(rate, length):
    spec = load_spec(MODEL)
    count = count_macs(spec, length, rate)
    assert count.per_token * length == pytest.approx(spec.macs(length, rate).total)
    assert count.all_active * length == pytest.approx(spec.macs(length, 1.0).total)
    assert count.saved == pytest.approx(1 - count.per_token / count.all_active)


def test_macs_use_the_rate_of_every_layer_and_module():
    spec = load_spec(MODEL)
    rates = [{"attention": 0.5}, {"attention": 0.0, "mlp": 0.1}]
    first, plain, last = spec.layer_specs
    expected = first.macs(8, 100, 0.5).total + plain.macs(8, 100).total
    expected += last.macs(8, 100, {"attention": 0.0, "mlp": 0.1}).total
    assert count_macs(spec, 100, rates).per_token == pytest.approx(expected / 100)


def test_macs_can_be_counted_at_measured_rates():
    spec = load_spec(MODEL)
    output = build(spec, seed=0)(torch.zeros(1, 40, dtype=torch.long))
    count = count_macs(spec, 40, count_rates(output.decisions).by_layer())
    assert 0 < count.per_token <= count.all_active


def test_without_active_tokens_all_macs_of_the_modules_are_saved():
    data = {
        **MODEL,
        "layers": [
            {
                "bypass": "identity",
                "router": {"kind": "always"},
                "modules": {"m": {"kind": "gated_mlp", "hidden_size": 4}},
            }
        ],
    }
    assert count_macs(load_spec(data), 10, 0.0) == MACCount(0.0, 3 * 8 * 4)
    assert count_macs(load_spec(data), 10, 0.0).saved == 1.0
    assert count_macs(load_spec(data), 10, 1.0).saved == 0.0


def test_a_model_without_macs_saves_nothing():
    assert count_macs(load_spec({**MODEL, "layers": []}), 10, []).saved == 0.0


@pytest.mark.parametrize(
    ("rates", "complaint"),
    [
        pytest.param([0.5], "there are rates for 1 layers; the model has 2 that route", id="layers"),
        pytest.param(
            [0.5, {"attention": 0.5}],
            "there is no rate for 'mlp' of layer 2; give one for each of attention, mlp",
            id="missing",
        ),
        pytest.param(
            [{"atention": 0.5}, 0.5],
            "the rate of layer 0 names 'atention', which is not a sub-module; did you mean 'attention'[?]",
            id="name",
        ),
        pytest.param(1.5, "the rate of 'attention' of layer 0 is 1.5; it must lie between 0 and 1", id="range"),
        pytest.param(
            [0.5, math.nan], "the rate of 'attention' of layer 2 is nan; it must lie between 0 and 1", id="nan"
        ),
    ],
)
def test_rates_that_do_not_fit_the_model_are_refused(rates, complaint):
    with pytest.raises(InputError, match=complaint):
        count_macs(load_spec(MODEL), 100, rates)


def test_macs_need_a_token():
    with pytest.raises(InputError, match="length=0 must be at least 1 token"):
        count_macs(load_spec(MODEL), 0, 0.5)
