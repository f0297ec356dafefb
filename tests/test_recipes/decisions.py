"""Random decisions of several routed layers, in batches of different sizes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sma.decision import Decision
from tests.cases import generator

LAYERS = [("attention", "mlp"), ("mlp",), ("conv", "attention")]


def _decision(names: Sequence[str], rows: int, length: int, seed: int) -> Decision:
    uniform = torch.rand(rows, length, len(names), generator=generator(seed))
    return Decision(uniform < 0.4, uniform.clamp(min=0.1), torch.zeros(*uniform.shape, 2), uniform, tuple(names))


def batches(layers: Sequence[Sequence[str]]) -> Iterator[tuple[list[Decision], Tensor]]:
    """Batches of different sizes, with and without padding; one has no valid token."""
    for seed, (rows, length, share) in enumerate([(3, 7, 0.6), (1, 2, 1.0), (5, 11, 0.3), (2, 4, 0.0)]):
        valid = torch.rand(rows, length, generator=generator(50 + seed)) < share
        yield [_decision(names, rows, length, 10 * seed + place) for place, names in enumerate(layers)], valid
