"""Common laws of `ema` and `s4d`: bit-exact causality, precision, memory, slots and two directions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sma.modules.state_space import StateSpace
from tests.test_modules import test_ema, test_s4d
from tests.test_modules.layouts import along, grad, run, saved_bytes
from tests.test_modules.streams import in_chunks

Make = Callable[..., StateSpace]


def make_s4d(width: int, **fields: object) -> StateSpace:
    return test_s4d.make(width, **{"spread": 0.1, **test_s4d.CORE, **fields})


KINDS: dict[str, Make] = {"ema": test_ema.make, "s4d": make_s4d}
kinds = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in KINDS.items()])
kinds_and_truncations = pytest.mark.parametrize(
    ("make", "fields"),
    [
        *(pytest.param(test_ema.make, {"truncation": taps}, id=f"ema-{taps}") for taps in (None, 7, 64)),
        pytest.param(make_s4d, {}, id="s4d"),
    ],
)
directions = pytest.mark.parametrize(
    "bidirectional", [pytest.param(True, id="bidirectional"), pytest.param(False, id="causal")]
)
half_precisions = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def impulse() -> Tensor:
    x = torch.zeros(1, 21, 1, dtype=torch.float64)
    x[0, 10] = 1
    return x


@kinds_and_truncations
@pytest.mark.parametrize("bad", [1e4, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(
    ("size", "position"),
    [*((None, position) for position in (0, 1, 63, 64, 100, 149)), *((size, 101) for size in (1, 40, 70))],
)
def test_earlier_outputs_of_a_causal_module_stay_bit_equal(
    make: Make, fields: dict[str, object], bad: float, size: int | None, position: int
) -> None:
    module = make(2, bidirectional=False, dtype=torch.float32, **fields)
    x = torch.randn(2, 150, 2)
    changed = x.clone()
    changed[0, position, 0] = bad
    before, after = (along(module, batch) if size is None else in_chunks(module, batch, size) for batch in (x, changed))
    assert torch.equal(after[0, :position], before[0, :position])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :, 1], before[0, :, 1])
    assert not torch.equal(after[0, position, 0], before[0, position, 0])


@kinds
def test_routed_tokens_count_slots_instead_of_positions(make: Make) -> None:
    module = make(2, bidirectional=False)
    x = torch.randn(1, 30, 2, dtype=torch.float64)
    active = torch.rand(1, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    alone = along(module, x[active][None])
    torch.testing.assert_close(run(module, x, active, "packed")[active][None], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "parameter"), [pytest.param(test_ema.make, "gamma", id="ema"), pytest.param(make_s4d, "c", id="s4d")]
)
def test_directions_have_parameters_of_their_own(make: Make, parameter: str) -> None:
    module = make(1)
    before = along(module, impulse())[0, :, 0]
    assert (before.abs() > 0).all()
    with torch.no_grad():
        getattr(module, parameter)[1].zero_()
    after = along(module, impulse())[0, :, 0]
    torch.testing.assert_close(after[11:], before[11:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(after[:10], torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-12)


@kinds
@directions
def test_no_tensor_of_states_times_tokens_is_kept(make: Make, bidirectional: bool) -> None:
    length, states = 4096, 64
    module = make(1, state_size=states, bidirectional=bidirectional, dtype=torch.float32)
    assert saved_bytes(lambda: along(module, torch.randn(1, length, 1))) < 4 * length * states


@kinds
@half_precisions
@directions
def test_half_precision_tokens_give_results_of_their_dtype(make: Make, bidirectional: bool, dtype: torch.dtype) -> None:
    module = make(3, bidirectional=bidirectional, dtype=torch.float32)
    x = torch.randn(2, 300, 3).to(dtype).requires_grad_()
    out = along(module, x)
    out.float().square().mean().backward()
    assert out.dtype is dtype
    assert grad(x).isfinite().all()
    torch.testing.assert_close(out.float(), along(module, x.float()), rtol=1e-2, atol=1e-2)


@kinds
@half_precisions
@directions
def test_autocast_never_changes_the_recurrence(make: Make, bidirectional: bool, dtype: torch.dtype) -> None:
    module = make(3, bidirectional=bidirectional, dtype=torch.float32)
    x = torch.randn(2, 300, 3)
    with torch.autocast("cpu", dtype=dtype):
        out = along(module, x)
    assert torch.equal(out, along(module, x))
