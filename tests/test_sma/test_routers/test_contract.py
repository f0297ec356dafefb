"""The contract of routers in addition to the laws of the conformance kit."""

import math

import pytest
import torch

from sma.errors import InputError, StateError
from sma.routers import Router, RouterSpec, SMARouterSpec
from sma.spec import kinds
from sma.submodule import State
from tests.cases import gradients, normal, strided
from tests.streams import exactly, near
from tests.test_sma.test_routers.each import (
    FIELDS,
    NAMES,
    SPECS,
    draws,
    is_causal,
    is_learned,
    router,
    routers,
    same,
)


def test_every_router_is_tested():
    assert {kind for kind, spec in kinds("router").items() if spec.__module__.startswith("sma.")} == {
        spec.kind for spec in SPECS.values()
    }


class TestIndependence:
    @routers()
    def test_a_control_state_that_is_not_contiguous_gives_the_same_decision(self, spec):
        part, control = router(spec), normal(2, 7, 5)
        for other in strided(control):
            for name in FIELDS:
                near(getattr(part(other)[0], name), getattr(part(control)[0], name))


class TestStreams:
    @routers(is_causal)
    def test_a_state_of_another_part_is_refused(self, spec):
        part, wanted = router(spec), "RandomState" if spec.kind == "random" or draws(spec) else "NoState"
        name = type(part).__name__
        with pytest.raises(
            StateError, match=exactly(f"{name} got a state of class State; expected {wanted}: use init_state")
        ):
            part(normal(1, 2, 5), state=State())
        sentence = (
            f"{name} got a state of 3 streams for a batch of 2 rows; "
            "make one with init_state(2), or take rows with state.select"
        )
        with pytest.raises(StateError, match=exactly(sentence)):
            part(normal(2, 2, 5), state=part.init_state(3))

    @routers(lambda spec: not is_causal(spec))
    def test_a_router_that_looks_ahead_refuses_every_state(self, spec):
        part = router(spec)
        name = type(part).__name__
        for call in (lambda: part.init_state(1), lambda: part(normal(1, 2, 5), state=State())):
            with pytest.raises(
                StateError,
                match=exactly(
                    f"{name} (kind {spec.kind}, causal=False) cannot continue from a state; choose a causal router, "
                    "such as 'sma', to stream the model"
                ),
            ):
                call()


class TestNumerics:
    @routers()
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_never_changes_the_scores(self, spec, dtype):
        part, control = spec.build(64, NAMES), normal(2, 9, 64, dtype=torch.float32)
        plain = part(control)[0]
        with torch.autocast("cpu", dtype=dtype):
            same(part(control)[0], plain)

    @routers(is_learned)
    @pytest.mark.parametrize("size", [0.0, 1e4, -1e4, 1e30])
    def test_huge_control_states_give_no_nan(self, spec, size):
        part, control = router(spec).float(), normal(2, 5, 5, dtype=torch.float32) * size
        control.requires_grad_()
        decision = part(control)[0]
        assert ((decision.confidence > 0) & (decision.confidence <= 1)).all()
        assert ((decision.p_on >= 0) & (decision.p_on <= 1)).all()
        assert decision.logits.isfinite().all()
        for tensor in (decision.confidence, decision.p_on):
            assert all(gradient.isfinite().all() for gradient in gradients(tensor, [control, part.weight, part.bias]))
        assert all(gradient.isfinite().all() for gradient in gradients(decision.confidence, part.parameters()))

    @routers(is_learned)
    def test_a_nan_token_runs_nothing(self, spec):
        part, control = router(spec), normal(2, 9, 5)
        control[:, 4, 1] = math.nan
        decision = part(control)[0]
        assert not decision.active[:, 4].any()
        assert decision.confidence[decision.active].isfinite().all()

    @routers()
    @pytest.mark.parametrize("modules", [0, 1, 3])
    @pytest.mark.parametrize("shape", [(0, 0), (0, 4), (2, 0), (1, 1), (2, 3)])
    def test_empty_batches_and_no_sub_modules_give_empty_decisions(self, spec, modules, shape):
        if modules and spec.kind == "top_k" and spec.k > modules + spec.skips:
            modules = 3
        part = spec.build(5, NAMES[:modules])
        control = torch.zeros(*shape, 5, requires_grad=True)
        for valid in (None, torch.zeros(shape, dtype=torch.bool)):
            decision = part(control, valid)[0]
            assert decision.active.shape == decision.confidence.shape == decision.p_on.shape == (*shape, modules)
            assert decision.logits.shape == (*shape, modules, 2)
            assert valid is None or not decision.active.any()
            if is_learned(spec):
                used = decision.confidence[decision.active].sum()
                for gradient in torch.autograd.grad(used, [control, *part.parameters()], materialize_grads=False):
                    assert gradient.isfinite().all()
                    assert valid is None or not gradient.any()


class TestSpecs:
    @routers()
    def test_sub_modules_of_one_router_have_different_names(self, spec):
        with pytest.raises(
            InputError, match=r"the sub-modules of one router need different names, not \['a', 'b', 'a'\]"
        ):
            spec.build(5, ["a", "b", "a"])

    @routers()
    @pytest.mark.parametrize("modules", [0, 1, 3])
    def test_spec_predicts_the_number_of_parameters_and_of_macs(self, spec, modules):
        if modules and spec.kind == "top_k" and spec.k > modules + spec.skips:
            modules = 3
        part = spec.build(5, NAMES[:modules])
        assert sum(parameter.numel() for parameter in part.parameters()) == spec.num_parameters(5, modules)
        assert spec.macs_per_token(5, modules) == (part.weight.numel() if is_learned(spec) else 0)

    @routers(is_learned)
    def test_initial_weights_are_truncated_normal_and_biases_zero(self, spec):
        part = spec.build(2000, NAMES)
        assert part.weight.abs().max() <= 0.04
        assert part.weight.std().item() == pytest.approx(0.0176, abs=0.0006)  # 0.02 cut at 2 standard deviations
        assert not part.bias.any()

    def test_a_spec_must_define_build_and_num_parameters(self):
        class Idle(RouterSpec):
            kind: str = "idle"

        with pytest.raises(TypeError, match=exactly("Idle must define build(self, width, names)")):
            Idle().build(5, NAMES)
        with pytest.raises(TypeError, match=exactly("Idle must define num_parameters(self, width, modules)")):
            Idle().num_parameters(5, 3)
        assert Idle().macs_per_token(5, 3) == 0

    def test_a_spec_with_the_former_name_of_macs_per_token_gets_the_present_one(self):
        class FormerSpec(RouterSpec):
            kind: str = "former"

            def operations(self, width, modules):
                return width

        with pytest.raises(TypeError, match=r"^FormerSpec\.operations\(self, width, modules\) is now macs_per_token"):
            FormerSpec().macs_per_token(5, 3)

    def test_a_router_must_define_forward(self):
        with pytest.raises(
            TypeError, match=exactly("Router must define forward(self, control_BLD, valid, positions, state=None)")
        ):
            Router(NAMES)(normal(1, 1, 5))

    def test_set_step_changes_nothing_without_a_schedule(self):
        part, control = router(SMARouterSpec()), normal(1, 9, 5)
        before = part(control)[0]
        part.set_step(7)
        same(part(control)[0], before)


@routers(is_learned)
@pytest.mark.parametrize("channels", [3, 9])
def test_a_control_state_of_another_width_is_named(spec, channels, as_users_run):
    part = spec.build(8, NAMES)
    with pytest.raises(
        InputError, match=rf"^control_BLD is of shape \(2, 5, {channels}\) .*; expected .* \(B, L, D = 8\)$"
    ):
        part(normal(2, 5, channels))
