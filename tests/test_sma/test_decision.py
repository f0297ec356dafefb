"""Activation rates against counts, and decisions that move with their tokens."""

import pytest
import torch
from hypothesis import given

from sma import Decision
from sma.errors import InputError
from sma.padding import move
from tests.cases import generator, masks, normal
from tests.streams import exactly


def _decision(active: torch.Tensor) -> Decision:
    shape = active.shape
    logits, confidence, p_on = normal(*shape, 2), normal(*shape, seed=1).sigmoid(), normal(*shape, seed=2).sigmoid()
    return Decision(active, confidence, logits, p_on, tuple("abc"[: shape[-1]]))


def _active(valid: torch.Tensor, modules: int = 3) -> torch.Tensor:
    return (torch.rand(*valid.shape, modules, generator=generator(4)) < 0.5) & valid[..., None]


@given(valid=masks())
def test_rate_is_active_valid_tokens_over_valid_tokens(valid):
    active = _active(valid)
    counts = [
        sum(bool(active[b, t, m]) for b in range(valid.shape[0]) for t in range(valid.shape[1])) for m in range(3)
    ]
    rate = _decision(active).rate(valid)
    assert rate.dtype == torch.float64
    assert rate.tolist() == [count / max(int(valid.sum()), 1) for count in counts]


@given(valid=masks())
def test_rate_without_a_mask_counts_every_token(valid):
    decision = _decision(_active(valid))
    assert torch.equal(decision.rate(), decision.rate(torch.ones_like(valid)))


def test_rate_ignores_active_padding():
    active = torch.ones(1, 4, 2, dtype=torch.bool)
    assert _decision(active).rate(torch.tensor([[True, False, False, False]])).tolist() == [1.0, 1.0]


def test_rate_of_no_valid_token_is_zero():
    for valid in (
        torch.zeros(2, 3, dtype=torch.bool),
        torch.zeros(0, 3, dtype=torch.bool),
        torch.zeros(2, 0, dtype=torch.bool),
    ):
        assert _decision(_active(valid)).rate(valid).tolist() == [0.0, 0.0, 0.0]
        assert _decision(_active(valid)).rate().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("valid", "problem"),
    [
        (
            torch.ones(1, 3, dtype=torch.bool),
            "valid is of shape (1, 3) and dtype torch.bool; expected a boolean tensor of shape (B = 2, L = 3)",
        ),
        (
            torch.ones(2, 4, dtype=torch.bool),
            "valid is of shape (2, 4) and dtype torch.bool; expected a boolean tensor of shape (B = 2, L = 3)",
        ),
        (
            torch.ones(2, 3, 1, dtype=torch.bool),
            "valid is of shape (2, 3, 1) and dtype torch.bool; expected a boolean tensor of shape (B = 2, L = 3)",
        ),
        (
            torch.ones(2, 3),
            "valid is of shape (2, 3) and dtype torch.float32; "
            "expected a boolean tensor of shape (B = 2, L = 3): convert with .bool()",
        ),
        (
            [[1, 1, 0], [1, 1, 1]],
            "valid is a list; expected a torch.Tensor: write torch.as_tensor(x, dtype=torch.bool)",
        ),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(valid, problem, as_users_run):
    with pytest.raises(InputError, match=exactly(problem)):
        _decision(_active(torch.ones(2, 3, dtype=torch.bool))).rate(valid)


@given(valid=masks())
def test_move_reorders_every_field(valid):
    decision = _decision(_active(valid))
    order = torch.rand(valid.shape, generator=generator(5)).argsort(1)
    moved = decision.move(order)
    for name in ("active", "confidence", "logits", "p_on"):
        assert torch.equal(getattr(moved, name), move(getattr(decision, name), order))
    assert moved.names == decision.names
    assert torch.equal(moved.move(order.argsort(1)).confidence, decision.confidence)
