"""Padding on any side of a batch of a layer changes no valid token, gradient or other row."""

import pytest
import torch
from torch import Tensor

from sma import LayerSpec
from sma.routers import SMARouter
from sma.spec import FrozenDict
from tests.cases import generator, normal, pad, sides
from tests.test_sma.layers import WIDTH, layers, make


def _valid_rows(count: int = 4) -> list[Tensor]:
    return [normal(length, WIDTH, seed=length) for length in (4, 0, 1, 6)[:count]]


@sides
@pytest.mark.parametrize("fill", [0.0, 1e4, torch.nan, torch.inf])
@layers
def test_a_row_alone_and_the_same_row_in_a_padded_batch_agree(name, side, fill):
    layer, rows = make(name), _valid_rows()
    batch, valid = pad(rows, side, fill=fill)
    batch.requires_grad_()
    output = layer(batch, valid)
    for b, row in enumerate(rows):
        alone = layer(row[None])
        torch.testing.assert_close(output.hidden[b][valid[b]], alone.hidden[0], atol=1e-12, rtol=1e-9)
        if alone.decision is not None:
            assert torch.equal(output.decision.active[b][valid[b]], alone.decision.active[0])
            torch.testing.assert_close(output.decision.confidence[b][valid[b]], alone.decision.confidence[0])
    if output.decision is not None:
        assert not output.decision.active[~valid].any()


@sides
@pytest.mark.parametrize("fill", [0.0, torch.nan])
@layers
def test_padding_never_changes_a_gradient(name, side, fill):
    layer, rows = make(name), _valid_rows()
    batch, valid = pad(rows, side, fill=fill)
    weight = pad([normal(*row.shape, seed=9) for row in rows], side)[0]
    batch.requires_grad_()
    parameters = list(layer.parameters())
    hidden = layer(batch, valid).hidden.where(valid[..., None], 0)
    by_batch, *found = torch.autograd.grad((hidden * weight).sum(), [batch, *parameters], materialize_grads=True)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for b, row in enumerate(rows):
        row = row[None].clone().requires_grad_()
        alone = (layer(row).hidden * weight[b][valid[b]]).sum()
        by_row, *parts = torch.autograd.grad(alone, [row, *parameters], materialize_grads=True)
        torch.testing.assert_close(by_batch[b][valid[b]], by_row[0])
        total = [one + other for one, other in zip(total, parts, strict=True)]
    torch.testing.assert_close(found, total)
    assert not by_batch[~valid].any()


@layers
def test_the_result_of_a_row_never_depends_on_the_other_rows(name):
    layer, x = make(name), normal(3, 6, WIDTH)
    valid = torch.rand(3, 6, generator=generator(2)) < 0.7
    changed = torch.stack([x[0], -1e3 * x[1], x[2].fill_(7.0)])
    one, other = layer(x, valid), layer(changed, valid)
    torch.testing.assert_close(one.hidden[0], other.hidden[0], atol=1e-12, rtol=1e-9)


@layers
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
def test_a_batch_without_a_valid_token_gives_zero_gradients_not_none(name, shape):
    layer, x = make(name).train(), torch.full((*shape, WIDTH), torch.nan, dtype=torch.float64).requires_grad_()
    output = layer(x, torch.zeros(shape, dtype=torch.bool))
    assert output.hidden.isfinite().all()
    output.hidden.where(torch.zeros(*shape, 1, dtype=torch.bool), 0).sum().backward()
    for name, tensor in [("input", x), *layer.named_parameters()]:
        assert tensor.grad is not None, name
        assert not tensor.grad.any(), name


@sides
def test_decision_is_returned_at_the_original_positions(side):
    """The router selects a marker token only, so its position in the decision is known for padding on any side."""
    layer = LayerSpec(modules=FrozenDict(skip={"kind": "identity"}), bypass="identity").build(WIDTH).double()
    router = layer.routed.router
    assert isinstance(router, SMARouter)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.0] * 4, [1.0, 0.0, 0.0, 0.0]]))
    rows = [torch.rand(length, WIDTH, generator=generator(length), dtype=torch.float64) - 2 for length in (5, 3)]
    rows[0][2, 0] = rows[1][1, 0] = 1.0
    batch, valid = pad(rows, side)
    decision = layer(batch, valid).decision
    assert torch.equal(decision.active[..., 0], (batch[..., 0] == 1) & valid)
    assert torch.equal(decision.logits[..., 0, 1][valid], batch[..., 0][valid])


def test_random_routers_draw_by_position_so_left_padding_changes_nothing():
    layer = make("several modules", router={"kind": "random", "rate": 0.5})
    row = normal(6, WIDTH)
    alone = layer(row[None])
    for side in ("left", "middle", "right"):
        batch, valid = pad([row], side, fill=torch.nan)
        output = layer(batch, valid)
        assert torch.equal(output.decision.active[valid], alone.decision.active[0])
        torch.testing.assert_close(output.hidden[valid], alone.hidden[0])


def test_batch_norm_in_a_layer_counts_the_valid_tokens_only():
    layer = make("seqboat", norm={"kind": "batch_norm", "momentum": 1.0}).train()
    batch, valid = pad(_valid_rows(), "left", fill=1e4)
    layer(batch, valid)
    torch.testing.assert_close(layer.norm.running_mean, batch[valid].mean(0))
    torch.testing.assert_close(layer.norm.running_var, batch[valid].var(0))


@sides
def test_batch_norm_after_the_residual_counts_the_valid_tokens_only(side):
    layer = make("seqboat", norm={"kind": "batch_norm", "place": "post", "affine": False, "epsilon": 1e-12}).train()
    batch, valid = pad(_valid_rows(), side, fill=1e4)
    tokens = layer(batch, valid).hidden[valid]
    torch.testing.assert_close(tokens.mean(0), torch.zeros(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(tokens.var(0, correction=0), torch.ones(WIDTH, dtype=torch.float64))
