"""Kernels of the EMA scan that pass states on: a register holds a state, the lanes of a warp neighbouring channels.

Rows are cut into chunks of C tokens. `ends` scans every chunk from zero, and `carry` passes the states from chunk to
chunk with exact powers of the decay. FLIP swaps the directions, which makes the backward pass of the inputs.

Shapes: x (B, L, D), parameters (S, D, N), states between kernels (S, B, J, N, D). Sizes and strides are not
specialised: known multiples of 16 would make the compiler choose layouts that exchange values between lanes. Nothing
in a loop over tokens is a function of its own: each call takes a millisecond in Triton's interpreter.
"""

import triton
import triton.language as tl

SIZES = [
    *("batch", "length", "channels", "states", "chunks", "late", "groups"),
    *("x_row", "x_token", "gradient_row", "gradient_token", "by_channel", "by_state"),
]


@triton.jit
def minus_one(z):
    """exp(z) - 1, exact to rounding near 0, where a decay that is rounded in every step would drift."""
    TERMS: tl.constexpr = 16 if z.dtype == tl.float64 else 9
    series = tl.full(z.shape, 1.0, z.dtype)
    for i in tl.static_range(TERMS - 1):
        series = series * z * (1.0 / (TERMS - i)) + 1.0
    return tl.where(tl.abs(z) < 0.5, series * z, tl.exp(z) - 1.0)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def ends(
    x, log_decay, lengths, enter, end,
    batch, length, channels, states, chunks, late, x_row, x_token, by_channel, by_state,
    S: tl.constexpr, FLIP: tl.constexpr, SLOPE: tl.constexpr, TRUNCATED: tl.constexpr, ROWS: tl.constexpr,
    FREEZE: tl.constexpr, CHUNK: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):
    """State at the end of each chunk that starts from zero; with SLOPE its derivative, where r enters as it is."""
    # fmt: on
    pid = tl.program_id(0)
    blocks, slices = tl.cdiv(channels, CHANNELS), tl.cdiv(states, STATES)
    d = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // blocks
    n = pid % slices * STATES + tl.arange(0, STATES)
    pid = pid // slices
    j = pid % chunks
    pid = pid // chunks
    way = pid % S
    b = pid // S
    here = d < channels
    real = (n < states)[:, None] & here[None, :]
    parameter = way * states * channels + n[:, None] * by_state + d[None, :] * by_channel
    z = tl.load(log_decay + parameter, mask=real, other=0.0)
    step = minus_one(z)
    at = (n[:, None] + ((way * batch + b).to(tl.int64) * chunks + j) * states) * channels + d[None, :]
    first = j * CHUNK
    size = length - first
    if ROWS:
        size = tl.load(lengths + b).to(tl.int32) - first
    r = tl.zeros((STATES, CHANNELS), z.dtype)
    u = tl.zeros((STATES, CHANNELS), z.dtype)
    if SLOPE:
        r = tl.load(enter + at, mask=real, other=0.0)
    by = tl.where((way + FLIP) % 2 == 0, 1, -1)
    o = tl.where(by == 1, 0, CHUNK - 1)
    place = x + b.to(tl.int64) * x_row + (first + o).to(tl.int64) * x_token + d
    if TRUNCATED:
        leaving = tl.exp(z * late)
        away = by * late
        gone = place - away.to(tl.int64) * x_token
    for _ in range(0, CHUNK, UNROLL):
        for _ in tl.static_range(UNROLL):
            inside = o < size
            value = tl.load(place, mask=here & inside, other=0.0).to(z.dtype)
            next = r + r * step
            if SLOPE:
                slope = u + u * step + next
            if TRUNCATED:
                t = first + o - away
                old = tl.load(gone, mask=here & inside & (t >= 0) & (t < length), other=0.0).to(z.dtype)
                out = leaving * old[None, :]
                next -= out
                if SLOPE:
                    slope -= out * late
                gone += by * x_token
            next += value[None, :]
            if FREEZE:
                next = tl.where(inside, next, r)
            r = next
            if SLOPE:
                if FREEZE:
                    slope = tl.where(inside, slope, u)
                u = slope
            place += by * x_token
            o += by
    tl.store(end + at, u if SLOPE else r, mask=real)


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
    batch, length, channels, states, chunks, by_channel, by_state,
    S: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr, FREEZE: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr,
):
    """The state that enters each chunk, from those at the ends of chunks; with FREEZE the last of the row, too."""
    # fmt: on
    pid = tl.program_id(0)
    blocks, slices = tl.cdiv(channels, CHANNELS), tl.cdiv(states, STATES)
    d = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // blocks
    n = pid % slices * STATES + tl.arange(0, STATES)
    pid = pid // slices
    way = pid % S
    b = pid // S
    real = (n < states)[:, None] & (d < channels)[None, :]
    parameter = n[:, None] * by_state + d[None, :] * by_channel
    z = tl.load(log_decay + way * states * channels + parameter, mask=real, other=0.0)
    over_chunk = minus_one(z * CHUNK)
    tokens = length
    if ROWS:
        tokens = tl.load(lengths + b).to(tl.int32)
    at = (n[:, None] + (way * batch + b).to(tl.int64) * chunks * states) * channels + d[None, :]
    stride = (channels * 1).to(tl.int64) * states
    by = tl.where((way + FLIP) % 2 == 0, 1, -1)
    j = tl.where(by == 1, 0, chunks - 1)
    s = tl.zeros((STATES, CHANNELS), z.dtype)
    for i in range(0, chunks, 4):
        # Four loads before the stores, behind which the compiler must not move them.
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
        tl.store(last + b.to(tl.int64) * states * channels + parameter, s, mask=real)
