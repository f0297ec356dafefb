"""Every part of a model is called as a module: hooks run once per pass, and parts can be compiled or checkpointed."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook

from sma import ModelOutput, SequenceModel, build
from sma.errors import InputError
from sma.pytree import tensors
from sma.ragged import Ragged, compress, rectangular
from tests.cases import generator, gradients, normal
from tests.test_sma.layers import CAUSAL_GAU, LAYERS, WIDTH, layers, make

CAUSAL: dict[str, Any] = {
    **LAYERS["causal seqboat"],
    "modules": {"attention": CAUSAL_GAU, "mlp": {"kind": "gated_mlp", "hidden_size": 3}},
}
CLASSIFIER: dict[str, Any] = {
    "kind": "sequence_classifier",
    "width": WIDTH,
    "encoder": {"kind": "linear", "features": 2},
    "sinusoid": True,
    "layers": [CAUSAL, {**CAUSAL, "bypass": "identity"}],
    "head": {"kind": "mean_pool_linear", "classes": 3},
}
LANGUAGE_MODEL = {
    "kind": "language_model",
    "width": WIDTH,
    "encoder": {"kind": "token_embedding", "vocabulary": 9},
    "layers": [CAUSAL, CAUSAL],
}
NOBODY = {"router": {"kind": "never"}}


def _called(model: nn.Module) -> Counter[str]:
    """Count the later calls of every module of a model by hooks before and after the call."""
    calls: Counter[str] = Counter()
    for name, part in model.named_modules():
        # Containers of modules are never called.
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            continue
        part.register_forward_pre_hook(
            lambda part, args, kwargs, name=name: calls.update([f"{name} <"]), with_kwargs=True
        )
        part.register_forward_hook(
            lambda part, args, kwargs, output, name=name: calls.update([f"{name} >"]), with_kwargs=True
        )
    return calls


def _once_each(model: nn.Module) -> Counter[str]:
    parts = [name for name, part in model.named_modules() if not isinstance(part, nn.ModuleList | nn.ModuleDict)]
    return Counter(f"{name} {side}" for name in parts for side in "<>")


@pytest.mark.parametrize(
    "changes", [pytest.param({}, id="some tokens active"), pytest.param(NOBODY, id="no token active")]
)
@pytest.mark.parametrize("mode", ["training", "evaluation", "padding on the left", "one step", "capacity"])
def test_hooks_of_every_part_run_once_per_forward_pass(mode, changes):
    model = build({**CLASSIFIER, "layers": [{**layer, **changes} for layer in CLASSIFIER["layers"]]}, seed=0)
    model.train(mode == "training")
    x, options = normal(3, 5, 2, dtype=torch.float32), {}
    if mode == "one step":
        x, options = x[:, :1], {"state": model.init_state(3)}
    elif mode == "padding on the left":
        options = {"valid": torch.arange(5) >= torch.tensor([[3], [0], [5]])}
    elif mode == "capacity":
        options = {"capacity": 2}
    wanted, calls = _once_each(model), _called(model)
    with torch.set_grad_enabled(mode == "training"):
        model(x, **options)
    assert calls == wanted


def test_the_embedding_is_called_once_for_the_vectors_and_once_for_the_tied_scores():
    model = build(LANGUAGE_MODEL, seed=0).eval()
    calls, ids = _called(model), torch.randint(9, (2, 5), generator=generator(0))
    output = model(ids)
    assert calls["encoder >"] == 2
    assert calls["layers.1 >"] == 1
    torch.testing.assert_close(output.logits, output.hidden @ model.encoder.weight.T)
    assert torch.equal(model.encoder.scores(output.hidden), output.logits)
    assert calls["encoder >"] == 3


def test_global_hooks_run_for_a_sub_module_without_active_tokens():
    model, seen = build({**CLASSIFIER, "layers": [{**CAUSAL, **NOBODY}]}, seed=0).eval(), []
    handle = register_module_forward_hook(lambda part, args, output: seen.append(part))
    try:
        with torch.no_grad():
            model(normal(3, 5, 2, dtype=torch.float32))
    finally:
        handle.remove()
    assert sum(part is model.layers[0].routed.submodules["attention"] for part in seen) == 1


@layers
@pytest.mark.parametrize("training", [True, False])
def test_tensors_passed_to_a_hook_never_change_afterwards(name, training):
    layer = make(name, dropout=0.3).train(training)
    shown: list[tuple[str, Tensor, Tensor]] = []

    def show(part: str, output: Any) -> None:
        shown.extend((part, tensor, tensor.detach().clone()) for tensor in tensors(output))

    for part_name, part in layer.named_modules():
        if not isinstance(part, nn.ModuleDict):
            part.register_forward_hook(lambda part, args, output, name=part_name: show(name, output))
    layer(normal(3, 7, WIDTH), torch.rand(3, 7, generator=generator(1)) < 0.8)
    assert {"routed.router", ""} <= {part for part, *_ in shown} or name == "no modules"
    assert [part for part, tensor, before in shown if not torch.equal(tensor, before)] == []


def test_a_hook_can_replace_the_inputs_and_outputs_of_a_layer():
    model, x = build(CLASSIFIER, seed=0).eval(), normal(3, 5, 2, dtype=torch.float32)
    changed = normal(3, 5, WIDTH, seed=1, dtype=torch.float32)
    wanted = model.layers[1](changed).hidden
    handle = model.layers[0].register_forward_hook(lambda layer, args, output: replace(output, hidden=changed))
    seen: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda layer, args, output: seen.append(output.hidden))
    model(x)
    handle.remove()
    model.layers[1].register_forward_pre_hook(lambda layer, args: (changed, *args[1:]))
    model(x)
    for hidden in seen:
        torch.testing.assert_close(hidden, wanted)


def test_ablating_a_sub_module_by_a_hook_keeps_bypass_and_residual():
    layer, x = make("seqboat"), normal(2, 6, WIDTH)
    decision = layer(x).decision
    assert decision.active.any()
    layer.routed.submodules["attention"].register_forward_hook(lambda part, args, output: (output[0] * 0, output[1]))
    never = make("seqboat", router={"kind": "never"})
    never.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if ".router." not in name})
    torch.testing.assert_close(layer(x).hidden, never(x).hidden)


@layers
def test_ragged_tokens_in_place_of_the_mask_give_the_same_result(name):
    layer, x = make(name), normal(3, 6, WIDTH)
    lengths = torch.tensor([6, 2, 4])
    valid = torch.arange(6) < lengths[:, None]
    found, wanted = layer(x.where(valid[..., None], 0), rectangular(x, lengths)), layer(x, valid)
    torch.testing.assert_close(found.hidden.where(valid[..., None], 0), wanted.hidden.where(valid[..., None], 0))
    assert wanted.decision is None or torch.equal(found.decision.active, wanted.decision.active)


@pytest.mark.parametrize(
    ("frame", "found"),
    [
        pytest.param(lambda x: rectangular(x[:, :3]), r"3 rows of 3", id="too short"),
        pytest.param(lambda x: rectangular(x.transpose(0, 1)), r"5 rows of 3", id="transposed"),
        pytest.param(lambda x: compress(x, torch.arange(5) < torch.ones(3, 5)), r"packed", id="packed"),
    ],
)
def test_ragged_tokens_of_another_batch_are_refused(frame: Any, found: str):
    x = normal(3, 5, WIDTH)
    tokens: Ragged = frame(x)
    with pytest.raises(
        InputError, match=rf"valid is a Ragged \({found}\).*tokens of shape \(3, 5, 4\); give the mask \(B, L\)"
    ):
        make("seqboat")(x, tokens)


def _results(model: SequenceModel, x: Tensor, valid: Tensor) -> list[Tensor]:
    output: ModelOutput = model(x, valid)
    return [output.logits, *gradients(output.logits, model.parameters())]


@pytest.mark.parametrize("part", ["layers.0", "layers.1", "layers.0.backbone", "layers.0.routed.submodules.mlp"])
def test_a_checkpoint_wrapper_around_a_part_recomputes_it_and_changes_nothing(part):
    model, x, valid = (
        build(CLASSIFIER, seed=0).double(),
        normal(3, 9, 2),
        torch.rand(3, 9, generator=generator(1)) < 0.8,
    )
    wanted, names = _results(model, x, valid), [name for name, _ in model.named_parameters()]
    calls: list[str] = []
    model.get_submodule(part).register_forward_pre_hook(lambda *_: calls.append(part))
    parent, _, child = part.rpartition(".")
    wrapped = checkpoint_wrapper(model.get_submodule(part))
    if isinstance(model.get_submodule(parent), nn.ModuleList):
        model.get_submodule(parent)[int(child)] = wrapped
    else:
        model.get_submodule(parent)._modules[child] = wrapped
    found = _results(model, x, valid)
    assert calls == [part, part]
    assert [name.replace("_checkpoint_wrapped_module.", "") for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(found, wanted)


def test_recomputation_reaches_a_layer_inside_a_wrapper():
    model = build(CLASSIFIER, seed=0)
    layer = model.layers[0]
    model.layers[0] = checkpoint_wrapper(layer)
    assert model.recompute_activations().layers[0] is not layer
    assert layer.recompute
