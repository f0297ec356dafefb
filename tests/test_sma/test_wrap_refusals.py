"""Errors of `TokenWise`, `RowWise` and layers of plain modules."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sma
from sma.errors import InputError, StateError
from sma.ragged import compress
from sma.submodule import SubModule
from sma.wrap import RowWise, TokenWise
from tests.test_sma.test_wrap import ACTIVE, WIDTH, Convolution, attention, encoder_layer, feed_forward


@pytest.mark.parametrize(
    ("module", "fits"),
    [
        pytest.param(nn.Linear(4, 4), r"takes no mask: sma\.TokenWise\(module\) fits", id="linear"),
        pytest.param(feed_forward(4), r"takes no mask: sma\.TokenWise\(module\) fits", id="sequential"),
        pytest.param(encoder_layer(4), r"takes 'src_key_padding_mask': sma\.RowWise\(module\) fits", id="encoder"),
        pytest.param(attention(4), r"sma\.RowWise\(module, mask_argument='key_padding_mask'\) fits", id="multihead"),
        pytest.param(
            Convolution(4),
            "mixes tokens and takes no mask: .*fits if padding",
            id="convolution",
        ),
        pytest.param(
            nn.GRU(4, 4),
            "mixes tokens and takes no mask: .*fits if padding",
            id="recurrence",
        ),
    ],
)
def test_a_plain_module_is_refused_with_the_wrapper_that_fits(module, fits):
    with pytest.raises(InputError, match=rf"^the sub-module 'mlp' is a plain {type(module).__name__}, .*{fits}"):
        sma.SparseModularActivation("sma", {"mlp": module})


@pytest.mark.parametrize("wrong", [3, None, nn.GELU, torch.relu])
@pytest.mark.usefixtures("as_users_run")
def test_an_object_that_is_not_a_module_is_refused(wrong):
    with pytest.raises(InputError, match=r"^the sub-module 'mlp' is .*; expected a Module"):
        sma.SparseModularActivation("sma", {"mlp": wrong})


class Wrong(SubModule):
    def __init__(self, result: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.result = result

    def forward(self, tokens, state=None):
        return self.result(tokens.values)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        pytest.param(lambda x: x, r"returned a torch\.Tensor of shape \(10, 4\).*expected a tuple", id="no-tuple"),
        pytest.param(lambda x: (x, None, None), "returned a tuple; expected a tuple of the results", id="three"),
        pytest.param(lambda x: None, "returned None; expected a tuple", id="nothing"),
        pytest.param(lambda x: (x[:, :3], None), r"shape \(10, 3\).*expected a tensor of shape \(10, 4\)", id="width"),
        pytest.param(lambda x: (x[:1], None), r"shape \(1, 4\).*expected a tensor of shape \(10, 4\)", id="tokens"),
        pytest.param(lambda x: ([x], None), "returned a list as its results", id="list"),
    ],
)
def test_a_sub_module_with_an_invalid_result_is_refused(result, said):
    routed = sma.SparseModularActivation("always", {"wrong": Wrong(result)}, width=4)
    with pytest.raises(InputError, match=rf"^the sub-module 'wrong' \(Wrong\) returned|{said}") as caught:
        routed(torch.randn(2, 5, 4))
    assert re.search(said, str(caught.value))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda: RowWise(nn.GRU(4, 4)), "batch on the second axis; build GRU with batch_first", id="rnn"),
        pytest.param(
            lambda: RowWise(nn.TransformerEncoderLayer(4, 2)),
            r"batch on the second axis; build TransformerEncoderLayer with|in 'self_attn'; build MultiheadAttention",
            id="encoder",
        ),
        pytest.param(
            lambda: RowWise(nn.Conv1d(4, 4, 3), mask_argument=None), "takes its channels on the second axis", id="conv"
        ),
        pytest.param(
            lambda: RowWise(encoder_layer(4), mask_argument="src_key_padding_maks"),
            "does not take; did you mean 'src_key_padding_mask'",
            id="typo",
        ),
        pytest.param(lambda: RowWise(nn.Linear(4, 4)), "give mask_argument=None if padding", id="no-mask"),
        pytest.param(lambda: RowWise(encoder_layer(4), mask_true_is="real"), "expected 'padding' or", id="polarity"),
        pytest.param(lambda: RowWise(encoder_layer(4), mask_argument="src_mask"), "a mask of pairs", id="pairs"),
        pytest.param(lambda: RowWise(encoder_layer(4), mask_argument="src"), "takes the tokens", id="first"),
        pytest.param(lambda: RowWise(encoder_layer(4), mask_argument=3), "expected the name of an", id="number"),
        pytest.param(
            lambda: RowWise(encoder_layer(4), mask_argument=None),
            "give mask_argument='src_key",
            id="none",
        ),
        pytest.param(
            lambda: RowWise(nn.Sequential(encoder_layer(4), encoder_layer(4)), mask_argument=None),
            "wrap Sequential in a module that takes the mask",
            id="sequence",
        ),
        pytest.param(
            lambda: RowWise(nn.GRU(4, 2, batch_first=True, bidirectional=True), mask_argument=None),
            "would read padding first",
            id="backwards",
        ),
        pytest.param(lambda: TokenWise(encoder_layer(4)), "TransformerEncoderLayer mixes tokens", id="token-wise"),
        pytest.param(lambda: TokenWise(nn.Conv1d(4, 4, 3)), "Conv1d mixes tokens", id="token-wise-conv"),
        pytest.param(lambda: TokenWise(nn.ModuleList()), "which has no forward", id="list"),
        pytest.param(lambda: TokenWise(nn.InstanceNorm1d(4)), "over the padding of a row", id="instance-norm"),
        pytest.param(lambda: TokenWise(TokenWise(nn.Linear(4, 4))), "is a sub-module already", id="twice"),
        pytest.param(lambda: TokenWise(len), "expected a Module", id="function"),
        pytest.param(
            lambda: TokenWise(nn.BatchNorm1d(4, track_running_stats=False)), "set track_running_stats", id="statistics"
        ),
    ],
)
@pytest.mark.usefixtures("as_users_run")
def test_a_module_that_cannot_be_wrapped_is_refused_at_construction(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize("wrap", [TokenWise, lambda module: RowWise(module, mask_argument=None)])
def test_batch_statistics_are_refused_in_training(wrap):
    tokens = compress(torch.randn(3, 5, WIDTH), ACTIVE)

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.flatten(0, -2)).view_as(x)

    part = wrap(Norm())
    with pytest.raises(InputError, match=r"contains BatchNorm1d 'norm', .*: it is in training mode; call its eval"):
        part(tokens)
    part.module.eval()
    assert_close(part(tokens)[0], tokens.values / (1 + 1e-5) ** 0.5)


def test_a_wrapped_module_with_an_invalid_result_is_refused():
    tokens = compress(torch.randn(3, 5, WIDTH), ACTIVE)
    with pytest.raises(InputError, match=r"^TokenWise\(Linear\) returned a torch.Tensor of shape \(8, 2\)"):
        TokenWise(nn.Linear(4, 2))(tokens)
    with pytest.raises(InputError, match=r"^RowWise\(GRU\) returned a tuple; expected a float"):
        RowWise(nn.GRU(4, 4, batch_first=True), mask_argument=None)(tokens)


@pytest.mark.parametrize("causal", [True, False])
def test_row_wise_refuses_a_state(causal):
    part = RowWise(encoder_layer(WIDTH), causal=causal)
    wanted = rf"RowWise.* \(causal={causal}\) cannot continue from a state; it keeps nothing between chunks"
    with pytest.raises(StateError, match=wanted):
        part.init_state(2)
    with pytest.raises(StateError, match=wanted):
        part(compress(torch.randn(3, 5, WIDTH), ACTIVE), TokenWise(nn.Identity()).init_state(3))
    routed = sma.SparseModularActivation("sma", {"row": part})
    assert routed.causal is causal
    with pytest.raises(StateError, match=r"'row' \(.*keeps nothing between chunks"):
        routed.init_state(2)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("router", "modules", "options", "said"),
    [
        pytest.param("sma", [nn.Identity()], {}, "expected a mapping of names", id="list"),
        pytest.param("sma", None, {}, "the sub-modules are None", id="nothing"),
        pytest.param("sma", {}, {}, "there are no sub-modules", id="empty"),
        pytest.param("sma", {1: TokenWise(nn.Linear(4, 4))}, {}, "expected a word", id="number"),
        pytest.param(None, {"a": TokenWise(nn.Linear(4, 4))}, {}, "the router is None", id="no-router"),
        pytest.param(nn.Linear(4, 4), {"a": TokenWise(nn.Linear(4, 4))}, {}, "the router is a", id="linear"),
        pytest.param("sma", {"a": TokenWise(nn.Linear(4, 4))}, {"width": 0}, "width=0 must be at least 1", id="zero"),
        pytest.param("sma", {"a": TokenWise(nn.Linear(4, 4))}, {"width": "4"}, "expected an integer", id="text"),
        pytest.param("sma", {"a": TokenWise(nn.LazyLinear(4))}, {}, "does not follow", id="lazy"),
    ],
)
def test_a_layer_of_invalid_parts_is_refused(router, modules, options, said):
    with pytest.raises(InputError, match=said):
        sma.SparseModularActivation(router, modules, **options)


def test_a_plain_module_with_an_attribute_causal_needs_a_wrapper():
    class Attention(nn.Module):
        causal = True

        def forward(self, x: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
            return x

    with pytest.raises(InputError, match="is a plain Attention"):
        sma.SparseModularActivation("sma", {"a": Attention()})
    assert RowWise(Attention(), mask_argument="mask").mask_argument == "mask"


@pytest.mark.parametrize(
    ("result", "said"),
    [
        pytest.param(lambda x: (x > 0).long(), "dtype torch.int64", id="integers"),
        pytest.param(lambda x: x.to(torch.complex64), "dtype torch.complex64", id="complex"),
        pytest.param(lambda x: x.to_sparse(), "expected a floating-point tensor", id="sparse"),
    ],
)
def test_results_that_are_not_dense_floats_are_refused(result, said):
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return result(x)

    with pytest.raises(InputError, match=said):
        TokenWise(Odd())(compress(torch.randn(3, 5, WIDTH), ACTIVE))


@pytest.mark.parametrize("wrap", [TokenWise, lambda module: RowWise(module, mask_argument=None)])
def test_a_module_that_changes_its_input_is_refused(wrap):
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    with torch.no_grad(), pytest.raises(InputError, match="changes its input in place"):
        wrap(Writing())(compress(torch.randn(3, 5, WIDTH), torch.ones(3, 5, dtype=torch.bool)))
