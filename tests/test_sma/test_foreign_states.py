"""The state of another model raises an error and is not changed."""

from typing import Any

import pytest
import torch

import sma
from sma.errors import InputError, StateError
from sma.pytree import named_tensors

GAU = {"kind": "gau", "query_size": 4, "hidden_size": 6, "window": 5, "bidirectional": False}
CONV = {"kind": "conv", "kernel_size": 3}
ATTENTION = {"kind": "attention", "heads": 2, "bidirectional": False}
EMA = {"kind": "ema", "state_size": 4, "bidirectional": False}


def model(
    backbone: dict[str, Any] | None = None, width: int = 8, repeat: int = 1, **modules: dict[str, Any]
) -> sma.SequenceModel:
    layer = {
        "backbone": EMA if backbone is None else backbone or None,
        "modules": modules,
        "router": {"kind": "always"},
    }
    encoder = {"kind": "token_embedding", "vocabulary": 9}
    spec = {"kind": "language_model", "width": width, "encoder": encoder, "layers": {"repeat": repeat, "layer": layer}}
    return sma.build(sma.load_spec(spec), seed=0).eval()


@pytest.mark.parametrize(
    ("mine", "other", "complaint"),
    [
        (
            model(),
            model(width=1),
            r"EMA got the state of another model: sizes \(1, 4, None\) instead of \(8, 4, None\); use init_state$",
        ),
        (
            model(),
            model(backbone=EMA | {"state_size": 1}),
            r"EMA got .*sizes \(8, 1, None\) instead of \(8, 4, None\); use init_state$",
        ),
        (
            model(),
            model(backbone=EMA | {"truncation": 3}),
            r"EMA got .*sizes \(8, 4, 3\) instead of \(8, 4, None\); use init_state$",
        ),
        (
            model(a=GAU),
            model(a=GAU | {"window": 1}),
            r"GatedAttentionUnit got .*sizes \(1, \(4,\), \(6,\), \(\)\)",
        ),
        (
            model(a=GAU),
            model(a=GAU | {"query_size": 2}),
            r"GatedAttentionUnit got .*sizes \(5, \(2,\), \(6,\), \(\)\)",
        ),
        (
            model(a=CONV),
            model(a=CONV | {"kernel_size": 4}),
            r"Conv got .*sizes \(3, \(8,\)\) instead of \(2, \(8,\)\); use init_state$",
        ),
        (
            model(a=ATTENTION),
            model(a=ATTENTION | {"heads": 4}),
            r"Attention got .*sizes \(None, \(4, 2\), \(4, 2\)\)",
        ),
        (model(a=GAU), model(a=CONV), r"GatedAttentionUnit got .*sizes \(2, \(8,\)\)"),
        (
            model(a=GAU),
            model(b=GAU),
            r"layer 0 Sparse.* got the state of another model: parts \['b'\] instead of \['a'\]; use init_state$",
        ),
        (
            model(a=GAU),
            model(),
            r"layer 0 RoutedLayer got .* parts \['backbone'\] instead of \['backbone', 'routed'\]; use init_state$",
        ),
        (
            model(),
            model(a=GAU),
            r"layer 0 RoutedLayer got .* parts \['backbone', 'routed'\] instead of \['backbone'\]; use init_state$",
        ),
        (
            model(a=GAU),
            model({}, a=GAU),
            r"layer 0 RoutedLayer got .* parts \['routed'\] instead of \['backbone', 'r",
        ),
        (
            model({}, a=GAU),
            model(a=GAU),
            r"layer 0 RoutedLayer got .* parts \['backbone', 'routed'\] instead of \['r",
        ),
        (model(), model(repeat=2), r"LanguageModel got .*: layers 2 instead of 1; use init_state"),
    ],
)
def test_the_state_of_another_model_is_refused_and_unchanged(
    mine: sma.SequenceModel, other: sma.SequenceModel, complaint: str
) -> None:
    ids = torch.randint(9, (2, 4))
    state = other(ids, state=other.init_state(2)).state
    assert state is not None
    before = {name: tensor.clone() for name, tensor in named_tensors(state).items()}
    for length in (4, 1):
        with pytest.raises(StateError, match=complaint):
            mine(ids[:, :length], state=state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(state).items())


def test_an_id_outside_the_vocabulary_never_changes_the_state() -> None:
    mine = model(a=GAU)
    state = mine.init_state(1)
    with pytest.raises(InputError, match="token id 9 is out of range; the vocabulary has ids 0 … 8"):
        mine(torch.tensor([[9]]), state=state)
    assert int(state.seen) == 0


def test_a_state_of_another_precision_can_be_used_and_keeps_it() -> None:
    mine = model(a=GAU)
    ids = torch.randint(9, (2, 7))
    given = mine.init_state(2, dtype=torch.float64)
    state = mine(ids[:, :4], state=given).state
    assert state is not None
    kept = {name: tensor.dtype for name, tensor in named_tensors(given).items()}
    assert torch.float64 in kept.values()
    assert {name: tensor.dtype for name, tensor in named_tensors(state).items()} == kept
    output = mine(ids[:, 4:], state=state)
    assert output.logits is not None
    whole = mine(ids).logits
    assert whole is not None
    torch.testing.assert_close(output.logits, whole[:, 4:], rtol=1e-5, atol=1e-5)
