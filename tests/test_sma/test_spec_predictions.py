"""Predictions of a spec against the module that it builds: parameters, and the matmul MACs that torch counts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sma import build, load_spec
from sma.errors import SpecError
from sma.routers import RandomRouterSpec, SMARouterSpec
from sma.spec import kinds
from sma.submodule import MACs
from tests import oracles
from tests.cases import normal
from tests.flops import counted_products
from tests.specs import KINDS, of_class

MODEL: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": 4,
    "encoder": {"kind": "token_embedding", "vocabulary": 5},
    "layers": {"repeat": 2, "layer": {"modules": {"attention": {"kind": "gau", "query_size": 2, "hidden_size": 3}}}},
    "head": {"kind": "mean_pool_linear", "classes": 3},
}


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _built(make: Any) -> torch.nn.Module | None:
    """A module, or None if the spec does not fit the width or the sub-modules, or a language model is not causal."""
    try:
        module: torch.nn.Module = make()
    except SpecError as error:
        assert any(reason in str(error) for reason in ("heads=", "must not look ahead", "to choose from"))  # noqa: PT017
        return None
    return module


class TestPredictions:
    @pytest.mark.parametrize(
        ("family", "kind"),
        [
            pytest.param(family, kind, id=f"{family}:{kind}")
            for family, kind, _ in KINDS
            if family not in ("position", "task")
        ],
    )
    @given(data=st.data())
    def test_number_of_parameters_agrees_with_the_built_module(self, family, kind, data):
        spec, width = data.draw(of_class(kinds(family)[kind], most=6)), data.draw(st.sampled_from([1, 2, 6, 12]))
        if family == "model":
            module, predicted = _built(lambda: build(spec, 0)), spec.num_parameters()
        elif family == "router":
            names = data.draw(st.sampled_from([[], ["a"], ["a", "b", "c"]]))
            module, predicted = _built(lambda: spec.build(width, names)), spec.num_parameters(width, len(names))
        else:
            module, predicted = _built(lambda: spec.build(width)), spec.num_parameters(width)
        if module is not None:
            assert _parameters(module) == predicted

    @pytest.mark.parametrize(
        "kind", [pytest.param(kind, id=kind) for family, kind, _ in KINDS if family == "sub-module"]
    )
    @given(data=st.data())
    def test_matmul_macs_agree_with_the_count_of_torch(self, kind, data):
        spec = data.draw(of_class(kinds("sub-module")[kind], most=40))
        width, tokens = (
            data.draw(st.sampled_from([1, 4, 12])),
            data.draw(st.one_of(st.integers(0, 20), st.integers(21, 150))),
        )
        module = _built(lambda: spec.build(width))
        if module is None:
            return
        with counted_products() as counter:
            module(oracles.one_row(normal(tokens, width, dtype=torch.float32)))
        assert spec.macs(width, tokens).matmul == counter.get_total_flops() / 2

    @given(tokens=st.integers(0, 30), width=st.sampled_from([1, 5]), modules=st.integers(0, 3))
    def test_macs_of_the_router_agree_with_the_count_of_torch(self, tokens, width, modules):
        for spec in (SMARouterSpec(), RandomRouterSpec(rate=0.5)):
            router = spec.build(width, list("abc"[:modules]))
            with FlopCounterMode(display=False) as counter:
                router(normal(1, tokens, width, dtype=torch.float32))
            assert tokens * spec.macs_per_token(width, modules) == counter.get_total_flops() / 2

    def test_macs_can_be_added(self):
        total = MACs.sum([MACs(matmul=1, fft=2, elementwise=3), MACs(10, 20, 30), MACs()])
        assert total == MACs(11, 22, 33)
        assert total.total == 66

    def test_macs_of_a_model_are_the_sum_of_its_layers(self):
        spec = load_spec(MODEL)
        one = spec.layer_specs[0].macs(4, 20, 0.5)
        assert spec.macs(20, 0.5) == MACs.sum([one, one])
        assert spec.macs(20, {"attention": 0.5}) == spec.macs(20, 0.5)
