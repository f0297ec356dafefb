"""Laws of every registered sub-module."""

import copy
import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.modules.gau import ChunkedGAUSpec
from sma.pytree import map_tensors
from sma.ragged import rectangular
from sma.spec import dump_spec, kinds, load_spec
from sma.submodule import SubModule, SubModuleSpec
from tests.flops import counted_products
from tests.test_modules.layouts import LAYOUTS, Layout, assert_near, draw, first, grad, lay, run, spread
from tests.test_modules.zoo import SPECS, WIDTH, make

every_spec = pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in SPECS.items()])


def batch(lengths: list[int], length: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(len(lengths), length, WIDTH, dtype=dtype), first(lengths, length)


def gradients(module: SubModule, *tensors: Tensor) -> dict[str, Tensor | None]:
    return {f"{place}": tensor.grad for place, tensor in enumerate(tensors)} | {
        name: p.grad for name, p in module.named_parameters()
    }


def test_every_kind_of_the_zoo_is_tested_in_both_directions() -> None:
    ours = {kind: spec for kind, spec in kinds("sub-module").items() if spec.__module__.startswith("sma.modules.")}
    assert {spec.kind for spec in SPECS.values()} == set(ours)
    for kind, spec in ours.items():
        built = {part.build(WIDTH).causal for part in SPECS.values() if part.kind == kind}
        assert built == ({True, False} if "bidirectional" in spec.model_fields else {True}), kind


@every_spec
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_call_without_a_state_gives_one_result_per_token_and_no_state(
    spec: SubModuleSpec, dtype: torch.dtype, layout: Layout
) -> None:
    module = make(spec, dtype)
    tokens = lay(*batch([40, 0, 3], dtype=dtype), layout)
    values, state = module(tokens)
    assert (values.shape, values.dtype, state) == (tokens.values.shape, dtype, None)
    assert values.isfinite().all()


@every_spec
@pytest.mark.parametrize("layout", ["static", "rectangular"])
@pytest.mark.parametrize("lengths", [[40, 40], [40, 0, 17, 1], [0, 0]], ids=str)
def test_layouts_agree(spec: SubModuleSpec, lengths: list[int], layout: Layout) -> None:
    x, active = batch(lengths)
    incoming = torch.randn_like(x)
    found = []
    both: tuple[Layout, Layout] = ("packed", layout)
    for each in both:
        module, leaf = make(spec), x.clone().requires_grad_()
        out = run(module, leaf, active, each)
        out.backward(incoming)
        found.append(
            {
                "output": out.detach(),
                **{name: tensor for name, tensor in gradients(module, leaf).items() if tensor is not None},
            }
        )
    for name, wanted in found[0].items():
        assert_near(name, found[1][name], wanted, 1e-9 * (1 + float(wanted.abs().max())))


@given(
    spec=st.sampled_from(list(SPECS.values())),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_a_row_alone_equals_the_row_in_a_batch(
    spec: SubModuleSpec, lengths: list[int], layout: Layout, data: st.DataObject
) -> None:
    module = make(spec)
    x, active = batch(lengths)
    row = data.draw(st.integers(0, len(lengths) - 1))
    together = run(module, x, active, layout)[row]
    # The single row has no padding up to the longest row of the batch.
    alone = run(module, x[row : row + 1, : lengths[row]], active[row : row + 1, : lengths[row]], "packed")[0]
    torch.testing.assert_close(together[: lengths[row]], alone, rtol=1e-10, atol=1e-10)


@every_spec
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_gradient_reaches_another_row(spec: SubModuleSpec, layout: Layout) -> None:
    x, active = batch([40, 7, 33])
    x.requires_grad_()
    run(make(spec), x, active, layout)[1].square().sum().backward()
    assert grad(x)[1, :7].abs().sum() > 0
    torch.testing.assert_close(grad(x)[[0, 2]], torch.zeros(2, 40, WIDTH, dtype=x.dtype), rtol=0, atol=1e-12)


@every_spec
@pytest.mark.parametrize("layout", ["static", "rectangular"])
@pytest.mark.parametrize(("dtype", "garbage"), [(torch.float32, 1e3), (torch.float64, 1e3), (torch.float64, 1e30)])
def test_values_in_holes_never_change_a_token(
    spec: SubModuleSpec, garbage: float, dtype: torch.dtype, layout: Layout
) -> None:
    x, active = batch([40, 0, 17, 1], dtype=dtype)
    incoming = torch.randn_like(x)
    limit = 1e-5 if dtype is torch.float32 else 1e-9
    found = []
    for size in (0.0, garbage):
        module = make(spec, dtype)
        tokens = lay(x, active, layout, garbage=size)
        values = tokens.values.detach().requires_grad_()
        out = spread(module(tokens.with_values(values))[0], tokens, x)
        out.backward(incoming)
        assert not grad(values)[~tokens.mask].any()
        found.append(
            {
                "output": out.detach(),
                **{name: tensor for name, tensor in gradients(module, values).items() if tensor is not None},
            }
        )
    for name, wanted in found[0].items():
        assert_near(name, found[1][name], wanted, limit * (1 + float(wanted.abs().max())))


@every_spec
@pytest.mark.parametrize("place", [1, 31, 32, 63, 64, 69])
def test_only_kinds_that_are_not_causal_depend_on_later_tokens(spec: SubModuleSpec, place: int) -> None:
    module = make(spec)
    x, active = batch([70, 50], 70)
    changed = x.clone()
    changed[0, place:] = 1e4
    before, after = run(module, x, active, "packed"), run(module, changed, active, "packed")
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
    assert not torch.equal(after[0, place:], before[0, place:])
    if module.causal:
        torch.testing.assert_close(after[0, :place], before[0, :place], rtol=0, atol=1e-12)
    elif not isinstance(spec, ChunkedGAUSpec) or place % spec.window:  # else place - 1 is in another chunk
        assert not torch.allclose(after[0, place - 1], before[0, place - 1])


@every_spec
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "length"), [(3, 5), (1, 1), (0, 5)])
def test_no_active_token_gives_zero_gradients_instead_of_none(
    spec: SubModuleSpec, rows: int, length: int, layout: Layout
) -> None:
    module = make(spec)
    x = torch.randn(rows, length, WIDTH, dtype=torch.float64, requires_grad=True)
    out = run(module, x, torch.zeros(rows, length, dtype=torch.bool), layout)
    out.sum().backward()
    assert out.shape == x.shape
    assert [name for name, gradient in gradients(module, x).items() if gradient is None or gradient.any()] == []


@every_spec
def test_rows_of_length_zero_give_zero_gradients(spec: SubModuleSpec) -> None:
    module = make(spec)
    x = torch.randn(2, 0, WIDTH, dtype=torch.float64, requires_grad=True)
    module(rectangular(x))[0].sum().backward()
    assert [name for name, gradient in gradients(module, x).items() if gradient is None or gradient.any()] == []


@every_spec
@pytest.mark.parametrize("lengths", [[1], [0, 2, 0], [40, 33]], ids=str)
def test_every_parameter_gets_a_gradient(spec: SubModuleSpec, lengths: list[int]) -> None:
    module = make(spec)
    x, active = batch(lengths)
    x.requires_grad_()
    run(module, x, active, "packed").square().sum().backward()
    assert [
        name for name, gradient in gradients(module, x).items() if gradient is None or not gradient.isfinite().all()
    ] == []
    if max(lengths) > 2:
        assert [
            name for name, gradient in gradients(module, x).items() if gradient is not None and not gradient.any()
        ] == []


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_near_those_in_float64_and_keep_the_dtype(spec: SubModuleSpec, dtype: torch.dtype) -> None:
    exact = make(spec)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_((0.5 * parameter).to(dtype))
    rough = copy.deepcopy(exact).to(dtype)
    x, active = batch([70, 0, 9], 70)
    x = x.to(dtype)
    wanted, found = run(exact, x.double(), active, "packed"), run(rough, x, active, "packed")
    assert found.dtype is dtype
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert (found.double() - wanted).norm() <= limit * wanted.norm()


@every_spec
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_call_gives_the_same_bits(spec: SubModuleSpec, layout: Layout) -> None:
    x, active = batch([40, 0, 17])
    found = []
    for _ in range(2):
        module, leaf = make(spec), x.clone().requires_grad_()
        out = run(module, leaf, active, layout)
        out.square().sum().backward()
        found.append([out.detach(), *gradients(module, leaf).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@every_spec
def test_a_call_changes_neither_the_module_nor_its_input(spec: SubModuleSpec) -> None:
    module = make(spec)
    tokens = lay(*batch([40, 0, 17]), "packed")
    tensors = (tokens.values, tokens.index, tokens.positions, tokens.rows, tokens.offsets, tokens.lengths)
    copies, attributes = [tensor.clone() for tensor in tensors], set(vars(module))
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module(tokens.with_values(tokens.values.requires_grad_()))[0].sum().backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert set(vars(module)) == attributes


@every_spec
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_backward_gives_the_same_gradients(spec: SubModuleSpec, layout: Layout) -> None:
    module = make(spec)
    x, active = batch([40, 0, 17])
    out, inputs = run(module, x.requires_grad_(), active, layout), [x, *module.parameters()]
    incoming = torch.randn_like(out)
    once, again = (torch.autograd.grad(out, inputs, incoming, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@pytest.mark.gpu
@every_spec
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_gives_the_results_of_the_cpu(spec: SubModuleSpec, layout: Layout) -> None:
    module = make(spec)
    tokens = lay(*batch([70, 0, 17], 70), layout)
    incoming = torch.randn(tokens.values.shape, dtype=torch.float64) * tokens.mask[:, None]
    found = []
    for device in ("cpu", "cuda"):
        there, placed = (
            copy.deepcopy(module).to(device),
            map_tensors(lambda tensor, device=device: tensor.to(device), tokens),
        )
        values = placed.values.detach().requires_grad_()
        out = there(placed.with_values(values))[0]
        results = torch.autograd.grad(out, [values, *there.parameters()], incoming.to(device))
        found.append([tensor.detach().cpu() for tensor in (out[placed.mask], *results)])
    for name, wanted, ours in zip(["output", "x", *dict(module.named_parameters())], *found, strict=True):
        assert_near(name, ours, wanted, 1e-9 * (1 + float(wanted.abs().max())))


@every_spec
def test_values_need_not_be_contiguous(spec: SubModuleSpec) -> None:
    module = make(spec)
    tokens = lay(*batch([40, 0, 17]), "packed")
    strided = torch.stack([tokens.values, tokens.values], 2)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(module(tokens.with_values(strided))[0], module(tokens)[0], rtol=1e-12, atol=1e-12)


@every_spec
@pytest.mark.parametrize("width", [2, 4, 32])
def test_the_spec_predicts_the_number_of_parameters(spec: SubModuleSpec, width: int) -> None:
    if spec.kind in ("attention", "local_attention") and width == 2:
        width = 8  # rotary pairs in two heads need four channels
    assert spec.num_parameters(width) == sum(parameter.numel() for parameter in spec.build(width).parameters())


@every_spec
@pytest.mark.parametrize("tokens", [0, 1, 5, 40, 200])
def test_the_spec_predicts_the_matrix_products(spec: SubModuleSpec, tokens: int) -> None:
    module = make(spec, torch.float32)
    with counted_products() as counter, torch.no_grad():
        module(rectangular(torch.randn(1, tokens, WIDTH)))
    assert spec.macs(WIDTH, tokens).matmul == counter.get_total_flops() // 2


@every_spec
def test_a_spec_survives_dump_and_load(spec: SubModuleSpec) -> None:
    assert load_spec(dump_spec(spec), "sub-module") == spec


@every_spec
def test_building_changes_neither_the_spec_nor_another_module(spec: SubModuleSpec) -> None:
    before, one = dump_spec(spec), make(spec)
    weights = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    other = draw(spec.build(WIDTH))
    places = [{tensor.data_ptr() for tensor in module.state_dict().values()} for module in (one, other)]
    assert places[0].isdisjoint(places[1])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())
    assert dump_spec(spec) == before


@every_spec
def test_the_seed_determines_the_initial_parameters(spec: SubModuleSpec) -> None:
    built = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(
            torch.cat([torch.zeros(0), *(parameter.flatten() for parameter in spec.build(WIDTH).parameters())])
        )
    assert torch.equal(built[0], built[1])
    assert built[0].numel() == 0 or not torch.equal(built[0], built[2])


@every_spec
@pytest.mark.parametrize("way", ["deepcopy", "state_dict", "file"])
def test_a_copy_gives_the_same_results_and_shares_no_parameters(spec: SubModuleSpec, way: str) -> None:
    module = make(spec)
    if way == "deepcopy":
        other = copy.deepcopy(module)
    else:
        state = module.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other = spec.build(WIDTH).double()
        other.load_state_dict(state, strict=True)
    tokens = lay(*batch([40, 3]), "packed")
    before = module(tokens)[0]
    assert torch.equal(other(tokens)[0], before)
    draw(other)
    assert torch.equal(module(tokens)[0], before)


def test_kinds_differ_in_what_they_compute() -> None:
    tokens = lay(*batch([40, 3]), "packed")
    results = {name: make(spec)(tokens)[0] for name, spec in SPECS.items()}
    assert [
        pair for pair in itertools.combinations(results, 2) if torch.allclose(results[pair[0]], results[pair[1]])
    ] == []
