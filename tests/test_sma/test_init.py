"""Initial values: a truncated normal distribution."""

import pytest
import torch
from torch import nn

from sma.init import reset_linear_, seeded, truncated_normal_


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_numbers_are_normal_and_truncated_at_two_standard_deviations(std):
    tensor = torch.full((200, 200), 9.0)
    assert truncated_normal_(tensor, std) is tensor
    assert 1.9 * std < tensor.abs().max() <= 2 * std
    assert abs(tensor.mean().item()) < 0.02 * std
    assert tensor.std().item() == pytest.approx(0.8796 * std, rel=0.02)  # of a normal distribution truncated there


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_has_small_initial_weights_and_zero_biases(bias):
    linear = nn.Linear(200, 100, bias=bias)
    reset_linear_(linear)
    assert linear.weight.requires_grad
    assert linear.weight.std().item() == pytest.approx(0.0176, rel=0.03)
    assert linear.bias is None or not linear.bias.any()


def test_a_seed_gives_the_same_draws_and_restores_every_random_state(monkeypatch):
    def fail(seed):
        raise AssertionError("the generators of accelerators are not touched")

    monkeypatch.setattr("torch.cuda.manual_seed_all", fail)
    torch.default_generator.manual_seed(7)
    wanted = torch.rand(3)
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state()
    with seeded(7):
        assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(torch.get_rng_state(), before)
