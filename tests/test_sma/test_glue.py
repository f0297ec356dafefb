"""The fused functions of a layer equal the separate operators in outputs and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma import glue
from sma.errors import InputError
from sma.fused import Compiled, Fused, FusedWithGradient, is_real
from sma.glue import JoinParts, RMSNormFunction, SiluDropout, slots_of
from sma.layer import RoutedLayer
from sma.modules.ema import ema_parameters
from sma.modules.gau import gau_inputs
from sma.norms import BatchNormSpec
from sma.routers.independent import tempered_choice
from tests.cases import normal
from tests.test_sma.compiled import assert_equal_if_compiled
from tests.test_sma.layers import LAYERS, WIDTH, make

N, D = 7, 5


def _gradients(result: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = normal(*result.shape, seed=9)
    return [result.detach(), *torch.autograd.grad((result * weight).sum(), leaves, materialize_grads=True)]


def _leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape, seed=place).requires_grad_() for place, shape in enumerate(shapes)]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("index", [None, [1, 3, 6], [0, 1, 2, 3, 4, 5, 6]], ids=["all", "some", "listed"])
@pytest.mark.parametrize("holes", [0, 2])
def test_the_end_of_a_layer_equals_the_chain_of_operators(
    silu: bool, passes: bool, index: list[int] | None, holes: int
) -> None:
    if index is None and holes:
        pytest.skip("where every token runs there are no holes")
    count = N if index is None else len(index) + holes
    x, passed, routed, confidence = leaves = _leaves((N, D), (N, D), (count, D), (N,))
    where = None if index is None else torch.tensor([*index, *[0] * holes])
    real = None if not holes or index is None else torch.arange(count) < len(index)
    slots = None if where is None else slots_of(where, real, N)
    given = passed if passes else None
    found = JoinParts.apply(x, given, routed, confidence, (where, slots, real), 0.0, False, silu)
    total = x + passed if passes else x
    sure = routed * (confidence if where is None else confidence[where])[:, None]
    clean = sure if real is None else sure.where(real[:, None], 0)
    total = total + clean if where is None else total.index_add(0, where, clean)
    wanted = nn.functional.silu(total) if silu else total
    for ours, theirs in zip(_gradients(found, leaves), _gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_without_a_routed_token_the_residual_and_the_bypass_remain() -> None:
    x, passed, confidence = _leaves((N, D), (N, D), (N,))
    for routed in (None, torch.zeros(0, D, dtype=torch.float64)):
        found = JoinParts.apply(x, passed, routed, confidence, (None, None, None), 0.0, False, True)
        wanted = nn.functional.silu(x + passed)
        for ours, theirs in zip(_gradients(found, [x, passed]), _gradients(wanted, [x, passed]), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_non_finite_confidence_of_an_inactive_token_has_no_effect() -> None:
    x, routed = _leaves((N, D), (2, D))
    index = torch.tensor([4, 1])
    confidence = torch.full((N,), torch.nan, dtype=torch.float64)
    confidence[index] = torch.tensor([0.5, 2.0], dtype=torch.float64)
    confidence.requires_grad_()
    found = JoinParts.apply(x, None, routed, confidence, (index, slots_of(index, None, N), None), 0.0, False, False)
    wanted = x.index_add(0, index, routed * torch.tensor([[0.5], [2.0]], dtype=torch.float64))
    torch.testing.assert_close(found, wanted)
    x_grad, routed_grad, grad = torch.autograd.grad(found.sum(), [x, routed, confidence])
    torch.testing.assert_close(x_grad, torch.ones_like(x))
    torch.testing.assert_close(routed_grad, torch.tensor([[0.5], [2.0]], dtype=torch.float64).expand(2, D))
    torch.testing.assert_close(grad, torch.zeros_like(grad).index_copy(0, index, routed.detach().sum(1)))


def test_a_dropped_sum_keeps_the_residual_and_drops_the_gradient_equally() -> None:
    x, passed = _leaves((400, D), (400, D))
    found = JoinParts.apply(x, passed, None, None, (None, None, None), 0.25, True, False)
    ratio = ((found - x) / passed).detach()
    kept = ratio.abs() > 0.5
    torch.testing.assert_close(ratio, kept.double() / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.05
    _, x_grad, grad = _gradients(found, [x, passed])
    torch.testing.assert_close(grad, x_grad * kept / 0.75)


@pytest.mark.parametrize("all_run", [False, True])
def test_dropped_results_keep_the_bypass_and_drop_the_gradients_equally(all_run: bool) -> None:
    size = 400
    index = torch.arange(size) if all_run else torch.randperm(size, generator=torch.Generator().manual_seed(0))[:300]
    x, passed, routed, confidence = _leaves((size, D), (size, D), (len(index), D), (size,))
    places = (None, None, None) if all_run else (index, slots_of(index, None, size), None)
    found = JoinParts.apply(x, passed, routed, confidence, places, 0.25, False, False)
    sure = routed * confidence[index][:, None]
    kept = (((found - x - passed)[index] / sure).abs() > 0.5).detach()
    assert abs(kept.double().mean().item() - 0.75) < 0.05
    wanted = (x + passed).index_add(0, index, sure * kept / 0.75)
    leaves = [x, passed, routed, confidence]
    for ours, theirs in zip(_gradients(found, leaves), _gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [[3, 1, 6], [0, 1, 2, 3, 4, 5, 6], [5]], ids=str)
def test_values_added_at_their_tokens_equal_index_add(index: list[int]) -> None:
    x, values, where = normal(N, D), normal(len(index), D, seed=1), torch.tensor(index)
    found = glue.add_at(x.float(), values, slots_of(where, None, N))
    assert torch.equal(found, x.float().double().index_add(0, where, values))


def test_dropped_silu_has_the_gradient_of_the_kept_elements() -> None:
    (x,) = _leaves((400, D))
    found = SiluDropout.apply(x, 0.25)
    kept = (found != 0).detach()
    assert abs(kept.double().mean().item() - 0.75) < 0.05
    wanted = nn.functional.silu(x) * kept / 0.75
    for ours, theirs in zip(_gradients(found, [x]), _gradients(wanted, [x]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("channels", [1, D])
def test_rms_norm_equals_that_of_torch(channels: int) -> None:
    x, weight = _leaves((2, N, D), (channels,))
    found = RMSNormFunction.apply(x, weight, 1e-5)
    wanted = nn.functional.rms_norm(x, (D,), None, 1e-5) * weight
    for ours, theirs in zip(_gradients(found, [x, weight]), _gradients(wanted, [x, weight]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("lengths", [[5, 0, 3], [1, 0, 0], [0, 0, 0], None], ids=str)
def test_batch_norm_equals_the_separate_operators(
    monkeypatch: pytest.MonkeyPatch, affine: bool, lengths: list[int] | None
) -> None:
    x = normal(3, 5, D).requires_grad_()
    valid = None if lengths is None else torch.arange(5) < torch.tensor(lengths)[:, None]
    results = []
    for fused in (False, True):
        norm = BatchNormSpec(affine=affine).build(D).double()
        for place, parameter in enumerate(norm.parameters()):
            parameter.data = normal(D, seed=20 + place)
        norm.running_mean.copy_(normal(D, seed=30))
        monkeypatch.setattr("sma.norms.fuses", lambda tensor, fused=fused: fused)
        found = _gradients(norm(x, valid), [x, *norm.parameters()])
        results.append([*found, norm.running_mean, norm.running_var, norm.num_batches_tracked.double()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"capacity": 3}], ids=["ragged", "static"])
def test_a_layer_is_the_same_with_fused_functions(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    layer, x = make(name), normal(3, 6, WIDTH)
    valid = torch.arange(6) < torch.tensor([6, 0, 4])[:, None]
    results = []
    for fused in (False, True):
        for choice in ("layer.fuses", "around.fuses", "norms.fuses", "fused.fuses"):
            monkeypatch.setattr(f"sma.{choice}", lambda tensor, fused=fused: fused)
        results.append(_results(layer, x.clone().requires_grad_(), valid, options))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def _results(layer: RoutedLayer, x: Tensor, valid: Tensor, options: dict[str, Any]) -> list[Tensor]:
    hidden = layer(x, valid, **options).hidden.where(valid[..., None], 0)
    return _gradients(hidden, [x, *layer.parameters()])


SLOTS = torch.tensor([2, 2, 0, 2, 1, 2, 2])
OPERATORS = [
    pytest.param(glue.silu_dropout_backward, (normal(N, D), normal(N, D), normal(N, D) > 0, 0.1), id="silu_dropout"),
    pytest.param(
        glue.join_parts,
        (normal(N, D), normal(N, D), normal(2, D), normal(N), SLOTS, 0.0, False, True),
        id="join_parts",
    ),
    pytest.param(glue.join_parts, (normal(N, D), None, None, None, None, 0.0, False, False), id="join_nothing"),
    pytest.param(
        glue.join_parts_backward,
        (
            *(normal(N, D), normal(N, D), normal(N, D) > 0, normal(2, D), normal(N), SLOTS, torch.tensor([2, 4])),
            *(None, 0.1, False, True),
        ),
        id="join_parts_backward",
    ),
    pytest.param(
        glue.join_parts_backward,
        (normal(N, D), normal(0), normal(N, D) > 0, None, None, None, None, None, 0.1, True, False),
        id="join_nothing_backward",
    ),
    pytest.param(glue.add_at, (normal(N, D), normal(2, D), SLOTS), id="add_at"),
    pytest.param(glue.batch_moments, (normal(N, D), normal(N, 1) > 0), id="batch_moments"),
    pytest.param(
        glue.batch_norm_scales,
        (normal(D), normal(D).square(), torch.tensor(3), normal(D), normal(D).square(), normal(D), 1e-5),
        id="batch_norm_scales",
    ),
    pytest.param(
        glue.batch_norm_factors, (normal(D), normal(D), normal(D), None, normal(1)[0]), id="batch_norm_factors"
    ),
    pytest.param(glue.normalise, (normal(N, D), normal(D), normal(D), None), id="normalise"),
    pytest.param(glue.batch_norm_sums, (normal(N, D), normal(N, D), normal(D)), id="batch_norm_sums"),
    pytest.param(
        glue.batch_norm_backward,
        (normal(N, D), normal(N, D), normal(N, 1) > 0, normal(D), normal(D), normal(D), normal(D)),
        id="batch_norm_backward",
    ),
    pytest.param(glue.rms_norm, (normal(N, D), normal(1), 1e-5), id="rms_norm"),
    pytest.param(glue.rms_norm_backward, (normal(N, D), normal(N, D), normal(D), normal(N, 1)), id="rms_norm_backward"),
]


@pytest.mark.parametrize(("operator", "arguments"), OPERATORS)
def test_operators_pass_the_checks_of_torch(operator: Fused, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(operator.operator, arguments, test_utils=("test_schema", "test_faketensor"))


Z, H = 2, 4
WITH_GRADIENTS = [
    pytest.param(gau_inputs, (normal(N, Z + 2 * H), normal(2, Z), normal(2, Z)), id="gau_inputs"),
    pytest.param(
        ema_parameters,
        (normal(D, Z, 1), normal(D, Z, 1), normal(D, Z, 1), normal(D, Z), torch.float64),
        id="ema_parameters",
    ),
    pytest.param(
        ema_parameters,
        (40 * normal(D, Z, 1), 40 * normal(D, Z, 1), normal(D, Z, 1), normal(D, Z), torch.float64),
        id="ema_parameters_at_their_limits",
    ),
    *(
        pytest.param(
            tempered_choice,
            (scale * normal(2, N, 1, 2), normal(2, N, 1) > 0, normal(1), gate),
            id=f"tempered_choice_{gate}_{scale}",
        )
        for gate in ("probability", "margin", "root_margin", "straight_through")
        for scale in (1, 1000)
    ),
]


@pytest.mark.parametrize(("function", "arguments"), WITH_GRADIENTS)
def test_a_fused_function_has_the_results_and_gradients_of_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, function: FusedWithGradient, arguments: tuple[Any, ...]
) -> None:
    found = []
    for fused in (False, True):
        monkeypatch.setattr("sma.fused.fuses", lambda tensor, fused=fused: fused)
        given = [each.clone().requires_grad_() if is_real(each) else each for each in arguments]
        leaves = [each for each in given if is_real(each)]
        results = function(*given)
        # Also each result separately, with zero gradients of the others.
        parts = [_gradients(function(*given)[place], leaves) for place in range(len(results))]
        both = torch.cat([result.flatten() for result in results])
        found.append([*(each for part in parts for each in part), *_gradients(both, leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("function", "arguments"), WITH_GRADIENTS)
def test_fused_functions_with_gradients_pass_the_checks_of_torch(
    function: FusedWithGradient, arguments: tuple[Any, ...]
) -> None:
    grads = [torch.ones_like(result) for result in function.function(*arguments)]
    for operator, given in ((function.fused, arguments), (function.gradient, (*grads, *arguments))):
        torch.library.opcheck(operator.operator, given, test_utils=("test_schema", "test_faketensor"))


def test_results_of_a_fused_function_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma.fused.fuses", lambda tensor: True)
    results = gau_inputs(normal(N, Z + 2 * H), normal(2, Z), normal(2, Z))
    assert len({each.untyped_storage().data_ptr() for each in results}) == 4
    assert all(each.is_contiguous() for each in results)


def test_a_fused_function_has_no_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma.fused.fuses", lambda tensor: True)
    projected = normal(N, Z + 2 * H).requires_grad_()
    q, *_ = gau_inputs(projected, normal(2, Z), normal(2, Z))
    with pytest.raises(InputError, match=r"^the fused function gau_inputs has no second derivatives"):
        torch.autograd.grad(q.sum(), projected, create_graph=True)


def test_a_function_that_cannot_be_compiled_runs_eagerly_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch.compile", lambda function, **options: broken)
    run = Compiled(torch.add)
    with pytest.warns(UserWarning, match=r"^a kernel cannot be compiled, so its operators .*: .*no compiler"):
        assert run(torch.ones(1), 2).item() == 3
    assert run(torch.ones(1), 2).item() == 3


def test_a_function_that_ran_out_of_memory_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [torch.OutOfMemoryError("no memory"), torch.tensor([5.0])]

    def sometimes(*arguments: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("torch.compile", lambda function, **options: sometimes)
    run = Compiled(torch.add)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        run(torch.ones(1), 2)
    assert run(torch.ones(1), 2).item() == 5


def test_wrong_arguments_of_a_compiled_function_never_disable_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda function, **options: function)
    run = Compiled(torch.add)
    with pytest.raises(RuntimeError, match="must match the size"):
        run(torch.ones(3), torch.ones(2))
    monkeypatch.setattr(run, "_compiled", lambda *arguments: torch.tensor([5.0]))
    assert run(torch.ones(1), 2).item() == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_functions_equal_the_eager_ones(tmp_path: Path) -> None:
    assert_equal_if_compiled("glue", tmp_path)
