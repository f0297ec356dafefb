"""Encoders: formulas, initialisation, and errors."""

import pytest
import torch

from sma.encoders import EncoderSpec, LinearEncoderSpec, RealNumberSpec, TokenEmbeddingSpec
from sma.errors import InputError, SpecError
from sma.spec import kinds
from tests.cases import gradients, normal

ENCODERS = pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        pytest.param(
            TokenEmbeddingSpec(vocabulary=5, padding=2), torch.tensor([[0, 2, 4], [1, 1, 3]]), id="token_embedding"
        ),
        pytest.param(RealNumberSpec(), normal(2, 3, dtype=torch.float32), id="real_number"),
        pytest.param(LinearEncoderSpec(features=4), normal(2, 3, 4, dtype=torch.float32), id="linear"),
    ],
)


def test_every_encoder_is_tested():
    assert set(kinds("encoder")) == {case.values[0].kind for case in ENCODERS.args[1]}


@ENCODERS
def test_the_vector_of_a_position_depends_on_its_input_only(spec, inputs):
    encoder = spec.build(6)
    encoder.check(inputs)
    out = encoder(inputs)
    assert out.shape == (2, 3, 6)
    for b in range(2):
        for t in range(3):
            torch.testing.assert_close(encoder(inputs[b : b + 1, t : t + 1])[0, 0], out[b, t])


@ENCODERS
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_encoder_accepts_no_rows_and_no_positions(spec, inputs, shape):
    empty = inputs[: shape[0], : shape[1]]
    encoder = spec.build(6)
    encoder.check(empty)
    assert encoder(empty).shape == (*shape, 6)


def test_tokens_are_looked_up():
    encoder = TokenEmbeddingSpec(vocabulary=5).build(3)
    assert torch.equal(encoder(torch.tensor([[4, 0]])), encoder.weight[[4, 0]][None])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_ids_may_be_integers_of_any_size(dtype):
    encoder = TokenEmbeddingSpec(vocabulary=5).build(3)
    ids = torch.tensor([[4, 0]], dtype=dtype)
    encoder.check(ids)
    assert torch.equal(encoder(ids), encoder.weight[[4, 0]][None])


def test_padding_token_is_zero_and_gets_no_gradient():
    encoder = TokenEmbeddingSpec(vocabulary=5, padding=2).build(3)
    assert not encoder.weight[2].any()
    (gradient,) = gradients(encoder(torch.tensor([[2, 2, 1]])), [encoder.weight])
    assert gradient.any(1).tolist() == [False, True, False, False, False]


def test_embedding_starts_from_a_normal_distribution_of_the_inverse_root_of_the_width():
    weight = TokenEmbeddingSpec(vocabulary=1000).build(64).weight
    assert weight.std().item() == pytest.approx(1 / 8, rel=0.02)


def test_real_numbers_are_scaled_and_shifted_per_channel():
    encoder, x = RealNumberSpec().build(4), normal(2, 3, dtype=torch.float32)
    out = encoder(x)
    for b in range(2):
        for t in range(3):
            torch.testing.assert_close(out[b, t], x[b, t] * encoder.weight + encoder.bias)
    big = RealNumberSpec().build(20000)
    assert (big.weight.std().item(), big.bias.std().item()) == pytest.approx((1.0, 0.1), rel=0.03)


def test_features_are_mapped_linearly():
    encoder, x = LinearEncoderSpec(features=4).build(3), normal(2, 5, 4, dtype=torch.float32)
    torch.testing.assert_close(encoder(x), x @ encoder.linear.weight.T + encoder.linear.bias)


@pytest.mark.usefixtures("as_users_run")
class TestWrongInput:
    @pytest.mark.parametrize(
        ("spec", "inputs", "complaint"),
        [
            pytest.param(
                TokenEmbeddingSpec(vocabulary=5),
                torch.tensor([[0, 5]]),
                r"token id 5 is out of range; the vocabulary has ids 0 … 4",
                id="id too large",
            ),
            pytest.param(
                TokenEmbeddingSpec(vocabulary=5),
                torch.tensor([[-1, 9]]),
                r"token id -1 is out of range; the vocabulary has ids 0 … 4",
                id="id below zero",
            ),
            pytest.param(
                TokenEmbeddingSpec(vocabulary=5),
                torch.zeros(1, 2),
                r"token ids are of shape \(1, 2\) and dtype torch\.float32; "
                r"expected an integer tensor of shape \(B, L\)",
                id="ids that are floats",
            ),
            pytest.param(
                TokenEmbeddingSpec(vocabulary=5),
                torch.zeros(1, 2, dtype=torch.bool),
                r"token ids are of shape \(1, 2\) and dtype torch\.bool; "
                r"expected an integer tensor of shape \(B, L\)",
                id="ids that are a mask",
            ),
            pytest.param(
                TokenEmbeddingSpec(vocabulary=5),
                torch.zeros(1, 2, dtype=torch.complex64),
                r"token ids are of shape \(1, 2\) and dtype torch\.complex64; "
                r"expected an integer tensor of shape \(B, L\)",
                id="ids that are complex",
            ),
            pytest.param(
                TokenEmbeddingSpec(vocabulary=5),
                torch.zeros(2, dtype=torch.long),
                r"token ids are of shape \(2,\) and dtype torch\.int64; "
                r"expected an integer tensor of shape \(B, L\)",
                id="one row of ids",
            ),
            pytest.param(
                RealNumberSpec(),
                torch.zeros(1, 2, dtype=torch.long),
                r"numbers are of shape \(1, 2\) and dtype torch\.int64; "
                r"expected a floating-point tensor of shape \(B, L\)",
                id="numbers that are integers",
            ),
            pytest.param(
                RealNumberSpec(),
                torch.zeros(1, 2, 3),
                r"numbers are of shape \(1, 2, 3\) and dtype torch\.float32; "
                r"expected a floating-point tensor of shape \(B, L\)",
                id="numbers with features",
            ),
            pytest.param(
                LinearEncoderSpec(features=4),
                torch.zeros(1, 2, 3),
                r"features are of shape \(1, 2, 3\) and dtype torch\.float32; "
                r"expected a floating-point tensor of shape \(B, L, F = 4\)",
                id="too few features",
            ),
            pytest.param(
                LinearEncoderSpec(features=4),
                torch.zeros(1, 2, 4, dtype=torch.int32),
                r"features are of shape \(1, 2, 4\) and dtype torch\.int32; "
                r"expected a floating-point tensor of shape \(B, L, F = 4\)",
                id="features that are integers",
            ),
        ],
    )
    def test_wrong_input_is_refused(self, spec, inputs, complaint):
        with pytest.raises(InputError, match=complaint):
            spec.build(3).check(inputs)

    @pytest.mark.parametrize("padding", [5, 100])
    def test_padding_outside_the_vocabulary_is_refused(self, padding):
        with pytest.raises(SpecError, match=f"TokenEmbeddingSpec: padding={padding} must be one of the 5 ids, 0 … 4"):
            TokenEmbeddingSpec(vocabulary=5, padding=padding)

    def test_incomplete_kind_is_refused(self):
        class HalfSpec(EncoderSpec):
            kind: str = "half"

        with pytest.raises(TypeError, match=r"HalfSpec must define build\(self, width\)"):
            HalfSpec().build(3)
        with pytest.raises(TypeError, match=r"HalfSpec must define num_parameters\(self, width\)"):
            HalfSpec().num_parameters(3)
