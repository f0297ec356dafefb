"""Benchmark of single steps of a stream: its output, its rates, and the results of its models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.stream_models import VOCABULARY, CachedTransformer, Recompute, Stream, language_model, set_rates

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"model", "batch", "rate", "position", "microseconds_per_token", "state_bytes", "peak_megabytes"}
MORE = {"mean_microseconds_per_token", "steps", "real_rate", "prefill_tokens_per_second", "forward_tokens_per_second"}


@pytest.mark.slow
def test_a_small_run_prints_every_point_as_json() -> None:
    small = "--batch 1 --rate 0.1 --position 20 --position 60 --steps 5"
    command = [sys.executable, "-m", "benchmarks.stream", "--json", *small.split()]
    points = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    found = [(point["model"], point["rate"], point["position"]) for point in points]
    models = (("seqboat", 0.1), ("recompute", 0.1), ("kv_cache_transformer", 1.0))
    assert found == [(*model, position) for model in models for position in (20, 60)]
    assert all(set(point) == KEYS | MORE for point in points)
    assert all(point[key] > 0 for point in points for key in KEYS - {"model"})
    streamed = [point["state_bytes"] for point in points if point["model"] == "seqboat"]
    assert streamed[0] == streamed[1]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.4, 1.0])
def test_every_layer_of_a_stream_has_the_rate_that_was_set(rate: float) -> None:
    torch.manual_seed(0)
    model = language_model()
    set_rates(model, rate, rows=8)
    torch.manual_seed(1)
    state, found = model.init_state(8), []
    with torch.inference_mode():
        for _ in range(8):
            output = model(torch.randint(VOCABULARY, (8, 250)), state=state)
            state = output.state
            found.append(torch.cat([decision.rate() for decision in output.decisions]))
    # The rate is set on 16,000 tokens and measured on 16,000 others: one standard error is 3 % of a rate of 0.1.
    torch.testing.assert_close(torch.stack(found).mean(0), torch.full((4,), rate).double(), rtol=0.08, atol=0.002)


def test_recompute_equals_the_stream_within_its_context() -> None:
    torch.manual_seed(0)
    model = language_model()
    set_rates(model, 0.4, rows=2, length=200)
    model = model.double()
    ids = torch.randint(VOCABULARY, (3, 150))
    with torch.inference_mode():
        stream = Stream(model, model.init_state(3))
        stream(ids[:, :140])
        recompute = Recompute(model, ids[:, :140], context=150)
        for token in ids[:, 140:].split(1, 1):
            torch.testing.assert_close(recompute(token), stream(token), rtol=0, atol=1e-9)
        further = (recompute(ids[:, :1]), stream(ids[:, :1]))
    assert recompute.ids.shape == (3, 150)
    assert not torch.allclose(*further, rtol=0, atol=1e-9)


def test_the_cached_transformer_equals_attention_over_all_tokens() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        model = CachedTransformer(2, 0, 12, "cpu").double()
        model.caches = [cache.double() for cache in model.caches]
        ids = torch.randint(VOCABULARY, (2, 12))
        found = torch.stack([model(token) for token in ids.split(1, 1)], 1)
        hidden = model.embedding(ids) + model.sinusoid(torch.arange(12)[None])
        for block in model.blocks:
            q, k, v = block.in_proj(block.norms[0](hidden)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            hidden = hidden + block.out_proj(attended.transpose(1, 2).flatten(2))
            hidden = hidden + block.feed(block.norms[1](hidden))
        wanted = torch.nn.functional.linear(model.norm(hidden), model.embedding.weight)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
