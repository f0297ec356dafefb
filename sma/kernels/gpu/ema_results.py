"""Kernels of the EMA scan that make results: y, and the gradients of the parameters; see `ema_states`."""

import triton
import triton.language as tl

from sma.kernels.gpu.ema_states import SIZES, minus_one


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def results(
    x, log_decay, weight, skip, carried, lengths, enter, part, y,
    batch, length, channels, states, chunks, late, x_row, x_token, by_channel, by_state,
    S: tl.constexpr, FLIP: tl.constexpr, TRUNCATED: tl.constexpr, ROWS: tl.constexpr, FREEZE: tl.constexpr,
    ENTER: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):
    """Y of a chunk: the first pass, of a direction and some states, writes it, and every other one adds to it.

    v = w r + q^t h is the part of a state in y. With SPLIT, all passes but the last use a wider copy of y. Loads run
    four tokens ahead, because the compiler must not move them before the stores.
    """
    # fmt: on
    pid = tl.program_id(0)
    blocks, slices = tl.cdiv(channels, CHANNELS), tl.cdiv(states, STATES)
    d = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // blocks
    j = pid % chunks
    b = pid // chunks
    here = d < channels
    first = j * CHUNK
    size = length - first
    if ROWS:
        size = tl.load(lengths + b).to(tl.int32) - first
    loaded = tl.minimum(size, CHUNK)
    dtype: tl.constexpr = log_decay.dtype.element_ty
    omega = tl.load(skip + d, mask=here, other=0.0)
    row = b.to(tl.int64)
    for index in range(S * slices):
        way = index // slices
        n = index % slices * STATES + tl.arange(0, STATES)
        later, final = index > 0, index == S * slices - 1
        real = (n < states)[:, None] & here[None, :]
        parameter = n[:, None] * by_state + d[None, :] * by_channel
        z = tl.load(log_decay + way * states * channels + parameter, mask=real, other=0.0)
        w = tl.load(weight + way * states * channels + parameter, mask=real, other=0.0)
        step = minus_one(z)
        by = tl.where((way + FLIP) % 2 == 0, 1, -1)
        o = tl.where(by == 1, 0, CHUNK - 1)
        v = tl.zeros((STATES, CHANNELS), dtype)
        if ENTER:
            at = (n[:, None] + ((way * batch + row) * chunks + j) * states) * channels + d[None, :]
            r = tl.load(enter + at, mask=real, other=0.0)
            v = w * (r + r * step)
        if FREEZE:
            h = tl.load(carried + row * states * channels + parameter, mask=real, other=0.0)
            v += h + h * minus_one(z * tl.where(by == 1, first, tl.maximum(size - CHUNK, 0)))
        place = x + row * x_row + (first + o).to(tl.int64) * x_token + d
        x0 = tl.load(place, mask=here & (o < loaded), other=0.0)
        x1 = tl.load(place + by * x_token, mask=here & (o + by < loaded), other=0.0)
        x2 = tl.load(place + 2 * by * x_token, mask=here & (o + 2 * by < loaded), other=0.0)
        x3 = tl.load(place + 3 * by * x_token, mask=here & (o + 3 * by < loaded), other=0.0)
        to = (row * length + first + o) * channels + d
        also = here & later
        y0 = tl.load(part + to, mask=also & (o < loaded), other=0.0)
        y1 = tl.load(part + to + by * channels, mask=also & (o + by < loaded), other=0.0)
        y2 = tl.load(part + to + 2 * by * channels, mask=also & (o + 2 * by < loaded), other=0.0)
        y3 = tl.load(part + to + 3 * by * channels, mask=also & (o + 3 * by < loaded), other=0.0)
        if TRUNCATED:
            leaving = w * tl.exp(z * late)
            t = first + o - by * late
            gone = place - (by * late).to(tl.int64) * x_token
        for _ in range(0, CHUNK, 4):
            for _ in tl.static_range(4):
                inside = o < size
                ahead = (o + 4 * by < loaded) & (o + 4 * by >= 0)
                x4 = tl.load(place + 4 * by * x_token, mask=here & ahead, other=0.0)
                y4 = tl.load(part + to + 4 * by * channels, mask=also & ahead, other=0.0)
                value = x0.to(dtype)
                now = v + w * value[None, :]
                if TRUNCATED:
                    old = tl.load(gone, mask=here & inside & (t >= 0) & (t < length), other=0.0).to(dtype)
                    now -= leaving * old[None, :]
                    gone += by * x_token
                    t += by
                out = tl.sum(now, 0) + tl.where(later, y0, omega * value)
                if SPLIT:
                    tl.store(part + to, out, mask=here & inside & (final == 0))
                    tl.store(y + to, out.to(y.dtype.element_ty), mask=here & inside & final)
                else:
                    tl.store(y + to, out, mask=here & inside)
                if FREEZE:
                    v = tl.where(inside, now + now * step, v)
                else:
                    v = now + now * step
                x0, x1, x2, x3, y0, y1, y2, y3 = x1, x2, x3, x4, y1, y2, y3, y4
                place += by * x_token
                to += by * channels
                o += by


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def sums(
    x, gradient, log_decay, weight, lengths, enter, enter_slope, decay_sums, weight_sums, skip_sums,
    batch, length, channels, states, chunks, late, x_row, x_token, gradient_row, gradient_token, by_channel, by_state,
    groups,
    S: tl.constexpr, TRUNCATED: tl.constexpr, ROWS: tl.constexpr, ENTER: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
):
    """Gradients of log q, w and omega, summed over one chunk of every `groups`-th row, always in the same order.

    With u = dr / dlog q, those of w and log q are the sums of g r and w g u.
    """
    # fmt: on
    pid = tl.program_id(0)
    blocks, slices = tl.cdiv(channels, CHANNELS), tl.cdiv(states, STATES)
    d = pid % blocks * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // blocks
    slice = pid % slices
    n = slice * STATES + tl.arange(0, STATES)
    pid = pid // slices
    j = pid % chunks
    pid = pid // chunks
    way = pid % S
    group = pid // S
    here = d < channels
    real = (n < states)[:, None] & here[None, :]
    parameter = way * states * channels + n[:, None] * by_state + d[None, :] * by_channel
    z = tl.load(log_decay + parameter, mask=real, other=0.0)
    step = minus_one(z)
    by = tl.where(way == 0, 1, -1)
    if TRUNCATED:
        leaving = tl.exp(z * late)
    first = j * CHUNK
    start = tl.where(by == 1, 0, CHUNK - 1)
    decay_sum = tl.zeros((STATES, CHANNELS), z.dtype)
    weight_sum = tl.zeros((STATES, CHANNELS), z.dtype)
    skip_sum = tl.zeros((CHANNELS,), z.dtype)
    for b in range(group, batch, groups):
        size = length - first
        if ROWS:
            size = tl.load(lengths + b).to(tl.int32) - first
        r = tl.zeros((STATES, CHANNELS), z.dtype)
        u = tl.zeros((STATES, CHANNELS), z.dtype)
        row = b + (group * 0).to(tl.int64)
        if ENTER:
            at = (n[:, None] + ((way * batch + row) * chunks + j) * states) * channels + d[None, :]
            r = tl.load(enter + at, mask=real, other=0.0)
            u = tl.load(enter_slope + at, mask=real, other=0.0)
        o = start
        place = x + row * x_row + (first + o).to(tl.int64) * x_token + d
        other = gradient + row * gradient_row + (first + o).to(tl.int64) * gradient_token + d
        if TRUNCATED:
            t = first + o - by * late
            gone = place - (by * late).to(tl.int64) * x_token
        for _ in range(0, CHUNK, UNROLL):
            for _ in tl.static_range(UNROLL):
                inside = here & (o < size)
                value = tl.load(place, mask=inside, other=0.0).to(z.dtype)
                g = tl.load(other, mask=inside, other=0.0).to(z.dtype)
                r = r + r * step
                u = u + u * step + r
                if TRUNCATED:
                    old = tl.load(gone, mask=inside & (t >= 0) & (t < length), other=0.0).to(z.dtype)
                    out = leaving * old[None, :]
                    u -= out * late
                    r -= out
                    gone += by * x_token
                    t += by
                r += value[None, :]
                weight_sum += r * g[None, :]
                decay_sum += u * g[None, :]
                skip_sum += value * g
                place += by * x_token
                other += by * gradient_token
                o += by
    line = group.to(tl.int64) * chunks + j
    at = (n[:, None] + (way * groups * chunks + line) * states) * channels + d[None, :]
    tl.store(weight_sums + at, weight_sum, mask=real)
    w = tl.load(weight + parameter, mask=real, other=0.0)
    tl.store(decay_sums + at, decay_sum * w, mask=real)
    tl.store(skip_sums + line * channels + d, skip_sum, mask=here & (way == 0) & (slice == 0))
