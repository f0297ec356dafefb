"""Running statistics of batch norms: means over batches of valid tokens, the tools of torch, and replaced norms."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import sma
from sma.errors import InputError
from tests.cases import normal

WIDTH = 3
LAYER = {
    "modules": {"mlp": {"kind": "gated_mlp", "hidden_size": 4}},
    "norm": {"kind": "batch_norm", "momentum": 0.3},
    "dropout": 0.5,
}
SPEC: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": WIDTH,
    "encoder": {"kind": "linear", "features": 2},
    "layers": [LAYER, LAYER],
    "head": {"kind": "mean_pool_linear", "classes": 2},
}


class Pair(NamedTuple):
    """A batch as a named tuple."""

    inputs: Tensor
    valid: Tensor


def _model(**changes: Any) -> sma.SequenceModel:
    model = sma.build({**SPEC, **changes}, seed=0).double()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer += 7
    return model


def _batches() -> list[Pair]:
    """Batches of different sizes, with garbage at padding."""
    lengths = [[4, 1], [2, 2], [5, 5]]
    found = []
    for number, rows in enumerate(lengths):
        valid = torch.arange(5) < torch.tensor(rows)[:, None]
        found.append(Pair(normal(2, 5, 2, seed=number).masked_fill(~valid[..., None], 1e3), valid))
    return found


def _statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


def _first_by_hand(model: sma.SequenceModel, batches: list[Pair]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the first norm's tokens, averaged over the batches."""
    tokens = [model.encoder(inputs)[valid] for inputs, valid in batches]
    return torch.stack([each.mean(0) for each in tokens]).mean(0), torch.stack([each.var(0) for each in tokens]).mean(0)


FORMS = {
    "pairs": lambda batch: (batch.inputs, batch.valid),
    "lists": lambda batch: [batch.inputs, batch.valid],
    "mappings": lambda batch: {"valid": batch.valid, "inputs": batch.inputs},
    "objects": lambda batch: batch,
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_means_over_batches_of_the_statistics_of_valid_tokens(form, training):
    model, batches = _model().train(training), _batches()
    model.head.train(not training)
    modes = [part.training for part in model.modules()]
    assert sma.update_statistics(model, (FORMS[form](batch) for batch in batches)) == 3  # with the norm before the head
    for found, wanted in zip(_statistics(model)[:2], _first_by_hand(model, batches), strict=True):
        torch.testing.assert_close(found, wanted)
    assert [part.training for part in model.modules()] == modes
    assert [layer.norm.momentum for layer in model.layers] == [0.3, 0.3]
    again = copy.deepcopy(model)
    sma.update_statistics(again, batches)  # no dropout, and earlier statistics are discarded
    assert all(torch.equal(one, other) for one, other in zip(_statistics(again), _statistics(model), strict=True))


def test_without_padding_update_bn_of_torch_gives_the_same_statistics():
    spec = {"layers": [{**LAYER, "dropout": 0.0}] * 2}
    ours, theirs, batches = _model(**spec), _model(**spec), [normal(2, 5, 2, seed=seed) for seed in range(3)]
    sma.update_statistics(ours, batches)
    update_bn([(batch, torch.zeros(2)) for batch in batches], theirs)
    torch.testing.assert_close(_statistics(theirs), _statistics(ours))
    assert theirs.layers[0].norm.momentum == 0.3


def test_averaged_weights_get_separate_statistics():
    model, batches = _model(), _batches()
    averaged = AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    averaged.update_parameters(model)
    assert sma.update_statistics(averaged, batches) == 3
    for found, wanted in zip(_statistics(averaged)[:2], _first_by_hand(averaged.module, batches), strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.equal(_statistics(model)[0], _statistics(averaged)[0])


def test_a_model_without_batch_norm_is_not_run():
    model = _model(layers=[{**LAYER, "norm": {"kind": "layer_norm"}}])
    assert sma.update_statistics(model, iter(["nothing that could be run"])) == 0


def test_checkpoints_hold_no_counter_of_batches():
    model = _model()
    assert {name.rpartition(".")[2] for name in model.state_dict() if ".norm." in name} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
    }
    assert not model.load_state_dict(dict(model.state_dict())).unexpected_keys


NAN = torch.full((2, 5, 2), torch.nan, dtype=torch.float64)
ONE = torch.arange(5) < torch.tensor([[1], [0]])
WRONG: dict[str, tuple[Any, str]] = {
    "none": ([], "update_statistics got no batch"),
    "targets": ([(NAN, torch.zeros(2))], "The second of a pair is the mask of the valid tokens"),
    "words": (["abc"], "a batch of update_statistics is a str"),
    "tensor": (NAN, "the data of update_statistics is a torch.Tensor of shape .*; expected batches"),
    "other names": (
        [{"inputs": NAN, "labels": NAN}],
        r"the forward of SequenceModel cannot be called with \['inputs', 'labels'\]",
    ),
    "too few tokens": (
        [(normal(2, 5, 2), ONE)],
        "the batch norm 'layers.0.norm' got no batch with at least two valid tokens",
    ),
    "not finite": ([normal(2, 5, 2), NAN], "the batch norm 'layers.0.norm' got values that are not finite"),
    "other shape": ([normal(2, 5, 2), normal(2, 5)], "features are of shape"),
}


@pytest.mark.parametrize(("batches", "complaint"), list(WRONG.values()), ids=list(WRONG))
def test_a_failure_is_named_and_leaves_the_statistics_as_they_were(batches, complaint):
    model = _model().train()
    before = _statistics(model)
    with pytest.raises(InputError, match=complaint):
        sma.update_statistics(model, batches)
    assert all(torch.equal(one, other) for one, other in zip(_statistics(model), before, strict=True))
    assert all(part.training for part in model.modules())
    assert model.layers[0].norm.momentum == 0.3


def test_a_rank_with_fewer_batches_than_the_others_is_refused(monkeypatch):
    # Two ranks; the other one has one batch more.
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        distributed, "all_reduce", lambda tensor: tensor.add_(1) if tensor.dtype is torch.int64 else tensor.mul_(2)
    )
    with pytest.raises(InputError, match="different numbers of batches on the ranks; give every rank the same number"):
        sma.update_statistics(_model(), _batches())


@pytest.mark.parametrize(
    ("norm", "cure"),
    [
        pytest.param(nn.SyncBatchNorm(WIDTH), r"synchronized: true", id="SyncBatchNorm"),
        pytest.param(nn.BatchNorm1d(WIDTH), r"synchronized: true", id="BatchNorm1d"),
        pytest.param(nn.LayerNorm(WIDTH), r"a subclass of sma\.norms\.Norm, or None", id="LayerNorm"),
        pytest.param(nn.Identity(), r"or None", id="Identity"),
    ],
)
@pytest.mark.parametrize("place", ["norm", "final_norm"])
def test_a_norm_of_torch_in_place_of_ours_is_refused(norm, cure, place):
    model = _model().float().eval()
    setattr(model.layers[0] if place == "norm" else model, place, norm)
    with pytest.raises(InputError, match=rf"'{place}' is torch's {type(norm).__name__}, which takes no mask.*{cure}"):
        model(torch.zeros(1, 3, 2))
    with pytest.raises(InputError, match=rf"'{place}' is torch's {type(norm).__name__}"):
        model.init_state(2)


def test_torch_fuses_a_linear_map_with_our_batch_norm():
    model, x = _model().eval(), normal(2, 5, 2)
    with torch.no_grad():
        fused = nn.utils.fusion.fuse_linear_bn_eval(model.encoder.linear, model.layers[0].norm)
    torch.testing.assert_close(fused(x), model.layers[0].norm(model.encoder(x)))


def test_functional_calls_and_parametrisations_work_on_every_part():
    model, x = _model().eval(), normal(2, 5, 2)
    other = {name: 2 * parameter for name, parameter in model.named_parameters()}
    wanted = copy.deepcopy(model)
    wanted.load_state_dict({**wanted.state_dict(), **other})
    torch.testing.assert_close(torch.func.functional_call(model, other, (x,)).logits, wanted(x).logits)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for part in list(model.modules()):
        for name, _ in list(part.named_parameters(recurse=False)):
            nn.utils.parametrize.register_parametrization(part, name, Double())
    torch.testing.assert_close(model(x).logits, wanted(x).logits)


def test_a_model_after_convert_sync_batchnorm_is_refused():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(_model().float())
    with pytest.raises(InputError, match=r"'norm' is torch's SyncBatchNorm.*batch_norm, synchronized: true"):
        model(torch.zeros(1, 3, 2))


def test_without_running_statistics_evaluation_uses_those_of_the_batch():
    model, x = _model(layers=[{**LAYER, "dropout": 0.0}]), normal(2, 5, 2)
    wanted = model.train()(x).logits
    torch.func.replace_all_batch_norm_modules_(model)
    torch.testing.assert_close(model.eval()(x).logits, wanted)
