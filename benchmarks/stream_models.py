"""Models of the stream benchmark. A step takes one token per row and returns the scores of the next tokens."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sma.decision import Decision
from sma.model import LanguageModel, SequenceModel, build
from sma.model_output import ModelState
from sma.positions import Sinusoid
from sma.routers import SMARouter

WIDTH, DEPTH, VOCABULARY = 128, 4, 256
CONTEXT = 2048

# Takes one token per row, returns the scores of the next tokens.
Step = Callable[[Tensor], Tensor]


def language_model() -> LanguageModel:
    """The model that is streamed, without a rate."""
    attention = {
        "kind": "gau",
        "query_size": 64,
        "hidden_size": 256,
        "window": 128,
        "bidirectional": False,
        "position": {"kind": "rotary"},
    }
    layer = {
        "backbone": {"kind": "ema", "state_size": 16, "bidirectional": False},
        "modules": {"attention": attention},
        "norm": {"kind": "layer_norm", "place": "pre"},
    }
    encoder = {"kind": "token_embedding", "vocabulary": VOCABULARY, "scaled": True}
    spec = {"kind": "language_model", "width": WIDTH, "encoder": encoder, "layers": {"repeat": DEPTH, "layer": layer}}
    model = build(spec, seed=0).eval()
    if not isinstance(model, LanguageModel):
        raise SystemExit("the spec makes no language model")
    return model


@torch.inference_mode()
def set_rates(model: SequenceModel, rate: float, rows: int = 16, length: int = 2048) -> None:
    """Move the bias of every router, first layer first, to the quantile of its scores on random rows that gives this
    rate.
    """
    inputs = model.encoder.random_inputs(rows, length)
    hidden = [model.encoder(part) for part in inputs.split(2)]  # a few rows at a time, to limit the peak memory
    for layer in model.routed_layers:
        if layer.routed is None or not isinstance(layer.routed.router, SMARouter):
            raise SystemExit("the layer has no SMA router")
        scores = torch.cat([cast(Decision, layer(part).decision).logits.flatten(0, 2) for part in hidden])
        margin = (scores[:, 1] - scores[:, 0]).sort(descending=True).values
        active = round(rate * len(margin))
        edges = torch.cat([margin[:1] + 1, margin, margin[-1:] - 1])
        layer.routed.router.bias[1] -= (
            (edges[active] + edges[active + 1]) / 2 if 0 < active < len(margin) else edges[active and -1]
        )
        hidden = [layer(part).hidden for part in hidden]


class Stream:
    """A model that continues from a state."""

    def __init__(self, model: Callable[..., Any], state: ModelState) -> None:
        self.model, self.state = model, state

    def __call__(self, ids: Tensor) -> Tensor:
        """Take one more chunk; return the last scores."""
        output = self.model(ids, state=self.state)
        self.state = output.state
        scores: Tensor = output.logits[:, -1]
        return scores


class Recompute:
    """A model without a state, which recomputes the last `context` tokens for every token."""

    def __init__(self, model: SequenceModel, ids: Tensor, context: int = CONTEXT) -> None:
        self.model, self.context = model, context
        self.ids = ids[:, -context:]

    def __call__(self, ids: Tensor) -> Tensor:
        """Take one more token of every row; return its scores."""
        self.ids = torch.cat([self.ids, ids], 1)[:, -self.context :]
        scores = self.model(self.ids).logits
        if scores is None:
            raise SystemExit("the model has no scores")
        return scores[:, -1]


class Block(nn.Module):
    """A pre-norm transformer layer over a preallocated cache."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x_BD: Tensor, cache: Tensor, position: int) -> Tensor:
        """One token of every row; `cache` is `(2, B, heads, S, D / heads)` and gets its key and value."""
        q, k, v = self.in_proj(self.norms[0](x_BD)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        cache[0, :, :, position], cache[1, :, :, position] = k, v
        keys, values = cache[:, :, :, : position + 1]
        attended = nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values)
        x_BD = x_BD + self.out_proj(attended.flatten(1))
        fed: Tensor = x_BD + self.feed(self.norms[1](x_BD))
        return fed


class CachedTransformer(nn.Module):
    """A transformer that keeps the keys and values of every token."""

    def __init__(self, batch: int, position: int, room: int, device: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.sinusoid = Sinusoid(WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH)
        self.to(device).eval()
        heads = 4
        self.caches = [
            torch.empty(2, batch, heads, position + room, WIDTH // heads, device=device) for _ in range(DEPTH)
        ]
        for cache in self.caches:
            cache.normal_()
        self.position = position

    def forward(self, ids: Tensor) -> Tensor:
        """Take one more token of every row; return its scores."""
        position = torch.full((1, 1), self.position, device=ids.device)
        hidden = self.embedding(ids[:, 0]) + self.sinusoid(position)[0]
        for block, cache in zip(self.blocks, self.caches, strict=True):
            hidden = block(hidden, cache, self.position)
        self.position += 1
        return nn.functional.linear(self.norm(hidden), self.embedding.weight)


def compiled(model: SequenceModel) -> Callable[..., Any]:
    """The compiled model; the graph includes operators whose shapes depend on the data."""
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    return torch.compile(model, dynamic=False)
