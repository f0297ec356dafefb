"""Kernels of the backward pass of windowed attention, which recompute the scores.

For TF32, all operands are rounded, `v` is 0 at broken tokens, and the arguments `turned_…` are transposed in blocks of
the size of the tiles that read them. For other precisions these arguments are the original tensors.
"""

import triton
import triton.language as tl

from sma.kernels.gpu.attention_tiles import (
    add_to,
    drop_weights,
    exponential,
    factor,
    inside,
    load_tile,
    load_turned,
    pair_scores,
    partners,
    score_gradients,
    score_weights,
    store_tile,
)

# fmt: off


@triton.jit(do_not_specialize=["T", "start"])
def grad_queries(
    q, k, turned_k, v, bounds, positions, table, broken, seed, grad, lse, inner, dq, dtable, T, start,
    MIDDLE: tl.constexpr, P: tl.constexpr, W: tl.constexpr, Z: tl.constexpr, H: tl.constexpr,
    BZ: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    MODE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
    ATOMIC: tl.constexpr, COPIES: tl.constexpr, FULL: tl.constexpr
):
    """Gradients of BM queries and of the table.

    The gradients of the table are added to one of COPIES copies. If not ATOMIC, the gradients of all pairs of the
    queries from `start` on are stored instead, (T, 2 W + 1).
    """
    i0 = start + tl.program_id(0) * BM
    m, n, z = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BZ)
    i = i0 + m
    qq = load_tile(q, i0, m, z, inside(i, T, PRECISION), Z)
    low, span = partners(bounds, i, T, W, 0 if CAUSAL else W)
    norm, mean = tl.zeros((BM,), WIDE), tl.zeros((BM,), WIDE)
    if MODE == 0:
        norm, mean = tl.load(lse + i, mask=i < T, other=0.0), tl.load(inner + i, mask=i < T, other=0.0)
    whole = tl.arange(0, BH)
    own = load_tile(grad, i0, m, whole, inside(i, T, PRECISION), H)
    acc = tl.zeros((BM, BZ), WIDE)
    first = tl.maximum(i0 - W, 0) // BN * BN
    last = tl.minimum(i0 + BM + (0 if CAUSAL else W), T)
    for j0 in range(first, last, BN):
        j = j0 + n
        kk = load_tile(k, j0, n, z, inside(j, T, PRECISION), Z)
        s, ok, index = pair_scores(
            qq, kk, i, j, low, span, positions, table, T, MIDDLE, P, W, CAUSAL, BIAS, False,
            PRECISION, WIDE, ASM
        )
        fine = inside(j, T, PRECISION)
        if PRECISION != "tf32":
            fine = tl.load(broken + j, mask=fine, other=1) == 0
        dp = tl.zeros((BM, BN), WIDE)
        if BH >= H:
            dp = tl.dot(own, tl.trans(load_tile(v, j0, n, whole, fine, H)), input_precision=PRECISION, out_dtype=WIDE)
        for h0 in range(0, H if BH < H else 0, BH):
            h = h0 + tl.arange(0, BH)
            dd, vv = load_tile(grad, i0, m, h, inside(i, T, PRECISION), H), load_tile(v, j0, n, h, fine, H)
            dp = tl.dot(dd, tl.trans(vv), dp, input_precision=PRECISION, out_dtype=WIDE)
        if DROPOUT > 0:
            dp = drop_weights(dp, seed, i[:, None], j[None, :], DROPOUT)
        ds = score_gradients(s, ok, dp, norm[:, None], mean[:, None], MODE, ASM)
        if PRECISION == "tf32":
            kk = tl.trans(load_turned(turned_k, j0, n, z, Z, BN))
        # With a number above 0 this sum is not accumulated in the tensor cores. Otherwise, in a loop without an inner
        # loop, the compiler would wait for every step of every product.
        BITS: tl.constexpr = 32 if PRECISION == "tf32" and BH >= H else 0
        acc += tl.dot(
            factor(ds, kk, PRECISION), kk, input_precision=PRECISION, max_num_imprecise_acc=BITS, out_dtype=WIDE
        )
        if BIAS > 0:
            if ATOMIC and FULL:
                add_to(dtable + (tl.program_id(0) % COPIES) * P, index, ds)
            elif ATOMIC:
                copy = (tl.program_id(0) % COPIES) * P
                tl.atomic_add(dtable + copy + index, ds, mask=ok, sem="relaxed")
            else:
                pair = (i - start)[:, None].to(tl.int64) * (2 * W + 1) + (j[None, :] - i[:, None] + W)
                tl.store(dtable + pair, ds, mask=ok)
    store_tile(dq, i0, m, z, acc, i < T, Z)


@triton.jit(do_not_specialize=["T"])
def grad_keys(
    q, turned_q, k, v, bounds, positions, table, broken, seed, grad, lse, inner, dk, T,
    MIDDLE: tl.constexpr, P: tl.constexpr, W: tl.constexpr, Z: tl.constexpr, H: tl.constexpr,
    BZ: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    MODE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr
):
    """Gradients of BN keys."""
    j0 = tl.program_id(0) * BN
    m, n, z = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BZ)
    j = j0 + n
    kk = load_tile(k, j0, n, z, inside(j, T, PRECISION), Z)
    low, span = partners(bounds, j, T, 0 if CAUSAL else W, W)
    fine = inside(j, T, PRECISION)
    if PRECISION != "tf32":
        fine = tl.load(broken + j, mask=fine, other=1) == 0
    whole = tl.arange(0, BH)
    own = load_tile(v, j0, n, whole, fine, H)
    acc = tl.zeros((BN, BZ), WIDE)
    first = (j0 if CAUSAL else tl.maximum(j0 - W, 0)) // BM * BM
    last = tl.minimum(j0 + BN + W, T)
    for i0 in range(first, last, BM):
        i = i0 + m
        qq = load_tile(q, i0, m, z, inside(i, T, PRECISION), Z)
        s, ok, _ = pair_scores(
            kk, qq, j, i, low, span, positions, table, T, MIDDLE, P, W, CAUSAL, BIAS, True,
            PRECISION, WIDE, ASM
        )
        dp = tl.zeros((BN, BM), WIDE)
        if BH >= H:
            dd = load_tile(grad, i0, m, whole, inside(i, T, PRECISION), H)
            dp = tl.dot(own, tl.trans(dd), input_precision=PRECISION, out_dtype=WIDE)
        for h0 in range(0, H if BH < H else 0, BH):
            h = h0 + tl.arange(0, BH)
            dd, vv = load_tile(grad, i0, m, h, inside(i, T, PRECISION), H), load_tile(v, j0, n, h, fine, H)
            dp = tl.dot(vv, tl.trans(dd), dp, input_precision=PRECISION, out_dtype=WIDE)
        if DROPOUT > 0:
            dp = drop_weights(dp, seed, i[None, :], j[:, None], DROPOUT)
        norm, mean = tl.zeros((BM,), WIDE), tl.zeros((BM,), WIDE)
        if MODE == 0:
            norm, mean = tl.load(lse + i), tl.load(inner + i)
        ds = score_gradients(s, ok, dp, norm[None, :], mean[None, :], MODE, ASM)
        if PRECISION == "tf32":
            qq = tl.trans(load_turned(turned_q, i0, m, z, Z, BM))
        acc = tl.dot(factor(ds, qq, PRECISION), qq, acc, input_precision=PRECISION, out_dtype=WIDE)
    store_tile(dk, j0, n, z, acc, j < T, Z)


@triton.jit(do_not_specialize=["T"])
def grad_values(
    q, k, bounds, positions, table, seed, turned_grad, lse, dv, T,
    MIDDLE: tl.constexpr, P: tl.constexpr, W: tl.constexpr, Z: tl.constexpr, H: tl.constexpr,
    BZ: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr,
    MODE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr
):
    """A slice of BH channels of the gradients of BN values."""
    j0 = tl.program_id(0) * BN
    m, n, z = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BZ)
    j = j0 + n
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    kk = load_tile(k, j0, n, z, inside(j, T, PRECISION), Z)
    low, span = partners(bounds, j, T, 0 if CAUSAL else W, W)
    acc = tl.zeros((BN, BH), WIDE)
    first = (j0 if CAUSAL else tl.maximum(j0 - W, 0)) // BM * BM
    last = tl.minimum(j0 + BN + W, T)
    for i0 in range(first, last, BM):
        i = i0 + m
        qq = load_tile(q, i0, m, z, inside(i, T, PRECISION), Z)
        s, ok, _ = pair_scores(
            kk, qq, j, i, low, span, positions, table, T, MIDDLE, P, W, CAUSAL, BIAS, True,
            PRECISION, WIDE, ASM
        )
        if MODE == 0:
            norm = tl.load(lse + i)
            p = tl.where(ok, exponential(s - norm[None, :], ASM), 0.0)
        else:
            p = score_weights(s, ok, MODE)
        if DROPOUT > 0:
            p = drop_weights(p, seed, i[None, :], j[:, None], DROPOUT)
        if PRECISION == "tf32":
            dd = tl.trans(load_turned(turned_grad, i0, m, h, H, BM))
        else:
            dd = load_tile(turned_grad, i0, m, h, i < T, H)
        acc = tl.dot(factor(p, dd, PRECISION), dd, acc, input_precision=PRECISION, out_dtype=WIDE)
    store_tile(dv, j0, n, h, acc, j < T, H)
