"""The repr of every output is one line, and that of every module shows its settings."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

import sma
from sma import Decision, Ragged, State, SubModule, SubModuleSpec, register
from sma.norms import LayerNormSpec
from sma.pytree import register_output
from sma.ragged import compress, rectangular
from sma.routers import SMARouterSpec
from sma.stats import count_rates
from sma.submodule import MACs, NoState
from tests.cases import normal


def _decision(active: Tensor, names: tuple[str, ...] = ("attention", "mlp")) -> Decision:
    scores = torch.stack([-active.double(), active.double()], -1)
    return Decision(active, active.double() + 0.5, scores, active.double(), names)


def _half() -> Decision:
    active = torch.zeros(2, 50, 2, dtype=torch.bool)
    active[0, :, 0], active[:, ::2, 1] = True, True
    return _decision(active)


def _streaming(layers: int = 2) -> sma.SequenceModel:
    attention = {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 4, "bidirectional": False}
    layer = {
        "backbone": {"kind": "ema", "bidirectional": False, "truncation": 3},
        "modules": {"attention": attention, "identity": {"kind": "identity"}},
        "norm": {"kind": "layer_norm"},
    }
    spec = {
        "kind": "sequence_encoder",
        "width": 8,
        "encoder": {"kind": "real_number"},
        "layers": {"repeat": layers, "layer": layer},
    }
    return sma.build(spec, seed=0)


def test_a_decision_shows_its_shape_names_and_rates():
    assert repr(_half()) == "Decision(B=2, L=50, rates={'attention': 0.5, 'mlp': 0.5}, dtype=float64, device='cpu')"


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (0, 0, 2)], ids=str)
def test_a_decision_without_tokens_has_rates_of_zero(shape):
    rates = "{'attention': 0, 'mlp': 0}"
    assert f"B={shape[0]}, L={shape[1]}, rates={rates}" in repr(_decision(torch.zeros(shape, dtype=torch.bool)))


def test_many_or_long_names_are_truncated():
    names = tuple(f"{place}{'x' * 500}" for place in range(100))
    text = repr(_decision(torch.zeros(1, 2, 100, dtype=torch.bool), names))
    assert "... 92 more" in text
    assert len(text) < 2000


def test_values_that_cannot_be_read_are_omitted(monkeypatch):
    decision, counts = _half(), count_rates([_half()])
    for move in (lambda tensor: tensor.to("meta"), FakeTensorMode().from_tensor):
        assert "B=2, L=50, names=['attention', 'mlp'], dtype=float64" in repr(tree_map(move, decision))
        assert repr(tree_map(move, counts)).startswith("RateCount(active=int64[1, 2], valid=int64[]")
    said: list[str] = []

    def each(active: Tensor) -> Tensor:
        said.append(repr(_decision(active)))
        return active

    torch.vmap(each)(torch.zeros(3, 2, 5, 2, dtype=torch.bool))
    assert said == ["Decision(B=2, L=5, names=['attention', 'mlp'], dtype=float64, device='cpu')"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "names=['attention', 'mlp']" in repr(decision)


def test_placeholders_of_a_tracer_are_shown_unchanged():
    assert "active=3" in repr(tree_map(lambda _: 3, _half()))
    assert "values=3" in repr(tree_map(lambda _: 3, rectangular(normal(2, 3, 4))))


def test_ragged_tokens_show_their_layout():
    x = normal(2, 5, 8)
    active = torch.tensor([[True] * 5, [True, False, True, False, False]])
    assert repr(compress(x, active)) == "Ragged(values=float64[7, 8], rows=2, packed, device='cpu')"
    assert (
        repr(rectangular(x, active.sum(1)))
        == "Ragged(values=float64[10, 8], rows=2, rectangular, stride=5, holes=True, device='cpu')"
    )
    assert repr(compress(x[:0], active[:0])).startswith("Ragged(values=float64[0, 8], rows=0, ")


def test_a_count_shows_the_rates_of_every_layer():
    counts = count_rates([_half(), _decision(_half().active[..., :1], ("conv",))])
    assert repr(counts) == "RateCount(rates=({'attention': 0.5, 'mlp': 0.5}, {'conv': 0.5}), valid=100)"


def test_every_output_and_state_is_one_short_line():
    model, x = _streaming(layers=40), torch.randn(3, 70)
    output = model(x, state=model.init_state(3))
    layer, hidden = model.layers[0], torch.randn(3, 70, 8)
    routed = layer.routed
    assert layer is not None
    found: list[Any] = [output, layer(hidden, state=layer.init_state(3)), routed(hidden, state=routed.init_state(3))]
    todo = [*found]
    while todo:  # with all nested states
        value = todo.pop()
        inner = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, tuple | list)
            else vars(value).values()
        )
        more = [
            part for part in inner if isinstance(part, dict | tuple | list) or (hasattr(part, "__dataclass_fields__"))
        ]
        todo += more
        found += [part for part in more if hasattr(part, "__dataclass_fields__")]
    assert {type(value).__name__ for value in found} > {
        "ModelOutput",
        "ModelState",
        "LayerState",
        "RoutedState",
        "EMAState",
        "Cache",
    }
    for value in found:
        text = repr(value)
        assert text.startswith(f"{type(value).__name__}(")
        assert "\n" not in text
        assert "tensor(" not in text
        assert len(text) < 400, text


def test_a_state_shows_dtype_and_shape_of_its_tensors():
    state = _streaming().init_state(3).layers[0]
    recent = "Cache(entries=(float32[3, 3, 8]), seen=int64[3], grows=False, device='cpu')"
    assert repr(state.backbone) == "EMAState(hidden=float32[3, 8, 16], recent=" + recent + ", device='cpu')"


@register_output
@dataclass(frozen=True)
class _Told(State):
    rows: Tensor

    def __repr__(self) -> str:
        return "told by its author"


def test_a_custom_repr_is_kept():
    assert repr(_Told(torch.zeros(2))) == "told by its author"


def test_modules_show_the_settings_of_their_specs():
    assert repr(SMARouterSpec(temperature_scale=0.3).build(8, ["attention"])) == (
        "SMARouter(names=['attention'], width=8, temperature_scale=0.3, gate='probability', initial_bias=0.0, "
        "control_conv=None)"
    )
    assert repr(LayerNormSpec(affine=False).build(8)) == "LayerNorm(width=8, place='pre', epsilon=1e-05, affine=False)"
    shown = repr(_streaming())
    for line in (
        "SequenceModel(\n  width=8, sinusoid=False, embedding_dropout=0.0, shared_router=False\n",
        "(encoder): RealNumber(width=8)",
        (
            "2 x RoutedLayer(\n"
            "      width=8, backbone_activation='silu', activation='silu', dropout=0.0, dropout_on='modules'\n"
        ),
        "(backbone): EMA(width=8, state_size=16, bidirectional=False, truncation=3)",
        "(bypass): LinearBypass(width=8)",
        "position=relative_bias(distance='true_distance', max_positions=1024)",
        "(identity): Identity(width=8)",
    ):
        assert line in shown


def test_a_third_party_module_without_a_spec_attribute_shows_its_settings():
    class _GainSpec(SubModuleSpec):
        kind: Literal["summary_gain"] = "summary_gain"
        gain: float = 2.0

        def build(self, width: int) -> SubModule:
            return _Gain(width)

        def num_parameters(self, width: int) -> int:
            return width

        def macs(self, width: int, tokens: int) -> MACs:
            return MACs()

    class _Gain(SubModule):
        causal = False

        def __init__(self, width: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(width))

        def forward(self, tokens: Ragged, state: State | None = None) -> tuple[Tensor, State | None]:
            self._continue(state, NoState, tokens)
            return tokens.values * self.gain, state

    try:
        part = register(_GainSpec)(gain=3.0).build(5)
        assert repr(part) == "_Gain(width=5, gain=3.0)"
        with pytest.raises(sma.errors.StateError, match=r"_Gain \(kind summary_gain, causal=False\) cannot continue"):
            part.init_state(2)
        assert repr(register(_GainSpec)().build(width=4)) == "_Gain(width=4, gain=2.0)"
    finally:
        sma.spec._registry["sub-module"].pop("summary_gain", None)
