"""Tiles of pairs of tokens: scores, weights and their derivatives.

Tiles of queries and keys lie on the packed line and may cross rows. A pair counts where its tokens are of one row and
at most W apart: within a row the distance on the packed line is the distance in slots. So there is no block layout, and
the host reads nothing.

The first axis of a tile is that of the tokens whose results a program makes: a product on tensor cores needs 64 of
them, and reads its left factor from registers.
"""

import triton
import triton.language as tl

# fmt: off

SQRT_HALF = tl.constexpr(0.7071067811865476)
MEAN = tl.constexpr(0.707107)
STD = tl.constexpr(0.282095)
SQRT_TAU = tl.constexpr(2.5066282746310002)


@triton.jit
def load_tile(x, at, columns, mask, width, WIDTH: tl.constexpr):
    """Rows `at` of a matrix of WIDTH columns; zeros where the mask is false and beyond `width`."""
    mask = mask[:, None] & (columns < width)[None, :]
    return tl.load(x + at[:, None].to(tl.int64) * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(x, at, columns, values, height, width, WIDTH: tl.constexpr):
    """Write rows `at` of a matrix of WIDTH columns, those below `height`."""
    mask = (at < height)[:, None] & (columns < width)[None, :]
    tl.store(x + at[:, None].to(tl.int64) * WIDTH + columns[None, :], values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def pair_scores(
    own,
    other,
    at,
    to,
    rows_at,
    rows_to,
    positions,
    table,
    T,
    MIDDLE: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    CAUSAL: tl.constexpr,
    BIAS: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Scores of a tile of pairs, which of them count, and their index into the table.

    `own` are the queries of the tokens `at` and `other` the keys of the tokens `to`; KEYS_FIRST the other way round.
    """
    s = tl.dot(own, tl.trans(other), input_precision=PRECISION, out_dtype=WIDE)
    if KEYS_FIRST:
        distance = at[:, None] - to[None, :]
    else:
        distance = to[None, :] - at[:, None]
    # Rows below 0 are holes and the end of the line: they equal no other.
    ok = (rows_at[:, None] == tl.where(rows_to < 0, -2, rows_to)[None, :]) & (distance >= -W)
    if CAUSAL:
        ok = ok & (distance <= 0)
    else:
        ok = ok & (distance <= W)
    index = distance
    if BIAS > 0:
        if BIAS == 1:
            here = tl.load(positions + at, mask=at < T, other=0)
            there = tl.load(positions + to, mask=to < T, other=0)
            if KEYS_FIRST:
                index = here[:, None] - there[None, :]
            else:
                index = there[None, :] - here[:, None]
        index = tl.minimum(tl.maximum(index + MIDDLE, 0), P - 1)
        s += tl.load(table + index, mask=ok, other=0.0).to(WIDE)
    return s, ok, index


@triton.jit
def score_weights(s, ok, MODE: tl.constexpr):
    """Weights of relu2 (1) and laplace (2); a score that is NaN stays NaN."""
    if MODE == 1:
        positive = tl.where(s > 0, s, 0.0)
        w = tl.where(s != s, s, positive * positive)
    else:
        w = 0.5 + 0.5 * tl.math.erf((s - MEAN) / STD * SQRT_HALF)
    return tl.where(ok, w, 0.0)


@triton.jit
def score_gradients(s, ok, dp, norm, mean, MODE: tl.constexpr):
    """Gradients of scores from those of weights.

    For softmax (0), `norm` is the logarithm of the sum of a query's weights, and `mean` the product of its result and
    the result's gradient.
    """
    if MODE == 0:
        ds = tl.exp(s - norm) * (dp - mean)
    elif MODE == 1:
        ds = dp * tl.where(s != s, s, 2 * tl.where(s > 0, s, 0.0))
    else:
        e = (s - MEAN) / STD
        ds = dp * (tl.exp(-0.5 * e * e) / (STD * SQRT_TAU))
    return tl.where(ok, ds, 0.0)


@triton.jit
def drop_weights(w, seed, i, j, DROPOUT: tl.constexpr):
    """Drop weights, or gradients of weights, and scale the others.

    The draw depends on query and key alone, so that every kernel drops the same.
    """
    zero = i * 0 + j * 0
    bits, _, _, _ = tl.philox(tl.load(seed), zero + i, zero + j, zero, zero)
    return tl.where(tl.uint_to_uniform_float(bits) >= DROPOUT, w * (1 / (1 - DROPOUT)), 0.0)
