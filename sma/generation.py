"""Text generation at constant cost per token."""

from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.checks import check_count, check_integers, check_number, check_valid
from sma.devices import running_sum
from sma.encoders import TokenEmbedding
from sma.errors import InputError, quote
from sma.memory import check_memory
from sma.model import LanguageModel
from sma.model_output import ModelState

CHUNK = 4096
"""Tokens of a prompt that are read at once: large matrix products, in bounded memory for long prompts."""

_EMPTY = "the prompt is empty; give at least one token per row"
_FEWER = "reduce the number of samples or prompts"


def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "B L"],
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    samples: int = 1,
    valid: Bool[Tensor, "B L"] | None = None,
) -> Iterator[Int[Tensor, "R"]]:
    """Continue prompts, and yield each token as soon as it is drawn.

    The prompt is read once, in chunks. In a model whose attention has a window, every token then costs the same,
    independently of the length of the text. The model should be in evaluation mode.

    Args:
        model: a causal language model.
        prompt: token ids, at least one valid one per row.
        tokens: number of tokens to draw per row.
        temperature: divisor of the scores; below 1 sharpens the distribution, 0 takes the most probable token.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the most probable tokens whose probabilities sum to p, in (0, 1].
        seed: seed of the draws; the same seed gives the same text on the same machine.
        samples: continuations per prompt; the prompt is read once for all of them.
        valid: False at padding of the prompt, on whichever side.

    Yields:
        the next token of each of R = B x samples rows; the samples of a prompt are neighbours.

    Raises:
        InputError: a setting is out of range, or a row has no valid token.
    """
    _check(model, prompt, valid, tokens, temperature, top_k, top_p, samples)
    check_count(seed, "seed", -(2**63))
    if seed >= 2**64:
        raise InputError(f"seed={quote(seed)} must have at most 64 bits")
    # The streams of all samples, and the scores of one token of each, must fit into memory.
    rows, vocabulary = prompt.shape[0] * samples, cast(TokenEmbedding, model.encoder).weight.shape[0]
    needed = model.init_state(rows, device="meta").num_bytes + rows * vocabulary * torch.float64.itemsize
    what = f"the generation of {len(prompt)} x {samples} samples"
    check_memory(needed, what, device=prompt.device, error=InputError, hint=_FEWER)
    # A generator function would raise only when the first token is requested.
    return _generate(
        model,
        prompt,
        valid,
        tokens,
        samples,
        torch.Generator(prompt.device).manual_seed(seed),
        temperature,
        top_k,
        top_p,
    )


@torch.no_grad()
def _generate(
    model: LanguageModel,
    prompt: Tensor,
    valid: Tensor | None,
    tokens: int,
    samples: int,
    generator: torch.Generator,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Iterator[Tensor]:
    logits, state = read(model, prompt, valid)
    # Where attention has no window, the state has grown with the prompt.
    check_memory(
        state.num_bytes * samples,
        f"the state for samples={samples}",
        device=prompt.device,
        error=InputError,
        hint=_FEWER,
    )
    rows = torch.arange(prompt.shape[0], device=prompt.device).repeat_interleave(samples)
    logits, state = logits.index_select(0, rows), state.select(rows)
    for step in range(tokens):
        token = draw(logits, generator, temperature=temperature, top_k=top_k, top_p=top_p)
        yield token
        if step + 1 < tokens:
            output = model(token[:, None], state=state)
            logits, state = cast(Tensor, output.logits)[:, 0], cast(ModelState, output.state)


def read(
    model: LanguageModel, prompt: Int[Tensor, "B L"], valid: Bool[Tensor, "B L"] | None = None
) -> tuple[Tensor, ModelState]:
    """Read prompts in chunks.

    Returns:
        the scores `(B, V)` of the token after the last valid one of each row, and the state of the streams.
    """
    state = model.init_state(prompt.shape[0])
    logits = None
    for start in range(0, prompt.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        mask = None if valid is None else valid[:, part]
        output = model(prompt[:, part], mask, state)
        state, scores = cast(ModelState, output.state), output.logits
        if scores is None or scores.ndim != 3:
            raise InputError(_unsuitable(model))
        if mask is None:
            logits = scores[:, -1]
            continue
        last = torch.arange(mask.shape[1], device=mask.device).where(mask, -1).amax(1)
        found = scores[torch.arange(mask.shape[0], device=mask.device), last.clamp(min=0)]
        logits = found if logits is None else found.where((last >= 0)[:, None], logits)
    if logits is None:
        raise InputError(_EMPTY)
    return logits, state


def draw(
    logits: Float[Tensor, "R V"],
    generator: torch.Generator | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Tensor, "R"]:
    """Draw one token per row from softmax(logits / temperature), restricted by `top_k` and `top_p`; see `generate`."""
    if bool(logits.isnan().any()):
        raise InputError("the scores of the next token contain NaN; look for NaN in the weights of the model")
    if temperature == 0:
        return logits.argmax(-1)
    # At most 0, so a tiny temperature gives -inf and never NaN.
    scores = (logits.double() - logits.double().amax(-1, keepdim=True)) / float(temperature)
    if top_k is not None and top_k < scores.shape[-1]:
        kept = scores.topk(top_k, dim=-1).indices
        scores = torch.full_like(scores, -torch.inf).scatter(-1, kept, scores.gather(-1, kept))
    probability = scores.softmax(-1)
    if top_p is not None and top_p < 1:
        ranked, order = probability.sort(dim=-1, descending=True)
        # A token stays while the probabilities before it sum to less than p, so the first one always stays.
        ranked = ranked.where(running_sum(ranked) - ranked < top_p, 0)
        probability = torch.zeros_like(probability).scatter(-1, order, ranked)
    return torch.multinomial(probability, 1, generator=generator).squeeze(-1)


def _unsuitable(model: object) -> str:
    return f"{type(model).__name__} does not score the next token; generate needs a model of kind language_model"


def _check(
    model: object,
    prompt: Tensor,
    valid: Tensor | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    samples: int,
) -> None:
    if not callable(getattr(getattr(model, "encoder", None), "scores", None)):
        raise InputError(_unsuitable(model))
    check_integers(prompt, "the prompt is", {"B": None, "L": None})
    if prompt.shape[1] == 0:
        raise InputError(_EMPTY)
    check_valid(prompt, valid)
    if valid is not None and not bool(valid.any(1).all()):
        row = int((~valid.any(1)).nonzero()[0])
        raise InputError(f"row {row} of the prompt has no valid token; every row needs at least one")
    check_count(tokens, "tokens")
    check_count(samples, "samples", 1)
    check_number(temperature, "temperature")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature={temperature} must be a finite number of at least 0")
    if top_k is not None:
        check_count(top_k, "top_k", 1, "; leave it out to draw from all tokens")
    if top_p is not None:
        check_number(top_p, "top_p")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p={top_p} must be above 0 and at most 1")
