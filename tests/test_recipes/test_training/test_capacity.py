"""Trainings with a static capacity: its schedule, and the tokens that it leaves out."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from sma import build
from sma.budget import routers_of
from sma.capacity import PerBatch
from sma.errors import SpecError
from sma.recipes.tasks.contract import TaskData
from sma.recipes.training.classification import Classifier
from sma.recipes.training.measures import Overflow, overflow_of
from sma.recipes.training.module import TrainingModule
from tests.test_recipes.tiny import metrics_of, tiny, train


@pytest.mark.parametrize("capacity", [0.1, 0.2, 1.0])
def test_overflow_counts_the_active_tokens_beyond_the_capacity(data: TaskData, capacity: float) -> None:
    spec = tiny(training__capacity=capacity)
    model = build(spec.model, seed=0).eval()
    for router in routers_of(model):
        router.score_bias.fill_(0.01)  # activates more than half of the tokens
    batch = data.collate([data.train[number] for number in range(8)])
    limits = spec.training.capacity_at(0, [("attention",)] * 2)
    assert limits == {"attention": PerBatch(capacity)}
    output = model(batch.inputs, batch.valid, capacity=limits)
    left_out = 0
    for layer, decision in enumerate(output.decisions):
        kept = decision.active
        # The decisions of this router without a limit, after the limited decisions of the layers before it.
        replayed = [each.active for each in output.decisions[:layer]]
        own = model(
            batch.inputs, batch.valid, decisions=[*replayed, *[each.active for each in output.decisions[layer:]]]
        )
        logits = own.decisions[layer].logits
        for row in range(len(kept)):
            for position in range(kept.shape[1]):
                on = bool(batch.valid[row, position]) and bool(
                    logits[row, position, 0, 1] > logits[row, position, 0, 0]
                )
                left_out += on and not bool(kept[row, position, 0])
    found = overflow_of(output.decisions)
    assert found is not None
    assert int(found) == left_out
    assert (left_out > 0) == (capacity < 1)
    assert overflow_of(model(batch.inputs, batch.valid).decisions) is None


def test_overflow_of_a_run_is_the_sum_over_its_updates(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    original = Classifier.compute

    def compute(self: Classifier, batch: Any, capacity: Any) -> Any:
        loss, measures = original(self, batch, capacity)
        beyond = int(measures.overflow)
        seen.append((beyond, beyond + int(measures.rates.active.sum())))
        return loss, measures

    monkeypatch.setattr(Classifier, "compute", compute)
    spec = tiny(training__capacity=0.3, training__updates=23)
    summary = train(spec, tmp_path, data).summary
    total = Overflow(*(sum(column) for column in zip(*seen, strict=True)))
    assert len(seen) == 23
    assert 0 < total.share < 1
    assert summary["overflow"] == pytest.approx(total.share)
    lines = [line for (_, kind), line in metrics_of(tmp_path).items() if kind == "fit"]
    parts = [Overflow(*(sum(column) for column in zip(*seen[start : start + 10], strict=True))) for start in (0, 10)]
    assert [float(line["fit_overflow"]) for line in lines[:2]] == pytest.approx([part.share for part in parts])


def test_the_capacity_follows_the_budget() -> None:
    spec = tiny(training__budget="{target: 0.4, hold: 4, anneal: 10}", training__capacity=1.5)
    at = [
        cast(Any, spec.training.capacity_at(update, [("attention",)] * 2))["attention"].tokens for update in range(30)
    ]
    assert at[:5] == [1.0] * 5
    assert at[-1] == pytest.approx(0.6)
    assert len(set(at)) <= 9
    budget = cast(Any, spec.training.budget)
    assert all(share >= min(1.0, 1.5 * budget.scheduled(0.4, update)) - 1e-12 for update, share in enumerate(at))


def test_capacity_multiplies_the_budgeted_rate_or_one() -> None:
    layers = [("attention", "mlp"), ("attention",)]
    shares: Callable[..., Any] = lambda **settings: {  # noqa: E731
        name: each.tokens for name, each in cast(Any, tiny(**settings).training.capacity_at(20, layers)).items()
    }
    assert tiny().training.capacity_at(0, layers) is None
    assert shares(training__graph="true") == {"attention": 1.0, "mlp": 1.0}
    assert shares(training__capacity=0.5) == {"attention": 0.5, "mlp": 0.5}
    assert shares(training__capacity=2.0, training__budget="{target: {attention: 0.2}}") == {
        "attention": pytest.approx(0.4),
        "mlp": 1.0,
    }
    assert shares(training__capacity=2.0, training__budget="{target: [0.1, 0.3]}") == {
        "attention": pytest.approx(0.6),
        "mlp": pytest.approx(0.2),
    }
    assert shares(training__capacity=0.5, training__budget="{target: 0.2, over: total}") == {
        "attention": 0.5,
        "mlp": 0.5,
    }


@pytest.mark.parametrize(("capacity", "warned"), [(0.1, True), (1.0, False)])
def test_a_run_warns_of_many_skipped_tokens(
    data: TaskData, tmp_path: Path, caplog: pytest.LogCaptureFixture, capacity: float, warned: bool
) -> None:
    summary = train(tiny(training__capacity=capacity, training__updates=6), tmp_path, data).summary
    message = f"of the activated tokens were beyond training.capacity={capacity:g} and were skipped; raise it"
    assert any(message in record.message for record in caplog.records) == warned
    assert (summary["overflow"] > 0.01) == warned
    assert "overflow" not in train(tiny(training__updates=6), tmp_path / "ragged", data).summary


@pytest.mark.parametrize("setting", ["training__capacity", "training__graph"])
def test_a_training_module_without_capacity_support_is_refused(setting: str) -> None:
    spec = tiny(**{setting: "true" if setting.endswith("graph") else 0.5})
    message = "TrainingModule gives its model no capacity: derive it from ScoredModule, or leave training.capacity"
    with pytest.raises(SpecError, match=re.escape(message)):
        TrainingModule(build(spec.model), spec.training).check_capacity()
    TrainingModule(build(spec.model), tiny().training).check_capacity()
