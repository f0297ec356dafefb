"""Replayed decisions: the recorded selection with current scores and confidences."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sma
from sma.decision import Decision
from sma.errors import CheckpointError, InputError
from sma.routers import Router, SMARouter
from sma.spec import kinds
from tests.cases import balance, generator, gradients, normal, pad, sides, spread
from tests.test_sma.layers import LAYERS, WIDTH, layers, make

MODEL: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": WIDTH,
    "encoder": {"kind": "linear", "features": 2},
    "sinusoid": True,
    "layers": [LAYERS["several modules"], LAYERS["no modules"], LAYERS["seqboat"], LAYERS["always"]],
    "head": {"kind": "mean_pool_linear", "classes": 3},
}
SETTINGS = {"random": {"rate": 0.4}, "top_k": {"k": 2}, "expert_choice": {"share": 0.3}}
ROUTERS = [{"kind": kind, **SETTINGS.get(kind, {})} for kind in kinds("router")]


def model_of(spec: dict[str, Any] = MODEL) -> sma.SequenceModel:
    """A model whose routers have rates between 0 and 1."""
    model = sma.build(spec, seed=0).double().eval()
    spread(model)
    for layer, decision in zip(
        [layer for layer in model.routed_layers if layer.routed is not None],
        model(normal(3, 9, 2, seed=1)).decisions,
        strict=True,
    ):
        if isinstance(layer.routed.router, SMARouter):
            balance(layer.routed.router, decision)
    return model


def result_of(output: Any) -> Tensor:
    return torch.cat([output.logits.flatten(), output.hidden.flatten()])


def assert_same(model: nn.Module, one: Any, other: Any) -> None:
    """Assert bit-equal outputs and gradients."""
    assert torch.equal(result_of(one), result_of(other))
    for a, b in zip(
        gradients(result_of(one), model.parameters()), gradients(result_of(other), model.parameters()), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS, ids=[router["kind"] for router in ROUTERS])
def test_own_decisions_reproduce_outputs_and_gradients(router, training):
    layer = {**LAYERS["several modules"], "router": router}
    model = model_of({**MODEL, "layers": {"repeat": 2, "layer": layer}}).train(training)
    inputs, valid = normal(3, 9, 2), torch.rand(3, 9, generator=generator(1)) < 0.8
    output = model(inputs, valid)
    assert_same(model, model(inputs, valid, decisions=output.decisions), output)
    masks = [decision.active for decision in output.decisions]
    assert_same(model, model(inputs, valid, decisions=masks), output)


@pytest.mark.parametrize("capacity", [2, 0.5])
def test_own_decisions_reproduce_the_result_under_a_capacity(capacity):
    model, inputs = model_of(), normal(3, 9, 2)
    output = model(inputs, capacity=capacity)
    again = model(inputs, capacity=capacity, decisions=output.decisions)
    assert_same(model, again, output)
    assert not any(decision.overflow.any() for decision in again.decisions)


@sides
def test_padding_may_be_on_another_side(side):
    model, rows = model_of(), [normal(length, 2, seed=length) for length in (5, 0, 7)]
    inputs, valid = pad(rows, "right")
    selected = [torch.rand(3, 9, len(d.names), generator=generator(2)) < 0.5 for d in model(inputs, valid).decisions]
    wanted = model(inputs, valid, decisions=selected)
    moved, there = pad(rows, side)
    masks = [torch.zeros(3, 9, mask.shape[2], dtype=torch.bool) for mask in selected]
    for mask, right in zip(masks, selected, strict=True):
        mask[there] = right[valid]
    found = model(moved, there, decisions=masks)
    torch.testing.assert_close(found.hidden[there], wanted.hidden[valid])
    for one, other in zip(found.decisions, wanted.decisions, strict=True):
        assert torch.equal(one.active[there], other.active[valid])


def test_padding_is_never_active():
    model, inputs = model_of(), normal(3, 9, 2)
    valid = torch.rand(3, 9, generator=generator(1)) < 0.7
    everything = [torch.ones_like(decision.active) for decision in model(inputs, valid).decisions]
    for decision in model(inputs, valid, decisions=everything).decisions:
        assert torch.equal(decision.active, valid[..., None].expand_as(decision.active))


@layers
def test_sub_modules_are_weighted_by_the_probability_of_the_choice(name):
    """Compare with a reference router that makes the choice token by token."""
    if "modules" not in LAYERS[name]:
        pytest.skip("nothing is routed")
    layer, x = make(name), normal(3, 7, WIDTH)
    selected = torch.rand(3, 7, len(layer.routed_names), generator=generator(3)) < 0.5

    class Oracle(Router):
        def forward(self, control_BLD, valid=None, positions=None, state=None):
            decision = layer.routed.router(control_BLD, valid, positions)[0]
            confidence = torch.ones_like(decision.confidence)
            if isinstance(layer.routed.router, SMARouter):
                for b, t, m in torch.cartesian_prod(*map(torch.arange, selected.shape)).tolist():
                    off, on = decision.logits[b, t, m]
                    confidence[b, t, m] = 1 / (1 + ((off - on) / layer.routed.router.temperature).exp())
            return Decision(selected, confidence, decision.logits, decision.p_on, self.names), None

    other = copy.deepcopy(layer)
    other.routed.router = Oracle(layer.routed_names)
    torch.testing.assert_close(layer(x, decision=selected).hidden, other(x).hidden)


def test_only_the_selection_is_fixed_during_training():
    model, inputs = model_of().train(), normal(3, 9, 2)
    recorded = model(inputs).decisions
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs, decisions=recorded).logits.square().sum().backward()
        optimizer.step()
    free, held = model(inputs), model(inputs, decisions=recorded)
    assert any(not torch.equal(a.active, b.active) for a, b in zip(free.decisions, recorded, strict=True))
    for before, now in zip(recorded, held.decisions, strict=True):
        assert torch.equal(now.active, before.active)
    # The first layer reads the same tokens in both, so its scores are those of the current router.
    assert torch.equal(held.decisions[0].logits, free.decisions[0].logits)
    assert not torch.equal(held.decisions[0].logits, recorded[0].logits)


@pytest.mark.parametrize("useful", [True, False])
def test_reversed_masks_raise_the_probability_of_useful_tokens_only(useful):
    routed = sma.SparseModularActivation("sma", {"copy": sma.TokenWise(nn.Identity())}, width=WIDTH).double()
    spread(routed)
    x = normal(2, 8, WIDTH)
    decision = routed(x).decision
    assert decision.active.any()
    assert not decision.active.all()
    again = routed(x, decision=~decision.active)
    # If the copy is useful, a larger weight of the copy lowers the loss of its token.
    loss = (again.values - (2 * x if useful else -x)).square().sum()
    (slope,) = torch.autograd.grad(loss, again.decision.logits)
    chosen = slope[~decision.active.squeeze(-1)].squeeze(1)
    assert slope.isfinite().all()
    assert not slope[decision.active.squeeze(-1)].any()
    assert ((chosen[..., 1] < 0) == useful).all()
    assert ((chosen[..., 0] > 0) == useful).all()


@pytest.mark.parametrize("chunks", [(9,), (1, 4, 4), (1,) * 9])
def test_a_stream_replays_its_chunks(chunks):
    spec = {**MODEL, "layers": [LAYERS["causal seqboat"]] * 2}
    model, inputs = model_of(spec), normal(3, 9, 2)
    selected = [torch.rand(3, 9, 1, generator=generator(seed)) < 0.5 for seed in range(2)]
    wanted = model(inputs, decisions=selected)
    state, found, start = model.init_state(3), [], 0
    for size in chunks:
        part = slice(start, start + size)
        output = model(inputs[:, part], state=state, decisions=[mask[:, part] for mask in selected])
        state, start = output.state, start + size
        found.append(output.hidden)
    torch.testing.assert_close(torch.cat(found, 1), wanted.hidden)


def test_micro_batches_replay_their_rows():
    model, inputs = model_of(), normal(4, 9, 2)
    decisions = model(inputs).decisions
    parts = [model(inputs[[row]], decisions=[each.active[[row]] for each in decisions]).logits for row in range(4)]
    torch.testing.assert_close(torch.cat(parts), model(inputs).logits)


@pytest.mark.parametrize("how", ["recompute_activations", "checkpoint"])
def test_activation_checkpointing_replays_the_given_decisions(how):
    model, inputs = model_of().train(), normal(3, 9, 2)
    recorded = [replace(each, active=~each.active) for each in model(inputs).decisions]
    wanted = model(inputs, decisions=recorded)
    other = copy.deepcopy(model)
    if how == "checkpoint":
        found = checkpoint(lambda x: other(x, decisions=recorded), inputs, use_reentrant=False)
    else:
        found = other.recompute_activations()(inputs, decisions=recorded)
    assert torch.equal(found.logits, wanted.logits)
    for a, b in zip(
        gradients(found.logits, other.parameters()), gradients(wanted.logits, model.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_data_parallel_training_passes_the_decisions_to_the_model(tmp_path):
    model, inputs = model_of().train(), normal(3, 9, 2)
    recorded = [~each.active for each in model(inputs).decisions]
    wanted = model(inputs, decisions=recorded).logits
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    try:
        found = DistributedDataParallel(model)(inputs, decisions=recorded)
        assert torch.equal(found.logits, wanted)
        found.logits.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        distributed.destroy_process_group()


def _others() -> dict[str, tuple[Any, str]]:
    own = model_of()(normal(3, 9, 2)).decisions
    return {
        "one too few": (own[:-1], "has 2 elements; expected one for each of the 3 routed layers"),
        "one missing": ([own[0], None, own[2]], r"decisions\[1\] is None; expected a Decision or a boolean mask"),
        "one alone": (own[0], "expected a sequence of a Decision or a mask for each of the 3 routed layers"),
        "the whole output": (model_of()(normal(3, 9, 2)), "give output.decisions"),
        "another order": (own[::-1], r"decisions\[0\] is about \['attention'\]; expected \['attention', 'conv'"),
        "other tokens": ([each.active[:, 1:] for each in own], r"decisions\[0\] is of shape \(3, 8, 3\)"),
        "other rows": ([each.active[:1] for each in own], r"decisions\[0\] is of shape \(1, 9, 3\)"),
        "fewer sub-modules": ([own[0].active[..., :1], own[1], own[2]], r"decisions\[0\] is of shape \(3, 9, 1\)"),
        "numbers": ([own[0].confidence, own[1], own[2]], r"decisions\[0\] is .*; expected a boolean tensor"),
        "another device": ([own[0].active.to("meta"), own[1], own[2]], r"decisions\[0\] is on meta"),
    }


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("name", list(_others()))
def test_decisions_that_do_not_fit_are_refused(name):
    decisions, said = _others()[name]
    with pytest.raises(InputError, match=said):
        model_of()(normal(3, 9, 2), decisions=decisions)


@pytest.mark.usefixtures("as_users_run")
def test_a_layer_and_its_routed_part_refuse_decisions_that_do_not_fit():
    layer, x = make("seqboat"), normal(3, 7, WIDTH)
    for part in (layer, layer.routed):
        with pytest.raises(InputError, match=r"decision is of shape \(3, 6, 1\)"):
            part(x, decision=torch.ones(3, 6, 1, dtype=torch.bool))
    with pytest.raises(InputError, match="decision is"):
        make("no modules")(x, decision=torch.ones(3, 7, 1, dtype=torch.bool))


def test_wrappers_of_layers_need_no_argument_for_decisions():
    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x, valid=None, state=None, capacity=None):
            return self.layer(x, valid, state, capacity)

    model, inputs = model_of(), normal(3, 9, 2)
    wanted = model(inputs).logits
    model.layers[0] = Wrapper(model.layers[0])
    assert torch.equal(model(inputs).logits, wanted)


@pytest.mark.usefixtures("as_users_run")
def test_a_router_without_replay_keeps_its_confidences():
    class Foreign(nn.Module):
        names, causal = ("copy",), True

        def forward(self, control_BLD, valid=None, positions=None, state=None):
            half = torch.full((*control_BLD.shape[:2], 1), 0.5, dtype=control_BLD.dtype)
            return Decision(half > 1, half, torch.stack([half, half], -1), half, self.names), None

    x, selected = normal(2, 4, WIDTH), torch.rand(2, 4, 1, generator=generator(0)) < 0.5
    routed = sma.SparseModularActivation(Foreign(), {"copy": sma.TokenWise(nn.Identity())})
    torch.testing.assert_close(routed(x, decision=selected).values, (x / 2).where(selected, 0))


def _recorded(shapes: list[tuple[int, int, int]]) -> list[Decision]:
    masks = [torch.rand(shape, generator=generator(seed)) < 0.3 for seed, shape in enumerate(shapes)]
    return [
        Decision(
            mask, mask.float(), torch.zeros(*mask.shape, 2), mask.float(), tuple(f"m{i}" for i in range(mask.shape[2]))
        )
        for mask in masks
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(1, 3)), max_size=3))
def test_load_undoes_save_of_decisions(tmp_path_factory, shapes):
    decisions, path = _recorded(shapes), tmp_path_factory.mktemp("d") / "decisions.safetensors"
    sma.save_decisions(decisions, path)
    found = sma.load_decisions(path, [each.names for each in decisions])
    assert len(found) == len(decisions)
    for mask, decision in zip(found, decisions, strict=True):
        assert mask.dtype is torch.bool
        assert torch.equal(mask, decision.active)


def test_a_saved_decision_uses_one_bit_per_token(tmp_path):
    path = tmp_path / "d"
    sma.save_decisions(_recorded([(4, 8000, 2)]), path)
    assert path.stat().st_size < 4 * 8000 * 2 / 8 + 500


def test_a_loaded_decision_is_replayed(tmp_path):
    model, inputs = model_of(), normal(3, 9, 2)
    output = model(inputs)
    sma.save_decisions(output.decisions, tmp_path / "d")
    found = sma.load_decisions(tmp_path / "d", [layer.routed_names for layer in model.routed_layers if layer.routed])
    assert torch.equal(model(inputs, decisions=found).logits, output.logits)
    with pytest.raises(InputError, match=r"holds decisions about .*; expected"):
        sma.load_decisions(tmp_path / "d", [["attention"]] * 3)


def _file(path: Path, change: Any = lambda text: text) -> Path:
    sma.save_decisions(_recorded([(2, 5, 2)]), path)
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda content: content[:-1], "damaged", id="cut-short"),
        pytest.param(lambda content: b"", "damaged", id="empty"),
        pytest.param(lambda content: content.replace(b"-decisions", b"-decisionz"), "holds no decisions", id="other"),
        pytest.param(lambda content: content.replace(b"[2, 5, 2]", b"[2, 9, 2]"), "its bits are not", id="shape"),
        pytest.param(lambda content: content.replace(b"[2, 5, 2]", b"[2, 5, 3]"), "its layers are", id="names"),
        pytest.param(lambda content: content.replace(b"[2, 5, 2]", b"[2,-5, 2]"), "its layers are", id="negative"),
        pytest.param(
            lambda content: content.replace(b"[2, 5, 2]", b"[0,1" + b"0" * 25 + b",2]"), "damaged|bytes", id="huge"
        ),
        pytest.param(lambda content: content.replace(b'\\"shape\\"', b'\\"shapf\\"'), "its layers are", id="key"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said):
        sma.load_decisions(_file(tmp_path / "d", change), [["a", "b"]])


@pytest.mark.usefixtures("as_users_run")
def test_a_file_that_is_missing_or_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        sma.load_decisions(tmp_path / "nowhere", [])
    with pytest.raises(CheckpointError, match="cannot save the decisions in"):
        sma.save_decisions(_recorded([(1, 2, 1)]), tmp_path)
    for active in (torch.ones(1, 2, 1), torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)):
        with pytest.raises(InputError, match="active of decision 0 is of shape"):
            sma.save_decisions([replace(_recorded([(1, 2, 1)])[0], active=active)], tmp_path / "d")
    with pytest.raises(InputError, match="save_decisions got"):
        sma.save_decisions([torch.ones(1, 2, 1)], tmp_path / "d")
