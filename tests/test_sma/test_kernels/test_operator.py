"""The choice between implementations, and the gradient of an operator that returns the tensors for backward."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sma.errors import InputError
from sma.kernels import implementation, operators, use
from sma.kernels.operator import choose, define, differentiate
from tests.flops import counted_products
from tests.test_sma.test_kernels.attention import H, Z, problem, solve


def _scale(x: Tensor, factor: float) -> tuple[Tensor, list[Tensor]]:
    return x * factor, [x.new_full((2,), factor)]


def _scale_backward(gradient: Tensor, kept: Tensor) -> Tensor:
    return gradient * kept[0]


def _save(ctx: Any, arguments: Sequence[Any], results: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*kept)
    ctx.implementation = arguments[-1]


@pytest.fixture(scope="module")
def scale() -> Any:
    """An operator that multiplies."""
    forward = define(
        "test_scale",
        "(Tensor x, float factor) -> (Tensor, Tensor[])",
        plain=_scale,
        fake=lambda x, factor, chosen: (torch.empty_like(x), [x.new_empty(2)]),
    )
    backward = define(
        "test_scale_backward",
        "(Tensor gradient, Tensor kept) -> Tensor",
        plain=_scale_backward,
        fake=lambda gradient, kept, chosen: torch.empty_like(gradient),
    )
    differentiate(
        forward,
        "scaling",
        save=_save,
        backward=lambda ctx, gradient: (backward(gradient, *ctx.saved_tensors, ctx.implementation), None, None),
    )
    return forward


def test_defined_operator_passes_torchs_own_checks(scale: Any) -> None:
    torch.library.opcheck(scale, (torch.randn(3, requires_grad=True), 2.0, "plain"))
    torch.library.opcheck(scale, (torch.randn(3), 2.0, "plain"))


def test_gradient_is_the_registered_one(scale: Any) -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scale(x, 3.0, "plain")[0], [x])


def test_second_derivatives_are_refused(scale: Any) -> None:
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(InputError, match="scaling has no second derivatives"):
        torch.autograd.grad(scale(x, 3.0, "plain")[0].sum(), x, create_graph=True)


def test_a_cpu_uses_the_plain_implementation(scale: Any) -> None:
    assert implementation("test_scale", "cpu") == ("plain", "kernels exist for NVIDIA GPUs, and the device is 'cpu'")
    assert "test_scale" in operators()
    assert "test_scale_backward" not in operators()


def test_an_implementation_can_be_forced(scale: Any) -> None:
    device = torch.device("cpu")
    with use("triton"):
        assert implementation("test_scale", device) == ("triton", "sma.kernels.use chose it")
        with use("plain"):
            assert choose(device) == "plain"
        assert choose(device) == "triton"
    assert choose(device) == "plain"


def test_an_unknown_name_is_refused(as_users_run: None, scale: Any) -> None:
    with pytest.raises(InputError, match="unknown operator 'test_scall'; did you mean 'test_scale'"):
        implementation("test_scall", "cpu")
    with pytest.raises(InputError, match=r"unknown implementation 'cuda'; implementations: plain, triton"), use("cuda"):  # type: ignore[arg-type]
        pass


def test_without_triton_the_reason_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, scale: Any) -> None:
    monkeypatch.setattr("sma.kernels.operator._HAS_TRITON", False)
    assert implementation("test_scale", "cuda").name == "plain"
    assert "pip install 'sparse-modular-activation[gpu]'" in implementation("test_scale", "cuda").reason
    with pytest.raises(InputError, match=r"needs the package triton; write pip install"), use("triton"):
        pass


def test_importing_operators_imports_no_triton() -> None:
    program = "import sys, sma.kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "lengths",
    [pytest.param([0], id="empty"), pytest.param([3, 0, 1], id="short"), pytest.param([80, 0, 1, 33], id="blocks")],
)
@pytest.mark.parametrize("causal", [pytest.param(False, id="both-sides"), pytest.param(True, id="causal")])
def test_torch_counts_the_products_of_windowed_attention(lengths: list[int], causal: bool) -> None:
    given = problem(lengths, 17)
    with FlopCounterMode(display=False) as outside:
        solve("plain", given, 17, causal=causal)
    with counted_products() as inside:
        solve("plain", given, 17, causal=causal)
    assert outside.get_total_flops() == inside.get_total_flops()
    assert outside.get_total_flops() > 0 or not sum(lengths)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_operations_of_kernels_are_counted_by_the_pairs_in_reach() -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    given = problem([80, 33], 17)
    with FlopCounterMode(display=False) as counter:
        solve("triton", given, 17)
    tokens, pairs = 113, 113 * 35
    assert tokens == given.tokens.values.shape[0]
    assert counter.get_total_flops() == 2 * pairs * ((Z + H) + (4 * Z + 2 * H))
