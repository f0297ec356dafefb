"""Third-party models to which routing is added."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.cases import generator

WIDTH = 8
OPEN = {"kind": "sma", "gate": "straight_through", "initial_bias": 60.0}
HALF = {"kind": "sma", "gate": "straight_through"}


class Block(nn.Module):
    """Pre-norm attention and feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normal = self.norm(x)
        x = x + self.attention(normal, normal, normal, key_padding_mask=None if mask is None else ~mask)[0]
        return x + self.mlp(x)


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(x))


class Output(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(16, WIDTH), nn.Dropout(0.5)
        if norm:
            self.LayerNorm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        hidden = self.dropout(self.dense(hidden)) + residual
        return self.LayerNorm(hidden) if hasattr(self, "LayerNorm") else hidden


class TwoModules(nn.Module):
    """A feed-forward block of two modules, as in BERT, or without a norm, as in older ViT."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.intermediate, self.output = Intermediate(), Output(norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.output(self.intermediate(x), x)


class Model(nn.Module):
    """A third-party model with the mask argument of transformers."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 11)
        self.recompute, self.reentrant = False, False

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = (
                checkpoint(layer, x, attention_mask, use_reentrant=self.reentrant)
                if self.recompute
                else layer(x, attention_mask)
            )
        return self.head(x)


def made(*blocks: type[nn.Module], dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model(*(block() for block in blocks or (Block, Block))).to(dtype)


def ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(11, (rows, length), generator=generator(1))
