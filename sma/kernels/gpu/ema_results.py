"""Kernels of the EMA scan that compute y and the gradients of the parameters; see `ema_states`."""

import triton
import triton.language as tl

from sma.kernels.gpu.ema_states import SIZES, group, minus_one


# fmt: off
@triton.jit
def _pass(
    x, log_decay, decay, lack, weight, omega, carried, enter, source, target, first, size, late, real, here,
    BACK: tl.constexpr, LATER: tl.constexpr, TRUNCATED: tl.constexpr, FREEZE: tl.constexpr, ENTER: tl.constexpr,
    TOKEN: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):
    """One direction and some states of a chunk: target = source or omega x, plus their sum; x is at the first token."""
    # fmt: on
    q = tl.load(decay, mask=real, other=0.0)
    missing = tl.load(lack, mask=real, other=0.0)
    w = tl.load(weight, mask=real, other=0.0)
    r = tl.zeros(q.shape, q.dtype)
    if FREEZE or TRUNCATED:
        z = tl.load(log_decay, mask=real, other=0.0)
    if ENTER:
        r = tl.load(enter, mask=real, other=0.0)
    base = 0
    if FREEZE:
        h = tl.load(carried, mask=real, other=0.0)
        h += h * minus_one(z * (tl.maximum(size - CHUNK, 0) if BACK else first))
        if BACK:
            # Start at the last token of the row; indices before the first token of the chunk, at the end, are skipped.
            base = tl.minimum(tl.maximum(size, 0), CHUNK) - CHUNK
    if TRUNCATED:
        leaving = tl.exp(z * late)
        away = late if BACK else -late
        gone = x + away.to(tl.int64) * TOKEN
    start = base + (CHUNK - UNROLL if BACK else 0)
    values = group(x, start, size, here, q.dtype, FREEZE and BACK, TOKEN, UNROLL)
    if LATER:
        sums = group(source, start, size, here, q.dtype, FREEZE and BACK, TOKEN, UNROLL)
    for i in tl.range(0, CHUNK, UNROLL, loop_unroll_factor=2):
        o = start - i if BACK else start + i
        left = size - o
        ahead = o - UNROLL if BACK else o + UNROLL
        there = tl.where(i + UNROLL < CHUNK, size, -CHUNK)
        nexts = group(x, ahead, there, here, q.dtype, FREEZE and BACK, TOKEN, UNROLL)
        if LATER:
            sums_next = group(source, ahead, there, here, q.dtype, FREEZE and BACK, TOKEN, UNROLL)
        olds = ()
        if TRUNCATED:
            bound = left - late if BACK else late - first - o
        for k in tl.static_range(UNROLL):
            inside = here & (left > k)
            if TRUNCATED:
                past = inside & (bound > k if BACK else bound <= k)
                old = tl.load(gone + o * TOKEN + k * TOKEN, mask=past, other=0.0)
                olds += (old.to(q.dtype),)  # type: ignore[assignment]
        for turn in tl.static_range(UNROLL):
            k = UNROLL - 1 - turn if BACK else turn
            r = r * q + values[UNROLL - 1 - turn if BACK else turn]
            if TRUNCATED:
                r -= leaving * olds[UNROLL - 1 - turn if BACK else turn]
            if FREEZE:
                out = tl.sum(w * r + h, 0, keep_dims=True)
                h = h * q
            else:
                out = tl.sum(w * r, 0, keep_dims=True)
            if LATER:
                out += sums[UNROLL - 1 - turn if BACK else turn]
            else:
                out += omega * values[UNROLL - 1 - turn if BACK else turn]
            inside = here & (left > k)
            if FREEZE and BACK:
                inside &= o >= -k
            tl.store(target + o * TOKEN + k * TOKEN, out.to(target.dtype.element_ty), mask=inside)
        r += r * missing
        if FREEZE:
            h += h * missing
        values = nexts
        if LATER:
            sums = sums_next


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def results(
    x, log_decay, decay, lack, weight, skip, carried, lengths, enter, part, y,
    batch, length, channels, chunks, late,
    S: tl.constexpr, N: tl.constexpr, FLIP: tl.constexpr, TRUNCATED: tl.constexpr, ROWS: tl.constexpr,
    FREEZE: tl.constexpr, ENTER: tl.constexpr, SPLIT: tl.constexpr, TOKEN: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):
    """Results y of a chunk. A pass has one direction and some states; the first writes y, and all others add to it.

    With SPLIT, all passes but the last use a copy of y of higher precision.
    """
    # fmt: on
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS)
    SLICES: tl.constexpr = (N + STATES - 1) // STATES
    d = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    pid = pid // blocks
    j = pid % chunks
    b = pid // chunks
    here = d < channels
    first = j * CHUNK
    size = length - first
    if ROWS:
        size = tl.load(lengths + b).to(tl.int32) - first
    omega = tl.load(skip + d, mask=here, other=0.0)
    row = b.to(tl.int64)
    token = (row * length + first) * TOKEN + d
    for index in tl.static_range(S * SLICES):
        n = index % SLICES * STATES + tl.arange(0, STATES)[:, None]
        real = (n < N) & here
        matrix = n * channels + d
        parameter = index // SLICES * N * channels + matrix
        entered = ((index // SLICES * batch + row) * chunks + j) * N * channels + matrix
        stream = row * N * channels + matrix
        _pass(
            x + token, log_decay + parameter, decay + parameter, lack + parameter, weight + parameter, omega,
            carried + stream if FREEZE else carried, enter + entered if ENTER else enter, part + token,
            (part if SPLIT and index < S * SLICES - 1 else y) + token,
            first, size, late, real, here,
            (index // SLICES + FLIP) % 2 == 1, index > 0, TRUNCATED, FREEZE, ENTER, TOKEN, CHUNK, UNROLL,
        )


# fmt: off
@triton.jit
def _sum(
    x, gradient, q, lack, leaving, r, m, weight_sum, decay_sum, skip_sum, gone_sum, first, size, late, here,
    BACK: tl.constexpr, TRUNCATED: tl.constexpr, TOKEN: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):
    """Sums of g r, of g m one token earlier, of g x and of g times the leaving inputs; x is at the first token."""
    # fmt: on
    if TRUNCATED:
        away = late if BACK else -late
        gone = x + away.to(tl.int64) * TOKEN
    for i in range(0, CHUNK, UNROLL):
        o = CHUNK - UNROLL - i if BACK else i
        left = size - o
        if TRUNCATED:
            bound = left - late if BACK else late - first - o
        for turn in tl.static_range(UNROLL):
            k = UNROLL - 1 - turn if BACK else turn
            inside = here & (left > k)
            value = tl.load(x + o * TOKEN + k * TOKEN, mask=inside, other=0.0).to(q.dtype)
            g = tl.load(gradient + o * TOKEN + k * TOKEN, mask=inside, other=0.0).to(q.dtype)
            decay_sum += m * g
            r = r * q + value
            if TRUNCATED:
                past = inside & (bound > k if BACK else bound <= k)
                old = tl.load(gone + o * TOKEN + k * TOKEN, mask=past, other=0.0).to(q.dtype)
                out = leaving * old
                r -= out
                gone_sum += g * old
            m = m * q + r
            if TRUNCATED:
                m -= out * late
            weight_sum += r * g
            skip_sum += value * g
        r += r * lack
        m += m * lack
    return weight_sum, decay_sum, skip_sum, gone_sum


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def sums(
    x, gradient, log_decay, decay, lack, weight, lengths, enter, enter_slope, decay_sums, weight_sums, skip_sums,
    batch, length, channels, chunks, late, groups,
    S: tl.constexpr, N: tl.constexpr, TRUNCATED: tl.constexpr, ROWS: tl.constexpr, ENTER: tl.constexpr,
    TOKEN: tl.constexpr, CHUNK: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):
    """Gradients of log q, w and omega, summed over one chunk of every `groups`-th row, always in the same order.

    With u = dr / dlog q = q m_{t-1}, the gradients of w and log q are the sums of g r and w g u.
    """
    # fmt: on
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, CHANNELS)
    SLICES: tl.constexpr = (N + STATES - 1) // STATES
    d = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    pid = pid // blocks
    slice = pid % SLICES
    n = slice * STATES + tl.arange(0, STATES)[:, None]
    pid = pid // SLICES
    j = pid % chunks
    pid = pid // chunks
    way = pid % S
    group = pid // S
    here = d < channels
    real = (n < N) & here
    matrix = n * channels + d
    parameter = way * N * channels + matrix
    q = tl.load(decay + parameter, mask=real, other=0.0)
    missing = tl.load(lack + parameter, mask=real, other=0.0)
    leaving = q
    if TRUNCATED:
        leaving = tl.exp(tl.load(log_decay + parameter, mask=real, other=0.0) * late)
    first = j * CHUNK
    decay_sum = tl.zeros((STATES, CHANNELS), q.dtype)
    weight_sum = tl.zeros((STATES, CHANNELS), q.dtype)
    skip_sum = tl.zeros((1, CHANNELS), q.dtype)
    gone_sum = tl.zeros((1, CHANNELS), q.dtype)
    for b in range(group, batch, groups):
        size = length - first
        if ROWS:
            size = tl.load(lengths + b).to(tl.int32) - first
        r = tl.zeros((STATES, CHANNELS), q.dtype)
        m = tl.zeros((STATES, CHANNELS), q.dtype)
        row = b + (group * 0).to(tl.int64)
        if ENTER:
            at = ((way * batch + row) * chunks + j) * N * channels + matrix
            r = tl.load(enter + at, mask=real, other=0.0)
            m = r + tl.load(enter_slope + at, mask=real, other=0.0)
        token = (row * length + first) * TOKEN + d
        for turn in tl.static_range(S):
            if way == turn:
                weight_sum, decay_sum, skip_sum, gone_sum = _sum(
                    x + token, gradient + token, q, missing, leaving, r, m,
                    weight_sum, decay_sum, skip_sum, gone_sum, first, size, late, here,
                    turn == 1, TRUNCATED, TOKEN, CHUNK, UNROLL,
                )
    line = group.to(tl.int64) * chunks + j
    at = (way * groups * chunks + line) * N * channels + matrix
    tl.store(weight_sums + at, weight_sum, mask=real)
    decay_sum *= q
    if TRUNCATED:
        decay_sum -= leaving * late * gone_sum
    w = tl.load(weight + parameter, mask=real, other=0.0)
    tl.store(decay_sums + at, decay_sum * w, mask=real)
    tl.store(skip_sums + line * channels + d, skip_sum, mask=here & (way == 0) & (slice == 0))
