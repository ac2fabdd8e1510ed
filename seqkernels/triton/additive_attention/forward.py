"""Scores of pairs of a query and a key, softmax, and weighted values.

tanh(q + k) = 1 - 2 r with r = 1 / (1 + e^2q e^2k): a tile takes exponentials of its queries and keys, and one
reciprocal per pair and unit. The product overflows where an element is beyond the bound; the tile then takes the
exponential of each pair.

Dimensions: B batch, Tq queries, Tk keys, H hidden units, Dv columns of the values.
"""

from __future__ import annotations

import triton
import triton.language as tl

BOUND32 = tl.constexpr(21.0)  # e^(4 bound) is finite
BOUND64 = tl.constexpr(175.0)


@triton.jit
def load_tile(p, first_t, first_h, T, H, ROWS: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    """[ROWS, BH] of the contiguous rows [T, H] at p; zeros beyond the last row and column."""
    i_t = first_t + tl.arange(0, ROWS)
    i_h = first_h + tl.arange(0, BH)
    p = p + i_t.to(tl.int64)[:, None] * H + i_h[None, :]
    return tl.load(p, mask=(i_t < T)[:, None] & (i_h < H)[None, :], other=0.0).to(ACC)


@triton.jit
def beyond_bound(b_x):
    """Whether an element of [rows, BH] is too large for the reciprocal form. NaN is not: the result is NaN anyway."""
    BOUND: tl.constexpr = BOUND64 if b_x.dtype == tl.float64 else BOUND32
    return tl.max(tl.reshape((tl.abs(b_x) > BOUND).to(tl.int32), [b_x.shape[0] * b_x.shape[1]]), 0) != 0


@triton.jit
def pairs(b_x, b_y):
    """r = (1 - tanh(x + y)) / 2 of all pairs of a row of x [X, BH] and one of y [Y, BH]: [X, Y, BH]."""
    if beyond_bound(b_x) | beyond_bound(b_y):
        b_e = tl.exp(2.0 * (b_x[:, None, :] + b_y[None, :, :]))
    else:
        b_e = tl.exp(2.0 * b_x)[:, None, :] * tl.exp(2.0 * b_y)[None, :, :]
    return 1.0 / (1.0 + b_e)


@triton.jit
def keys_of(p_lengths, i_b, Tk):
    """Number of keys of a sequence, clamped to the tensor."""
    if p_lengths is not None:
        return tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 0), Tk).to(tl.int32)
    return Tk


@triton.jit
def extents(p_lengths, i_b, R, N, OF_ROWS: tl.constexpr):
    """Numbers of rows and of others of a sequence, whose lengths are those of the rows or of the others."""
    if OF_ROWS:
        return keys_of(p_lengths, i_b, R), N
    return R, keys_of(p_lengths, i_b, N)


# Grid: sequences, tiles of queries, tiles of keys.
@triton.jit(do_not_specialize=["Tq", "Tk", "s_mask_b", "s_mask_q"])
def additive_attention_scores_kernel(
    p_query,  # [B, Tq, H]
    p_key,  # [B, Tk, H]
    p_v,  # [H]
    p_mask,  # uint8, strides s_mask_b, s_mask_q, 1; or None
    p_lengths,  # [B] or None
    p_scores,  # [B, Tq, Tk] of the compute type, written; -inf for hidden keys
    s_mask_b,
    s_mask_q,
    Tq,
    Tk,
    H,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    ACC: tl.constexpr = p_scores.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    first_q = tl.program_id(1) * BM
    first_k = tl.program_id(2) * BN
    n = keys_of(p_lengths, i_b, Tk)
    i_q = first_q + tl.arange(0, BM)
    i_k = first_k + tl.arange(0, BN)
    b_s = tl.zeros([BM, BN], ACC)
    if first_k < n:
        for h in range(0, H, BH):
            i_h = h + tl.arange(0, BH)
            b_v = tl.load(p_v + i_h, mask=i_h < H, other=0.0).to(ACC)
            b_q = load_tile(p_query + i_b * Tq * H, first_q, h, Tq, H, BM, BH, ACC)
            b_k = load_tile(p_key + i_b * Tk * H, first_k, h, n, H, BN, BH, ACC)
            b_s += tl.sum((1.0 - 2.0 * pairs(b_q, b_k)) * b_v[None, None, :], 2)
    m_seen = (i_k < n)[None, :] & (i_q < Tq)[:, None]
    if p_mask is not None:
        p_m = p_mask + i_b * s_mask_b + i_q[:, None] * s_mask_q + i_k[None, :]
        m_seen = m_seen & (tl.load(p_m, mask=m_seen, other=0) != 0)
    b_s = tl.where(m_seen, b_s, float("-inf"))
    o = (i_b * Tq + i_q)[:, None] * Tk + i_k[None, :]
    tl.store(p_scores + o, b_s, mask=(i_q < Tq)[:, None] & (i_k < Tk)[None, :])


# Grid: queries of all sequences.
@triton.jit(do_not_specialize=["Tq", "Tk"])
def additive_attention_softmax_kernel(
    p_scores,  # [B, Tq, Tk], replaced by the weights
    p_lengths,  # [B] or None
    Tq,
    Tk,
    BN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    n = keys_of(p_lengths, i_row // Tq, Tk)
    p_row = p_scores + i_row * Tk
    ACC: tl.constexpr = p_scores.dtype.element_ty
    b_top = tl.full([BN], float("-inf"), ACC)
    b_sum = tl.zeros([BN], ACC)
    for first in range(0, n, BN):
        i_k = first + tl.arange(0, BN)
        b_s = tl.load(p_row + i_k, mask=i_k < n, other=float("-inf"))
        b_next = tl.where(b_s > b_top, b_s, b_top)
        b_less = tl.where(b_next == float("-inf"), 0.0, b_next)
        b_sum = b_sum * tl.exp(b_top - b_less) + tl.exp(b_s - b_less)
        b_top = b_next
    top = tl.max(b_top, 0)
    less = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(b_sum * tl.exp(b_top - less), 0)
    factor = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    for first in range(0, Tk, BN):
        i_k = first + tl.arange(0, BN)
        b_s = tl.load(p_row + i_k, mask=i_k < n, other=float("-inf"))
        tl.store(p_row + i_k, tl.exp(b_s - less) * factor, mask=i_k < Tk)


# Grid: sequences, tiles of rows, tiles of columns.
@triton.jit(do_not_specialize=["s_w_b", "s_w_r", "s_w_t", "R", "T"])
def additive_attention_product_kernel(
    p_w,  # [B, R, T], strides s_w_b, s_w_r, s_w_t: weights, or their transpose
    p_x,  # [B, T, D]
    p_lengths,  # [B] number of terms, or of rows if OF_ROWS; or None
    p_out,  # [B, R, D], written: w x
    s_w_b,
    s_w_r,
    s_w_t,
    R,
    T,
    D,
    OF_ROWS: tl.constexpr,
    SKIP: tl.constexpr,  # terms of weight 0 are skipped, whatever x is
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    ACC: tl.constexpr = p_w.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    first_r = tl.program_id(1) * BM
    first_d = tl.program_id(2) * BD
    rows, terms = extents(p_lengths, i_b, R, T, OF_ROWS)
    i_r = first_r + tl.arange(0, BM)
    i_d = first_d + tl.arange(0, BD)
    b_out = tl.zeros([BM, BD], ACC)
    for first in range(0, terms, BN):
        i_t = first + tl.arange(0, BN)
        p = p_w + i_b * s_w_b + i_r.to(tl.int64)[:, None] * s_w_r + i_t.to(tl.int64)[None, :] * s_w_t
        b_w = tl.load(p, mask=(i_r < rows)[:, None] & (i_t < terms)[None, :], other=0.0)
        b_x = load_tile(p_x + i_b * T * D, first, first_d, terms, D, BN, BD, ACC)
        if SKIP:
            b_product = b_w[:, :, None] * b_x[None, :, :]
            b_out += tl.sum(tl.where((b_w == 0)[:, :, None], 0.0, b_product), 1)
        else:
            b_out = tl.dot(b_w, b_x, b_out, input_precision="ieee", out_dtype=ACC)
    o = (i_b * R + i_r)[:, None] * D + i_d[None, :]
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=(i_r < R)[:, None] & (i_d < D)[None, :])
