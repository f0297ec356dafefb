"""Kernels of the EMA scan that compute states. A register holds a state; the lanes of a warp have adjacent channels.

Rows are cut into chunks of C tokens. `ends` scans every chunk from zero, and `carry` passes the states from chunk to
chunk with exact powers of the decay. FLIP swaps the directions, which gives the backward pass of the inputs.

Shapes: x (B, L, D), parameters (S, N, D), states between kernels (S, B, J, N, D); all contiguous.

A loop over tokens has

- no exchange between lanes: every tensor is a matrix with adjacent channels, even with one row, so that all loads have
  one layout; a load with other strides would impose its layout on everything that depends on it. Sizes are not
  specialised: with a known multiple of 16, a lane would hold adjacent channels;
- no address computations: the distance of tokens, TOKEN = D, and the direction are constants, so that a group of tokens
  needs one address, and the offsets are part of the instructions;
- no waiting: a group is loaded during the computation of the previous one, and completely before a result is stored,
  because the compiler moves no load ahead of a store;
- one instruction for r = q r + x: q is rounded once, and each group ends with r += r * lack, see `prepare`;
- no function call per token, which takes a millisecond in Triton's interpreter.
"""

import triton
import triton.language as tl

SIZES = ["batch", "length", "channels", "chunks", "late", "groups", "size"]


@triton.jit
def minus_one(z):
    """exp(z) - 1, exact up to rounding near 0, where a decay that is rounded in every step would drift."""
    TERMS: tl.constexpr = 16 if z.dtype == tl.float64 else 9
    series = tl.full(z.shape, 1.0, z.dtype)
    for i in tl.static_range(TERMS - 1):
        series = series * z * (1.0 / (TERMS - i)) + 1.0
    return tl.where(tl.abs(z) < 0.5, series * z, tl.exp(z) - 1.0)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def prepare(
    log_decay, weight, out, channels, size, N: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write log q and w with adjacent channels, rounded q, and the rounding error of UNROLL multiplications by it."""
    # fmt: on
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = at < size
    d, n, way = at % channels, at // channels % N, at // channels // N
    parameter = (way * channels + d) * N + n
    value = tl.load(log_decay + parameter, mask=given)
    step = minus_one(value)
    slow = tl.abs(value) < 0.5  # a fast decay needs no correction, and a small q would be lost in 1 + (q - 1)
    near = tl.where(slow, 1.0 + step, tl.exp(value))
    tl.store(out + at, value, mask=given)
    tl.store(out + size + at, near, mask=given)
    tl.store(out + 2 * size + at, tl.where(slow, (step - (near - 1.0)) * UNROLL, 0.0), mask=given)
    tl.store(out + 3 * size + at, tl.load(weight + parameter, mask=given), mask=given)


# fmt: off
@triton.jit
def group(
    place, o, size, here, dtype: tl.constexpr, FLOOR: tl.constexpr, TOKEN: tl.constexpr, UNROLL: tl.constexpr,
):
    """The tokens of a group that begins at token o of a chunk; with FLOOR, o may be before the chunk."""
    # fmt: on
    values = ()
    for k in tl.static_range(UNROLL):
        inside = here & (size - o > k)
        if FLOOR:
            inside &= o >= -k
        value = tl.load(place + o * TOKEN + k * TOKEN, mask=inside, other=0.0)
        values += (value.to(dtype),)  # type: ignore[assignment]
    return values


# fmt: off
@triton.jit
def _scan(
    x, q, lack, leaving, first, size, late, here,
    BACK: tl.constexpr, SLOPE: tl.constexpr, TRUNCATED: tl.constexpr, FREEZE: tl.constexpr, TOKEN: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):
    """The states r and m at the end of a chunk, from zero, where m_t = q m_{t-1} + r_t; x is at the first token."""
    # fmt: on
    r = tl.zeros(q.shape, q.dtype)
    m = tl.zeros(q.shape, q.dtype)
    base = 0
    if FREEZE and not BACK:
        # The chunk ends with the row: zeros before its first token leave r at zero.
        base = tl.minimum(tl.maximum(size, 0), CHUNK) - CHUNK
    if TRUNCATED:
        away = late if BACK else -late
        gone = x + away.to(tl.int64) * TOKEN
    start = base + (CHUNK - UNROLL if BACK else 0)
    values = group(x, start, size, here, q.dtype, FREEZE and not BACK, TOKEN, UNROLL)
    # Two groups per iteration, so that no group is copied to the registers of another.
    for i in tl.range(0, CHUNK, UNROLL, loop_unroll_factor=2):
        o = start - i if BACK else start + i
        left = size - o
        ahead = o - UNROLL if BACK else o + UNROLL
        nexts = group(
            x, ahead, tl.where(i + UNROLL < CHUNK, size, -CHUNK), here,
            q.dtype, FREEZE and not BACK, TOKEN, UNROLL,
        )
        if TRUNCATED:
            # Tokens of the group from which, or up to which, an input leaves the kernel.
            bound = left - late if BACK else late - first - o
        for turn in tl.static_range(UNROLL):
            k = UNROLL - 1 - turn if BACK else turn
            r = r * q + values[UNROLL - 1 - turn if BACK else turn]
            if TRUNCATED:
                inside = here & (left > k)
                past = inside & (bound > k if BACK else bound <= k)
                old = tl.load(gone + o * TOKEN + k * TOKEN, mask=past, other=0.0).to(q.dtype)
                out = leaving * old
                r -= out
            if SLOPE:
                m = m * q + r
                if TRUNCATED:
                    m -= out * late
        r += r * lack
        if SLOPE:
            m += m * lack
        values = nexts
    return r, m


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def ends(
    x, log_decay, decay, lack, lengths, enter, end,
    batch, length, channels, chunks, late,
    S: tl.constexpr, N: tl.constexpr, FLIP: tl.constexpr, SLOPE: tl.constexpr, TRUNCATED: tl.constexpr,
    ROWS: tl.constexpr, FREEZE: tl.constexpr, TOKEN: tl.constexpr, CHUNK: tl.constexpr, STATES: tl.constexpr,
    CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):
    """State at the end of each chunk that starts from zero; with SLOPE its derivative, given the states that enter.

    The derivative by log q is u = m - r: u_t = q (u_{t-1} + r_{t-1}).
    """
    # fmt: on
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS)
    SLICES: tl.constexpr = (N + STATES - 1) // STATES
    d = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    pid = pid // blocks
    n = pid % SLICES * STATES + tl.arange(0, STATES)[:, None]
    pid = pid // SLICES
    j = pid % chunks
    pid = pid // chunks
    way = pid % S
    b = pid // S
    here = d < channels
    real = (n < N) & here
    matrix = n * channels + d
    parameter = way * N * channels + matrix
    q = tl.load(decay + parameter, mask=real, other=0.0)
    missing = tl.load(lack + parameter, mask=real, other=0.0)
    leaving = q
    if TRUNCATED:
        leaving = tl.exp(tl.load(log_decay + parameter, mask=real, other=0.0) * late)
    at = ((way * batch + b).to(tl.int64) * chunks + j) * N * channels + matrix
    first = j * CHUNK
    size = length - first
    if ROWS:
        size = tl.load(lengths + b).to(tl.int32) - first
    place = x + (b.to(tl.int64) * length + first) * TOKEN + d
    r = tl.zeros((STATES, CHANNELS), q.dtype)
    m = tl.zeros((STATES, CHANNELS), q.dtype)
    for turn in tl.static_range(S):
        if way == turn:
            r, m = _scan(
                place, q, missing, leaving, first, size, late, here,
                (turn + FLIP) % 2 == 1, SLOPE, TRUNCATED, FREEZE, TOKEN, CHUNK, UNROLL,
            )
    if SLOPE:
        tokens = tl.minimum(tl.maximum(size, 0), CHUNK) if FREEZE else CHUNK
        z = tl.load(log_decay + parameter, mask=real, other=0.0)
        r = m - r + tl.load(enter + at, mask=real, other=0.0) * tl.exp(z * tokens) * tokens
    tl.store(end + at, r, mask=real)


@triton.jit
def _pass_on(s, e, z, over_chunk, place, tokens, valid, real, FREEZE: tl.constexpr, CHUNK: tl.constexpr):
    """Store the state that enters a chunk; return the one that leaves it."""
    tl.store(place, s, mask=real & valid)
    if FREEZE:
        over_chunk = minus_one(z * tl.where(valid, tl.minimum(tl.maximum(tokens, 0), CHUNK), 0))
    return s + s * over_chunk + e


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def carry(
    log_decay, lengths, end, enter, last,
    batch, length, channels, chunks,
    S: tl.constexpr, N: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr, FREEZE: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr,
):
    """The states that enter the chunks, from those at the ends of chunks; with FREEZE also the last one of a row."""
    # fmt: on
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS)
    SLICES: tl.constexpr = (N + STATES - 1) // STATES
    d = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    pid = pid // blocks
    n = pid % SLICES * STATES + tl.arange(0, STATES)[:, None]
    pid = pid // SLICES
    way = pid % S
    b = pid // S
    real = (n < N) & (d < channels)
    matrix = n * channels + d
    z = tl.load(log_decay + way * N * channels + matrix, mask=real, other=0.0)
    over_chunk = minus_one(z * CHUNK)
    tokens = length
    if ROWS:
        tokens = tl.load(lengths + b).to(tl.int32)
    at = (way * batch + b).to(tl.int64) * chunks * N * channels + matrix
    stride = (channels * 1).to(tl.int64) * N
    by = tl.where((way + FLIP) % 2 == 0, 1, -1)
    j = tl.where(by == 1, 0, chunks - 1)
    s = tl.zeros((STATES, CHANNELS), z.dtype)
    for i in range(0, chunks, 4):
        # Four loads before the stores, because the compiler moves no load ahead of a store.
        e0 = tl.load(end + at + j * stride, mask=real, other=0.0)
        e1 = tl.load(end + at + (j + by) * stride, mask=real & (i + 1 < chunks), other=0.0)
        e2 = tl.load(end + at + (j + 2 * by) * stride, mask=real & (i + 2 < chunks), other=0.0)
        e3 = tl.load(end + at + (j + 3 * by) * stride, mask=real & (i + 3 < chunks), other=0.0)
        left = tokens - j * CHUNK
        into = enter + at + j * stride
        s = _pass_on(s, e0, z, over_chunk, into, left, i < chunks, real, FREEZE, CHUNK)
        left -= by * CHUNK
        into += by * stride
        s = _pass_on(s, e1, z, over_chunk, into, left, i + 1 < chunks, real, FREEZE, CHUNK)
        left -= by * CHUNK
        into += by * stride
        s = _pass_on(s, e2, z, over_chunk, into, left, i + 2 < chunks, real, FREEZE, CHUNK)
        left -= by * CHUNK
        into += by * stride
        s = _pass_on(s, e3, z, over_chunk, into, left, i + 3 < chunks, real, FREEZE, CHUNK)
        j += 4 * by
    if FREEZE:
        tl.store(last + b.to(tl.int64) * N * channels + matrix, s, mask=real)
