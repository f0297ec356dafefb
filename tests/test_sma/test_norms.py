"""Norms against the formula of one token, and batch norm against that of torch over the valid tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from sma.norms import BatchNorm, BatchNormSpec, LayerNormSpec, Norm, NormSpec, RMSNormSpec, ScaleNormSpec
from sma.spec import kinds
from tests import oracles
from tests.cases import generator, gradients, masks, normal, spread, strided

NORMS = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(LayerNormSpec(), id="layer_norm"),
        pytest.param(LayerNormSpec(affine=False, epsilon=0.1), id="layer_norm-plain"),
        pytest.param(RMSNormSpec(epsilon=0.1), id="rms_norm"),
        pytest.param(RMSNormSpec(affine=False), id="rms_norm-plain"),
        pytest.param(ScaleNormSpec(), id="scale_norm"),
        pytest.param(ScaleNormSpec(affine=False), id="scale_norm-plain"),
        pytest.param(BatchNormSpec(), id="batch_norm"),
        pytest.param(BatchNormSpec(affine=False, momentum=0.3), id="batch_norm-plain"),
        pytest.param(BatchNormSpec(synchronized=True), id="batch_norm-synchronized-of-one"),
    ],
)


def _norm(spec: NormSpec, width: int = 5) -> Norm:
    norm = spec.build(width).double()
    spread(norm)
    if isinstance(norm, BatchNorm):
        norm.running_mean += normal(width, seed=1)
        norm.running_var += normal(width, seed=2).abs()
    return norm


def test_every_norm_is_tested():
    assert set(kinds("norm")) == {spec.values[0].kind for spec in NORMS.args[1]}


@NORMS
@given(rows=st.integers(0, 2), length=st.integers(0, 4), width=st.integers(1, 6))
def test_every_token_is_normalised_by_the_formula(spec, rows, length, width):
    norm, x = _norm(spec, width).eval(), normal(rows, length, width, seed=width).requires_grad_()
    out = norm(x)
    assert out.shape == x.shape
    by_hand = [[oracles.normalise(norm, x[b, t]) for t in range(length)] for b in range(rows)]
    for b in range(rows):
        for t in range(length):
            torch.testing.assert_close(out[b, t], by_hand[b][t])
    if out.numel():
        expected = torch.stack([torch.stack(row) for row in by_hand])
        inputs = [x, *norm.parameters()]
        torch.testing.assert_close(gradients(out, inputs), gradients(expected, inputs), atol=1e-9, rtol=1e-6)


@NORMS
@given(valid=masks())
def test_padding_never_changes_a_valid_token(spec, valid):
    x = normal(*valid.shape, 5)
    outputs = [_norm(spec)(x.where(valid[..., None], junk), valid)[valid] for junk in (0.0, 1e4, torch.nan)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@NORMS
@pytest.mark.parametrize("training", [True, False])
def test_gradient_check_in_float64(spec, training):
    norm = _norm(spec).train(training)
    assert torch.autograd.gradcheck(
        lambda x, *parameters: norm(x), [normal(2, 3, 5).requires_grad_(), *norm.parameters()]
    )


@NORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_result_is_finite_in_the_dtype_of_the_tokens(spec, dtype, size):
    norm, x = spec.build(5).to(dtype), (size * normal(2, 3, 5)).to(dtype).requires_grad_()
    out = norm(x)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(out, [x, *norm.parameters()]))


@NORMS
def test_input_that_is_not_contiguous_gives_the_same_result(spec):
    x = normal(2, 3, 5)
    for other in strided(x):
        torch.testing.assert_close(_norm(spec)(other), _norm(spec)(x))


@NORMS
def test_initial_norm_has_unit_scale_and_no_shift(spec):
    x = normal(4, 9, 8)
    x = (x - x.mean((0, 1))) / x.std((0, 1))
    torch.testing.assert_close(
        spec.replace(epsilon=1e-9).build(8).double().eval()(x).square().mean(), x.square().mean(), rtol=0.05, atol=0
    )


class TestBatchNorm:
    def _pair(self, affine: bool, momentum: float, width: int = 5) -> tuple[Norm, nn.BatchNorm1d]:
        ours = _norm(BatchNormSpec(affine=affine, momentum=momentum), width)
        theirs = nn.BatchNorm1d(width, eps=1e-5, affine=affine, momentum=momentum).double()
        theirs.load_state_dict({**ours.state_dict(), "num_batches_tracked": torch.tensor(0)})
        return ours, theirs

    @pytest.mark.parametrize("affine", [True, False])
    @given(valid=masks(rows=4, length=6), momentum=st.sampled_from([0.1, 0.7, 1.0]), masked=st.booleans())
    def test_equals_torch_over_the_valid_tokens(self, affine, valid, momentum, masked):
        ours, theirs = self._pair(affine, momentum)
        valid = valid if masked else torch.ones_like(valid)
        x = normal(*valid.shape, 5).requires_grad_()
        if valid.sum() < 2:
            return
        out, expected = ours(x, valid if masked else None)[valid], theirs(x[valid])
        torch.testing.assert_close(out, expected)
        inputs = [x, *ours.parameters()], [x, *theirs.parameters()]
        torch.testing.assert_close(gradients(out, inputs[0]), gradients(expected, inputs[1]))
        for name, buffer in ours.named_buffers():
            torch.testing.assert_close(buffer, theirs.get_buffer(name))
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.flatten(0, 1)).reshape(x.shape))

    def test_without_padding_it_equals_batch_norm_of_torch_in_float32(self):
        ours, theirs = self._pair(True, 0.1)
        x = normal(3, 7, 5, dtype=torch.float32)
        torch.testing.assert_close(ours.float()(x), theirs.float()(x.transpose(1, 2)).transpose(1, 2))

    @pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
    def test_fewer_than_two_tokens_use_the_running_statistics_without_an_update(self, shape):
        for valid in (None, torch.zeros(shape, dtype=torch.bool)):
            norm, x = _norm(BatchNormSpec()), normal(*shape, 5)
            kept = {name: buffer.clone() for name, buffer in norm.named_buffers()}
            torch.testing.assert_close(norm.train()(x, valid), norm.eval()(x))
            assert all(torch.equal(buffer, kept[name]) for name, buffer in norm.named_buffers())

    def test_evaluation_updates_nothing(self):
        norm = _norm(BatchNormSpec()).eval()
        kept = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        norm(normal(2, 3, 5))
        assert all(torch.equal(buffer, kept[name]) for name, buffer in norm.named_buffers())

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_activation_checkpointing_updates_statistics_once_and_changes_no_gradient(self, reentrant):
        x, valid = normal(3, 7, 5).requires_grad_(), torch.rand(3, 7, generator=generator(0)) < 0.7
        plain, saved = _norm(BatchNormSpec()), _norm(BatchNormSpec())
        expected, out = (
            plain(x, valid).square(),
            checkpoint(lambda y: saved(y, valid).square(), x, use_reentrant=reentrant),
        )
        grads = []
        for result, norm in ((expected, plain), (out, saved)):
            x.grad = None
            (result * normal(3, 7, 5, seed=7)).sum().backward()
            grads.append([x.grad, *(parameter.grad for parameter in norm.parameters())])
        assert torch.equal(out, expected)
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
        for name, buffer in plain.named_buffers():
            assert torch.equal(saved.get_buffer(name), buffer)

    def test_statistics_of_half_precision_tokens_are_kept_in_float32(self):
        norm = BatchNormSpec().build(5)
        x = (1 + normal(64, 64, 5)).bfloat16()
        norm(x)
        assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
        torch.testing.assert_close(norm.running_mean.double(), 0.1 * x.double().mean((0, 1)), rtol=1e-5, atol=0)
