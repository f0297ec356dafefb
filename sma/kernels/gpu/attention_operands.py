"""Kernels that lay out the operands of windowed attention.

Tensor cores read operands of 32 bits along the summed axis. If that axis is the tokens, the matrix is first transposed
block by block ("turned"). The same pass rounds to TF32.
"""

import triton
import triton.language as tl

from sma.kernels.gpu.attention_tiles import NOWHERE, load_tile, nearest_finite, store_tile, store_turned

# fmt: off


@triton.jit
def _lay_out(x, near, turned, start, T, WIDTH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
             PRECISION: tl.constexpr):
    """Round BM rows, and write them in both orders."""
    m = tl.arange(0, BM)
    i = start + m
    for c0 in range(0, WIDTH, BW):
        c = c0 + tl.arange(0, BW)
        values = nearest_finite(load_tile(x, start, m, c, i < T, WIDTH), PRECISION)
        store_tile(near, start, m, c, values, i < T, WIDTH)
        if BLOCK > 0:
            store_turned(turned, i, c, values, T, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["T"])
def lay_out_values(
    q, k, v, rows, offsets, lengths, near_q, near_k, turned_v, bounds, broken, T, HOLES: tl.constexpr,
    Z: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
    BM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Write the bounds of each token's row, and mark the tokens that have a value which is not finite.

    For TF32 also round queries, keys and values, and transpose the values, with 0 for marked tokens.
    """
    start = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    i = start + m
    row = tl.load(rows + i, mask=i < T, other=0)
    first = tl.load(offsets + row)
    if HOLES:
        last = first + tl.load(lengths + row) - 1
        first = tl.where(i <= last, first, NOWHERE)
    else:
        last = tl.load(offsets + row + 1) - 1
    tl.store(bounds + i, first.to(tl.int32), mask=i < T)
    tl.store(bounds + T + i, last.to(tl.int32), mask=i < T)
    found = tl.zeros((BM,), tl.int32)
    for h0 in range(0, H, BH):
        x = load_tile(v, start, m, h0 + tl.arange(0, BH), i < T, H)
        found = tl.maximum(found, tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1))
    tl.store(broken + i, found.to(tl.int8), mask=i < T)
    if PRECISION == "tf32":
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            x = load_tile(v, start, m, h, (i < T) & (found == 0), H)
            store_turned(turned_v, i, h, nearest_finite(x, PRECISION), T, H, BLOCK)
        _lay_out(q, near_q, near_q, start, T, Z, BH, BM, 0, PRECISION)
        _lay_out(k, near_k, near_k, start, T, Z, BH, BM, 0, PRECISION)


@triton.jit(do_not_specialize=["T"])
def lay_out_gradients(
    q, k, v, grad, out, broken, near_q, near_k, near_v, near_grad, turned_q, turned_k, turned_grad, inner, T,
    Z: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, GRADIENTS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr
):
    """Product of every result with its gradient, for softmax (MODE 0); for TF32, also round and transpose the operands.

    The values of tokens that `broken` marks become 0.
    QUERIES, KEYS, GRADIENTS: tokens of a transposed block.
    """
    start = tl.program_id(0) * BM
    m = tl.arange(0, BM)
    i = start + m
    if MODE == 0:
        total = tl.zeros((BM,), WIDE)
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            one, other = load_tile(grad, start, m, h, i < T, H), load_tile(out, start, m, h, i < T, H)
            total += tl.sum(one.to(WIDE) * other.to(WIDE), 1)
        tl.store(inner + i, total, mask=i < T)
    if PRECISION == "tf32":
        fine = tl.load(broken + i, mask=i < T, other=1) == 0
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            store_tile(near_v, start, m, h, nearest_finite(load_tile(v, start, m, h, fine, H), PRECISION), i < T, H)
        _lay_out(grad, near_grad, turned_grad, start, T, H, BH, BM, GRADIENTS, PRECISION)
        _lay_out(q, near_q, turned_q, start, T, Z, BH, BM, QUERIES, PRECISION)
        _lay_out(k, near_k, turned_k, start, T, Z, BH, BM, KEYS, PRECISION)
