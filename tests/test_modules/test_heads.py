"""Heads as sub-modules: their sum is one multi-head attention, and each runs on its own tokens only."""

import pytest
import torch
from torch import Tensor

import sma
from sma.layer import LayerSpec
from sma.modules.attention import AttentionSpec
from sma.modules.gau import GAUSpec
from sma.modules.local_attention import LocalAttentionSpec
from sma.modules.multihead import MultiHead, MultiHeadSpec
from sma.positions import RotarySpec
from sma.routers import AlwaysRouterSpec, SMARouterSpec
from tests.cases import normal, spread

WIDTH, HEADS, SIZE = 6, 3, 4
NAMES = [f"head_{index}" for index in range(HEADS)]
SPECS = {
    "attention": AttentionSpec(heads=HEADS, head_size=SIZE, position=RotarySpec()),
    "local": LocalAttentionSpec(heads=HEADS, head_size=SIZE, window=3, position=RotarySpec()),
}
every_spec = pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in SPECS.items()])


def cut(whole: MultiHead, index: int) -> MultiHead:
    """One head of an attention as a separate attention; the first head has the output bias."""
    head = whole.spec.replace(heads=1).build(WIDTH).double()
    own = slice(index * SIZE, (index + 1) * SIZE)
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = getattr(whole.in_proj, name).unflatten(0, (3, HEADS * SIZE))[:, own].flatten(0, 1)
            getattr(head.in_proj, name).copy_(rows)
        head.out_proj.weight.copy_(whole.out_proj.weight[:, own])
        head.out_proj.bias.copy_(whole.out_proj.bias if index == 0 else torch.zeros(WIDTH))
    return head


@every_spec
def test_an_attention_is_the_sum_of_its_heads(spec: MultiHeadSpec) -> None:
    whole = spec.build(WIDTH).double()
    spread(whole)
    heads = {name: cut(whole, index) for index, name in enumerate(NAMES)}
    x, valid = normal(4, 9, WIDTH), torch.rand(4, 9) < 0.7
    valid[1] = False
    one = sma.SparseModularActivation(AlwaysRouterSpec().build(WIDTH, ["all"]), {"all": whole})
    several = sma.SparseModularActivation(AlwaysRouterSpec().build(WIDTH, NAMES), heads)
    torch.testing.assert_close(several(x, valid=valid).values, one(x, valid=valid).values, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(SPECS["attention"].replace(heads=1), id="attention"),
        pytest.param(SPECS["local"].replace(heads=1), id="local"),
        pytest.param(GAUSpec(query_size=4, hidden_size=4, window=3), id="gau"),
    ],
)
def test_each_head_runs_on_its_own_tokens_and_costs_by_its_own_rate(head: MultiHeadSpec | GAUSpec) -> None:
    spec = LayerSpec(router=SMARouterSpec(temperature_scale=0.3), modules=dict.fromkeys(NAMES, head))
    layer = spec.build(WIDTH).double()
    spread(layer)
    seen: dict[str, Tensor] = {}
    assert layer.routed is not None
    for name, module in layer.routed.submodules.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].index}))
    decision = layer(normal(4, 9, WIDTH)).decision
    assert decision is not None
    active = decision.active.flatten(0, 1)
    assert len({tuple(column.tolist()) for column in active.unbind(-1)}) == HEADS
    for name, column in zip(NAMES, active.unbind(-1), strict=True):
        assert torch.equal(seen[name].sort().values, column.nonzero().squeeze(1))
    rates = dict(zip(NAMES, (0.0, 0.5, 1.0), strict=True))
    routed = [head.macs(WIDTH, round(rate * 20)).matmul for rate in rates.values()]
    assert spec.macs(WIDTH, 20, rates).matmul == spec.macs(WIDTH, 20, 0.0).matmul + sum(routed)
