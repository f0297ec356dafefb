"""Laws of every causal sub-module that continues from a state: whole = chunked = step by step."""

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.errors import StateError
from sma.modules.attention import AttentionSpec
from sma.modules.cache import Cache
from sma.modules.conv import ConvSpec
from sma.modules.ema import EMA, EMASpec
from sma.modules.gau import GAUSpec
from sma.modules.local_attention import LocalAttentionSpec
from sma.positions import NoPositionSpec, RotarySpec
from sma.pytree import tensors
from sma.submodule import NoState, State, SubModule, SubModuleSpec
from tests.streams import copied, cuts, exactly, few, near, near_states, same_bits, steps
from tests.test_modules import zoo
from tests.test_modules.layouts import first, lay, run
from tests.test_modules.streams import STREAM_LAYOUTS, StreamLayout, stream
from tests.test_modules.zoo import NEAR, SLOTS, SPECS, WIDTH

LENGTH = 14
STREAMS: dict[str, SubModuleSpec] = {
    **{name: spec for name, spec in SPECS.items() if spec.build(WIDTH).causal},
    "attention-causal-nowhere": AttentionSpec(heads=1, bidirectional=False),
    "conv-causal-one-tap": ConvSpec(kernel_size=1),
    "ema-causal-truncated-at-1": EMASpec(state_size=2, bidirectional=False, truncation=1),
    "ema-causal-truncated-late": EMASpec(state_size=2, bidirectional=False, truncation=LENGTH + 3),
    "gau-causal-true-distance": GAUSpec(
        query_size=4, hidden_size=3, window=2, bidirectional=False, attention="laplace", position=NEAR
    ),
    "gau-causal-rotary": GAUSpec(
        query_size=4, hidden_size=3, window=4, bidirectional=False, attention="relu2", position=RotarySpec()
    ),
    "gau-causal-window-1": GAUSpec(
        query_size=4, hidden_size=3, window=1, bidirectional=False, position=NoPositionSpec()
    ),
    "gau-causal-long-window": GAUSpec(
        query_size=4, hidden_size=3, window=40, bidirectional=False, attention="relu2", position=SLOTS
    ),
    "gau-causal-all-rotary": GAUSpec(query_size=4, hidden_size=3, bidirectional=False, position=RotarySpec()),
    "gau-causal-all-laplace": GAUSpec(
        query_size=4, hidden_size=3, bidirectional=False, attention="laplace", position=NEAR
    ),
    "local-causal-window-1": LocalAttentionSpec(heads=1, window=1, bidirectional=False),
    "local-causal-long-window": LocalAttentionSpec(heads=2, window=40, bidirectional=False, position=RotarySpec()),
}
GROWING = [name for name, spec in STREAMS.items() if spec.kind == "attention" or getattr(spec, "window", 0) is None]
every_stream = pytest.mark.parametrize("name", [pytest.param(name, id=name) for name in STREAMS])
every_layout = pytest.mark.parametrize("layout", STREAM_LAYOUTS)
some_layouts = pytest.mark.parametrize("layout", ["packed", "front"])


@functools.cache  # for tests that only run it
def make(name: str, dtype: torch.dtype = torch.float64) -> SubModule:
    module = zoo.make(STREAMS[name], dtype)
    if isinstance(module, EMA):  # the usual decay would not reveal a wrong recurrence
        with torch.no_grad():
            module.delta.mul_(2)
            module.alpha.mul_(2)
    return module


@st.composite
def activity(draw: st.DrawFn, rows: int = 3, length: int = LENGTH) -> Tensor:
    """A mask of active tokens, `(B, L)`: some rows have none, and two positions may be inactive in all rows."""
    source = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rates = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.0]), min_size=rows, max_size=rows)))
    active = torch.rand(rows, length, generator=source) < rates[:, None]
    silent = draw(st.integers(0, length))
    return active & ((torch.arange(length) < silent) | (torch.arange(length) >= silent + 2))


def tokens(rows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_stream
@few
@given(active=activity(), chunks=cuts(LENGTH), layout=st.sampled_from(STREAM_LAYOUTS))
def test_whole_equals_chunked_equals_step_by_step(
    name: str, active: Tensor, chunks: list[slice], layout: StreamLayout
) -> None:
    module, x = make(name), tokens()
    with torch.no_grad():
        whole = run(module, x, active, "packed")
        chunked, after_chunks = stream(module, x, active, chunks, layout)
        stepped, after_steps = stream(module, x, active, steps(LENGTH), layout)
        _, at_once = stream(module, x, active, [slice(0, LENGTH)], layout)
    for found in (chunked, stepped):
        near(found, whole)
    for state in (after_chunks, after_steps):
        near_states(state, at_once)


@every_stream
def test_a_long_stream_of_uneven_rows_equals_the_whole(name: str) -> None:
    length = 150
    module, x = make(name), tokens(4, length)
    active = (
        torch.rand(4, length, generator=torch.Generator().manual_seed(2)) < torch.tensor([1.0, 0.5, 0.03, 0.0])[:, None]
    )
    chunks = [slice(0, 70), slice(70, 71), slice(71, 71), slice(71, 74), slice(74, 150)]
    with torch.no_grad():
        near(stream(module, x, active, chunks)[0], run(module, x, active, "packed"))


@every_stream
@every_layout
def test_gradients_through_the_states_are_those_of_the_whole(name: str, layout: StreamLayout) -> None:
    module, x = make(name), tokens().requires_grad_()
    active = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(3)) < torch.tensor([0.8, 0.3, 0.0])[:, None]
    incoming, inputs = tokens(3, LENGTH).flip(1), [x, *module.parameters()]
    chunks = [slice(0, 5), slice(5, 6), slice(6, 6), slice(6, LENGTH)]
    wanted = torch.autograd.grad((run(module, x, active, "packed") * incoming).sum(), inputs)
    for parts in (chunks, steps(LENGTH)):
        found = torch.autograd.grad((stream(module, x, active, parts, layout)[0] * incoming).sum(), inputs)
        for ours, theirs in zip(found, wanted, strict=True):
            near(ours, theirs)


@every_stream
@some_layouts
@pytest.mark.parametrize("length", [1, 6])
def test_a_state_is_a_value_that_can_be_continued_twice(name: str, length: int, layout: StreamLayout) -> None:
    module, x, active = make(name), tokens(), first([4, 0, 9], LENGTH)
    _, state = stream(module, x, active, [slice(0, 8)])
    kept, rest = copied(state), [slice(8, 8 + length)]
    once, after = stream(module, x, active.roll(5, 1), rest, layout, state)
    assert same_bits(state, kept)
    again, after_again = stream(module, x, active.roll(5, 1), rest, layout, state)
    assert torch.equal(once, again)
    assert same_bits(after, after_again)


@every_stream
@some_layouts
@pytest.mark.parametrize("length", [0, 1, 6])
def test_a_row_without_a_token_keeps_its_state_bit_by_bit(name: str, length: int, layout: StreamLayout) -> None:
    module, x, active = make(name), tokens(), first([4, 0, 9], LENGTH)
    _, state = stream(module, x, active, [slice(0, 9)])
    for rows in (first([0, 0, 9], length), first([0, 0, 0], length)):
        _, after = stream(module, x[:, :length], rows, [slice(0, length)], layout, state)
        idle = (~rows.any(1)).nonzero().squeeze(1)
        near_states(after.select(idle), state.select(idle), 0.0)


@every_stream
@few
@given(rows=st.lists(st.integers(0, 2), max_size=4), active=activity(), cut=st.integers(0, LENGTH))
def test_selected_rows_continue_as_in_the_whole_batch(name: str, rows: list[int], active: Tensor, cut: int) -> None:
    module, x, chosen = make(name), tokens(), torch.tensor(rows, dtype=torch.long)
    with torch.no_grad():
        _, state = stream(module, x, active, [slice(0, cut)])
        found, after = stream(module, x[chosen], active[chosen], [slice(cut, LENGTH)], state=state.select(chosen))
        wanted, there = stream(module, x, active, [slice(cut, LENGTH)], state=state)
    near(found, wanted[chosen])
    near_states(after, there.select(chosen))


@every_stream
def test_reordered_rows_continue_from_the_state_of_another_row(name: str) -> None:
    module, x, active = make(name), tokens(), first([7, 3, 0], LENGTH)
    order, rest = torch.tensor([2, 0, 0]), [slice(0, 4)]
    _, state = stream(module, x, active, [slice(0, 8)])
    ones = torch.ones(3, LENGTH, dtype=torch.bool)
    found, _ = stream(module, x[[1, 1, 1]], ones, rest, state=state.reorder(order))
    alone = [stream(module, x[1:2], ones[:1], rest, state=state.select(order[row : row + 1]))[0] for row in range(3)]
    near(found, torch.cat(alone))


@every_stream
@pytest.mark.parametrize("numbers", [False, True], ids=["mask", "numbers"])
def test_reset_rows_restart_and_the_others_continue(name: str, numbers: bool) -> None:
    module, x, active = make(name), tokens(), first([7, 3, 5], LENGTH)
    mask, rest = torch.tensor([True, False, True]), [slice(0, 4)]
    _, state = stream(module, x, active, [slice(0, 8)])
    state_after_reset = state.reset(mask.nonzero().squeeze(1) if numbers else mask)
    found, _ = stream(module, x, active, rest, state=state_after_reset)
    fresh, going = stream(module, x, active, rest)[0], stream(module, x, active, rest, state=state)[0]
    near(found, fresh.where(mask[:, None, None], going))


@every_stream
@pytest.mark.parametrize("bad", [1e4, torch.inf, torch.nan])
def test_a_non_finite_row_never_changes_another_through_the_states(name: str, bad: float) -> None:
    module, x = make(name), tokens()
    active = torch.ones(3, LENGTH, dtype=torch.bool)
    changed = x.clone()
    changed[1, 4] = bad
    for chunks in ([slice(0, 3), slice(3, 9), slice(9, LENGTH)], steps(LENGTH)):
        with torch.no_grad():
            before, after = (stream(module, batch, active, chunks)[0] for batch in (x, changed))
            whole = run(module, changed, active, "packed")
        near(after[[0, 2]], before[[0, 2]])
        near(after[1, :4], before[1, :4])
        assert torch.equal(after.isfinite(), whole.isfinite())


@pytest.mark.parametrize("name", [name for name in STREAMS if name not in GROWING])
def test_a_state_never_grows(name: str) -> None:
    module, x, active = make(name), tokens(), first([LENGTH, 2, 0], LENGTH)
    state = module.init_state(3)
    before = [(tensor.shape, tensor.dtype) for tensor in tensors(state)]
    for chunks in ([slice(0, 1)], [slice(0, LENGTH)], [slice(0, 0)]):
        _, after = stream(module, x, active, chunks)
        assert after.num_bytes == state.num_bytes
        assert [(tensor.shape, tensor.dtype) for tensor in tensors(after)] == before


@pytest.mark.parametrize("name", GROWING)
def test_a_state_without_a_window_grows_with_its_longest_row(name: str) -> None:
    module = make(name)
    _, state = stream(module, tokens(), first([LENGTH, 2, 0], LENGTH), [slice(0, 5), slice(5, LENGTH)])
    assert isinstance(state, Cache)
    assert state.size == LENGTH
    assert state.num_bytes > module.init_state(3).num_bytes


@every_stream
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_have_the_dtype_of_the_tokens_and_states_keep_theirs(name: str, dtype: torch.dtype) -> None:
    module, exact = copy.deepcopy(make(name, torch.float32)), copy.deepcopy(make(name))
    exact.load_state_dict(module.state_dict())
    module = module.to(dtype)
    exact.load_state_dict(module.state_dict())
    x, active = tokens().to(dtype), first([LENGTH, 5, 0], LENGTH)
    state = module.init_state(3)
    kinds = [tensor.dtype for tensor in tensors(state)]
    if isinstance(module, EMA):
        assert kinds[0] is torch.float32
    with torch.no_grad():
        found, after = stream(module, x, active, [slice(0, 4), slice(4, 5), slice(5, LENGTH)], state=state)
        wanted = run(exact, x.double(), active, "packed")
    assert found.dtype is dtype
    assert [tensor.dtype for tensor in tensors(after)] == kinds
    assert (found.double() - wanted).norm() <= (1e-4 if dtype is torch.float32 else 0.1) * wanted.norm()


@every_stream
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_of_lower_precision_than_the_tokens_keeps_its_dtype(name: str, dtype: torch.dtype) -> None:
    module, x, active = make(name), tokens(), first([LENGTH, 5, 0], LENGTH)
    state = module.init_state(3, dtype=dtype)
    with torch.no_grad():
        for chunks in ([slice(0, 4), slice(4, 5), slice(5, LENGTH)], steps(LENGTH)):
            found, after = stream(module, x, active, chunks, state=state)
            assert found.dtype is torch.float64
            assert [tensor.dtype for tensor in tensors(after)] == [tensor.dtype for tensor in tensors(state)]
            wanted = run(module, x, active, "packed")
            assert (found - wanted).norm() <= (1e-5 if dtype is torch.float32 else 0.1) * wanted.norm()


@every_stream
def test_a_stream_may_have_no_rows(name: str) -> None:
    module, nothing = make(name), first([], LENGTH)
    found, after = stream(module, tokens()[:0], nothing, [slice(0, 5), slice(5, 6), slice(6, LENGTH)])
    assert found.shape == (0, LENGTH, WIDTH)
    assert after.batch_size == 0


@every_stream
def test_autocast_never_changes_the_dtypes_of_a_state(name: str) -> None:
    module, x, active = make(name, torch.float32), tokens().float(), first([LENGTH, 5, 0], LENGTH)
    state = module.init_state(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, after = stream(module, x, active, [slice(0, 4), slice(4, 5), slice(5, LENGTH)], state=state)
    assert [tensor.dtype for tensor in tensors(after)] == [tensor.dtype for tensor in tensors(state)]


@every_stream
def test_init_state_takes_a_dtype_and_a_device(name: str) -> None:
    module = make(name, torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        found = {tensor.dtype for tensor in tensors(module.init_state(2, dtype=dtype)) if tensor.is_floating_point()}
        assert found <= {dtype, torch.promote_types(dtype, torch.float32)}
    state = module.init_state(5, device="cpu")
    assert state.batch_size == 5
    assert not any(tensor.any() for tensor in tensors(state))


class TestRefusals:
    @every_stream
    def test_state_of_another_class(self, name: str) -> None:
        module = make(name)
        wanted = type(module.init_state(1)).__name__
        sentence = f"{type(module).__name__} got a state of class State; expected {wanted}: use init_state"
        with pytest.raises(StateError, match=exactly(sentence)):
            module(lay(tokens(1), first([3], LENGTH), "packed"), State())

    @every_stream
    def test_state_of_another_number_of_streams(self, name: str) -> None:
        module = make(name)
        sentence = (
            f"{type(module).__name__} got a state of 3 streams for a batch of 2 rows; "
            "make one with init_state(2), or take rows with state.select"
        )
        for lengths in ([3, 2], [0, 0]):
            with pytest.raises(StateError, match=exactly(sentence)):
                module(lay(tokens(2), first(lengths, LENGTH), "packed"), module.init_state(3))

    @pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not spec.build(WIDTH).causal])
    def test_part_that_looks_ahead(self, name: str) -> None:
        module = zoo.make(SPECS[name])
        sentence = (
            f"{type(module).__name__} (kind {SPECS[name].kind}, causal=False) cannot continue from a state; build the "
            "model with bidirectional=false to stream it"
        )
        nothing = NoState(torch.zeros(1, 0, dtype=torch.bool))
        for call in (
            lambda: module(lay(tokens(1), first([3], LENGTH), "packed"), nothing),
            lambda: module.init_state(2),
        ):
            with pytest.raises(StateError, match=exactly(sentence)):
                call()


def test_a_call_without_a_state_returns_none() -> None:
    for name in STREAMS:
        assert make(name)(lay(tokens(), first([3, 0, 2], LENGTH), "packed"))[1] is None


@every_stream
def test_a_chunk_without_tokens_gives_every_parameter_a_gradient_of_zeros(name: str) -> None:
    module, x = make(name), tokens(3, 2)
    nobody = torch.zeros(3, 2, dtype=torch.bool)
    out, _ = module(lay(x, nobody, "packed"), module.init_state(3))
    for parameter in module.parameters():
        (gradient,) = torch.autograd.grad(out.sum(), parameter, retain_graph=True)  # raises if unused
        assert not gradient.any()
