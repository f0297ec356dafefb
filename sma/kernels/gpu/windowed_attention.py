"""Windowed attention in Triton: the launches of its kernels, and the choice of tiles."""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sma.kernels.blocks import whole_tiles
from sma.kernels.gpu.attention_backward import grad_keys, grad_queries, grad_values
from sma.kernels.gpu.attention_forward import attend
from sma.kernels.gpu.attention_operands import lay_out_gradients, lay_out_values
from sma.kernels.launch import capability, input_precision, launch, shared_memory

MODES = {"softmax": 0, "relu2": 1, "laplace": 2}
# Copies of the gradient of the table, so that atomic additions of different programs rarely collide.
COPIES = 32
# Elements of the buffer for the deterministic gradient of the table.
BUFFER = 2**25
# Tokens per program that lays out operands.
ROWS = 32
# Constants of all kernels.
LAID_OUT = ("Z", "H", "PRECISION")


class Tiles(NamedTuple):
    """Sizes of the tiles of one kernel: queries, keys, channels of a slice of values, and options of the compiler."""

    BM: int
    BN: int
    BH: int
    num_warps: int
    num_stages: int


@cache
def tiles(kernel: str, query_size: int, hidden_size: int, dtype: torch.dtype, room: int, biased: bool) -> Tiles:
    """Choose the tiles of a kernel.

    Args:
        kernel: `attend`, `grad_queries`, `grad_keys` or `grad_values`.
        query_size, hidden_size: Z and H.
        dtype: dtype of the values.
        room: bytes of shared memory per block.
        biased: whether scores have biases, whose gradients take registers.
    """
    narrow, small = dtype.itemsize <= 2, power(query_size) < 128
    if room > 200_000:
        # A group of 4 warps multiplies 64 rows. Timed on an H200 by `python -m benchmarks.tiles`.
        own, warps = (64, 4) if small or narrow else (128, 8)
        if kernel in ("grad_queries", "grad_keys"):
            other = 32 if biased and not small and kernel == "grad_queries" else 64
            sides, width, stages = (own, other), min(power(hidden_size), 64), 2
        else:
            sides, width, stages = (own, 32), _slice(query_size, hidden_size, 256), 2 if warps == 4 else 3
        queries_first = kernel in ("attend", "grad_queries")
        return Tiles(*(sides if queries_first else sides[::-1]), width, warps, stages)
    # A warp multiplies 16 rows. The largest tiles without register spills.
    if kernel in ("grad_queries", "grad_keys"):
        width = min(power(hidden_size), 64 if narrow else 32)
        if kernel == "grad_keys":
            return Tiles(64, 32, width, 8, 2)
        return Tiles(32, 64 if narrow or small else 32, width, 8, 2)
    width = _slice(query_size, hidden_size, 128)
    return Tiles(32, 64, width, 8, 2) if kernel == "grad_values" else Tiles(64, 32, width, 8, 2)


def _slice(query_size: int, hidden_size: int, widest: int) -> int:
    """Channels of a slice of values: every slice recomputes the scores, and the last one is padded."""
    widths = [width for width in (16, 32, 64, 128, 256) if width <= min(widest, power(hidden_size))]
    return min(widths, key=lambda width: -(-hidden_size // width) * (power(query_size) + width))


def _parts(size: int, part: int) -> int:
    """Number of parts; `triton.cdiv` takes 3 us of host time per call."""
    return -(-size // part)


def power(size: int) -> int:
    """The next power of two, at least 16, the minimum side of a product on tensor cores."""
    return max(16, 1 << (size - 1).bit_length())


def _constants(q: Tensor, v: Tensor, table: Tensor | None, settings: tuple[Any, ...]) -> dict[str, Any]:
    window, causal, weighting, middle, over_slots, dropout, _ = settings
    return {
        "MIDDLE": middle,
        "P": 1 if table is None else table.shape[0],
        "W": window,
        "Z": q.shape[1],
        "H": v.shape[1],
        "BZ": power(q.shape[1]),
        "CAUSAL": causal,
        "BIAS": 0 if table is None else 2 if over_slots else 1,
        "MODE": MODES[weighting],
        "DROPOUT": dropout,
        "PRECISION": input_precision(v.dtype),
        "WIDE": tl.float64 if v.dtype is torch.float64 else tl.float32,
        # Neither the interpreter nor float64 has these instructions.
        "ASM": isinstance(attend, triton.JITFunction) and v.dtype is not torch.float64,
    }


def _shared(constants: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: constants[name] for name in names}


def _programs(tokens: int, *blocks: int) -> tuple[int]:
    """The grid of a kernel that lays out operands in blocks of these numbers of tokens, the last one padded."""
    return (max(_parts(_parts(tokens, block) * block, ROWS) for block in (*blocks, ROWS)),)


def _near(x: Tensor) -> Tensor:
    """An uninitialised tensor for a matrix that is padded to the ends of all tiles."""
    return x.new_empty(whole_tiles(x.shape[0]), x.shape[1])


def _turned(x: Tensor, block: int) -> Tensor:
    """An uninitialised tensor for a matrix that is transposed in blocks of `block` rows."""
    return x.new_empty(_parts(x.shape[0], block) * block, x.shape[1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    rows: Tensor,
    positions: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Attend; keeps the logarithms of the sums of weights, the marks of broken tokens, the first and the last token of
    the row of each token, and the positions.
    """
    q, k, v, table = q.contiguous(), k.contiguous(), v.contiguous(), None if table is None else table.contiguous()
    T, H = v.shape
    by_position = table is not None and not settings[4]
    places = _places(positions, settings[0]) if by_position else rows.new_empty(0, dtype=torch.int32)
    sums = whole_tiles(T) if settings[2] == "softmax" else 0
    out, lse = torch.empty_like(v), v.new_zeros(sums, dtype=_wide(v.dtype))
    broken, bounds = v.new_empty(T, dtype=torch.int8), v.new_empty(2, T, dtype=torch.int32)
    kept = [lse, broken, bounds, places]
    constants = _constants(q, v, table, settings)
    tile = tiles("attend", q.shape[1], H, v.dtype, shared_memory(v.device), table is not None)
    queries, keys, values, options = q, k, v, _shared(constants, LAID_OUT)
    if constants["PRECISION"] == "tf32":
        queries, keys, values = _near(q), _near(k), _turned(v, tile.BN)
    layout = [x.contiguous() for x in (rows, offsets, rows if lengths is None else lengths)]
    results = queries, keys, values, bounds, broken
    sizes = {"BH": 64, "BM": ROWS, "BLOCK": tile.BN, "HOLES": lengths is not None, **options}
    launch(lay_out_values, _programs(T, tile.BN), q, k, v, *layout, *results, T, **sizes)
    grid = _parts(T, tile.BM), _parts(H, tile.BH)
    biases, random = lse if table is None else table, lse if seed is None else seed
    given = queries, keys, values, bounds, places, biases, broken, random
    launch(attend, grid, *given, out, lse, T, **constants, **tile._asdict())
    return out, kept


def _places(positions: Tensor, window: int) -> Tensor:
    """Positions as 32-bit numbers with the same differences within a window, up to the size of a table.

    Positions grow along a row, so a gap that is wider than every table can be shortened. Overflows cancel in the
    differences.
    """
    widest = 2**30 // window
    gaps = torch.diff(positions, prepend=positions[:1]).clamp_(-widest, widest)
    return gaps.cumsum(0).int()


def backward(
    grad: Tensor, out: Tensor, kept: list[Tensor], table: Tensor | None, seed: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and of the table (empty without one).

    All but the gradient of the table are the same in every run. Under `torch.use_deterministic_algorithms` that one is
    too, computed from the gradients of all pairs.
    """
    table = None if table is None else table.contiguous()
    q, k, v, lse, broken, bounds, places = kept
    q, k, v, grad = q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous()
    (T, H), wide = v.shape, _wide(v.dtype)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    constants, room = _constants(q, v, table, settings), shared_memory(v.device)
    inner, shared = torch.empty_like(lse), _shared(constants, LAID_OUT)
    query_tile, key_tile, value_tile = (
        tiles(f"grad_{name}", q.shape[1], H, v.dtype, room, table is not None) for name in ("queries", "keys", "values")
    )
    near, turned = [q, k, v, grad], [q, k, grad]
    blocks = {"QUERIES": key_tile.BM, "KEYS": query_tile.BN, "GRADIENTS": value_tile.BM}
    rounded = constants["PRECISION"] == "tf32"
    if rounded:
        near = [_near(x) for x in near]
        turned = [_turned(x, block) for x, block in zip(turned, blocks.values(), strict=True)]
    if rounded or constants["MODE"] == 0:
        given, results = (q, k, v, grad, out, broken), (*near, *turned, inner)
        sizes = {"BH": 64, "BM": ROWS, **_shared(constants, ("MODE", "WIDE")), **shared}
        launch(lay_out_gradients, _programs(T, *blocks.values()), *given, *results, T, **blocks, **sizes)
    (near_q, near_k, near_v, near_grad), (turned_q, turned_k, turned_grad) = near, turned
    biases, random = lse if table is None else table, lse if seed is None else seed
    tail = near_v, bounds, places, biases, broken, random, near_grad, lse, inner

    launch(
        grad_keys,
        (_parts(T, key_tile.BN),),
        near_q,
        turned_q,
        near_k,
        *tail,
        dk,
        T,
        **constants,
        **key_tile._asdict(),
    )

    few = near_q, near_k, bounds, places, biases, random, turned_grad
    grid = _parts(T, value_tile.BN), _parts(H, value_tile.BH)
    launch(grad_values, grid, *few, lse, dv, T, **constants, **value_tile._asdict())

    tile = query_tile
    atomic = table is None or not torch.are_deterministic_algorithms_enabled()
    # On compute capability 9, every warp has 16 queries, so no two threads have the same pair.
    full = constants["ASM"] and 16 * tile.num_warps == tile.BM and capability(v.device) == 9
    options = {**constants, **tile._asdict(), "ATOMIC": atomic, "COPIES": COPIES, "FULL": full}

    def queries(first: int, count: int, into: Tensor) -> None:
        grid = (_parts(count, tile.BM),)
        launch(grad_queries, grid, near_q, near_k, turned_k, *tail, dq, into, T, first, **options)

    if table is None:
        queries(0, T, lse)
        return dq, dk, dv, grad.new_empty(0)
    if atomic:
        copies = table.new_zeros(COPIES, table.shape[0], dtype=wide)
        queries(0, T, copies)
        return dq, dk, dv, copies.sum(0).to(table.dtype)
    reach = 2 * settings[0] + 1
    total = table.new_zeros(table.shape[0], dtype=wide)
    size = max(tile.BM, BUFFER // reach // tile.BM * tile.BM)
    for first in range(0, T, size):
        count = min(size, T - first)
        pairs = table.new_zeros(count, reach, dtype=wide)
        queries(first, count, pairs)
        total += _by_distance(pairs, first, places, settings, table.shape[0])
    return dq, dk, dv, total.to(table.dtype)


def _by_distance(pairs: Tensor, first: int, places: Tensor, settings: tuple[Any, ...], size: int) -> Tensor:
    """Sum the gradients of pairs, (count, 2 W + 1), by their index into the table, always in the
    same order.
    """
    window, _, _, middle, over_slots = settings[:5]
    distance = torch.arange(-window, window + 1, device=pairs.device)
    if over_slots:
        pairs, index = pairs.sum(0), distance
    else:
        own = torch.arange(first, first + pairs.shape[0], device=pairs.device)
        # Invalid pairs have a gradient of 0.
        other = (own[:, None] + distance).clamp(0, places.shape[0] - 1)
        index = places[other] - places[own][:, None]
    index = (index.clamp(-size, size) + middle).clamp(0, size - 1)
    return pairs.new_zeros(size).index_add_(0, index.reshape(-1), pairs.reshape(-1))
