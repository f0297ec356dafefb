"""Formulas and initialisation of heads."""

import math

import pytest
import torch

from sma.heads import HeadSpec, MeanPoolLinearSpec, MeanPoolMLPSpec
from sma.spec import kinds
from tests.cases import normal, spread

HEADS = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(MeanPoolMLPSpec(hidden=4, classes=3, dropout=0.5), id="mean_pool_mlp"),
        pytest.param(MeanPoolLinearSpec(classes=1), id="linear"),
    ],
)


def test_every_head_is_tested():
    assert set(kinds("head")) == {spec.values[0].kind for spec in HEADS.args[1]}


@HEADS
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_every_row_is_scored_independently(spec, rows):
    head, pooled = spec.build(5).eval(), normal(rows, 5, dtype=torch.float32)
    scores = head(pooled)
    assert scores.shape == (rows, spec.classes)
    for b in range(rows):
        torch.testing.assert_close(head(pooled[b : b + 1])[0], scores[b])


def test_mlp_is_linear_gelu_linear_without_bias():
    head, pooled = MeanPoolMLPSpec(hidden=4, classes=3).build(5).double(), normal(2, 5)
    spread(head)
    inner = pooled @ head.inner.weight.T + head.inner.bias
    gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    torch.testing.assert_close(head(pooled), gelu @ head.outer.weight.T)
    assert head.outer.bias is None


def test_initial_weights_of_the_mlp_are_xavier_uniform():
    head = MeanPoolMLPSpec(hidden=300, classes=100).build(200)
    for linear in (head.inner, head.outer):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not head.inner.bias.any()


def test_mlp_drops_before_the_gelu_in_training_only():
    head = MeanPoolMLPSpec(hidden=4000, classes=2, dropout=0.25).build(3)
    seen = []
    head.outer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pooled = normal(1, 3, dtype=torch.float32)
    head.train()(pooled)
    head.eval()(pooled)
    dropped = seen[0] == 0
    assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.03)
    inner = head.inner(pooled)
    torch.testing.assert_close(seen[0][~dropped], torch.nn.functional.gelu(inner / 0.75)[~dropped])
    torch.testing.assert_close(seen[1], torch.nn.functional.gelu(inner))


def test_incomplete_kind_is_refused():
    class HalfSpec(HeadSpec):
        kind: str = "half"

    with pytest.raises(TypeError, match=r"HalfSpec must define build\(self, width\)"):
        HalfSpec().build(3)
