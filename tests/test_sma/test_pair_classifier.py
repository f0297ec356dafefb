"""Scores of pairs of documents against two runs of one encoder and the four features of a pair."""

import pytest
import torch
from torch import nn

from sma import build, load_spec
from sma.describe import describe
from sma.errors import InputError, SpecError
from sma.pairs import PairClassifier, PairClassifierSpec
from sma.testing import check_model
from tests.cases import generator, spread

LAYER = {
    "backbone": {"kind": "ema", "state_size": 3},
    "modules": {"attention": {"kind": "gau", "query_size": 3, "hidden_size": 5, "window": 4}},
    "norm": {"kind": "scale_norm", "place": "post"},
}
CAUSAL = {
    **LAYER,
    "backbone": {"kind": "ema", "state_size": 3, "bidirectional": False},
    "modules": {"attention": {"kind": "gau", "query_size": 3, "hidden_size": 5, "window": 4, "bidirectional": False}},
}
SPEC = {
    "kind": "pair_classifier",
    "width": 6,
    "encoder": {"kind": "token_embedding", "vocabulary": 11, "padding": 0},
    "layers": {"repeat": 2, "layer": LAYER},
    "head": {"kind": "mean_pool_mlp", "hidden": 5, "classes": 3},
}


def pair_classifier(**changes):
    model = build({**SPEC, **changes}, seed=0).double()
    spread(model)
    return model.eval()


def batch(pairs=4, length=9):
    lengths = torch.randint(0, length + 1, (2 * pairs,), generator=generator(1))
    lengths[0], lengths[1] = length, 0  # one document has no token
    inputs = torch.randint(1, 11, (2 * pairs, length), generator=generator(2))
    valid = torch.arange(length) < lengths[:, None]
    return inputs.where(valid, 0), valid


def oracle(model, inputs, valid):
    """Scores of each pair from single documents without padding, by the formulas of the features and the head."""
    scores = []
    for sample in range(len(inputs) // 2):
        a, b = (_mean(model, inputs[row][valid[row]]) for row in (2 * sample, 2 * sample + 1))
        features = torch.stack([b, a, a * b, a - b]).reshape(-1)
        inner = model.head.inner.weight @ features + model.head.inner.bias
        scores.append(model.head.outer.weight @ nn.functional.gelu(inner))
    return torch.stack(scores)


def _mean(model, ids):
    # The encoder without the head, on a pair of two equal documents.
    hidden = model(torch.stack([ids, ids])).hidden[0]
    return hidden.sum(0) / max(1, len(ids))


@pytest.mark.parametrize("layer", [pytest.param(LAYER, id="both ways"), pytest.param(CAUSAL, id="causal")])
def test_scores_and_gradients_agree_with_the_four_features_of_single_documents(layer):
    model = pair_classifier(layers={"repeat": 2, "layer": layer})
    inputs, valid = batch()
    weights = torch.randn(4, 3, dtype=torch.float64, generator=generator(3))
    found = []
    for scores in (lambda: model(inputs, valid).logits, lambda: oracle(model, inputs, valid)):
        model.zero_grad()
        logits = scores()
        (logits * weights).sum().backward()
        found.append(
            (
                logits.detach(),
                {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None},
            )
        )
    (logits, gradients), (wanted, expected) = found
    assert logits.shape == (4, 3)
    torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def test_hidden_states_and_decisions_are_those_of_single_documents():
    model, (inputs, valid) = pair_classifier(), batch()
    output = model(inputs, valid)
    assert [decision.active.shape for decision in output.decisions] == [(8, 9, 1)] * 2
    for row, (ids, present) in enumerate(zip(inputs, valid, strict=True)):
        alone = model(torch.stack([ids[present]] * 2))
        torch.testing.assert_close(output.hidden[row][present], alone.hidden[0])
        torch.testing.assert_close(output.pooled[row], alone.pooled[0])
        for decision, single in zip(output.decisions, alone.decisions, strict=True):
            assert torch.equal(decision.active[row][present], single.active[0])


def test_swapped_documents_have_other_scores():
    model, (inputs, valid) = pair_classifier(), batch()
    swapped = torch.arange(8).view(4, 2).flip(1).reshape(-1)
    assert not torch.allclose(model(inputs, valid).logits, model(inputs[swapped], valid[swapped]).logits)


def test_no_pairs_give_no_scores():
    assert pair_classifier()(torch.zeros(0, 5, dtype=torch.int64)).logits.shape == (0, 3)


@pytest.mark.parametrize("rows", [1, 3])
def test_odd_number_of_rows_is_refused(rows):
    with pytest.raises(
        InputError, match=rf"inputs have {rows} rows, which is odd; a pair_classifier takes an even number"
    ):
        pair_classifier()(torch.ones(rows, 5, dtype=torch.int64))


@pytest.mark.parametrize("layer", [pytest.param(LAYER, id="both ways"), pytest.param(CAUSAL, id="causal")])
def test_pair_classifier_keeps_the_contract_of_models(layer, as_users_run):
    check_model(load_spec({**SPEC, "layers": [layer]}), effort=4)


def test_spec_predicts_parameters_with_a_head_of_four_widths():
    spec = load_spec(SPEC)
    assert isinstance(spec, PairClassifierSpec)
    model = build(spec)
    assert isinstance(model, PairClassifier)
    assert sum(part.numel() for part in model.parameters()) == spec.num_parameters()
    assert describe(spec).total.parameters == spec.num_parameters()
    assert model.head.inner.in_features == 24


def test_paper_retrieval_model_has_the_parameters_of_the_paper():
    # 1,024,298 without the embedding: the paper's table.
    layer = {
        "backbone": {"kind": "ema", "state_size": 16, "truncation": 1024},
        "modules": {
            "attention": {
                "kind": "gau",
                "query_size": 64,
                "hidden_size": 256,
                "window": 128,
                "position": {"kind": "relative_bias", "distance": "true_distance", "max_positions": 4002},
            }
        },
        "bypass": "linear",
        "norm": {"kind": "scale_norm", "place": "post"},
    }
    spec = load_spec(
        {
            "kind": "pair_classifier",
            "width": 128,
            "encoder": {"kind": "token_embedding", "vocabulary": 257, "padding": 0},
            "layers": {"repeat": 6, "layer": layer},
            "head": {"kind": "mean_pool_mlp", "hidden": 256, "classes": 2},
        }
    )
    assert spec.num_parameters() == 1_024_298 + 257 * 128


def test_pair_classifier_needs_a_head():
    with pytest.raises(SpecError, match=r"PairClassifierSpec: .*head"):
        load_spec({name: value for name, value in SPEC.items() if name != "head"})
