"""The kernel that places active tokens, in Triton's interpreter, against the operators of PyTorch."""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.kernels import use
from sma.kernels.operator import Name
from sma.kernels.placing import Search, lay_out
from sma.ragged import find, locate
from tests.cases import generator, masks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def _assert_the_search_agrees(active: torch.Tensor, positions: torch.Tensor | None, name: Name = "triton") -> None:
    index = active.reshape(-1).nonzero().squeeze(1)
    wanted = lay_out(index, active.sum(1), active.shape[1], positions)
    search = Search(active, positions)
    assert search.all_active == bool(active.all())
    with use(name):
        found = search.read()
    for field in ("at", "positions", "rows", "offsets", "lengths"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field
    count = len(index)
    inverse = torch.full((active.numel(),), count)
    inverse[index] = torch.arange(count)
    assert torch.equal(found.inverse, inverse)


@given(active=masks(), given_positions=st.booleans())
def test_the_kernel_agrees_with_the_operators(active: torch.Tensor, given_positions: bool) -> None:
    if active.numel():
        for name in ("plain", "triton"):
            _assert_the_search_agrees(
                active, torch.randint(2**40, active.shape, generator=generator(0)) if given_positions else None, name
            )


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(3, 1000), (1, 1024), (2050, 1), (7, 293)], ids=str)
def test_more_tokens_than_one_program_handles(shape: tuple[int, int], rate: float) -> None:
    active = torch.rand(shape, generator=generator(0)) < rate
    _assert_the_search_agrees(active, None)
    _assert_the_search_agrees(active.T.contiguous().T, None)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_find_on_an_accelerator_equals_locate(monkeypatch: pytest.MonkeyPatch, rate: float) -> None:
    active = torch.rand(3, 9, 1, generator=generator(0)) < rate
    (wanted,) = locate(active)
    monkeypatch.setattr("sma.ragged.on_host", lambda device: False)
    with use("triton"):
        (found,) = find(active)()
    assert found.stride == wanted.stride
    for field in ("index", "positions", "rows", "offsets", "lengths"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), field
