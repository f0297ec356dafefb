"""Kernels of the forward pass of windowed attention."""

import triton
import triton.language as tl

from sma.kernels.gpu.attention_tiles import (
    NOWHERE,
    drop_weights,
    exponential,
    factor,
    inside,
    load_tile,
    load_turned,
    pair_scores,
    partners,
    score_weights,
    store_tile,
)

# fmt: off


@triton.jit(do_not_specialize=["T"])
def attend(
    q, k, v, bounds, positions, table, broken, seed, out, lse, T,
    MIDDLE: tl.constexpr, P: tl.constexpr, W: tl.constexpr, Z: tl.constexpr, H: tl.constexpr,
    BZ: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    MODE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr
):
    """A slice of BH channels of the results of BM queries.

    For TF32, `q`, `k` and `v` are rounded, and `v` is transposed in blocks of BN tokens.
    """
    i0 = tl.program_id(0) * BM
    m, n, z = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BZ)
    i = i0 + m
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    qq = load_tile(q, i0, m, z, inside(i, T, PRECISION), Z)
    low, span = partners(bounds, i, T, W, 0 if CAUSAL else W)
    acc = tl.zeros((BM, BH), WIDE)
    highest = tl.full((BM,), float("-inf"), WIDE)
    total = tl.zeros((BM,), WIDE)
    first = tl.maximum(i0 - W, 0) // BN * BN
    last = tl.minimum(i0 + BM + (0 if CAUSAL else W), T)
    for j0 in range(first, last, BN):
        j = j0 + n
        kk = load_tile(k, j0, n, z, inside(j, T, PRECISION), Z)
        s, ok, _ = pair_scores(
            qq, kk, i, j, low, span, positions, table, T, MIDDLE, P, W, CAUSAL, BIAS, False,
            PRECISION, WIDE, ASM
        )
        bad = tl.load(broken + j, mask=j < T, other=1) > 0
        if PRECISION == "tf32":
            vv = tl.trans(load_turned(v, j0, n, h, H, BN))
        else:
            vv = load_tile(v, j0, n, h, bad == 0, H)
        if MODE == 0:
            s = tl.where(ok, s, float("-inf"))
            new = tl.maximum(highest, tl.max(s, 1), propagate_nan=tl.PropagateNan.ALL)
            # There is no maximum before the first valid pair.
            base = tl.where(new == float("-inf"), 0.0, new)
            p = exponential(s - base[:, None], ASM)
            fade = exponential(highest - base, ASM)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None]
            highest = new
        else:
            p = score_weights(s, ok, MODE)
        if DROPOUT > 0:
            p = drop_weights(p, seed, i[:, None], j[None, :], DROPOUT)
        # A non-finite value makes exactly the results in its reach NaN.
        p = tl.where(ok & bad[None, :], float("nan"), p)
        acc = tl.dot(factor(p, vv, PRECISION), vv, acc, input_precision=PRECISION, out_dtype=WIDE)
    if MODE == 0:
        # The result of a hole is 0.
        real = low < NOWHERE
        acc = acc / tl.where(real, total, 1.0)[:, None]
        if tl.program_id(1) == 0:
            tl.store(lse + i, tl.where(real, highest + tl.log(total), 0.0), mask=i < T)
    store_tile(out, i0, m, h, acc, i < T, H)
