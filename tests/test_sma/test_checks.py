"""Checks of the arguments of `SparseModularActivation`, layers and models, and of the decisions of routers."""

import importlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma import Decision, Ragged, Router, SparseModularActivation, State, build
from sma.checks import check_causal, check_dtype
from sma.errors import InputError, StateError
from sma.routers import AlwaysRouterSpec, SMARouterSpec
from tests.cases import normal
from tests.streams import exactly
from tests.test_sma.layers import WIDTH, make

REAL: dict[str, Any] = {
    "kind": "sequence_encoder",
    "width": WIDTH,
    "layers": [{"modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 3}}}],
}


class Twice(nn.Module):
    """A plain module that takes ragged tokens."""

    causal = True

    def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, None]:
        return 2 * tokens.values, None


class Edited(Router):
    """A third-party router: by default everything is active at confidence 1, also padding."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(["a", "b"])
        self.changes = changes

    def forward(self, control_BLD, valid=None, positions=None, state=None):
        ones = control_BLD.new_ones(*control_BLD.shape[:2], 2)
        return replace(
            Decision(ones.bool(), ones, torch.stack([-ones, ones], -1), ones, self.names), **self.changes
        ), None


def routed(router: Router | None = None) -> SparseModularActivation:
    return SparseModularActivation(
        router or SMARouterSpec().build(WIDTH, ["a", "b"]).double(), {"a": Twice(), "b": Twice()}
    )


def test_padding_is_never_active_even_if_a_router_activates_it():
    x, valid = normal(2, 4, WIDTH), torch.tensor([[True, False, True, True], [False] * 4])
    for capacity in (None, 2):
        output = routed(Edited())(x, valid=valid, capacity=capacity)
        assert torch.equal(output.decision.active.any(-1), output.decision.active.all(-1))
        assert not output.decision.active[~valid].any()
        assert not output.values[~valid].any()
        assert torch.equal(output.values[0, 0], 4 * x[0, 0])


@pytest.mark.usefixtures("as_users_run")
class TestOtherArguments:
    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            (
                {"control_BLD": normal(2, 3, WIDTH)},
                "control_BLD is of shape (2, 3, 4) and dtype torch.float64; "
                "expected a floating-point tensor of shape (B = 2, L = 4, E)",
            ),
            (
                {"control_BLD": normal(1, 4, WIDTH)},
                "control_BLD is of shape (1, 4, 4) and dtype torch.float64; "
                "expected a floating-point tensor of shape (B = 2, L = 4, E)",
            ),
            (
                {"control_BLD": normal(2, 4)},
                "control_BLD is of shape (2, 4) and dtype torch.float64; "
                "expected a floating-point tensor of shape (B = 2, L = 4, E)",
            ),
            (
                {"control_BLD": normal(2, 4, WIDTH).long()},
                "control_BLD is of shape (2, 4, 4) and dtype torch.int64; "
                "expected a floating-point tensor of shape (B = 2, L = 4, E): convert with .float()",
            ),
            (
                {"control_BLD": normal(2, 4, 5)},
                "control_BLD is of shape (2, 4, 5) and dtype torch.float64; "
                "expected a floating-point tensor of shape (B, L, D = 4)",
            ),
            (
                {"positions": torch.arange(4)},
                "positions are of shape (4,) and dtype torch.int64; expected an integer tensor of shape (B = 2, L = 4)",
            ),
            (
                {"positions": torch.arange(20).reshape(2, 10)},
                "positions are of shape (2, 10) and dtype torch.int64; "
                "expected an integer tensor of shape (B = 2, L = 4)",
            ),
            (
                {"positions": normal(2, 4)},
                "positions are of shape (2, 4) and dtype torch.float64; "
                "expected an integer tensor of shape (B = 2, L = 4): convert with .long()",
            ),
            (
                {"positions": torch.ones(2, 4).bool()},
                "positions are of shape (2, 4) and dtype torch.bool; "
                "expected an integer tensor of shape (B = 2, L = 4): convert with .long()",
            ),
        ],
    )
    def test_what_does_not_fit(self, options, complaint):
        with pytest.raises(InputError, match=exactly(complaint)):
            routed()(normal(2, 4, WIDTH), **options)

    def test_tokens_of_another_width_than_that_of_the_router(self):
        with pytest.raises(InputError, match=r"^the tokens are .* \(2, 4, 5\) .*; expected .* \(B, L, D = 4\)$"):
            routed()(normal(2, 4, 5))


@pytest.mark.usefixtures("as_users_run")
class TestDtypes:
    sentence = (
        "have dtype torch.float32 and the parameters torch.float64; "
        "convert either with .to(dtype), or use torch.autocast"
    )

    @pytest.mark.parametrize("part", [routed(), make("seqboat"), make("bare")], ids=["plain", "seqboat", "bare"])
    def test_tokens_of_another_dtype_than_the_parameters(self, part):
        with pytest.raises(InputError, match=exactly(f"the tokens {self.sentence}")):
            part(normal(2, 4, WIDTH).float())

    @pytest.mark.parametrize(
        ("encoder", "shape"), [({"kind": "real_number"}, (2, 4)), ({"kind": "linear", "features": 3}, (2, 4, 3))]
    )
    def test_numbers_of_another_dtype_than_the_encoder(self, encoder, shape):
        model = build({**REAL, "encoder": encoder}).double()
        assert model(normal(*shape)).hidden.dtype is torch.float64
        with pytest.raises(InputError, match=exactly(f"the inputs {self.sentence}")):
            model(normal(*shape).float())

    def test_parameters_of_several_dtypes_accept_tokens_of_each(self):
        mixed = nn.ModuleList([nn.Linear(1, 1).bfloat16(), nn.LayerNorm(1)])
        for dtype in (torch.bfloat16, torch.float32):
            check_dtype(mixed, torch.ones(1, dtype=dtype))
        with pytest.raises(
            InputError, match=r"dtype torch\.float16 and the parameters torch\.bfloat16 and torch\.float32; convert"
        ):
            check_dtype(mixed, torch.ones(1).half())

    def test_dtypes_are_not_checked_under_autocast_or_without_parameters(self):
        layer = make("seqboat", torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(normal(2, 4, WIDTH).bfloat16()).hidden.isfinite().all()
        plain = SparseModularActivation(AlwaysRouterSpec().build(WIDTH, ["a"]), {"a": Twice()})
        assert plain(normal(2, 4, WIDTH).half()).values.dtype is torch.float16


@pytest.mark.usefixtures("as_users_run")
class TestDecisions:
    ones = torch.ones(2, 4, 3)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"names": ()}, "the decision of Edited is about []; expected ['a', 'b'], in this order"),
            (
                {"names": ("b", "a")},
                "the decision of Edited is about ['b', 'a']; expected ['a', 'b'], in this order",
            ),
            (
                {"active": ones.bool()},
                "active of the decision of Edited is of shape (2, 4, 3) and dtype torch.bool; "
                "expected a boolean tensor of shape (B = 2, L = 4, M = 2)",
            ),
            (
                {"active": ones[..., 0].bool()},
                "active of the decision of Edited is of shape (2, 4) and dtype torch.bool; "
                "expected a boolean tensor of shape (B = 2, L = 4, M = 2)",
            ),
            (
                {"confidence": ones[:1, :, :2]},
                "confidence of the decision of Edited is of shape (1, 4, 2) and dtype torch.float32; "
                "expected a floating-point tensor of shape (B = 2, L = 4, M = 2)",
            ),
            (
                {"active": ones[..., :2]},
                "active of the decision of Edited is of shape (2, 4, 2) and dtype torch.float32; "
                "expected a boolean tensor of shape (B = 2, L = 4, M = 2): convert with .bool()",
            ),
        ],
    )
    def test_decision_that_does_not_fit(self, changes, complaint):
        with pytest.raises(InputError, match=exactly(complaint)):
            routed(Edited(**changes))(normal(2, 4, WIDTH))


@pytest.mark.usefixtures("as_users_run")
class TestNames:
    @pytest.mark.parametrize("name", ["a.b", ""])
    def test_name_that_torch_refuses(self, name):
        sentence = f"the sub-module name {name!r} must be a word without dots, by which torch finds its parameters"
        with pytest.raises(InputError, match=exactly(sentence)):
            SparseModularActivation(AlwaysRouterSpec().build(WIDTH, [name]), {name: Twice()})

    def test_no_sub_module(self):
        with pytest.raises(InputError, match=exactly("there are no sub-modules to choose from; give at least one")):
            SparseModularActivation(AlwaysRouterSpec().build(WIDTH, []), {})


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "",
            "Ahead (causal=False) cannot continue from a state; build the model with bidirectional=false to stream it",
        ),
        (
            "mixer",
            "'mixer' (kind Ahead, causal=False) cannot continue from a state; build the model with bidirectional",
        ),
    ],
    ids=["alone", "in a layer"],
)
def test_a_third_party_part_that_looks_ahead_is_refused(name: str, sentence: str) -> None:
    class Ahead(nn.Module):
        causal = False

    with pytest.raises(StateError, match=f"^{re.escape(sentence)}"):
        check_causal(Ahead(), name)


def test_a_part_may_define_how_it_can_be_streamed() -> None:
    class Ahead(nn.Module):
        causal = False
        to_stream = "set lookahead=0"

    with pytest.raises(StateError, match=r"cannot continue from a state; set lookahead=0$"):
        check_causal(Ahead())


@pytest.mark.parametrize(
    ("name", "present"),
    [
        ("submodule.placement", "sma.submodule.device_and_dtype"),
        ("submodule.check_sizes", "sma.checks.check_sizes"),
        ("submodule.Operations", "sma.submodule.MACs"),
        ("stats.operation_count", "sma.stats.count_macs"),
        ("budget.calibrate", "sma.calibration.calibrate"),
    ],
)
def test_an_import_of_a_former_name_raises_an_error_with_the_present_one(name: str, present: str) -> None:
    module, _, attribute = f"sma.{name}".rpartition(".")
    with pytest.raises(ImportError, match=f"^sma.{name} is now {present}"):
        getattr(importlib.import_module(module), attribute)
