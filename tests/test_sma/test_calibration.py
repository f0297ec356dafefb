"""Calibration of a trained model reaches the target rates, over all ranks, or warns."""

import copy
import itertools
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sma import load_spec
from sma.budget import BudgetController, BudgetSpec, module_costs, routers_of
from sma.calibration import calibrate
from sma.errors import InputError
from tests.cases import normal, spread
from tests.streams import exactly


def _model(router: dict, layers: int = 2, modules: int = 2):
    parts = {
        "mlp": {"kind": "gated_mlp", "hidden_size": 6},
        "conv": {"kind": "conv", "kernel_size": 3},
        "other": {"kind": "identity"},
    }
    layer = {
        "router": router,
        "modules": dict(list(parts.items())[:modules]),
        "norm": {"kind": "layer_norm"},
    }
    data = {
        "kind": "sequence_encoder",
        "width": 5,
        "encoder": {"kind": "linear", "features": 3},
        "layers": {"repeat": layers, "layer": layer},
    }
    return spread(load_spec(data).build().double())


class TestCalibrate:
    @pytest.mark.parametrize("kind", ["sma", "threshold", "gumbel"])
    @pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
    def test_it_reaches_the_rate_and_changes_only_score_biases(self, kind, rate):
        model = _model({"kind": kind}).train()
        kept, data = (
            copy.deepcopy(model.state_dict()),
            [(normal(3, 60, 3, seed=seed), normal(3, 60, seed=seed + 9) > -1) for seed in (1, 2)],
        )
        reached = calibrate(model, data, rate, tolerance=0.01)
        assert reached.rates.flatten().tolist() == pytest.approx([rate] * 4, abs=0.02)
        assert model.training
        changed = {
            name.rpartition(".")[2]
            for name, tensor in model.state_dict().items()
            if not torch.equal(tensor, kept[name])
        }
        assert changed == {"score_bias"}
        assert all(parameter.grad is None for parameter in model.parameters())
        with torch.no_grad():
            outputs = [model.eval()(inputs, valid) for inputs, valid in data]
        tokens = sum(int(valid.sum()) for _, valid in data)
        for layer, m in itertools.product(range(2), range(2)):
            active = sum(int(output.decisions[layer].active[..., m].sum()) for output in outputs)
            assert active / tokens == pytest.approx(float(reached.rates[layer, m]))

    def test_a_total_rate_is_weighted_by_macs(self):
        model, data = _model({"kind": "sma"}), [normal(3, 100, 3)]
        reached = calibrate(model, data, 0.3, over="total")
        costs = torch.tensor(module_costs(model.spec, 100), dtype=torch.float64)
        assert float((reached.rates * costs).sum() / costs.sum()) == pytest.approx(0.3, abs=0.02)

    def test_rates_by_name(self):
        model = _model({"kind": "sma"})
        reached = calibrate(model, [normal(3, 100, 3)], {"conv": 0.2})
        assert reached.rates[:, 1].tolist() == pytest.approx([0.2] * 2, abs=0.02)
        assert [router.score_bias.bool().tolist() for router in routers_of(model)] == [[False, True]] * 2

    def test_rates_by_layer(self):
        reached = calibrate(_model({"kind": "sma"}), [normal(3, 100, 3)], [{"conv": 0.2, "mlp": 0.6}, 0.4])
        assert reached.rates.tolist() == [pytest.approx([0.6, 0.2], abs=0.02), pytest.approx([0.4, 0.4], abs=0.02)]

    def test_data_that_can_be_iterated_over_only_once_is_refused(self):
        with pytest.raises(InputError, match="this can be iterated over only once: give a list of batches"):
            calibrate(_model({"kind": "sma"}), iter([normal(1, 4, 3)]), 0.5)

    def test_no_data_is_refused(self):
        with pytest.raises(InputError, match="calibrate got no batch; give it data for which the rates should hold"):
            calibrate(_model({"kind": "sma"}), [], 0.5)

    @pytest.mark.parametrize(
        ("router", "rates"),
        [
            pytest.param({"kind": "top_k"}, {"mlp": 0.5, "conv": 0.5}, id="top_k"),
            pytest.param({"kind": "top_k"}, {"mlp": 0.3}, id="top_k, one of them"),
            pytest.param({"kind": "top_k", "k": 2}, {"mlp": 0.9, "conv": 0.6, "other": 0.5}, id="top_k, 2 of 3"),
            pytest.param({"kind": "exclusive"}, {"mlp": 0.6, "conv": 0.3, "other": 0.1}, id="exclusive, no skips left"),
            pytest.param({"kind": "exclusive"}, {"mlp": 0.6, "conv": 0.1, "other": 0.1}, id="exclusive"),
        ],
    )
    def test_competing_sub_modules_reach_their_rates_together(self, router, rates):
        model = _model(router, modules=3 if "other" in rates else 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reached = calibrate(model, [normal(8, 100, 3)], rates, tolerance=0.01)
        for layer in reached.by_layer():
            assert {name: layer[name] for name in rates} == pytest.approx(rates, abs=0.01)

    def test_a_missed_target_gives_a_warning(self):
        same = torch.ones(2, 9, 3, dtype=torch.float64)  # equal tokens get equal decisions
        sentence = (
            "calibrate did not come within 0.005 of the target in 3 passes: 'mlp' of routed layer 0 runs at a rate of"
        )
        with pytest.warns(
            UserWarning,
            match=rf"^{sentence} (0|1)\.0000, the target is 0.4; give it more data or passes, or a rate that",
        ):
            calibrate(_model({"kind": "sma"}, layers=1), [same], {"mlp": 0.4}, passes=3)
        with pytest.warns(UserWarning, match=r"weighted by cost the rates sum to \d\.\d{4}, the target is 0.4"):
            calibrate(_model({"kind": "sma"}, layers=1), [same], 0.4, over="total", passes=3)

    def test_a_total_is_weighted_by_costs_at_the_mean_length_of_the_rows(self):
        model, data = (
            _model({"kind": "sma"}),
            [(normal(4, 90, 3), torch.arange(90) < torch.tensor([[90], [30], [30], [50]]))],
        )
        reached = calibrate(model, data, 0.3, over="total", tolerance=0.02)
        costs = torch.tensor(module_costs(model.spec, 50), dtype=torch.float64)
        assert float((reached.rates * costs).sum() / costs.sum()) == pytest.approx(0.3, abs=0.02)

    def test_parts_return_to_their_previous_mode(self):
        model = _model({"kind": "sma"}).train()
        model.encoder.eval()
        kept = {name: part.training for name, part in model.named_modules()}
        calibrate(model, [normal(2, 30, 3)], 0.5, tolerance=0.1)
        assert {name: part.training for name, part in model.named_modules()} == kept
        assert len(set(kept.values())) == 2

    @pytest.mark.parametrize(
        "data",
        [
            [normal(2, 0, 3)],
            [(normal(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool))],
            [normal(0, 4, 3), normal(3, 0, 3)],
        ],
    )
    def test_data_without_a_valid_token_is_refused(self, data):
        with pytest.raises(
            InputError,
            match=exactly("calibrate got no valid token, so there are no rates; give it data with valid tokens"),
        ):
            calibrate(_model({"kind": "sma"}), data, 0.5)

    @pytest.mark.parametrize(
        ("rate", "what"),
        [
            (True, "the rate True is a bool"),
            (torch.tensor(0.5), r"the rate tensor\(0.5000\) is a torch\.Tensor of shape \(\) and dtype torch\.float32"),
            ({"mlp": "0.5"}, "the rate '0.5' is a str"),
            ([0.5, None], "the rate None is None"),
        ],
    )
    def test_an_impossible_rate_is_refused(self, rate, what, as_users_run):
        with pytest.raises(
            InputError, match=f"^{what}; expected a number such as 0.3, one for every name, or a list of these for"
        ):
            calibrate(_model({"kind": "sma"}), [normal(1, 4, 3)], rate)

    @pytest.mark.parametrize(
        ("batch", "told"),
        [
            ({"x": normal(1, 4, 3), "valid": None}, "a mapping of ['x', 'valid']"),
            ((), "a tuple"),
            ("text", "a str"),
            (3, "an int"),
        ],
    )
    def test_a_batch_in_an_unsupported_form_is_refused(self, batch, told):
        wanted = (
            "inputs, a pair (inputs, valid), or an object with the attributes, "
            "or a mapping with the keys, inputs and valid"
        )
        with pytest.raises(InputError, match=exactly(f"a batch of calibrate is {told}; expected {wanted}")):
            calibrate(_model({"kind": "sma"}), [batch], 0.5)

    def test_every_form_of_a_batch_gives_the_same_rates(self):
        inputs, valid = normal(2, 40, 3), torch.arange(40).expand(2, 40) < 30
        forms = [
            (inputs, valid),
            [inputs, valid, "labels"],
            SimpleNamespace(inputs=inputs, valid=valid),
            inputs[:, :30],
            (inputs[:, :30],),
        ]
        forms += [{"inputs": inputs, "valid": valid, "labels": "any"}, {"inputs": inputs[:, :30]}]
        rates = [calibrate(_model({"kind": "sma"}), [form], 0.5).by_layer() for form in forms]
        assert all(rate == rates[0] for rate in rates)


class Own(nn.Module):
    """A third-party module that contains a model; its forward has another signature and return value."""

    def __init__(self, told: str) -> None:
        super().__init__()
        self.body, self.told = _model({"kind": "sma"}), told

    def forward(self, x: torch.Tensor) -> Any:
        output = self.body(x)
        return (
            output if self.told == "output" else {"logits": output.hidden} if self.told == "mapping" else output.hidden
        )


class TestThirdPartyModules:
    def test_one_that_returns_its_decisions_is_calibrated(self):
        own = Own("output")
        calibrate(own, [normal(4, 90, 3)], 0.3, tolerance=0.02)
        assert own.body(normal(4, 90, 3)).decisions[1].rate().tolist() == pytest.approx([0.3, 0.3], abs=0.02)

    @pytest.mark.parametrize(
        ("told", "came"), [("tensor", r"a torch\.Tensor of shape \(2, 9, 5\) and dtype .*"), ("mapping", "a dict")]
    )
    def test_one_that_returns_no_decisions_is_refused(self, told, came, as_users_run):
        required = (
            "expected an output with the attribute decisions, "
            "one for each of its 2 routed layers, as in sma.ModelOutput"
        )
        with pytest.raises(
            InputError,
            match=rf"^Own returned {came}, which has no decisions; {required}: .* the part model\.body alone",
        ):
            calibrate(Own(told), [normal(2, 9, 3)], 0.3)

    def test_one_that_takes_no_mask_is_refused(self):
        with pytest.raises(
            InputError,
            match=r"^the forward of Own takes no valid mask beside its inputs; give it one, or calibrate with",
        ):
            calibrate(Own("output"), [(normal(2, 9, 3), torch.ones(2, 9, dtype=torch.bool))], 0.3)

    def test_one_without_routers_is_refused(self):
        with pytest.raises(InputError, match=exactly("Linear has no routed layer, so there are no rates to calibrate")):
            calibrate(nn.Linear(3, 3), [normal(2, 9, 3)], 0.3)


@pytest.mark.parametrize(
    "targets",
    [torch.tensor([0, 1]), torch.zeros(2, 9, 1), torch.ones(2, dtype=torch.bool), torch.ones(9, 2, dtype=torch.bool)],
)
def test_targets_in_place_of_the_mask_are_refused(targets, as_users_run):
    mask = "The second of a pair is the mask of the valid tokens"
    cure = f"{mask}; targets are not needed: give [inputs for inputs, targets in data]"
    given = f"of shape {tuple(targets.shape)} and dtype {targets.dtype}"
    convert = "" if targets.dtype is torch.bool else ": convert with .bool()"
    required = f"expected a boolean tensor of shape (B = 2, L = 9){convert}"
    with pytest.raises(InputError, match=exactly(f"valid is {given}; {required}. {cure}")):
        calibrate(_model({"kind": "sma"}), [(normal(2, 9, 3), targets)], 0.5)
    with pytest.raises(
        InputError,
        match=r"^valid is of shape \(2, 9\) and dtype torch\.int64; .*: convert with \.bool\(\)\. The second",
    ):
        calibrate(_model({"kind": "sma"}), [(normal(2, 9, 3), torch.ones(2, 9, dtype=torch.int64))], 0.5)


class Once:
    """Data that is exhausted after one pass, although it can return a new iterator."""

    def __init__(self) -> None:
        self.batches = iter([normal(2, 30, 3), normal(2, 30, 3, seed=1)])

    def __iter__(self) -> Any:
        return (batch for batch in self.batches)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        pytest.param(Once(), "and its batches can be iterated over only once: give a list of them", id="exhausted"),
        pytest.param(
            normal(2, 9, 3),
            "is a torch.Tensor of shape (2, 9, 3) and dtype torch.float64; expected batches",
            id="tensor",
        ),
        pytest.param(
            normal(2, 9, 3).numpy(),
            "is a numpy.ndarray of shape (2, 9, 3) and dtype float64; expected batches",
            id="array",
        ),
        pytest.param({"inputs": normal(2, 9, 3)}, "is a dict; expected batches", id="mapping"),
        pytest.param(3, "is an int; expected batches, such as a list of them or a DataLoader", id="number"),
        pytest.param([], "got no batch; give it data for which the rates should hold", id="nothing"),
    ],
)
def test_data_that_is_not_a_list_of_batches_is_refused(data, problem, as_users_run):
    with pytest.raises(InputError, match=re.escape(problem)):
        calibrate(_model({"kind": "sma"}), data, 0.5, tolerance=0.0)


@pytest.mark.parametrize("settings", [{"passes": -1}, {"passes": 2.5}, {"tolerance": "0.1"}], ids=str)
def test_impossible_passes_and_tolerances_are_refused(settings, as_users_run):
    with pytest.raises(InputError, match=f"^{next(iter(settings))}"):
        calibrate(_model({"kind": "sma"}), [normal(2, 9, 3)], 0.5, **settings)


class Wrapped(nn.Module):
    """A wrapper similar to DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class TestCosts:
    @pytest.mark.parametrize(
        "wrap", [Wrapped, torch.compile, lambda model: Wrapped(torch.compile(model)), nn.DataParallel]
    )
    def test_costs_of_a_wrapped_model_are_those_of_the_model(self, wrap):
        model, spec = _model({"kind": "sma"}), BudgetSpec(target=0.3, over="total")
        wanted = [cost for layer in module_costs(model.spec, 1024) for cost in layer]
        assert len(set(wanted)) == 2
        assert [steered.cost for steered in BudgetController.of(wrap(model), spec).steered] == wanted

    def test_costs_of_a_model_without_a_spec_must_be_given(self):
        model = nn.Sequential(*_model({"kind": "sma"}).layers)
        with pytest.raises(
            InputError,
            match=r"^Sequential has no spec .* give the costs: BudgetController\(spec, routers_of\(model\), costs\)$",
        ):
            BudgetController.of(model, BudgetSpec(target=0.3, over="total"))
        assert len(BudgetController.of(model, BudgetSpec(target=0.3)).steered) == 4


def _batches(rank: int) -> list[torch.Tensor]:
    """Three batches for rank 0, one for rank 1, none for rank 2, with different tokens and lengths."""
    return [normal(2, 60 + 20 * rank, 3, seed=10 * rank + number) + rank for number in range((3, 1, 0)[rank])]


def _calibrate_by_rank(rank: int, folder: str, ranks: int, over: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    model = _model({"kind": "sma"})
    wrapped = nn.parallel.DistributedDataParallel(model) if over == "each" else model
    reached = calibrate(wrapped, _batches(rank), 0.3, over=over, tolerance=0.002)
    torch.save([reached.rates, *(router.score_bias for router in routers_of(model))], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("over", ["each", "total"])
def test_processes_with_different_numbers_of_batches_agree_with_one_process(tmp_path, over):
    torch.multiprocessing.start_processes(_calibrate_by_rank, (str(tmp_path), 3, over), nprocs=3, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    model = _model({"kind": "sma"})
    reached = calibrate(
        model, [batch for rank in range(3) for batch in _batches(rank)], 0.3, over=over, tolerance=0.002
    )
    for tensors in found:
        wanted = [reached.rates, *(router.score_bias for router in routers_of(model))]
        for one, other in zip(tensors, wanted, strict=True):
            assert torch.equal(one, other)
