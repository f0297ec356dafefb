"""Generation samples from the distribution of a model that recomputes the whole text, at every setting."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma.errors import InputError
from sma.generation import draw, generate, read
from sma.model import LanguageModel, build
from sma.spec import load_spec

SPEC = {
    "kind": "language_model",
    "width": 8,
    "encoder": {"kind": "token_embedding", "vocabulary": 11, "scaled": True},
    "layers": {
        "repeat": 2,
        "layer": {
            "backbone": {"kind": "ema", "bidirectional": False, "state_size": 4},
            "modules": {
                "attention": {"kind": "gau", "query_size": 4, "hidden_size": 8, "window": 3, "bidirectional": False}
            },
            "norm": {"kind": "layer_norm"},
        },
    },
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    made = build(load_spec(SPEC), seed=0).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double() * 0.5)
    return cast(LanguageModel, made)


def texts(model: LanguageModel, prompt: Tensor, **settings: Any) -> Tensor:
    return torch.stack(list(generate(model, prompt, **settings)), 1)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.0, None, None), (0.7, 3, None), (1.3, None, 0.6), (1.0, 4, 0.8)],
)
def test_generation_equals_recomputing_the_whole_text(
    model: LanguageModel, temperature: float, top_k: int, top_p: float
) -> None:
    prompt = torch.randint(11, (3, 7))
    found = texts(model, prompt, tokens=20, temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
    generator, text = torch.Generator().manual_seed(5), prompt
    for _ in range(20):
        logits = model(text).logits
        assert logits is not None
        text = torch.cat(
            [text, draw(logits[:, -1], generator, temperature=temperature, top_k=top_k, top_p=top_p)[:, None]], 1
        )
    assert torch.equal(found, text[:, 7:])


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), left=st.booleans())
def test_padding_of_the_prompt_changes_no_token(model: LanguageModel, lengths: list[int], left: bool) -> None:
    prompt = torch.randint(11, (len(lengths), max(lengths)))
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    if left:
        valid = valid.flip(1)
    found = texts(model, prompt, tokens=5, temperature=0.0, valid=valid)
    for row, mask in enumerate(valid):
        assert torch.equal(found[row], texts(model, prompt[row : row + 1, mask], tokens=5, temperature=0.0)[0])


def test_a_prompt_read_in_chunks_gives_the_same_state(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, valid = torch.randint(11, (2, 25)), torch.rand(2, 25) < 0.5
    valid[:, 0] = True
    whole = read(model, prompt, valid)
    monkeypatch.setattr("sma.generation.CHUNK", 4)
    parts = read(model, prompt, valid)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(parts[1].seen, whole[1].seen)


def test_samples_of_a_prompt_are_adjacent_and_differ(model: LanguageModel) -> None:
    prompt = torch.randint(11, (2, 4))
    found = texts(model, prompt, tokens=30, samples=3, seed=1)
    assert found.shape == (6, 30)
    assert len({tuple(row) for row in found.tolist()}) == 6
    greedy = texts(model, prompt, tokens=10, samples=3, temperature=0.0)
    assert torch.equal(greedy, texts(model, prompt, tokens=10, temperature=0.0).repeat_interleave(3, 0))


def test_the_same_seed_gives_the_same_text_and_another_seed_another_text(model: LanguageModel) -> None:
    prompt = torch.randint(11, (1, 4))
    first, again, other = (texts(model, prompt, tokens=40, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokens_are_returned_one_at_a_time(model: LanguageModel) -> None:
    stream = generate(model, torch.randint(11, (1, 4)), tokens=10**9)
    assert [next(stream).shape for _ in range(3)] == [(1,)] * 3


@given(scores=st.lists(st.floats(-5, 5), min_size=2, max_size=8, unique=True), data=st.data())
def test_top_k_and_top_p_limit_the_drawn_tokens(scores: list[float], data: st.DataObject) -> None:
    logits = torch.tensor([scores], dtype=torch.float64)
    ranked = sorted(range(len(scores)), key=lambda token: -scores[token])
    top_k = data.draw(st.integers(1, len(scores)))
    drawn = {int(draw(logits, torch.Generator().manual_seed(seed), top_k=top_k)) for seed in range(20)}
    assert drawn <= set(ranked[:top_k])
    top_p = data.draw(st.floats(0.05, 1.0))
    probability = logits.softmax(-1)[0]
    total, least = 0.0, 1.0
    for token in ranked:  # the smallest set that reaches p; scores closer than rounding have equal probabilities
        least = float(probability[token])
        total += least
        if total >= top_p:
            break
    drawn = {int(draw(logits, torch.Generator().manual_seed(seed), top_p=top_p)) for seed in range(20)}
    assert all(float(probability[token]) >= least for token in drawn)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(40000, -1)
    counts = draw(logits, torch.Generator().manual_seed(0), temperature=2.0).bincount(minlength=3) / 40000
    torch.testing.assert_close(counts, torch.tensor([0.0, 0.5, 1.0]).softmax(0), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0 must be a finite number of at least 0"),
        ({"temperature": float("nan")}, r"temperature=nan must be a finite number of at least 0"),
        ({"top_k": 0}, r"top_k=0 must be at least 1; leave it out to draw from all tokens"),
        ({"top_p": 0.0}, r"top_p=0.0 must be above 0 and at most 1"),
        ({"tokens": -1}, r"^tokens=-1 must be at least 0$"),
        ({"samples": 0}, r"^samples=0 must be at least 1$"),
        (
            {"prompt": torch.zeros(2, 0, dtype=torch.long)},
            "the prompt is empty; give at least one token per row",
        ),
        ({"valid": torch.tensor([[True], [False]])}, r"row 1 of the prompt has no valid token"),
    ],
)
def test_impossible_settings_are_refused_at_once(
    model: LanguageModel, settings: dict[str, Any], complaint: str
) -> None:
    prompt = settings.pop("prompt", torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(InputError, match=complaint):
        generate(model, prompt, **{"tokens": 1, **settings})
