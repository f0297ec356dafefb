"""Angles, sinusoids and the sizes of bias tables against their formulas."""

import cmath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.positions import NoPositionSpec, RelativeBiasSpec, RotarySpec, Sinusoid, rotate
from tests import oracles
from tests.cases import gradients, normal


@given(pairs=st.integers(1, 4), position=st.integers(0, 10**7), base=st.sampled_from([10000.0, 500.0]))
def test_rotary_rotates_each_pair_of_channels_as_a_complex_number(pairs, position, base):
    x = normal(1, 2 * pairs, seed=pairs)
    found = rotate(x, torch.tensor([position]), base)[0]
    for i in range(pairs):
        turned = complex(x[0, 2 * i], x[0, 2 * i + 1]) * cmath.exp(1j * position * base ** (-2 * i / (2 * pairs)))
        assert found[2 * i].item() == pytest.approx(turned.real, abs=1e-8)
        assert found[2 * i + 1].item() == pytest.approx(turned.imag, abs=1e-8)


@given(query=st.integers(0, 10**6), key=st.integers(0, 10**6), shift=st.integers(0, 10**6))
def test_rotary_scores_depend_on_distances_only(query, key, shift):
    q, k = normal(1, 6, seed=1), normal(1, 6, seed=2)

    def score(offset: int) -> torch.Tensor:
        return (rotate(q, torch.tensor([query + offset]), 1e4) * rotate(k, torch.tensor([key + offset]), 1e4)).sum()

    torch.testing.assert_close(score(0), score(shift), atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_angles_are_exact_at_large_positions(dtype):
    """A float32 angle near position 10^6 would have an error of 0.03 rad."""
    x, positions = normal(3, 8), torch.tensor([10**6, 10**6 + 1, 10**7])
    exact = rotate(x.to(dtype).double(), positions, 1e4)
    assert rotate(x.to(dtype), positions, 1e4).dtype == dtype
    torch.testing.assert_close(
        rotate(x.to(dtype), positions, 1e4).double(), exact, atol=3e-7 if dtype == torch.float32 else 0.03, rtol=0
    )


def test_rotary_accepts_several_heads_and_no_tokens():
    x, positions = normal(5, 3, 4), torch.arange(5)
    heads = [rotate(x[:, head], positions, 1e4) for head in range(3)]
    assert torch.equal(rotate(x, positions, 1e4), torch.stack(heads, dim=1))
    assert rotate(x[:0], positions[:0], 1e4).shape == (0, 3, 4)


def test_rotary_keeps_lengths_and_rotates_gradients_back():
    x, positions = normal(5, 6).requires_grad_(), torch.arange(5) * 1000
    turned = rotate(x, positions, 1e4)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(gradients(turned, [x])[0], rotate(normal(5, 6, seed=7), -positions, 1e4))


@given(width=st.integers(1, 5).map(lambda half: 2 * half), position=st.integers(0, 10**6))
def test_sinusoid_is_sine_then_cosine_of_the_position(width, position):
    module = Sinusoid(width).double()
    with torch.no_grad():
        module.scale.fill_(0.7)
    found = module(torch.tensor([[position, 0]]))
    torch.testing.assert_close(found[0, 0], 0.7 * oracles.sinusoid(position, width), atol=1e-8, rtol=0)
    torch.testing.assert_close(found[0, 1], 0.7 * oracles.sinusoid(0, width))


def test_initial_scale_of_the_sinusoid_is_the_inverse_root_of_the_width():
    module = Sinusoid(16)
    assert module.scale.tolist() == [0.25]
    assert module(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 16)


@pytest.mark.parametrize(
    ("spec", "window", "size"),
    [
        pytest.param(RelativeBiasSpec(max_positions=100), None, 199, id="true distance"),
        pytest.param(RelativeBiasSpec(max_positions=100), 8, 199, id="true distance with a window"),
        pytest.param(RelativeBiasSpec(max_positions=1), None, 1, id="one position"),
        pytest.param(RelativeBiasSpec(distance="slot_distance"), 8, 47, id="slot distance"),
        pytest.param(RotarySpec(), 8, 0, id="rotary"),
        pytest.param(NoPositionSpec(), None, 0, id="none"),
    ],
)
def test_bias_table_has_the_size_of_the_layout_of_the_authors(spec, window, size):
    assert spec.table_size(window) == size
