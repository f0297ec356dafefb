"""States as values: rows, sizes and errors; the defaults of a sub-module."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from sma.errors import InputError, StateError
from sma.pytree import register_output, tensors
from sma.ragged import Ragged
from sma.submodule import NoState, State, SubModule, may_skip, no_state
from tests.streams import copied, exactly, same_bits


@register_output
@dataclass(frozen=True)
class Inner(State):
    """A state inside another."""

    memory: tuple[Tensor, ...]
    missing: Tensor | None = None


@register_output
@dataclass(frozen=True)
class Outer(State):
    """A state of every shape, dtype and nesting."""

    seen: Tensor
    parts: dict[str, Inner]
    flags: Tensor
    nothing: NoState


def state(rows: int = 4) -> Outer:
    """A state in which all values of row b are b + 1."""
    numbers = torch.arange(1, rows + 1)
    inner = Inner((numbers[:, None, None].expand(rows, 2, 3).double().clone(), numbers.float()[:, None].repeat(1, 0)))
    return Outer(numbers, {"a": inner, "b": Inner((numbers.half(),))}, numbers > 0, no_state(rows))


def rows_of(found: State) -> list[set[float]]:
    """The values of each row, from all tensors."""
    parts = [tensor.double() for tensor in tensors(found) if tensor.dtype is not torch.bool]
    return [{number for part in parts for number in part[row].reshape(-1).tolist()} for row in range(found.batch_size)]


@given(rows=st.lists(st.integers(0, 3), max_size=6))
def test_select_takes_rows_in_the_order_given(rows: list[int]) -> None:
    whole = state()
    found = whole.select(torch.tensor(rows, dtype=torch.long))
    assert found.batch_size == len(rows)
    assert rows_of(found) == [{float(row + 1)} for row in rows]
    assert type(found) is Outer
    assert found.parts["a"].missing is None
    assert same_bits(whole, state())


@given(order=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_reorder_lets_every_row_continue_from_another(order: list[int]) -> None:
    assert rows_of(state().reorder(torch.tensor(order))) == [{float(row + 1)} for row in order]


@given(order=st.permutations(range(4)))
def test_reordering_back_undoes_a_permutation(order: list[int]) -> None:
    places = torch.tensor(order)
    assert same_bits(state().reorder(places).reorder(places.argsort()), state())


@pytest.mark.parametrize("shape", [(3,), (5,), (0,), (4, 1)])
@pytest.mark.usefixtures("as_users_run")
def test_reorder_takes_one_row_for_every_row(shape: tuple[int, ...]) -> None:
    sentence = f"reorder got rows of shape {shape} for 4 streams; select(rows) takes any number"
    with pytest.raises(StateError, match=exactly(sentence)):
        State.reorder(state(), torch.zeros(shape, dtype=torch.long))


@given(mask=st.lists(st.booleans(), min_size=4, max_size=4), twice=st.booleans())
def test_reset_sets_the_given_rows_to_zero_and_no_others(mask: list[bool], twice: bool) -> None:
    whole, chosen = state(), torch.tensor(mask)
    numbers = chosen.nonzero().squeeze(1)
    for rows in (chosen, torch.cat([numbers, numbers]) if twice else numbers):
        found = whole.reset(rows)
        assert rows_of(found) == [{0.0} if reset else {float(row + 1)} for row, reset in enumerate(mask)]
        assert found.flags.tolist() == [not reset for reset in mask]
        assert [tensor.dtype for tensor in tensors(found)] == [tensor.dtype for tensor in tensors(whole)]
    assert same_bits(whole, state())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.select(torch.tensor([0, 4])), "row 4 is out of range; the state has 4 streams, numbered from 0"),
        (
            lambda s: s.reorder(torch.tensor([0, -1, 2, 3])),
            "row -1 is out of range; the state has 4 streams, numbered from 0",
        ),
        (lambda s: s.reset(torch.tensor([7])), "row 7 is out of range; the state has 4 streams, numbered from 0"),
        (
            lambda s: s.select(torch.tensor([0.5])),
            "rows are of shape (1,) and dtype torch.float32; expected an integer tensor of shape (R,)",
        ),
        (
            lambda s: s.select(torch.tensor([[0]])),
            "rows are of shape (1, 1) and dtype torch.int64; expected an integer tensor of shape (R,)",
        ),
        (
            lambda s: s.select(torch.ones(4, dtype=torch.bool)),
            (
                "rows are of shape (4,) and dtype torch.bool; "
                "expected an integer tensor of shape (R,): convert with .nonzero().squeeze(1)"
            ),
        ),
        (
            lambda s: s.reset(torch.tensor([True])),
            "rows are of shape (1,) and dtype torch.bool; expected a boolean tensor of shape (B = 4,)",
        ),
        (
            lambda s: s.reset(torch.tensor([[True]] * 4)),
            "rows are of shape (4, 1) and dtype torch.bool; expected a boolean tensor of shape (B = 4,)",
        ),
        (lambda s: s.to("gpu"), "the device 'gpu' cannot be used"),
        (
            lambda s: s.to(torch.int32),
            "the dtype torch.int32 is not a floating-point dtype; give one such as torch.float32",
        ),
        (
            lambda s: s.to(torch.float8_e4m3fn),
            "the dtype torch.float8_e4m3fn is not a floating-point dtype; give one such as",
        ),
    ],
)
def test_rows_devices_and_dtypes_that_a_state_cannot_have_are_refused(
    change: Any, complaint: str, as_users_run: None
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(complaint)}"):
        change(state())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_rows_may_be_integers_of_any_dtype(dtype: torch.dtype, as_users_run: None) -> None:
    rows = torch.tensor([2, 0], dtype=dtype)
    assert same_bits(state().select(rows), state().select(rows.long()))
    assert same_bits(state().reset(rows), state().reset(rows.long()))


def test_reset_removes_non_finite_values() -> None:
    broken = Inner((torch.full((2, 3), torch.nan), torch.full((2,), torch.inf)))
    assert rows_of(broken.reset(torch.tensor([True, True]))) == [{0.0}, {0.0}]


def test_num_bytes_counts_every_tensor() -> None:
    assert state(4).num_bytes == 4 * 8 + 4 * 6 * 8 + 0 + 4 * 2 + 4 * 1 + 0
    assert no_state(7).num_bytes == 0
    assert no_state(7).batch_size == 7


def test_detach_cuts_the_graph_and_keeps_the_values() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    grown = Inner((leaf * 2, leaf[:, 0] * 3))
    found = grown.detach()
    assert same_bits(found, grown)
    assert not any(tensor.requires_grad for tensor in tensors(found))
    assert all(tensor.requires_grad for tensor in tensors(grown))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_to_a_dtype_converts_floating_point_tensors_only(dtype: torch.dtype) -> None:
    found = state().to(dtype)
    assert {tensor.dtype for tensor in tensors(found) if tensor.is_floating_point()} == {dtype}
    assert (found.seen.dtype, found.flags.dtype, found.nothing.rows.dtype) == (torch.int64, torch.bool, torch.bool)
    assert rows_of(found) == rows_of(state())


@pytest.mark.parametrize("device", ["meta", torch.device("meta")], ids=["word", "device"])
def test_to_a_device_moves_every_tensor(device: Any) -> None:
    found = state().to(device)
    assert {tensor.device.type for tensor in tensors(found)} == {"meta"}
    assert [tensor.dtype for tensor in tensors(found)] == [tensor.dtype for tensor in tensors(state())]


def test_gradients_flow_through_select_and_reset() -> None:
    leaf = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    found = Inner((leaf * 2,)).select(torch.tensor([2, 0, 2])).reset(torch.tensor([False, True, False]))
    found.memory[0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0, 0], [0, 0], [4, 4]]


def test_states_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot assign to field 'seen'"):
        state().seen = torch.zeros(4)  # type: ignore[misc]
    assert same_bits(copied(state()), state())


class TokenWise(SubModule):
    """A causal sub-module that defines no state."""

    causal = True

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
        return tokens.values, self._continue(state, NoState, tokens)


class LookingAhead(SubModule):
    """A sub-module without a spec that is not causal."""


def test_a_token_wise_sub_module_inherits_an_empty_state() -> None:
    made = TokenWise().init_state(3)
    assert isinstance(made, NoState)
    assert (made.batch_size, made.num_bytes) == (3, 0)
    assert (made.reset(torch.tensor([0])).batch_size, made.select(torch.tensor([0, 0])).batch_size) == (3, 2)


def test_a_sub_module_without_a_spec_that_looks_ahead_is_named_by_its_class() -> None:
    sentence = (
        "LookingAhead (causal=False) cannot continue from a state; "
        "build the model with bidirectional=false to stream it"
    )
    with pytest.raises(StateError, match=exactly(sentence)):
        LookingAhead().init_state(1)


def test_a_part_may_be_skipped_only_if_no_gradient_hook_or_rank_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    part = TokenWise()
    assert not may_skip(part)  # the parameters need zero gradients
    with torch.no_grad():
        assert may_skip(part)
        for watch in (
            lambda: part.register_forward_hook(lambda *_: None),
            lambda: part.register_forward_pre_hook(lambda *_: None),
            lambda: register_module_forward_hook(lambda *_: None),
            lambda: register_module_forward_pre_hook(lambda *_: None),
        ):
            handle = watch()
            assert not may_skip(part)
            handle.remove()
            assert may_skip(part)
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        assert not may_skip(part)  # the parameters may be sharded over the ranks
