"""Gradients of the scores, and of queries, keys and v.

Given the gradient g of the scores, each hidden unit is independent: dq = 4 v sum_k g r (1 - r), dk the same over the
queries, and dv = sum g (1 - 2 r). No sum is shared by programs.

Dimensions: B batch, Tq queries, Tk keys, H hidden units, Dv columns of the values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import extents, keys_of, load_tile, pairs


# Grid: sequences, tiles of queries, tiles of keys.
@triton.jit(do_not_specialize=["Tq", "Tk"])
def additive_attention_weight_gradient_kernel(
    p_dout,  # [B, Tq, Dv] or None
    p_value,  # [B, Tk, Dv]
    p_dweights,  # [B, Tq, Tk] or None
    p_lengths,  # [B] or None
    p_g,  # [B, Tq, Tk], written: dout value^T + dweights
    Tq,
    Tk,
    D,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    ACC: tl.constexpr = p_g.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    first_q = tl.program_id(1) * BM
    first_k = tl.program_id(2) * BN
    n = keys_of(p_lengths, i_b, Tk)
    i_q = first_q + tl.arange(0, BM)
    i_k = first_k + tl.arange(0, BN)
    b_g = tl.zeros([BM, BN], ACC)
    if p_dout is not None:
        for d in range(0, D, BD):
            b_do = load_tile(p_dout + i_b * Tq * D, first_q, d, Tq, D, BM, BD, ACC)
            b_x = load_tile(p_value + i_b * Tk * D, first_k, d, n, D, BN, BD, ACC)
            b_g = tl.dot(b_do, tl.trans(b_x), b_g, input_precision="ieee", out_dtype=ACC)
    o = (i_b * Tq + i_q)[:, None] * Tk + i_k[None, :]
    m = (i_q < Tq)[:, None] & (i_k < n)[None, :]
    if p_dweights is not None:
        b_g += tl.load(p_dweights + o, mask=m, other=0.0)
    tl.store(p_g + o, b_g, mask=m)


# Grid: queries of all sequences.
@triton.jit(do_not_specialize=["Tq", "Tk"])
def additive_attention_softmax_gradient_kernel(
    p_weights,  # [B, Tq, Tk]
    p_lengths,  # [B] or None
    p_g,  # [B, Tq, Tk]: gradient of the weights, replaced by that of the scores
    Tq,
    Tk,
    BN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    n = keys_of(p_lengths, i_row // Tq, Tk)
    o_row = i_row * Tk
    b_dot = tl.zeros([BN], p_g.dtype.element_ty)
    for first in range(0, n, BN):
        i_k = first + tl.arange(0, BN)
        b_w = tl.load(p_weights + o_row + i_k, mask=i_k < n, other=0.0)
        b_g = tl.load(p_g + o_row + i_k, mask=i_k < n, other=0.0)
        b_dot += tl.where(b_w == 0, 0.0, b_w * b_g)  # a hidden key has no gradient, whatever its value
    mean = tl.sum(b_dot, 0)
    for first in range(0, Tk, BN):
        i_k = first + tl.arange(0, BN)
        b_w = tl.load(p_weights + o_row + i_k, mask=i_k < n, other=0.0)
        b_g = tl.load(p_g + o_row + i_k, mask=i_k < n, other=0.0)
        tl.store(p_g + o_row + i_k, tl.where(b_w == 0, 0.0, b_w * (b_g - mean)), mask=i_k < Tk)


# Grid: sequences, tiles of rows, tiles of hidden units. Rows are queries and others keys, or the reverse.
@triton.jit(do_not_specialize=["s_row", "s_other", "R", "N"])
def additive_attention_rows_gradient_kernel(
    p_row,  # [B, R, H]
    p_other,  # [B, N, H]
    p_v,  # [H]
    p_lengths,  # [B] number of others, or of rows if OF_ROWS; or None
    p_g,  # [B, Tq, Tk] with strides s_row and s_other of a row and another
    p_drow,  # [B, R, H], written
    p_dv,  # [B, tiles of rows, H], written; or None
    s_row,
    s_other,
    R,
    N,
    H,
    OF_ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    ACC: tl.constexpr = p_g.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1) * BM
    first_h = tl.program_id(2) * BH
    n_rows, n_others = extents(p_lengths, i_b, R, N, OF_ROWS)
    i_row = first_row + tl.arange(0, BM)
    i_h = first_h + tl.arange(0, BH)
    b_v = tl.load(p_v + i_h, mask=i_h < H, other=0.0).to(ACC)
    b_x = load_tile(p_row + i_b * R * H, first_row, first_h, n_rows, H, BM, BH, ACC)
    b_dx = tl.zeros([BM, BH], ACC)
    b_dv = tl.zeros([BM, BH], ACC)
    for first in range(0, n_others, BN):
        i_other = first + tl.arange(0, BN)
        b_y = load_tile(p_other + i_b * N * H, first, first_h, n_others, H, BN, BH, ACC)
        p = p_g + i_b * R * N + i_row.to(tl.int64)[:, None] * s_row + i_other.to(tl.int64)[None, :] * s_other
        b_g = tl.load(p, mask=(i_row < n_rows)[:, None] & (i_other < n_others)[None, :], other=0.0)[:, :, None]
        b_r = pairs(b_x, b_y)
        b_dx += tl.sum(tl.where(b_g == 0, 0.0, b_g * (b_r - b_r * b_r)), 1)
        if p_dv is not None:
            b_dv += tl.sum(tl.where(b_g == 0, 0.0, b_g * (1.0 - 2.0 * b_r)), 1)
    o = (i_b * R + i_row)[:, None] * H + i_h[None, :]
    m_h = i_h < H
    b_dx = 4.0 * b_v[None, :] * b_dx
    tl.store(p_drow + o, b_dx.to(p_drow.dtype.element_ty), mask=(i_row < R)[:, None] & m_h[None, :])
    if p_dv is not None:
        o_dv = (i_b * tl.num_programs(1) + tl.program_id(1)) * H + i_h
        tl.store(p_dv + o_dv, tl.sum(b_dv, 0), mask=m_h)
