"""Routed feed-forward blocks in models of transformers, of small random configurations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sma.retrofit import collect_decisions, intermediate_and_output, retrofit
from tests.cases import generator

transformers = pytest.importorskip("transformers", reason="needs transformers, which the tests do not install")

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


MODELS = {
    "llama": (_llama, "model.layers.*.mlp"),
    "gpt2": (_gpt2, "transformer.h.*.mlp"),
    "bert": (_bert, intermediate_and_output),
    "vit": (_vit, "layers.*.mlp"),
}
models = pytest.mark.parametrize("name", list(MODELS))


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator(0))}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(1, 20, (2, 9), generator=generator(0)), "attention_mask": mask}


@models
def test_with_everything_active_the_model_is_the_original_bit_by_bit(name):
    build, target = MODELS[name]
    model, original, inputs = made(build), made(build), inputs_of(name)
    retrofit(model, {target: OPEN})
    assert torch.equal(model(**inputs)[0], original(**inputs)[0])


@models
def test_the_routers_learn_and_undo_gives_the_original_back(name):
    build, target = MODELS[name]
    model, original, inputs = made(build), made(build), inputs_of(name)
    handle = retrofit(model, {target: HALF}, train="routers")
    valid = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    with collect_decisions(model, valid) as decisions:
        output = model(**inputs)[0]
    assert len(decisions) == 2
    for decision in decisions:
        assert decision.active.any()
        assert not decision.active.all()
        assert valid is None or not decision.active[~valid].any()
    output.square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.requires_grad == (".router." in path)
        assert (parameter.grad is not None) == parameter.requires_grad
    assert torch.equal(handle.undo()(**inputs)[0], original(**inputs)[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_with_a_cache_is_generation_without(name):
    build, target = MODELS[name]
    model = made(build)
    retrofit(model, {target: HALF})
    prompt = torch.randint(1, 20, (2, 4), generator=generator(3))
    cached, plain = (
        model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)
