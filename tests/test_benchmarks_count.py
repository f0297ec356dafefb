"""Counter of launches and bytes, compared with counts by hand."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.count import SHAPES, Counter, count, layer_spec
from benchmarks.work import Work, fused_pass, nbytes, register_work

ROOT = Path(__file__).resolve().parents[1]
FLOAT, LONG = 4, 8


def _x() -> Tensor:
    return torch.ones(6, 8)


def _rows() -> Tensor:
    return torch.tensor([0, 2, 5])


WHOLE, ROWS = 6 * 8 * FLOAT, 3 * 8 * FLOAT
INDEX = 3 * LONG
CASES: list[Any] = [
    pytest.param(lambda x, rows: x * 2, Work(1, WHOLE, WHOLE), id="one-pass"),
    pytest.param(lambda x, rows: x.mul_(2), Work(1, WHOLE, WHOLE), id="in-place"),
    pytest.param(lambda x, rows: x.T.reshape(8, 2, 3)[1:].transpose(0, 1), Work(0), id="views"),
    pytest.param(lambda x, rows: x[:1].expand(6, 8) + x, Work(1, 8 * FLOAT + WHOLE, WHOLE), id="broadcast-read-once"),
    pytest.param(lambda x, rows: x.as_strided((5, 16), (8, 1)).abs(), Work(1, WHOLE, 80 * FLOAT), id="overlapping"),
    pytest.param(lambda x, rows: torch.zeros(6, 8), Work(1, 0, WHOLE), id="zeros"),
    pytest.param(lambda x, rows: torch.empty(6, 8), Work(0), id="empty"),
    pytest.param(lambda x, rows: x[:0] * 2, Work(0), id="no-elements"),
    pytest.param(lambda x, rows: torch.empty(6, 8).copy_(x), Work(1, WHOLE, WHOLE), id="copy"),
    pytest.param(lambda x, rows: x.index_select(0, rows), Work(1, ROWS + INDEX, ROWS), id="gather"),
    pytest.param(
        lambda x, rows: x.index_add_(0, rows, x[:3].clone()),
        Work(2, ROWS + INDEX + 2 * ROWS, 2 * ROWS),
        id="index_add_",
    ),
    pytest.param(
        lambda x, rows: x.index_copy_(0, rows, x[:3].clone()), Work(2, ROWS + INDEX + ROWS, 2 * ROWS), id="index_copy_"
    ),
    pytest.param(
        lambda x, rows: x.index_copy(0, rows, x[:3]), Work(2, WHOLE + INDEX + ROWS, WHOLE + ROWS), id="index_copy"
    ),
    pytest.param(lambda x, rows: x @ x.T, Work(1, 2 * WHOLE, 36 * FLOAT, 2 * 6 * 8 * 6), id="mm"),
    pytest.param(
        lambda x, rows: torch.addmm(x[0, :6], x, x.T),
        Work(1, 6 * FLOAT + 2 * WHOLE, 36 * FLOAT, 2 * 6 * 8 * 6),
        id="addmm",
    ),
    pytest.param(
        lambda x, rows: nn.functional.pad(x, (0, 1)), Work(2, WHOLE, 6 * 9 * FLOAT + WHOLE), id="fill-and-copy"
    ),
]


@pytest.mark.parametrize(("program", "wanted"), CASES)
def test_an_operator_counts_the_bytes_that_it_reads_and_writes(
    program: Callable[[Tensor, Tensor], Tensor], wanted: Work
) -> None:
    x, rows = _x(), _rows()
    with Counter() as counter:
        program(x, rows)
    assert counter.work() == wanted


def test_the_work_of_a_chain_is_the_sum_over_its_operators() -> None:
    x = _x().requires_grad_()
    with Counter() as counter:
        y = (x * x).sum()
        with counter.during("backward"):
            y.backward()
    # Forward: a product and a sum. Backward: a gradient of 1, expanded as a view; two products with x; their sum.
    assert counter.work("forward") == Work(2, WHOLE + WHOLE, WHOLE + FLOAT)
    assert counter.work("backward") == Work(4, 2 * (WHOLE + FLOAT) + 2 * WHOLE, FLOAT + 3 * WHOLE)
    assert counter.work() == counter.work("forward") + counter.work("backward")
    assert {call.place for call in counter.calls} == {"tests/test_benchmarks_count.py"}


def test_an_operator_with_a_registered_rule_counts_its_own_work() -> None:
    @torch.library.custom_op("sma_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x + x + 0

    def work(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
        return Work(3, nbytes(args), nbytes(out), 7)

    register_work("sma_test::twice", work)
    x = _x()
    with Counter() as counter:
        twice(x)
    assert counter.work() == Work(3, WHOLE, WHOLE, 7)
    assert [call.operator for call in counter.calls] == ["sma_test::twice"]


def test_a_compiled_function_counts_kernels_by_the_sizes_of_its_results() -> None:
    x, weight, factor = torch.ones(6, 8), torch.ones(8), torch.ones(6, 1)
    half = torch.ones(6, 4)
    one = fused_pass((x, weight), {}, (x + 1, factor))
    assert one == Work(1, WHOLE + 8 * FLOAT, WHOLE + 6 * FLOAT)
    assert fused_pass((x,), {}, (half, half + 1, x + 1)) == Work(2, WHOLE, 2 * WHOLE)
    # A sum over rows takes two kernels: partial sums, and their sum. With other results, it reads the arguments again.
    assert fused_pass((x,), {}, weight) == Work(2, WHOLE, 8 * FLOAT)
    assert fused_pass((x,), {}, (x + 1, weight)) == Work(3, 2 * WHOLE, WHOLE + 8 * FLOAT)
    assert fused_pass((x,), {}, []) == Work()


def test_synchronisations_with_the_host_are_counted_and_get_values() -> None:
    x = torch.empty(4, 6, device="meta")
    with Counter(active=24, longest=4) as counter:
        assert (x > 0).nonzero().shape == (24, 2)
        assert bool((x > 0).any()) is True
        assert int(x.long().max()) == 4
        assert x.long()[0].tolist() == [4] * 6
    assert counter.synchronisations == ["tests/test_benchmarks_count.py"] * 4


@pytest.mark.parametrize("name", SHAPES)
def test_more_active_tokens_take_more_bytes_in_equally_many_launches(name: str) -> None:
    width, spec = layer_spec(SHAPES[name].model)
    with torch.device("meta"):
        layer = spec.build(width)
    few, many = (count(layer, 2, 16384, rate).work() for rate in (0.2, 0.4))
    assert few.launches == many.launches
    assert few.read + few.written < many.read + many.written
    assert few.flops < many.flops


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_a_layer_synchronises_with_the_host_once_and_with_a_capacity_never(name: str, rate: float) -> None:
    width, spec = layer_spec(SHAPES[name].model)
    with torch.device("meta"):
        layer = spec.build(width).train()
    assert len(count(layer, 2, 4096, rate).synchronisations) == 1
    assert count(layer, 2, 4096, rate, rate).synchronisations == []


@pytest.mark.slow
def test_the_command_prints_every_point_as_json() -> None:
    command = [sys.executable, "-m", "benchmarks.count", "--json", "--layer", "image"]
    points = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert [point["rate"] for point in points] == [0.1, 0.3, 1.0]
    for point in points:
        assert point["launches"] == sum(work["launches"] for work in point["places"].values())
        assert len(point["synchronised_at"]) == point["synchronisations"]
