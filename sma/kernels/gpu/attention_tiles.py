"""Tiles of pairs of tokens: scores, weights and their derivatives.

Tiles are ranges of packed queries and keys, and may cross rows. A pair is valid if its tokens belong to one row and are
at most W apart; within a row the distance of packed indices is the distance in slots. The tokens of a row are
consecutive, so the partners of a token are too. There is no block layout and no synchronisation with the host.

The first axis of a tile is that of the tokens whose results a program computes: a product on tensor cores needs 64 of
them, and reads its left factor from registers.
"""

import triton
import triton.language as tl

# fmt: off

SQRT_HALF = tl.constexpr(0.7071067811865476)
MEAN = tl.constexpr(0.707107)
STD = tl.constexpr(0.282095)
SQRT_TAU = tl.constexpr(2.5066282746310002)
NOWHERE = tl.constexpr(2**30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(x, start, rows, columns, mask, WIDTH: tl.constexpr):
    """Rows `start` + `rows` of a matrix of WIDTH columns; zeros where the mask is false and beyond WIDTH."""
    # One 64-bit address for the tile, and 32-bit offsets that are the same for every tile.
    tile = x + start * tl.full((), WIDTH, tl.int64)
    mask = mask[:, None] & (columns < WIDTH)[None, :]
    return tl.load(tile + (rows[:, None] * WIDTH + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def load_turned(x, start, rows, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load a tile that `store_turned` wrote, with the columns first; otherwise as `load_tile`."""
    tile = x + start * tl.full((), WIDTH, tl.int64)
    return tl.load(tile + (columns[:, None] * BLOCK + rows[None, :]), mask=(columns < WIDTH)[:, None], other=0.0)


@triton.jit
def store_tile(x, start, rows, columns, values, mask, WIDTH: tl.constexpr):
    """Write rows `start` + `rows` of a matrix of WIDTH columns where the mask is true."""
    tile = x + start * tl.full((), WIDTH, tl.int64)
    mask = mask[:, None] & (columns < WIDTH)[None, :]
    tl.store(tile + (rows[:, None] * WIDTH + columns[None, :]), values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def store_turned(x, at, columns, values, T, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write rows `at`, transposed in blocks of BLOCK rows; the last block has zeros after row T.

    Every eight rows are written in the order of `factor`: even ones first.
    """
    block = (at // BLOCK) * tl.full((), WIDTH * BLOCK, tl.int64)
    row = at % BLOCK
    place = row // 8 * 8 + row % 2 * 4 + row % 8 // 2
    to = block[:, None] + (columns[None, :] * BLOCK + place[:, None])
    inside = at < tl.cdiv(T, BLOCK) * BLOCK
    tl.store(x + to, values, mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def nearest(x, PRECISION: tl.constexpr):
    """The nearest TF32 numbers, ties away from zero, if PRECISION is tf32.

    Tensor cores cut off the last 13 bits instead, which makes every product smaller by 0.07 % on average.
    """
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def nearest_finite(x, PRECISION: tl.constexpr):
    """`nearest`, but numbers that it would round to infinity are cut off instead.

    Operands need it, because infinity times 0, the weight of an invalid pair, is NaN.
    """
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        overflows = ((bits + 0x1000) & 0x7F800000) == 0x7F800000
        x = tl.where(overflows & (x == x), (bits & -0x2000).to(tl.float32, bitcast=True), nearest(x, PRECISION))
    return x


@triton.jit
def inside(at, T, PRECISION: tl.constexpr):
    """Which of the tokens `at` are before the end; all for TF32, whose tensors extend to the ends of all tiles."""
    return (at < T) | (PRECISION == "tf32")


@triton.jit
def partners(bounds, at, T, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """The first partner of each token, and the number of partners after that one.

    Partners are at most BEFORE tokens before and AFTER tokens after a token in its row. `bounds` has the first and the
    last token of every token's row; the first of holes, and of indices from T on, is NOWHERE.
    """
    first = tl.load(bounds + at, mask=at < T, other=NOWHERE)
    last = tl.load(bounds + T + at, mask=at < T, other=NOWHERE)
    low = tl.maximum(first, at - BEFORE)
    return low, tl.maximum(tl.minimum(last, at + AFTER) - low, 0)


@triton.jit
def factor(x, like, PRECISION: tl.constexpr):
    """A tile of pairs as the left factor of a product.

    For TF32 it is rounded, with the even ones of every eight columns first, so that every thread already has the
    elements that it needs in its registers.
    """
    if PRECISION == "tf32":
        M: tl.constexpr = x.shape[0]
        N: tl.constexpr = x.shape[1]
        pairs = tl.reshape(nearest(x, PRECISION), (M, N // 8, 4, 2))
        return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (M, N))
    return x.to(like.dtype)


@triton.jit
def pair_scores(
    own,
    other,
    at,
    to,
    low,
    span,
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
    ASM: tl.constexpr,
):
    """Scores of a tile of pairs, whether each is valid, and its index into the table.

    `own` are the queries of the tokens `at` and `other` the keys of the tokens `to`; with KEYS_FIRST the reverse.
    `low` and `span`: see `partners`.
    ASM: see `look_up`.
    """
    # With a number above 0 the compiler does not initialise the product with the biases, for which it would wait. The
    # number has no other effect on these types.
    s = tl.dot(own, tl.trans(other), input_precision=PRECISION, max_num_imprecise_acc=32, out_dtype=WIDE)
    if KEYS_FIRST:
        distance = at[:, None] - to[None, :]
    else:
        distance = to[None, :] - at[:, None]
    # One comparison for both ends: an index before `low` becomes a large unsigned number.
    ok = (to[None, :] - low[:, None]).to(tl.uint32, bitcast=True) <= span[:, None].to(tl.uint32, bitcast=True)
    index = distance
    if BIAS > 0:
        if BIAS == 1:
            here = tl.load(positions + at, mask=at < T, other=0)
            there = tl.load(positions + to, mask=to < T, other=0)
            if KEYS_FIRST:
                index = here[:, None] - there[None, :]
            else:
                index = there[None, :] - here[:, None]
        # No clamp if the table has all distances in slots within the reach of tiles.
        REACH: tl.constexpr = W + own.shape[0] + other.shape[0]
        index += MIDDLE
        if BIAS == 1 or MIDDLE < REACH or MIDDLE + REACH >= P:
            index = tl.minimum(tl.maximum(index, 0), P - 1)
        s += look_up(table, index, ASM).to(WIDE)
    return s, ok, index


@triton.jit
def look_up(table, index, ASM: tl.constexpr):
    """Elements of a small table.

    With ASM, for compiled kernels, every thread loads the elements of its own pairs. The compiler would redistribute
    the loads over the threads, and exchange the elements through shared memory.
    """
    if ASM and table.dtype.element_ty == tl.float32:
        first = tl.full(index.shape, 0, tl.int64) + table.to(tl.int64)
        return tl.inline_asm_elementwise(
            "{ .reg .u64 at; mad.wide.s32 at, $1, 4, $2; ld.global.nc.f32 $0, [at]; }",
            "=f,r,l",
            [index, first],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.load(table + index)


@triton.jit
def add_to(table, index, values):
    """Add to elements of a table of float32: `tl.atomic_add` by every thread that has a value.

    As in `look_up`, no value is moved to another thread. Therefore no two threads may have the same pair: the layout of
    the tile must fill all warps.
    """
    first = tl.full(index.shape, 0, tl.int64) + table.to(tl.int64)
    tl.inline_asm_elementwise(
        "{ .reg .pred some; .reg .u64 at; setp.neu.f32 some, $3, 0f00000000; mad.wide.s32 at, $1, 4, $2; "
        "@some red.relaxed.gpu.global.add.f32 [at], $3; mov.b32 $0, 0; }",
        "=r,r,l,f",
        [index, first, values],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def exponential(x, ASM: tl.constexpr):
    """The exponential function; with ASM, 0 instead of subnormal results, in a third of the instructions."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


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
def score_gradients(s, ok, dp, norm, mean, MODE: tl.constexpr, ASM: tl.constexpr):
    """Gradients of scores from those of weights.

    For softmax (0), `norm` is the logarithm of the sum of a query's weights, and `mean` the product of its result and
    the result's gradient.
    """
    if MODE == 0:
        ds = exponential(s - norm, ASM) * (dp - mean)
    elif MODE == 1:
        ds = dp * tl.where(s != s, s, 2 * tl.where(s > 0, s, 0.0))
    else:
        e = (s - MEAN) / STD
        ds = dp * (exponential(-0.5 * e * e, ASM) * (1 / (STD * SQRT_TAU)))
    return tl.where(ok, ds, 0.0)


@triton.jit
def drop_weights(w, seed, i, j, DROPOUT: tl.constexpr):
    """Drop weights, or gradients of weights, and scale the others.

    The draw depends on query and key only, so that every kernel drops the same pairs. The number of a query is mixed
    once, and that of a pair in ten instructions. The generator Philox needs a hundred, more than the rest of the work
    per pair.
    """
    bits = tl.load(seed)
    low, high = bits.to(tl.uint32), (bits >> 32).to(tl.uint32)
    row = _mixed(_mixed(i.to(tl.uint32) ^ low) ^ _mixed(low ^ high))
    drawn = _mixed(row + j.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32))
    THRESHOLD: tl.constexpr = int(DROPOUT * 2**32)
    return tl.where(drawn >= tl.full((), THRESHOLD, tl.uint32), w * (1 / (1 - DROPOUT)), 0.0)


@triton.jit
def _mixed(x):
    """Mix the bits of 32-bit numbers: every bit of the result depends on every bit (the last step of MurmurHash3)."""
    x ^= x >> 16
    x *= tl.full((), 0x85EBCA6B, tl.uint32)
    x ^= x >> 13
    x *= tl.full((), 0xC2B2AE35, tl.uint32)
    return x ^ (x >> 16)
