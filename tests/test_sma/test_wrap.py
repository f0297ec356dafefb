"""Plain modules as sub-modules, against loops that call the plain module on each token or row separately."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.testing import assert_close

import sma
from sma.errors import InputError
from sma.ragged import compress
from sma.testing import ConformanceError, check_submodule
from sma.wrap import RowWise, TokenWise

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 4


class Convolution(nn.Module):
    """A convolution along the row; `causal` uses earlier tokens only."""

    def __init__(self, width: int, causal: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3)
        self.padding = (2, 0) if causal else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x.transpose(1, 2), self.padding)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Self-attention with the mask of transformers: True, or 1, at tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return self.attention(hidden, hidden, hidden, key_padding_mask=~attention_mask)[0]


class Mixing(nn.Module):
    """Subtracts the mean of all tokens of the call, over all rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0)) if len(x) else self.linear(x)


class Unmasked(nn.Module):
    """Attends to padding, because it takes no mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class LoRALinear(nn.Module):
    """A frozen linear map plus a trained map of low rank."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))


def encoder_layer(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=True)


def attention(width: int) -> nn.Module:
    return nn.MultiheadAttention(width, 2, batch_first=True)


TOKEN_WISE = {
    "sequential": feed_forward,
    "lora": lambda width: nn.Sequential(LoRALinear(nn.Linear(width, width), 2), nn.Tanh()),
    "scale-norm": lambda width: nn.RMSNorm(width, eps=0.0),
}
ROW_WISE: dict[str, tuple[Callable[[int], nn.Module], dict[str, object]]] = {
    "encoder-layer": (encoder_layer, {}),
    "multihead": (attention, {"mask_argument": "key_padding_mask"}),
    "valid-mask": (SelfAttention, {"mask_argument": "attention_mask", "mask_true_is": "valid"}),
    "convolution": (Convolution, {"mask_argument": None}),
    "causal-convolution": (lambda width: Convolution(width, causal=True), {"mask_argument": None, "causal": True}),
}
# Three rows: some tokens, none, all.
ACTIVE = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def row_wise(name: str, width: int = WIDTH) -> RowWise:
    build, options = ROW_WISE[name]
    return RowWise(build(width), **options)


def plain(module: nn.Module, x: Tensor) -> Tensor:
    """The result of the module for `(1, S, D)` without a mask."""
    if isinstance(module, nn.MultiheadAttention):
        return module(x, x, x)[0]
    return module(x, torch.ones(x.shape[:2], dtype=torch.bool)) if isinstance(module, SelfAttention) else module(x)


def assert_gradients_agree(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert_close(a.grad, b.grad)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", ["sequential", "lora"])  # a norm without epsilon is undefined at zeros
def test_token_wise_keeps_the_contract(name):
    check_submodule(lambda width: TokenWise(TOKEN_WISE[name](width)), effort=5)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise_keeps_the_contract(name):
    check_submodule(lambda width: row_wise(name, width), effort=5)


@pytest.mark.parametrize("capacity", [None, 2, 5, 7])
@pytest.mark.parametrize("name", TOKEN_WISE)
def test_token_wise_equals_the_module_on_each_token(name, capacity):
    one = TOKEN_WISE[name](WIDTH).double()
    other = TOKEN_WISE[name](WIDTH).double()
    other.load_state_dict(one.state_dict())
    x, y = (torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.manual_seed(0)) for _ in "ab")
    x, y = x.requires_grad_(), x.detach().clone().requires_grad_()
    tokens = compress(x, ACTIVE, capacity=capacity)
    found = TokenWise(one)(tokens)[0][tokens.mask]
    wanted = torch.stack([other(y.flatten(0, 1)[index]) for index in tokens.index[tokens.mask]])
    assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert_close(x.grad, y.grad)
    assert_gradients_agree(one, other)


@pytest.mark.parametrize("capacity", [None, 2, 5, 7])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise_equals_the_module_on_the_active_tokens_of_each_row(name, training, capacity):
    one, other = row_wise(name).double().train(training), row_wise(name).double().train(training)
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    tokens = compress(x, ACTIVE, capacity=capacity)
    found = one(tokens)[0][tokens.mask]
    rows = [y[row, ACTIVE[row]][: capacity or 5] for row in range(3)]
    wanted = torch.cat([plain(other.module, row[None])[0] for row in rows if len(row)])
    assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert_close(x.grad, y.grad)
    assert_gradients_agree(one, other)
    with torch.no_grad():  # this uses the fast path of nn.TransformerEncoderLayer
        assert_close(one(tokens)[0][tokens.mask], wanted.detach())


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize("name", ROW_WISE)
def test_without_active_tokens_nothing_is_called_and_all_gradients_are_zero(name, capacity):
    part = row_wise(name)
    part.module.register_forward_hook(lambda *_: pytest.fail("called"))
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    tokens = compress(x, torch.zeros(2, 3, dtype=torch.bool), capacity=capacity)
    result = part(tokens)[0]
    assert result.shape == tokens.values.shape
    assert not result.any()
    result.sum().backward()
    for tensor in (x, *part.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_holes_never_reach_a_token_wise_module():
    seen = []
    module = nn.Linear(WIDTH, WIDTH)
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(3, 5, WIDTH)
    TokenWise(module)(compress(x, ACTIVE, capacity=4))
    assert torch.equal(seen[0], torch.cat([x[0, ACTIVE[0]], x[2, :4]]))


def test_in_a_process_group_a_row_wise_module_is_called_without_active_tokens(tmp_path):
    part, calls = row_wise("encoder-layer"), []
    part.module.register_forward_hook(lambda _, inputs, __: calls.append(tuple(inputs[0].shape)))
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    try:
        result = part(compress(torch.randn(2, 3, WIDTH), torch.zeros(2, 3, dtype=torch.bool)))[0]
        result.sum().backward()
    finally:
        distributed.destroy_process_group()
    assert calls == [(1, 1, WIDTH)]
    assert result.shape == (0, WIDTH)
    assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


COMPILED = """
import torch
import sma
from tests.test_sma.test_wrap import WIDTH, feed_forward, row_wise

def routed(name):
    torch.manual_seed(0)
    return sma.SparseModularActivation("threshold", {"mlp": sma.TokenWise(feed_forward(WIDTH)), "row": row_wise(name)})

x = torch.randn(3, 5, WIDTH, generator=torch.manual_seed(1))
valid = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
for name in ("multihead", "convolution", "encoder-layer"):
    for training in (True, False):
        one, other = routed(name).train(training), routed(name).train(training)
        compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(training):
            found, wanted = (part(x, valid=valid, capacity=3).values for part in (compiled, other))
        torch.testing.assert_close(found, wanted)
        if training:
            found.square().sum().backward()
            wanted.square().sum().backward()
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
print("equal")
"""


@pytest.mark.slow
def test_a_compiled_layer_with_a_capacity_equals_the_eager_one():
    # In a separate process, because a compiler cannot trace the shape checker of the suite.
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("active", ["all", "some"])
@pytest.mark.parametrize("wrap", [TokenWise, lambda module: RowWise(module, mask_argument=None)])
def test_modules_that_work_in_place_work_on_a_copy(wrap, active):
    """The residual stream and the tokens of the next sub-module stay unchanged."""

    def routed(inplace: bool) -> sma.SparseModularActivation:
        torch.manual_seed(0)
        module = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(WIDTH, WIDTH))
        parts = {"a": wrap(module), "b": TokenWise(nn.Linear(WIDTH, WIDTH))}
        return sma.SparseModularActivation("always" if active == "all" else "threshold", parts)

    results = []
    for inplace in (False, True):
        x = torch.randn(3, 5, WIDTH, generator=torch.manual_seed(1), requires_grad=True)
        hidden = x * 1
        result = hidden + routed(inplace)(hidden).values
        result.square().sum().backward()
        results.append((result.detach(), x.grad))
    assert_close(results[1], results[0])


def test_padding_gives_no_non_finite_gradients():
    class Directions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.linear(x)
            return x / x.square().sum(-1, keepdim=True).sqrt()

    part = RowWise(Directions(), mask_argument="mask")
    tokens = compress(torch.randn(3, 5, WIDTH), ACTIVE)
    part(tokens)[0].sum().backward()
    assert part.module.linear.weight.grad.isfinite().all()


def test_the_inferred_width_is_that_of_inputs_and_outputs():
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.inward = nn.Linear(32, 4), nn.Linear(4, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inward(x))

    assert sma.SparseModularActivation("sma", {"a": TokenWise(Reversed())}).router.width == 4


@pytest.mark.parametrize("wrap", [TokenWise, lambda module: RowWise(module, mask_argument=None)])
def test_a_module_is_never_called_on_empty_tensors(wrap):
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], 2, -1).flip(-2).flatten(-2)

    part = wrap(Halves())
    for shape in ((2, 3, WIDTH), (2, 0, WIDTH), (0, 3, WIDTH)):
        assert part(compress(torch.randn(shape), torch.zeros(shape[:2], dtype=torch.bool)))[0].shape == (0, WIDTH)


def test_attention_inside_a_wrapper_gets_query_key_and_value():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = attention(WIDTH)
    tokens = compress(torch.randn(3, 5, WIDTH), ACTIVE)
    wanted = RowWise(module, mask_argument="key_padding_mask")(tokens)[0]
    assert_close(RowWise(checkpoint_wrapper(module), mask_argument="key_padding_mask")(tokens)[0], wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda: TokenWise(feed_forward(WIDTH)), lambda: row_wise("encoder-layer")])
def test_a_scripted_module_is_wrapped_like_the_module(wrap):
    one, other, tokens = wrap(), wrap(), compress(torch.randn(3, 5, WIDTH), ACTIVE)
    other.load_state_dict(one.state_dict())
    other.eval()
    options = {} if isinstance(one, TokenWise) else {"mask_argument": one.mask_argument}
    scripted = type(one)(torch.jit.script(one.module.eval()), **options)
    assert_close(scripted(tokens)[0], other(tokens)[0])


def test_a_layer_of_plain_modules_requires_neither_spec_nor_router():
    routed = sma.SparseModularActivation("sma", {"mlp": TokenWise(feed_forward(6)), "row": RowWise(encoder_layer(6))})
    assert routed.router.names == ("mlp", "row")
    assert routed(torch.randn(2, 7, 6)).values.shape == (2, 7, 6)


def test_width_is_taken_from_the_modules_or_given():
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    with pytest.raises(InputError, match=r"the width of the tokens does not follow from the sub-modules \['twice'\]"):
        sma.SparseModularActivation("sma", {"twice": TokenWise(Opaque())})
    assert sma.SparseModularActivation("sma", {"twice": TokenWise(Opaque())}, width=3).router.width == 3
    with pytest.raises(InputError, match=r"different widths, \{'a': 3, 'b': 5\}"):
        sma.SparseModularActivation("sma", {"a": TokenWise(nn.Linear(3, 3)), "b": TokenWise(nn.Linear(5, 5))})


def test_a_router_may_be_a_kind_or_a_spec():
    parts = {"mlp": TokenWise(nn.Linear(3, 3))}
    spec = sma.load_spec({"kind": "sma", "temperature_scale": 0.3}, "router")
    assert sma.SparseModularActivation(spec, parts).router.spec == spec
    with pytest.raises(sma.SmaError, match="unknown router kind 'smaa'; did you mean 'sma'"):
        sma.SparseModularActivation("smaa", parts)


@pytest.mark.usefixtures("as_users_run")
def test_the_kit_detects_a_token_wise_module_that_mixes_rows():
    with pytest.raises(ConformanceError, match="rows_are_independent"):
        check_submodule(lambda width: TokenWise(Mixing(width)), effort=5)


@pytest.mark.usefixtures("as_users_run")
def test_the_kit_detects_a_missing_or_inverted_mask():
    with pytest.raises(ConformanceError, match="rows_are_independent"):
        check_submodule(lambda width: RowWise(Unmasked(width), mask_argument=None), effort=10)
    with pytest.raises(ConformanceError, match=r"layouts_agree|rows_are_independent"):
        check_submodule(lambda width: RowWise(encoder_layer(width), mask_true_is="valid"), effort=5)


@pytest.mark.parametrize("wrapped", [torch.compile, lambda part: nn.Sequential(part)])
def test_a_compiled_sub_module_is_accepted_and_a_container_is_refused(wrapped):
    part = wrapped(TokenWise(nn.Linear(4, 4)))
    if isinstance(part, nn.Sequential):
        with pytest.raises(InputError, match="is a plain Sequential"):
            sma.SparseModularActivation("sma", {"mlp": part})
    else:
        assert sma.SparseModularActivation("sma", {"mlp": part}).router.width == 4
