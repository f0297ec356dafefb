"""Speed and memory of a finished run: on random rows, at the rates of its test."""

import pytest
import torch

from sma.errors import CheckpointError
from sma.recipes.experiment import load_experiment
from sma.recipes.studies.efficiency import _set_rates, efficiency, random_rows
from tests.test_recipes.tiny import tiny


def test_efficiency_of_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no finished run in"):
        efficiency(tmp_path, 16)


def test_missing_gpu_gives_an_error_message(tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        CheckpointError, match="requires cuda, and torch finds no GPU here; measure it on a machine with a GPU"
    ):
        efficiency(tmp_path, 16, device="cuda")


MIXED = "{gau: {kind: gau, query_size: 4, hidden_size: 8}, mlp: {kind: gated_mlp, hidden_size: 8}, conv: {kind: conv}}"


@pytest.mark.parametrize(
    ("router", "asked"),
    [
        pytest.param("sma", (0.5, 0.2, 0.0), id="sma"),
        pytest.param("sma", (1.0, 0.0, 0.0), id="all-and-none"),
        pytest.param("gumbel", (0.3, 1.0, 0.0), id="gumbel"),
        pytest.param("exclusive", (0.5, 0.3, 0.1), id="exclusive"),
        pytest.param("exclusive", (1.0, 0.0, 0.0), id="exclusive-one"),
        pytest.param("exclusive", (0.0, 0.0, 0.0), id="exclusive-none"),
        pytest.param("top_k", (0.5, 0.3, 0.2), id="top-k"),
        pytest.param("always", (1.0, 1.0, 1.0), id="always"),
        pytest.param("never", (0.0, 0.0, 0.0), id="never"),
        pytest.param("expert_choice, share: 0.5", (0.5, 0.5, 0.5), id="expert-choice"),
    ],
)
def test_model_is_measured_at_the_rates_of_its_test(router, asked):
    spec = tiny(layers__layer__modules=MIXED, layers__layer__router=f"{{kind: {router}}}")
    model = spec.model.build().eval()
    inputs = random_rows(model, 1, 1024)
    _set_rates(model, inputs, [dict(zip(("gau", "mlp", "conv"), asked, strict=True))] * 2)
    for decision in model(inputs).decisions:
        assert decision.active[0].double().mean(0).tolist() == pytest.approx(asked, abs=0.02)


@pytest.mark.parametrize("preset", ["listops_tiny", "image_paper", "retrieval_paper"])
def test_random_rows_fit_the_model(preset):
    model = load_experiment(preset, ["layers.repeat=1"]).model.build()
    rows = random_rows(model, 1, 32)
    assert model(rows).logits.shape[0] == 1


def test_model_without_routing_has_no_rates_to_set():
    model = tiny(layers__layer__modules="{}").model.build().eval()
    _set_rates(model, random_rows(model, 1, 16), [])
