"""A training step with a capacity never synchronises with the host, so it could be captured in a CUDA graph."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sma import build
from sma.budget import BudgetController, BudgetSpec
from sma.losses import budget_loss, load_balance_loss, z_loss
from sma.model import ModelSpec
from sma.recipes.experiment import load_experiment
from sma.spec import kinds, load_spec
from tests.no_host import HostAskedError, NoHost

# More tokens than bins in the histograms of a budget, which are float64.
ROWS, LENGTH = 3, 8000
PRESETS = ["text_paper", "image_paper", "listops_paper", "language_paper", "speech_paper"]


def _x() -> Tensor:
    return torch.zeros(4, 5, device="meta")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        pytest.param(lambda x: x.sum().item(), "_local_scalar_dense asks the host", id="item"),
        pytest.param(lambda x: bool((x > 0).any()), "_local_scalar_dense asks the host", id="bool"),
        pytest.param(lambda x: (x > 0).nonzero(), "nonzero asks the host", id="nonzero"),
        pytest.param(lambda x: x[0].tolist(), "_to_copy moves between", id="tolist"),
        pytest.param(lambda x: x.cpu(), "_to_copy moves between", id="cpu"),
        pytest.param(lambda x: x + torch.tensor(2.0, device="meta"), "^tensor copies numbers", id="tensor"),
        pytest.param(lambda x: x.new_tensor([1.0, 2.0]), "^new_tensor copies numbers", id="new_tensor"),
        pytest.param(lambda x: x + torch.zeros(5), "zeros makes a tensor of the host", id="zeros"),
        pytest.param(lambda x: x.double(), r"_to_copy computes \(4, 5\) in float64", id="float64"),
        pytest.param(lambda x: x.cumsum(0), "cumsum is not deterministic on CUDA", id="cumsum"),
    ],
)
def test_a_program_that_needs_the_host_is_detected(program: Callable[[Tensor], Any], message: str) -> None:
    x = _x()
    with pytest.raises(HostAskedError, match=message), NoHost(wide=20):
        program(x)


def test_a_program_without_the_host_passes() -> None:
    x = _x().requires_grad_()
    with NoHost(wide=20) as host:
        (x * 2).cos().sum().backward()
        (x > 0).cumsum(0)
        x[:, :1].double()
    assert host.calls > 5


def _meta(spec: ModelSpec) -> Any:
    with torch.device("meta"):
        return build(spec).train()


def _step(model: Any, capacity: Any, controller: BudgetController, optimizer: torch.optim.Optimizer) -> None:
    spec = model.spec
    dtype = torch.int64 if spec.encoder.reads == "tokens" else torch.float32
    inputs = torch.empty(ROWS, LENGTH, dtype=dtype, device="meta")
    valid = torch.empty(ROWS, LENGTH, dtype=torch.bool, device="meta")
    with NoHost(wide=ROWS * LENGTH):
        output = model(inputs, valid, capacity=capacity)
        scores = output.logits.flatten(0, -2)
        targets = torch.zeros(scores.shape[0], dtype=torch.int64, device="meta")
        loss = torch.nn.functional.cross_entropy(scores, targets)
        decisions = output.decisions
        loss = (
            loss + load_balance_loss(decisions, valid) + z_loss(decisions, valid) + budget_loss(decisions, 0.3, valid)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        controller.update(decisions, valid)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def optimizer_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch accept capturable optimisers, as in a CUDA graph, on the meta device."""
    for name in ("torch.optim.adam", "torch.optim.radam"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["meta"])


@pytest.mark.usefixtures("optimizer_on_meta")
@pytest.mark.parametrize("capacity", [0.4, 50])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_with_a_capacity_never_synchronises_with_the_host(preset: str, capacity: Any) -> None:
    model = _meta(load_experiment(preset, ["layers.repeat=2"]).model)
    spec = BudgetSpec(target=0.3, start=0.9, hold=5, anneal=10, exploration=0.1, until=100)
    controller = BudgetController.of(model, spec).to("meta")
    kind = torch.optim.RAdam if preset == "language_paper" else torch.optim.AdamW
    optimizer = kind(model.parameters(), foreach=True, capturable=True)
    for group in optimizer.param_groups:
        group["lr"] = torch.empty((), device="meta")
    for _ in range(2):  # the first step creates the state of the optimiser
        _step(model, capacity, controller, optimizer)


NEEDED: dict[str, dict[str, Any]] = {"random": {"rate": 0.3}, "expert_choice": {"share": 0.3}}


@pytest.mark.parametrize("kind", kinds("router"))
def test_no_router_synchronises_with_the_host(kind: str) -> None:
    spec: Any = load_spec({"kind": kind, **NEEDED.get(kind, {})}, "router")
    with torch.device("meta"):
        router = spec.build(16, ["a", "b"]).train()
    control = torch.empty(ROWS, 40, 16, device="meta", requires_grad=True)
    valid = torch.empty(ROWS, 40, dtype=torch.bool, device="meta")
    with NoHost() as host:
        decision, _ = router(control, valid)
        if decision.confidence.requires_grad:
            decision.confidence.sum().backward()
    assert host.calls
