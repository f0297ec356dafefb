"""Sub-modules run on a stream in chunks."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sma.padding import right_padding
from sma.ragged import Ragged, rectangular
from sma.submodule import State, SubModule
from tests.test_modules.layouts import lay, spread

# `packed` and `static` as in `lay`; `front` moves the tokens of every row to its front, followed by holes.
StreamLayout = Literal["packed", "static", "front"]
STREAM_LAYOUTS: tuple[StreamLayout, ...] = ("packed", "static", "front")


def lay_chunk(x_BLD: Tensor, active_BL: Tensor, layout: StreamLayout, positions_BL: Tensor) -> Ragged:
    """The active tokens of a chunk in one layout; holes are filled with large numbers."""
    if layout != "front":
        return lay(x_BLD, active_BL, layout, positions_BL)
    lengths, order = right_padding(active_BL)
    index = torch.arange(active_BL.numel()).reshape(active_BL.shape)
    if order is not None:
        x_BLD, positions_BL, index = (
            x_BLD.gather(1, order[..., None].expand_as(x_BLD)),
            positions_BL.gather(1, order),
            index.gather(1, order),
        )
    tokens = replace(rectangular(x_BLD, None if active_BL.all() else lengths, positions_BL), index=index.reshape(-1))
    return tokens.with_values(tokens.values.where(tokens.mask[:, None], 1e3))


def in_chunks(module: SubModule, x_BLD: Tensor, size: int) -> Tensor:
    """Run a sub-module on all tokens of a batch in chunks of `size` tokens per row."""
    active = torch.ones(x_BLD.shape[:2], dtype=torch.bool)
    starts = range(0, x_BLD.shape[1], size)
    return stream(module, x_BLD, active, [slice(start, start + size) for start in starts], "front")[0]


def stream(
    module: SubModule,
    x_BLD: Tensor,
    active_BL: Tensor,
    chunks: list[slice],
    layout: StreamLayout = "packed",
    state: State | None = None,
    positions_BL: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run a sub-module chunk by chunk; return the results at the positions of their tokens, zeros elsewhere, and the
    last state.
    """
    state = module.init_state(x_BLD.shape[0]) if state is None else state
    positions_BL = torch.arange(x_BLD.shape[1]).expand(x_BLD.shape[:2]) if positions_BL is None else positions_BL
    out = [x_BLD[:, :0]]
    for part in chunks:
        tokens = lay_chunk(x_BLD[:, part], active_BL[:, part], layout, positions_BL[:, part])
        values, after = module(tokens, state)
        assert after is not None
        state = after
        out.append(spread(values, tokens, x_BLD[:, part]))
    return torch.cat(out, 1), state
