"""An update of every tiny preset reads no values from the device, so a CUDA graph can capture it."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sma.recipes.experiment import ExperimentSpec, load_experiment
from sma.recipes.io.presets import shipped
from sma.recipes.tasks.batch import Batch
from sma.recipes.training.classification import Classifier
from sma.recipes.training.graph import Update, make_capturable
from sma.recipes.training.language import LanguageModule, Segment
from sma.recipes.training.module import ScoredModule
from tests.no_host import HostAskedError, NoHost

pytestmark = pytest.mark.slow  # real trainings

PRESETS = [name for name in shipped("presets") if name.endswith("_tiny")]
# More tokens than a histogram of a budget has bins, because these histograms are float64.
ROWS, LENGTH = 8, 8000


@pytest.fixture
def optimizer_on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make torch use capturable optimisers and deterministic algorithms on the meta device."""
    for name in ("torch.optim.adam", "torch.optim.radam"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["meta"])
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _module(spec: ExperimentSpec) -> ScoredModule:
    with torch.device("meta"):
        model: Any = spec.model.build()
        if spec.model.scores_positions:
            return LanguageModule(model, spec.training, carry_state=False).train()
        return Classifier(model, spec.training, spec.task.classes).train()  # type: ignore[attr-defined]


def _batch(module: ScoredModule) -> Any:
    model = module.model
    rows = ROWS * model.spec.rows_per_sample
    inputs = torch.zeros(rows, LENGTH, dtype=model.encoder.input_dtype, device="meta")
    valid = torch.ones(rows, LENGTH, dtype=torch.bool, device="meta")
    logits = model(inputs, valid, capacity=LENGTH).logits
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device="meta")
    return (
        Segment(inputs, targets, valid, True) if isinstance(module, LanguageModule) else Batch(inputs, valid, targets)
    )


@pytest.mark.usefixtures("optimizer_on_meta")
@pytest.mark.parametrize("preset", PRESETS)
def test_an_update_needs_no_values_on_the_host(preset: str) -> None:
    carried = ["task.carry_state=false"] if preset.startswith("language") else []
    spec = load_experiment(preset, ["training.graph=true", *carried])
    module, training = _module(spec), spec.training
    kind = torch.optim.RAdam if training.optimizer == "radam" else torch.optim.AdamW
    optimizer = kind(module._groups(), lr=training.learning_rate, foreach=True)
    make_capturable(optimizer)
    update, batch = Update(module.compute, optimizer, training.clip_norm), _batch(module)
    # Stochastic routers and the losses of their draws compute in float64 on purpose.
    wide = float("inf") if training.losses.policy else ROWS * LENGTH
    for number in (0, training.updates - 1):  # with the capacities of the first and of the last rate
        capacity = training.capacity_at(number, module.module_names)
        with warnings.catch_warnings(), NoHost(wide=wide) as host:
            warnings.simplefilter("ignore")  # there is no trainer to log to
            _, measures = update(batch, capacity)
            module.record(measures)
        assert host.calls > 100


@pytest.mark.usefixtures("optimizer_on_meta")
@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda module: module.check_unseen(), id="losses"),
        pytest.param(lambda module: module.fit_scores.compute("fit"), id="measures"),
        pytest.param(lambda module: module.overflow, id="overflow"),
    ],
)
def test_reading_results_needs_values_on_the_host(ask: Callable[[ScoredModule], Any]) -> None:
    module = _module(load_experiment("digits_tiny", ["training.graph=true"]))
    batch = _batch(module)
    with NoHost():
        module.record(module.compute(batch, {"attention": LENGTH})[1])
        with pytest.raises(HostAskedError, match=r"moves between|asks the host"):
            ask(module)
