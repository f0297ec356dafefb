"""The linear bypass, which also gathers the routed tokens, equals its two separate operators."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.bypass import LinearBypass
from sma.errors import InputError
from sma.glue import slots_of
from sma.ragged import Places
from tests.cases import generator, normal, spread

WIDTH = 4


def make(dtype: torch.dtype = torch.float64) -> LinearBypass:
    bypass = LinearBypass(WIDTH).to(dtype)
    spread(bypass)
    return bypass


def plain(bypass: LinearBypass, x_TD: Tensor, places: Callable[[], Places]) -> tuple[Tensor, Tensor]:
    """The two separate operators."""
    return nn.functional.linear(x_TD, bypass.weight, bypass.bias), x_TD.index_select(0, places().index)


def results(program: Any, bypass: LinearBypass, x: Tensor, index: Tensor, weights: tuple[float, float]) -> list[Tensor]:
    """Both outputs, and the gradients of x, weight and bias under random incoming gradients, scaled."""
    leaf = x.detach().clone().requires_grad_()
    mapped, routed = program(bypass, leaf, lambda: Places(index, None))
    total = (
        weights[0] * (mapped * normal(*mapped.shape, seed=2)).sum()
        + weights[1] * (routed * normal(*routed.shape, seed=3)).sum()
    )
    return [
        mapped.detach(),
        routed.detach(),
        *torch.autograd.grad(total, [leaf, bypass.weight, bypass.bias], materialize_grads=True),
    ]


@given(
    tokens=st.integers(0, 9),
    rate=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
    weights=st.sampled_from([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)]),
)
def test_outputs_and_gradients_equal_those_of_the_two_operators(
    tokens: int, rate: float, seed: int, weights: tuple[float, float]
) -> None:
    bypass, x = make(), normal(tokens, WIDTH, seed=seed)
    index = (torch.rand(tokens, generator=generator(seed)) < rate).nonzero().squeeze(1)
    index = index[torch.randperm(len(index), generator=generator(seed))]
    found = results(LinearBypass.__call__, bypass, x, index, weights)
    for ours, theirs in zip(found, results(plain, bypass, x, index, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_an_unused_output_leaves_the_gradient_of_the_other_complete(which: int) -> None:
    bypass, index = make(), torch.tensor([3, 1])
    leaves = [normal(5, WIDTH).requires_grad_() for _ in range(2)]
    incoming = normal(*bypass(leaves[0], lambda: Places(index, None))[which].shape, seed=6)
    for program, leaf in zip((LinearBypass.__call__, plain), leaves, strict=True):
        program(bypass, leaf, lambda: Places(index, None))[which].backward(incoming)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("indices", [[], [2], [4, 0, 1]], ids=str)
def test_bypass_passes_gradcheck(indices: list[int]) -> None:
    bypass, x, index = make(), normal(5, WIDTH).requires_grad_(), torch.tensor(indices, dtype=torch.long)

    def program(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(bypass, {"weight": weight, "bias": bias}, (x, lambda: Places(index, None)))

    assert torch.autograd.gradcheck(program, (x, bypass.weight, bypass.bias))


def test_incoming_gradients_are_never_changed() -> None:
    bypass, x, index = make(), normal(5, WIDTH).requires_grad_(), torch.tensor([0, 2])
    incoming = [normal(5, WIDTH, seed=4), normal(2, WIDTH, seed=5)]
    kept = [tensor.clone() for tensor in incoming]
    outputs = bypass(x, lambda: Places(index, None))
    once, again = (
        torch.autograd.grad(outputs, [x, *bypass.parameters()], incoming, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(incoming, kept, strict=True))


def test_both_outputs_have_separate_memory() -> None:
    """In-place changes of the outputs change neither the tokens nor the gradients."""
    bypass, x, index = make(), normal(5, WIDTH).requires_grad_(), torch.arange(5)
    wanted = results(plain, bypass, x, index, (1.0, 1.0))[2:]
    mapped, routed = bypass(x, lambda: Places(index, None))
    kept = x.detach().clone()
    total = (mapped.add_(1) * normal(5, WIDTH, seed=2)).sum() + (routed.add_(1) * normal(5, WIDTH, seed=3)).sum()
    for ours, theirs in zip(torch.autograd.grad(total, [x, bypass.weight, bypass.bias]), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.equal(x.detach(), kept)


def test_tokens_that_are_not_contiguous_give_the_same_outputs() -> None:
    bypass, index = make(), torch.tensor([1, 3])
    x = normal(WIDTH, 5).T
    assert not x.is_contiguous()
    wanted = results(plain, bypass, x.contiguous(), index, (1.0, 1.0))
    for ours, theirs in zip(results(LinearBypass.__call__, bypass, x, index, (1.0, 1.0)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("graph", [False, True], ids=["no_grad", "grad"])
def test_autocast_gives_the_outputs_of_the_two_operators(graph: bool) -> None:
    bypass, x, index = make(torch.float32), normal(5, WIDTH, dtype=torch.float32), torch.tensor([1, 3])
    with torch.set_grad_enabled(graph), torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, theirs in zip(
            bypass(x, lambda: Places(index, None)), plain(bypass, x, lambda: Places(index, None)), strict=True
        ):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_gives_the_gradients_of_the_two_operators(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr("sma.bypass.fuses", lambda tensor: fused)
    bypass, x, index = make(torch.float32), normal(50, WIDTH, dtype=torch.float32), torch.tensor([1, 3])
    found = []
    for program in (LinearBypass.__call__, plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mapped, routed = program(bypass, leaf, lambda: Places(index, None))
            total = (mapped.float() * normal(50, WIDTH, seed=1)).sum() + (routed * normal(2, WIDTH, seed=2)).sum()
        found.append(torch.autograd.grad(total, [leaf, bypass.weight, bypass.bias]))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("places", [[3, 1], [4], [0, 1, 2, 3, 4]], ids=str)
def test_an_inverse_gives_the_gradients_of_the_index(monkeypatch: pytest.MonkeyPatch, places: list[int]) -> None:
    bypass, x, index = make(), normal(5, WIDTH), torch.tensor(places)
    wanted = results(plain, bypass, x, index, (1.0, 1.0))
    monkeypatch.setattr("sma.bypass.fuses", lambda tensor: True)
    inverse = slots_of(index, None, 5)
    found = results(lambda part, x, _: part(x, lambda: Places(index, inverse)), bypass, x, index, (1.0, 1.0))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_keeps_float64(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr("sma.bypass.fuses", lambda tensor: fused)
    bypass, x, index = make(), normal(5, WIDTH).requires_grad_(), torch.tensor([1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped, _ = bypass(x, lambda: Places(index, None))
    torch.testing.assert_close(mapped, nn.functional.linear(x, bypass.weight, bypass.bias), rtol=1e-12, atol=1e-12)


def test_second_derivatives_under_autocast_equal_the_operators_or_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def penalty() -> Tensor:
        bypass, x = make(torch.float32), normal(5, WIDTH, dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mapped, _ = bypass(x, lambda: Places(torch.tensor([1, 3]), None))
        (slope,) = torch.autograd.grad(mapped.float().square().sum(), x, create_graph=True)
        found: Tensor = torch.autograd.grad(slope.square().sum(), bypass.weight)[0]
        return found

    bypass, x = make(torch.float32), normal(5, WIDTH, dtype=torch.float32).requires_grad_()
    (slope,) = torch.autograd.grad(
        bypass(x, lambda: Places(torch.tensor([1]), None))[0].square().sum(), x, create_graph=True
    )
    (wanted,) = torch.autograd.grad(slope.square().sum(), bypass.weight)
    torch.testing.assert_close(penalty(), wanted, rtol=5e-2, atol=5e-2 * float(wanted.abs().max()))
    monkeypatch.setattr("sma.bypass.fuses", lambda tensor: True)
    with pytest.raises(InputError, match=r"^the bypass under autocast has no second derivatives"):
        penalty()
