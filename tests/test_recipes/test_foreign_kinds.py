"""Third-party kinds are handled like built-in ones: the properties of a spec decide, never its kind."""

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import sma.recipes.tasks.kinds  # registers the tasks
import sma.spec
from sma.budget import BudgetController
from sma.decision import Decision
from sma.describe import describe
from sma.encoders import Encoder, EncoderSpec
from sma.errors import InputError, SpecError
from sma.modules.gau import GAUSpec
from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.studies.baselines import BASELINES, baseline
from sma.recipes.studies.efficiency import random_rows
from sma.recipes.studies.variants import with_routers
from sma.recipes.training.callbacks import RouterHealth
from sma.recipes.training.classification import Classifier
from sma.routers import Router, RouterSpec, SMARouterSpec
from sma.spec import kinds, register
from sma.submodule import State


class EveryOtherSpec(RouterSpec):
    """Spec of a router of a fixed rate."""

    kind: Literal["every_other"] = "every_other"
    fixed_rate: ClassVar[bool] = True
    expected_rate: ClassVar[float] = 0.5

    def build(self, width: int, names: Sequence[str]) -> "EveryOther":
        return EveryOther(self, names)

    def num_parameters(self, width: int, modules: int) -> int:
        return 0


class EveryOther(Router):
    """Activate every sub-module at every other token."""

    def __init__(self, spec: EveryOtherSpec, names: Sequence[str]) -> None:
        super().__init__(names)
        self.spec = spec

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        rows, length = control.shape[:2]
        places = torch.arange(length).expand(rows, length) if positions is None else positions
        even = (places % 2 == 0)[..., None].expand(rows, length, len(self.names))
        p_on = torch.full(even.shape, 0.5)
        active = even if valid is None else even & valid[..., None]
        return Decision(active, torch.ones_like(p_on), torch.zeros(*even.shape, 2), p_on, self.names), state


class CoinSpec(RouterSpec):
    """Spec of a router that is stochastic if `draw` is true, and then learns only from a policy gradient."""

    kind: Literal["coin"] = "coin"
    draw: bool = True

    @property
    def stochastic(self) -> bool:
        return self.draw

    @property
    def needs_policy_gradient(self) -> bool:
        return self.draw

    def build(self, width: int, names: Sequence[str]) -> "Coin":
        return Coin(self, width, names)

    def num_parameters(self, width: int, modules: int) -> int:
        return width * modules


class Coin(Router):
    """Activate sub-modules with a learned probability."""

    def __init__(self, spec: CoinSpec, width: int, names: Sequence[str]) -> None:
        super().__init__(names)
        self.spec = spec
        self.stochastic = spec.draw
        self.weight = nn.Parameter(torch.randn(len(names), width))

    def forward(
        self, control: Tensor, valid: Any = None, positions: Any = None, state: Any = None
    ) -> tuple[Decision, State | None]:
        scores = control @ self.weight.T
        p_on = torch.sigmoid(scores)
        active = p_on > (torch.rand_like(p_on) if self.training and self.stochastic else 0.5)
        active = active if valid is None else active & valid[..., None]
        logits = torch.stack([torch.zeros_like(scores), scores], -1)
        return Decision(active, torch.ones_like(p_on), logits, p_on, self.names), state


class DecibelSpec(EncoderSpec):
    """Spec of an encoder of numbers."""

    kind: Literal["decibel"] = "decibel"
    reads: ClassVar[Literal["numbers"]] = "numbers"

    def build(self, width: int) -> "Decibel":
        return Decibel(width)

    def num_parameters(self, width: int) -> int:
        return width


class Decibel(Encoder):
    """The logarithm of numbers above 0, times a vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def random_inputs(self, rows: int, length: int) -> Tensor:
        return torch.rand(rows, length) + 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.log()[..., None] * self.weight


class SpectrumSpec(DecibelSpec):
    """Spec of an encoder of vectors."""

    kind: Literal["spectrum"] = "spectrum"  # type: ignore[assignment]
    reads: ClassVar[Literal["vectors"]] = "vectors"  # type: ignore[assignment]


class GatedAttentionSpec(GAUSpec):
    """Spec of a windowed attention of another kind than `gau`."""

    kind: Literal["gated_attention"] = "gated_attention"  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds("model")
    known = {family: dict(members) for family, members in sma.spec._registry.items()}
    monkeypatch.setattr(sma.spec, "_registry", known)
    for spec in (EveryOtherSpec, CoinSpec, DecibelSpec, SpectrumSpec, GatedAttentionSpec):
        register(spec)


def _experiment(**settings: Any) -> ExperimentSpec:
    set_by = {f"{path.replace('__', '.')}={value}" for path, value in settings.items()}
    return load_experiment("digits_tiny", ["layers.repeat=2", "layers.layer.dropout=0", *sorted(set_by)])


def _warnings(routers: Sequence[RouterSpec], caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings about routers that run no token."""
    metrics = {f"val_rate/layer{layer}/attention": torch.tensor(0.0) for layer in range(len(routers))}
    trainer: Any = SimpleNamespace(callback_metrics=metrics, global_step=9)
    with caplog.at_level(logging.WARNING, logger="sma.recipes"):
        RouterHealth(routers).on_validation_end(trainer, None)  # type: ignore[arg-type]
    return [record.getMessage() for record in caplog.records]


def test_describe_counts_a_fixed_rate_instead_of_the_given_one() -> None:
    model = _experiment(layers__layer__router="{kind: every_other}").model
    own, asked = describe(model, rate=0.5), describe(model, rate=0.1)
    assert "every_other (rate 0.5)" in asked.as_text()
    assert "(routers whose rate is shown: on that share)" in asked.as_text()
    assert own.total.macs == asked.total.macs
    free = describe(_experiment(layers__layer__router="{kind: coin, draw: false}").model)
    assert "whose rate is shown" not in free.as_text()


def test_routers_with_a_fixed_rate_cause_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    sentences = _warnings([EveryOtherSpec(), CoinSpec()], caplog)
    assert [sentence.split(" is ")[0] for sentence in sentences] == ["warning: the router of 'attention' in layer 1"]


def test_budget_does_not_steer_a_fixed_rate() -> None:
    steered = _experiment(training__budget="{target: 0.3}", training__losses="{z: 0.1}")
    fixed = with_routers(steered, EveryOtherSpec())
    assert fixed.training.budget is None
    assert fixed.training.losses.z == 0
    mixed = with_routers(steered, [SMARouterSpec(), EveryOtherSpec()])
    assert (mixed.training.budget, mixed.training.losses.z) == (steered.training.budget, 0.1)
    with pytest.raises(InputError, match="the router kind 'every_other' cannot be steered to a rate; use one that can"):
        BudgetController.of(fixed.model.build(), steered.training.budget)  # type: ignore[arg-type]


def test_router_that_needs_a_policy_gradient_gets_one() -> None:
    with pytest.raises(SpecError, match=r"training\.losses\.policy=0 leaves the router kind 'coin' without a gradient"):
        _experiment(layers__layer__router="{kind: coin}")
    assert with_routers(_experiment(), CoinSpec()).training.losses.policy == 1.0
    spec = _experiment(layers__layer__router="{kind: coin}", training__losses="{policy: 0.5}")
    assert with_routers(spec, CoinSpec()).training.losses.policy == 0.5


def test_fields_of_a_spec_decide_whether_it_is_stochastic() -> None:
    with pytest.raises(SpecError, match=r"policy=0\.5 needs a stochastic router, and the model's are: 'coin'"):
        _experiment(layers__layer__router="{kind: coin, draw: false}", training__losses="{policy: 0.5}")
    spec = _experiment(layers__layer__router="{kind: coin}", training__losses="{policy: 0.5}")
    assert with_routers(spec, CoinSpec(draw=False)).training.losses.policy == 0
    assert _experiment(layers__layer__router="{kind: coin, draw: false}").training.losses.policy == 0


def test_policy_gradient_reaches_a_stochastic_router() -> None:
    spec = _experiment(layers__layer__router="{kind: coin}", training__losses="{policy: 1.0}")
    learner = Classifier(spec.model.build(), spec.training, 10)
    decisions = learner.model(torch.randn(4, 64)).decisions
    torch.as_tensor(learner.routing_loss(decisions, None, torch.arange(4.0))).backward()
    routers = [part for part in learner.modules() if isinstance(part, Coin)]
    assert len(routers) == 2
    assert all(router.weight.grad is not None and router.weight.grad.any() for router in routers)


def test_encoder_is_accepted_by_the_tasks_whose_inputs_it_reads() -> None:
    spec = _experiment(encoder="{kind: decibel}")
    assert isinstance(spec.model.encoder, DecibelSpec)
    with pytest.raises(SpecError, match=r"encoder\.kind='spectrum' does not read grey values; use kind 'real_number'"):
        _experiment(encoder="{kind: spectrum}")


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_accept_any_attention_that_works_without_a_window_and_in_chunks(name: str) -> None:
    ours = _experiment()
    theirs = _experiment(layers__layer__modules__attention__kind="gated_attention")
    made = baseline(name, theirs).model
    assert made.num_parameters() == baseline(name, ours).model.num_parameters()
    if name in ("seqboat", "seqboat_full"):
        assert {part.kind for layer in made.layer_specs for part in layer.modules.values()} == {"gated_attention"}


def test_random_rows_suit_the_encoder() -> None:
    rows = random_rows(_experiment(encoder="{kind: decibel}").model.build(), 2, 9)
    assert rows.shape == (2, 9)
    assert (rows >= 1).all()


def test_language_model_refuses_an_encoder_that_does_not_score_tokens() -> None:
    with pytest.raises(SpecError, match="the encoder kind 'decibel' does not score tokens"):
        sma.load_spec({"kind": "language_model", "width": 4, "encoder": {"kind": "decibel"}, "layers": []})
