"""Arguments of the wrong class: every public function refuses them with a sentence instead of a traceback."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sma
from sma.budget import BudgetController, BudgetSpec, routers_of
from sma.generation import draw
from sma.losses import policy_gradient_loss
from sma.model import ModelSpec
from sma.modules.identity import IdentitySpec
from sma.routers import SMARouterSpec
from sma.testing import check_model, check_router, check_submodule

pytestmark = pytest.mark.usefixtures("as_users_run")

SPEC = {
    "kind": "sequence_classifier",
    "width": 8,
    "encoder": {"kind": "token_embedding", "vocabulary": 16, "padding": 0},
    "layers": [
        {
            "norm": {"kind": "batch_norm"},
            "router": {"kind": "sma"},
            "modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 8}},
        }
    ],
    "head": {"kind": "mean_pool_mlp", "hidden": 8, "classes": 3},
}
WRONG = [None, 3, -1, 1.5, True, "x", b"x", [], [3], {}, {"a": 1}, object(), torch.ones(2), float("nan")]


def _model() -> sma.SequenceModel:
    return sma.build(SPEC, seed=0)


def _tokens() -> sma.Ragged:
    return sma.compress(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool))


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "build": (sma.build, lambda: {"spec": SPEC, "seed": 0}),
    "load_spec": (sma.load_spec, lambda: {"source": SPEC, "family": "model", "overrides": ()}),
    "SequenceModel": (sma.SequenceModel, lambda: {"spec": _model().spec}),
    "RoutedLayer": (sma.RoutedLayer, lambda: {"spec": _model().spec.layer_specs[0], "width": 8}),
    "BudgetController": (
        sma.BudgetController,
        lambda: {"spec": BudgetSpec(target=0.5), "routers": routers_of(_model()), "costs": [[1.0]]},
    ),
    "BudgetController.of": (sma.BudgetController.of, lambda: {"model": _model(), "spec": BudgetSpec(target=0.5)}),
    "Router": (sma.Router, lambda: {"names": ["a"]}),
    "register": (sma.register, lambda: {"spec_class": ModelSpec}),
    "calibrate": (
        sma.calibrate,
        lambda: {"model": _model(), "data": [torch.ones(2, 5, dtype=torch.int64)], "rate": 0.5},
    ),
    "update_statistics": (sma.update_statistics, lambda: {"model": _model(), "batches": []}),
    "collect_decisions": (
        lambda **given: sma.collect_decisions(**given).__enter__(),
        lambda: {"model": _model()},
    ),
    "retrofit": (sma.retrofit, lambda: {"model": torch.nn.Sequential(torch.nn.Linear(4, 4)), "targets": {"0": "sma"}}),
    "compress": (sma.compress, lambda: {"x_BLD": torch.ones(2, 3, 4), "active_BL": torch.ones(2, 3, dtype=torch.bool)}),
    "extract": (
        sma.extract,
        lambda: {"values": torch.ones(6, 4), "tokens": _tokens(), "like_BLD": torch.ones(2, 3, 4)},
    ),
    "save": (sma.save, lambda: {"model": _model(), "folder": "x"}),
    "load": (sma.load, lambda: {"folder": "x"}),
    "save_state": (sma.save_state, lambda: {"state": None, "path": "x"}),
    "load_state": (sma.load_state, lambda: {"path": "x", "like": None}),
    "save_decisions": (sma.save_decisions, lambda: {"decisions": (), "path": "x"}),
    "load_decisions": (sma.load_decisions, lambda: {"path": "x", "names": [["a"]]}),
    "SparseModularActivation": (
        sma.SparseModularActivation,
        lambda: {"router": "sma", "modules": {"a": sma.TokenWise(torch.nn.Linear(4, 4))}, "dropout": 0.0, "width": 4},
    ),
    "TokenWise": (sma.TokenWise, lambda: {"module": torch.nn.Linear(4, 4)}),
    "RowWise": (sma.RowWise, lambda: {"module": torch.nn.Linear(4, 4)}),
}
"""Public functions, each with valid arguments."""


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, (_, valid) in CALLS.items() for argument in valid()]
)
def test_wrong_classes_are_refused_with_a_sentence(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, valid = CALLS[name]
    refused = 0
    for wrong in WRONG:
        given = {**valid(), argument: wrong}
        try:  # some of these values are right for some arguments; any other error fails the test
            call(**given)
        except sma.SmaError:
            refused += 1
    assert refused >= 5, f"{name} accepts nearly any {argument}"


def test_values_that_do_not_belong_to_the_tokens_are_refused():
    tokens = _tokens()
    with pytest.raises(sma.SmaError, match=r"values of shape \(5, 4\) for 6 tokens"):
        sma.extract(torch.ones(5, 4), tokens, torch.ones(2, 3, 4))
    with pytest.raises(sma.SmaError, match=r"like_BLD has shape \(3, 2, 4\); expected \(B, L, …\) with B=2"):
        sma.extract(torch.ones(6, 4), tokens, torch.ones(3, 2, 4))


def test_overrides_are_a_mapping_or_a_list_of_settings():
    settings = {"width": 16, "layers[0].modules.mlp.hidden_size": 12}
    expected = sma.load_spec(SPEC, overrides=settings)
    assert (expected.width, expected.layer_specs[0].modules["mlp"].hidden_size) == (16, 12)
    assert sma.load_spec(SPEC, overrides=[f"{path}={value}" for path, value in settings.items()]) == expected


def test_budget_over_is_checked():
    losses = torch.zeros(2)
    with pytest.raises(sma.SmaError, match="budget_over='Total'; expected 'each', 'total', or None"):
        policy_gradient_loss(_model()(torch.ones(2, 5, dtype=torch.int64)).decisions, losses, budget_over="Total")


def test_losses_that_are_nan_stay_nan():
    decisions = _model()(torch.ones(2, 5, dtype=torch.int64)).decisions
    assert policy_gradient_loss(decisions, torch.full((2,), torch.nan)).isnan()


def test_a_set_is_not_a_list_of_targets():
    with pytest.raises(sma.SmaError, match="target"):
        BudgetSpec(target={0.9, 0.1, 0.5})
    assert BudgetSpec(target=[0.9, 0.1, 0.5]).target == (0.9, 0.1, 0.5)


def test_values_are_put_back_only_into_a_batch_of_the_compressed_shape():
    active = torch.zeros(2, 10, dtype=torch.bool)
    active[0, 3] = active[1, 4] = True
    tokens = sma.compress(torch.arange(20.0).reshape(2, 10, 1), active)
    for length in (2, 20):
        with pytest.raises(sma.SmaError, match=f"like_BLD has {length} positions per row"):
            sma.extract(tokens.values, tokens, torch.zeros(2, length, 1))
    with pytest.raises(sma.SmaError, match="would round the values"):
        sma.extract(tokens.values, tokens, torch.zeros(2, 10, 1, dtype=torch.int64))


def test_a_controller_in_half_precision_steers_as_before():
    biases = []
    for half in (False, True):
        model = _model()
        controller = BudgetController.of(model, BudgetSpec(target=0.25))
        holder = torch.nn.ModuleDict({"controller": controller})
        if half:
            holder.half()
        ids = torch.randint(1, 16, (80, 960), generator=torch.Generator().manual_seed(0))  # 76,800 tokens
        for _ in range(3):
            controller.update(model(ids).decisions)
        biases.append(routers_of(model)[0].score_bias.clone())
    assert torch.equal(*biases)


def test_only_states_are_saved(tmp_path):
    output = _model()(torch.ones(2, 5, dtype=torch.int64))
    for wrong in (output, torch.ones(2), {"a": torch.ones(2)}, output.decisions):
        with pytest.raises(sma.SmaError, match="expected a State"):
            sma.save_state(wrong, tmp_path / "state")
        with pytest.raises(sma.SmaError, match="expected a State"):
            sma.load_state(tmp_path / "state", wrong)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((10, 50), "the rate of 'mlp' is 50"),
        ((10, -1.0), "the rate of 'mlp' is -1.0"),
        ((-5,), "length=-5 must be at least 0"),
        ((10, {"attention": 0.5}), "there is no rate for 'mlp'"),
        ((10, [0.5, 0.5]), "the rate of 'mlp' is a list"),
    ],
)
def test_rates_of_predicted_macs_are_checked(arguments, complaint):
    with pytest.raises(sma.SmaError, match=complaint):
        _model().spec.macs(*arguments)


@pytest.mark.parametrize("temperature", [1e-320, 1e-30])
def test_a_tiny_temperature_draws_the_best_token(temperature):
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.0]])
    assert draw(logits, temperature=temperature).tolist() == [1, 0]
    with pytest.raises(sma.SmaError, match="contain NaN"):
        draw(logits * torch.nan, temperature=temperature)


def test_names_of_replayed_decisions_are_lists_by_layer(tmp_path):
    for names in ("mlp", ["attention", "mlp"], _model().routed_layers, None):
        with pytest.raises(sma.SmaError, match=r"expected a list of names for each routed layer"):
            sma.load_decisions(tmp_path / "decisions", names)


def test_decisions_without_gradients_are_warned_of(recwarn):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    sma.retrofit(model, {"0": "sma"})
    with torch.no_grad(), sma.collect_decisions(model), pytest.warns(UserWarning, match="without gradients"):
        model(torch.ones(1, 3, 4))
    with torch.no_grad(), sma.collect_decisions(model.eval()) as decisions:
        model(torch.ones(1, 3, 4))
    assert len(decisions) == 1


def test_the_batch_of_compress_has_rows_and_fits_into_memory():
    with pytest.raises(sma.SmaError, match=r"the batch has shape \(4,\); expected \(B, L, …\)"):
        sma.compress(torch.rand(4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(sma.SmaError, match="capacity=1000000000000000 needs"):
        sma.compress(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), capacity=10**15)


@pytest.mark.parametrize(
    ("check", "arguments", "complaint"),
    [
        (check_submodule, {"spec": sma.TokenWise(torch.nn.Linear(4, 4))}, "expected a SubModuleSpec, or a function"),
        (check_submodule, {"spec": IdentitySpec}, "expected a SubModuleSpec, or a function"),
        (check_submodule, {"spec": "identity"}, "check_submodule got a str"),
        (check_submodule, {"spec": IdentitySpec(), "width": -1}, "width=-1 must be at least 1"),
        (check_submodule, {"spec": IdentitySpec(), "effort": 0}, "effort=0 must be at least 1"),
        (check_router, {"spec": "sma"}, "check_router got a str"),
        (check_router, {"spec": SMARouterSpec(), "exempt": "no_law"}, "there is no law 'no_law'"),
        (check_model, {"spec": SPEC}, "expected a ModelSpec: write load_spec"),
    ],
)
def test_the_conformance_kit_refuses_what_it_cannot_check(check, arguments, complaint):
    with pytest.raises(sma.SmaError, match=complaint):
        check(**arguments)
