"""Routed feed-forward blocks in models of transformers and torchvision, of small random configurations."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.decision import Decision
from sma.retrofit import collect_decisions, intermediate_and_output, retrofit
from tests.cases import generator
from tests.test_interop.libraries import HAS_TORCHVISION, transformers

ROOT = Path(__file__).resolve().parents[2]
OPEN = {"kind": "sma", "gate": "straight_through", "initial_bias": 60.0}
HALF = {"kind": "sma", "gate": "straight_through"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, vocab_size=20, num_key_value_heads=2, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=20))


def _vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4))


def _torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # it is initialised to 0
    return model


MODELS = {
    "llama": (_llama, "model.layers.*.mlp"),
    "gpt2": (_gpt2, "transformer.h.*.mlp"),
    "bert": (_bert, intermediate_and_output),
    "vit": (_vit, "layers.*.mlp"),
    "torchvision": (_torchvision_vit, "encoder.layers.*.mlp"),
}
needs_torchvision = pytest.mark.skipif(not HAS_TORCHVISION, reason="needs torchvision: make test-extras")
models = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_torchvision if name == "torchvision" else ()) for name in MODELS]
)
texts = pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
causal = pytest.mark.parametrize("name", ["llama", "gpt2"])


def made(name: str, dtype: torch.dtype = torch.float32, router: dict[str, Any] | None = None) -> nn.Module:
    """A model in evaluation mode, always with the same weights; routed if a router is given."""
    torch.manual_seed(0)
    build, target = MODELS[name]
    model = build().eval().to(dtype)
    if router is not None:
        retrofit(model, {target: router})
    return model


def inputs_of(name: str, left: bool = False) -> dict[str, Tensor]:
    if name == "torchvision":
        return {"x": torch.randn(2, 3, 8, 8, generator=generator(0))}
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator(0))}
    mask = torch.ones(2, 9, dtype=torch.long)
    if left:
        mask[1, :3] = 0
    else:
        mask[1, 6:] = 0
    return {"input_ids": torch.randint(1, 20, (2, 9), generator=generator(0)), "attention_mask": mask}


def valid_of(inputs: dict[str, Tensor]) -> Tensor | None:
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else None


def output_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


@models
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
def test_with_all_tokens_active_the_model_equals_the_original_bit_by_bit(name, dtype):
    inputs = {key: each.to(dtype) if each.is_floating_point() else each for key, each in inputs_of(name).items()}
    assert torch.equal(output_of(made(name, dtype, OPEN), inputs), output_of(made(name, dtype), inputs))


@models
def test_with_all_tokens_active_under_autocast_the_model_equals_the_original_bit_by_bit(name):
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (output_of(made(name, router=router), inputs_of(name)) for router in (OPEN, None))
    assert torch.equal(found, wanted)


def blocks_of(name: str, model: nn.Module) -> list[nn.Module]:
    """The modules whose results are 0 for skipped tokens, layer by layer."""
    words = {"llama": "mlp", "gpt2": "mlp", "bert": "output.dropout", "vit": "mlp", "torchvision": "mlp"}[name]
    found = [part for path, part in model.named_modules() if path.endswith(words) and "attention.output" not in path]
    assert len(found) == 2
    return found


@contextmanager
def skipping(blocks: list[nn.Module], decisions: list[Decision]) -> Iterator[None]:
    """Set the results of the blocks to 0 for inactive tokens."""
    hooks = [
        block.register_forward_hook(lambda _, __, result, active=decision.active: result * active)
        for block, decision in zip(blocks, decisions, strict=True)
    ]
    yield
    for hook in hooks:
        hook.remove()


@models
def test_skipped_tokens_get_zeros_from_the_block_and_others_are_unchanged(name):
    inputs = inputs_of(name)
    model, original = made(name, router=HALF), made(name)
    with collect_decisions(model, valid_of(inputs)) as decisions:
        found = output_of(model, inputs)
    shares = [float(decision.active.double().mean()) for decision in decisions]
    assert all(0 < share < 1 for share in shares), shares
    with skipping(blocks_of(name, original), decisions):
        torch.testing.assert_close(found, output_of(original, inputs))


@models
def test_only_the_routers_get_gradients_and_undo_restores_the_original(name):
    model, original, inputs = made(name), made(name), inputs_of(name)
    handle = retrofit(model, {MODELS[name][1]: HALF}, train="routers")
    valid = valid_of(inputs)
    with collect_decisions(model, valid) as decisions:
        output = output_of(model, inputs)
    assert len(decisions) == 2
    for decision in decisions:
        assert decision.active.any()
        assert not decision.active.all()
        assert valid is None or not decision.active[~valid].any()
    output.square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.requires_grad == (".router." in path)
        assert (parameter.grad is not None) == parameter.requires_grad
    assert torch.equal(output_of(handle.undo(), inputs), output_of(original, inputs))
    assert list(model.state_dict()) == list(original.state_dict())


@models
def test_a_total_budget_and_calibration_reach_their_rate(name):
    model = made(name)
    handle = retrofit(model, {MODELS[name][1]: HALF})
    controller, inputs = handle.budget({"target": 0.3, "over": "total", "speed": 0.5}), inputs_of(name)
    valid = valid_of(inputs)
    for _ in range(30):
        with collect_decisions(model, valid) as decisions:
            output_of(model, inputs)
        controller.update(decisions, valid)
    tokens = decisions[0].active.shape[:2].numel() if valid is None else int(valid.sum())
    rates = torch.stack([decision.rate(valid) for decision in decisions])
    assert abs(float(rates.mean()) - 0.3) <= 1 / tokens
    data = next(iter(inputs.values()))
    batches = [data if valid is None else (data, valid)]
    if valid is not None:  # the tokens of image models are not the elements of the input
        counted = handle.calibrate(batches, 0.6, tolerance=1 / tokens)
        assert (counted.rates - 0.6).abs().max() <= 1 / tokens


@texts
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_gradient_checkpointing_changes_no_gradient_and_collects_once(name, reentrant):
    inputs, found = inputs_of(name, left=True), []
    for recompute in (False, True):
        model = made(name, torch.float64, HALF).train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with collect_decisions(model, valid_of(inputs)) as decisions:
            loss = output_of(model, inputs).square().sum()
        loss.backward()
        assert len(decisions) == 2
        found.append({path: parameter.grad for path, parameter in model.named_parameters()})
    for path, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][path], msg=path)


@texts
def test_left_padding_changes_no_token(name):
    inputs = inputs_of(name, left=True)
    model = made(name, torch.float64, HALF)
    alone = {key: each[1:, 3:] for key, each in inputs.items()}
    if name != "llama":  # Llama has relative positions
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = output_of(model, inputs)[1:, 3:]
    torch.testing.assert_close(found, output_of(model, alone))


@models
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_have_equal_outputs_and_collect_their_own_decisions(name, copied):
    model, inputs = made(name, router=HALF), inputs_of(name)
    other = copied(model)
    with collect_decisions(other) as decisions:
        assert torch.equal(output_of(other, inputs), output_of(model, inputs))
    assert len(decisions) == 2


@models
def test_weights_load_into_a_model_with_the_same_retrofit(name):
    model, other, inputs = made(name, router=HALF), made(name, router=HALF), inputs_of(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(generator=generator(1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(output_of(other, inputs), output_of(model, inputs))


@causal
def test_generation_with_a_cache_equals_generation_without(name):
    model = made(name, router=HALF)
    prompt = torch.randint(1, 20, (2, 4), generator=generator(3))
    cached, plain = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


@causal
def test_generation_from_a_padded_prompt_equals_that_of_the_prompt_alone(name):
    model, inputs = made(name, torch.float64, HALF), inputs_of(name, left=True)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = model.generate(**inputs, **options)
    alone = model.generate(inputs["input_ids"][1:, 3:], **options)
    assert torch.equal(together[1:, 9:], alone[:, 6:])


@causal
def test_decisions_of_every_generation_step_are_collected(name):
    model = made(name, router=HALF)
    prompt = torch.randint(1, 20, (2, 4), generator=generator(3))
    with collect_decisions(model) as decisions:
        model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert [tuple(decision.active.shape) for decision in decisions] == [(2, 4, 1)] * 2 + [(2, 1, 1)] * 4


def compare_compiled(name: str, backend: str) -> None:
    """Assert that a compiled model has the outputs and decisions of the uncompiled one."""
    model, inputs = made(name, router=HALF), inputs_of(name)
    compiled: Callable[..., Any] = torch.compile(model, backend=backend)
    with torch.no_grad():
        with collect_decisions(model, valid_of(inputs)) as wanted:
            plain = output_of(model, inputs)
        with collect_decisions(model, valid_of(inputs)) as found:
            output = compiled(**inputs)
    torch.testing.assert_close(output if isinstance(output, Tensor) else output[0], plain, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a.active, b.active) for a, b in zip(found, wanted, strict=True))
    print("equal")


@pytest.mark.extras
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in MODELS), pytest.param("llama", "inductor")]
)
def test_a_compiled_model_has_equal_outputs_and_decisions(name, backend):
    # In a separate process, because a compiler cannot trace the shape checker of the tests.
    program = f"from tests.test_interop.test_retrofit import compare_compiled; compare_compiled({name!r}, {backend!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "equal", done.stderr
