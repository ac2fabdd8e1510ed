"""Scaled-dot-product attention in Triton, forward and backward.

Dimensions: B batch, or sequences of packed rows; H heads, G query heads of one key head, Tq and Tk rows, D columns of q
and k, Dv of v. Needs torch and Triton alone.

The scores of a block of rows against a block of keys are kept in units of log2, so that the exponential is exp2. Keys
come in three runs: a border on the left, whole blocks that every row of the block sees, and a border on the right; what
a row sees is only asked in the borders, and blocks that no row sees are not visited. Backward computes the scores
twice, once by rows for dq and once by keys for dk and dv, and so needs no atomics.

Heads of more columns than LARGEST are wide: scores are then sums over chunks of columns, read anew for every block, and
a program makes one chunk of columns of its result, from scores of its own.

Source: https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/2307.08691
"""

# ruff: noqa: SIM102
# In a kernel the outer of two conditions is known when it is compiled, and the inner one is not.

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_LOWEST64 = tl.constexpr(-1.7976931348623157e308)

# ---- parts


@triton.jit
def _real(bits, ACC: tl.constexpr):
    """A number whose float64 bits came as an integer: a float argument would be rounded to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def _sequence(p_cu, p_lengths, i_b, T):
    """First row of a sequence and number of its rows, never outside of the T that there are."""
    begin = (T * 0).to(tl.int64)
    end = T.to(tl.int64)
    if p_cu is not None:
        begin = tl.minimum(tl.maximum(tl.load(p_cu + i_b).to(tl.int64), begin), end)
        end = tl.minimum(tl.maximum(tl.load(p_cu + i_b + 1).to(tl.int64), begin), end)
    elif p_lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(p_lengths + i_b).to(tl.int64), begin), end)
    return begin, (end - begin).to(tl.int32)


@triton.jit
def _clear_after(
    p_out, p_cu, B, T, i_h, i_block, blocks, first_d, value, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):
    """The value in the rows of this head that come after the last sequence, columns `first_d` and following; out is
    [1, H, T, D]."""
    begin = tl.minimum(tl.maximum(tl.load(p_cu + B).to(tl.int64), 0), T)
    o_d = first_d + tl.arange(0, BD)
    for first in range(begin + i_block * ROWS, T, blocks * ROWS):
        o_t = first + tl.arange(0, ROWS)
        p = p_out + (i_h.to(tl.int64) * T + o_t)[:, None] * D + o_d[None, :]
        tl.store(p, tl.full([ROWS, BD], value, p_out.dtype.element_ty), mask=(o_t < T)[:, None] & (o_d < D)[None, :])


@triton.jit
def _tile(p, first, L, s_t, s_d, WHOLE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD] from row `first` of L; zeros where there is no row, which cannot be if WHOLE, or no column."""
    i_t = tl.arange(0, ROWS)
    i_d = tl.arange(0, BD)
    p = p + tl.cast(first, tl.int64) * s_t + (i_t[:, None] * s_t + i_d[None, :] * s_d)
    if WHOLE:
        if D == BD:
            return tl.load(p)
        return tl.load(p, mask=(i_d < D)[None, :], other=0.0)
    if D == BD:
        return tl.load(p, mask=(first + i_t < L)[:, None], other=0.0)
    return tl.load(p, mask=(first + i_t < L)[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def _chunk(p, first, L, first_d, s_t, s_d, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD] from row `first` of L and column `first_d` of D; zeros where there is no row or no column."""
    i_t = tl.arange(0, ROWS)
    i_d = first_d + tl.arange(0, BD)
    p = p + tl.cast(first, tl.int64) * s_t + (i_t[:, None] * s_t + i_d[None, :] * s_d)
    return tl.load(p, mask=(first + i_t < L)[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def _product(
    p_x,
    first_x,
    L_x,
    s_xt,
    s_xd,
    p_y,
    first_y,
    L_y,
    s_yt,
    s_yd,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
):
    """[BX, BY] products of rows of x and of y; of wide heads they are read in chunks of columns."""
    if D <= BD:
        b_x = _tile(p_x, first_x, L_x, s_xt, s_xd, False, D, BD, BX)
        b_y = _tile(p_y, first_y, L_y, s_yt, s_yd, False, D, BD, BY)
        return tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION, out_dtype=ACC)
    b_z = tl.zeros([BX, BY], ACC)
    for first_d in range(0, D, BD):
        b_x = _chunk(p_x, first_x, L_x, first_d, s_xt, s_xd, D, BD, BX)
        b_y = _chunk(p_y, first_y, L_y, first_d, s_yt, s_yd, D, BD, BY)
        b_z = tl.dot(b_x, tl.trans(b_y), b_z, input_precision=PRECISION, out_dtype=ACC)
    return b_z


@triton.jit
def _has_nan(x):  # in one step: of two, Triton 3.6 makes no code for sm_100
    return tl.max(tl.reshape((x != x).to(tl.int32), [x.shape[0] * x.shape[1]]), 0) != 0


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """Near 0 the quotient cancels; there the polynomials of the Cephes library, http://www.netlib.org/cephes"""
    if EXACT:
        e = tl.exp2(-2.0 * _LOG2E * tl.abs(x))
        y = (1.0 - e) / (1.0 + e)
        near = tl.minimum(tl.maximum(x, -1.0), 1.0)  # farther off they do not hold, and shall not overflow
        z = near * near
        if x.dtype == tl.float64:
            above = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
            below = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
            r = above / below
        else:
            r = -5.70498872745e-3 * z + 2.06390887954e-2
            r = (r * z - 5.37397155531e-2) * z + 1.33314422036e-1
            r = r * z - 3.33332819422e-1
        y = tl.where(z < 0.390625, near + near * z * r, tl.where(x < 0, -y, y))
        return tl.where(x == x, y, x)
    return 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * _LOG2E * x))


@triton.jit
def _hide(b_s, i_q, i_k, L_k, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """-inf where a row does not see the key."""
    m_seen = i_k < L_k
    if RIGHT:
        m_seen = m_seen & (i_k <= i_q + (offset + right))
    if LEFT:
        m_seen = m_seen & (i_k >= i_q + (offset - left))
    return tl.where(m_seen, b_s, float("-inf"))


@triton.jit
def _score(
    b_s,  # q.k, [rows, keys] or [keys, rows]
    first,  # row
    i_q,  # positions in their sequences, to broadcast with it
    i_k,
    L_k,
    offset,
    left,
    right,
    p_mask,  # of this batch and head
    s_mq,
    s_mk,
    T_mq,
    T_mk,
    slope,
    scale,
    cap,
    EDGE: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The scores in units of log2, -inf where a row does not see the key; and tanh(score / cap)."""
    b_t = b_s
    if CAP:
        b_t = _tanh(b_s * (scale / cap), EXACT)
        b_s = b_t * (cap * _LOG2E)
    else:
        b_s = b_s * (scale * _LOG2E)
    if ALIBI:
        b_s -= (slope * _LOG2E) * tl.abs(i_q + offset - i_k).to(b_s.dtype)
    if p_mask is not None:
        o_q = tl.minimum(i_q, T_mq - 1) - first
        o_k = tl.minimum(i_k, T_mk - 1)
        b_m = tl.load(p_mask + tl.cast(first, tl.int64) * s_mq + (o_q * s_mq + o_k * s_mk))
        if p_mask.dtype.element_ty == tl.uint8:
            b_s = tl.where(b_m != 0, b_s, float("-inf"))
        else:
            b_m = b_m.to(b_s.dtype)
            # The lowest finite number stays finite, as a mask made of it does in torch.
            b_s += tl.maximum(b_m * _LOG2E, _LOWEST64 if b_s.dtype == tl.float64 else _LOWEST)
            b_s = tl.where(b_m == float("-inf"), float("-inf"), b_s)
    if EDGE:
        b_s = _hide(b_s, i_q, i_k, L_k, offset, left, right, LEFT, RIGHT)
    return b_s, b_t


@triton.jit
def _kept(seed, i_q, first_k, i_bh, threshold, TRANSPOSED: tl.constexpr, BN: tl.constexpr):
    """Which of the weights [rows, BN], or transposed, dropout keeps: four keys to one Philox counter."""
    i_k = first_k // 4 + tl.arange(0, BN // 4)
    if TRANSPOSED:
        c_k = i_k[:, None] + (i_q * 0)[None, :]
        c_q = (i_k * 0)[:, None] + i_q[None, :]
    else:
        c_k = i_k[None, :] + (i_q * 0)[:, None]
        c_q = (i_k * 0)[None, :] + i_q[:, None]
    r0, r1, r2, r3 = tl.philox(seed, c_k, c_q, c_k * 0 + i_bh, c_k * 0, n_rounds=7)
    t = threshold.to(tl.uint32)
    r02 = tl.join((r0 >= t).to(tl.int8), (r2 >= t).to(tl.int8))
    r13 = tl.join((r1 >= t).to(tl.int8), (r3 >= t).to(tl.int8))
    r = tl.join(r02, r13)  # [.., .., 2, 2]: word 2 x + y at [x, y]
    if TRANSPOSED:
        b_kept = tl.reshape(tl.permute(r, (0, 2, 3, 1)), (BN, i_q.shape[0]))
    else:
        b_kept = tl.reshape(r, (i_q.shape[0], BN))
    return b_kept != 0


@triton.jit
def _seen_keys(
    first, L_q, L_k, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Of the keys that rows `first` and following see: where they begin, from where to where each row sees whole
    blocks, and the end."""
    last = tl.minimum(first + BM, L_q) - 1
    begin = first * 0
    whole = begin
    end = tl.where(first < L_q, L_k, 0)
    until = end
    if RIGHT:
        until = tl.minimum(end, tl.maximum(first + offset + right + 1, 0))
        end = tl.minimum(end, tl.maximum(last + offset + right + 1, 0))
    if LEFT:
        begin = tl.maximum(first + offset - left, 0) // BN * BN
        whole = tl.minimum((tl.maximum(last + offset - left, 0) + BN - 1) // BN * BN, end)
    return begin, whole, tl.maximum(until // BN * BN, whole), end


@triton.jit
def _seeing_rows(
    first, L_q, L_k, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """The same of the rows that see keys `first` and following."""
    last = tl.minimum(first + BN, L_k) - 1
    begin = first * 0
    whole = begin
    end = tl.where(first < L_k, L_q, 0)
    until = end
    if LEFT:
        until = tl.minimum(end, tl.maximum(first - offset + left + 1, 0))
        end = tl.minimum(end, tl.maximum(last - offset + left + 1, 0))
    if RIGHT:
        begin = tl.maximum(first - offset - right, 0) // BM * BM
        whole = tl.minimum((tl.maximum(last - offset - right, 0) + BM - 1) // BM * BM, end)
    return begin, whole, tl.maximum(until // BM * BM, whole), end


# ---- forward


@triton.jit
def _attend(
    b_acc,  # [BM, BDV]
    b_max,  # [BM] of the scores so far, in units of log2
    b_sum,  # [BM]
    b_q,  # unless heads are wide: then rows are read again
    begin,
    end,
    first_q,
    i_q,
    L_q,
    L_k,
    first_v,  # column of the values
    p_q,
    p_k,
    p_v,
    s_qt,
    s_qd,
    s_kt,
    s_kd,
    s_vt,
    s_vd,
    offset,
    left,
    right,
    p_mask,
    s_mq,
    s_mk,
    T_mq,
    T_mk,
    slope,
    scale,
    cap,
    seed,
    i_bh,
    threshold,
    EDGE: tl.constexpr,
    LEAN: tl.constexpr,  # on registers
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = b_acc.dtype
    PLAIN: tl.constexpr = not (EDGE or CAP or ALIBI or p_mask is not None)
    EXACT: tl.constexpr = b_q.dtype.primitive_bitwidth >= 32
    WIDE: tl.constexpr = D > BD or DV > BDV
    BM: tl.constexpr = b_acc.shape[0]
    for first in tl.range(begin, end, BN, disable_licm=EDGE or LEAN):
        if WIDE:
            b_s = _product(
                *(p_q, first_q, L_q, s_qt, s_qd, p_k, first, L_k, s_kt, s_kd, ACC, PRECISION, D, BD, BM, BN),
            )
        else:
            b_k = _tile(p_k, first, L_k, s_kt, s_kd, not EDGE, D, BD, BN)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        if PLAIN:
            b_top = tl.maximum(b_max, tl.max(b_s, 1) * (scale * _LOG2E))
            b_p = tl.exp2(b_s * (scale * _LOG2E) - b_top[:, None])
            b_less = tl.exp2(b_max - b_top)
        else:
            i_k = first + tl.arange(0, BN)
            b_s, _ = _score(
                b_s,
                *(first_q, i_q[:, None], i_k[None, :], L_k, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
                *(slope, scale, cap, EDGE, LEFT, RIGHT, CAP, ALIBI, EXACT),
            )
            b_top = tl.maximum(b_max, tl.max(b_s, 1))
            b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
            b_p = tl.exp2(b_s - b_base[:, None])
            b_less = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_less + tl.sum(b_p, 1)
        b_acc = b_acc * b_less[:, None]
        b_max = b_top
        if DROPOUT:
            b_p = tl.where(_kept(seed, i_q, first, i_bh, threshold, False, BN), b_p, 0.0)
        if WIDE:
            b_v = _chunk(p_v, first, L_k, first_v, s_vt, s_vd, DV, BDV, BN)
        else:
            b_v = _tile(p_v, first, L_k, s_vt, s_vd, not EDGE, DV, BDV, BN)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION, out_dtype=ACC)
    return b_acc, b_max, b_sum


_SIZES = ["B", "H", "G", "T_q", "T_k", "T_mq", "T_mk", "blocks", "scale", "cap", "left", "right", "lower"]
_SIZES += ["threshold", "rescale"]


# Grid: blocks of rows of each head of each sequence; one sequence more where rows are packed, for the rows that follow
# the last one. With a bound on the right, the longest rows of a head come first. Wide heads are read in chunks of BD
# and BDV columns, and the second dimension of the grid is the chunks of the result: each makes the scores anew.
@triton.jit(do_not_specialize=_SIZES)
def attention_forward_kernel(
    p_q,  # [B, H, Tq, D], packed [1, H, Nq, D]
    p_k,  # [B, H / G, Tk, D]
    p_v,  # [B, H / G, Tk, Dv]
    p_mask,  # [B or 1, H or 1, Tq or 1, Tk or 1], or None
    p_slopes,  # [B or 1, H] or None
    p_q_lengths,  # [B] or None
    p_k_lengths,  # [B] or None
    p_cu_q,  # [B + 1] or None
    p_cu_k,  # [B + 1] or None
    p_seed,  # int64 [1] or None
    p_out,  # [B, H, Tq, Dv]
    p_lse,  # [B, H, Tq]
    s_qb,
    s_qh,
    s_qt,
    s_qd,
    s_kb,
    s_kh,
    s_kt,
    s_kd,
    s_vb,
    s_vh,
    s_vt,
    s_vd,
    s_mb,
    s_mh,
    s_mq,
    s_mk,
    s_slope,  # of the batch
    B,
    H,
    G,
    T_q,
    T_k,
    T_mq,
    T_mk,
    blocks,
    scale,  # this, cap and rescale: bits of float64
    cap,
    left,
    right,
    lower,
    threshold,
    rescale,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if p_q.dtype.element_ty == tl.float64 else tl.float32
    ALIBI: tl.constexpr = p_slopes is not None
    DROPOUT: tl.constexpr = p_seed is not None
    PACKED: tl.constexpr = p_cu_q is not None
    WIDE: tl.constexpr = D > BD or DV > BDV
    first_v = tl.program_id(1) * BDV if WIDE else 0
    EXACT: tl.constexpr = p_q.dtype.element_ty.primitive_bitwidth >= 32
    i_block = tl.program_id(0) % blocks
    i_bh = tl.program_id(0) // blocks
    i_b = i_bh // H
    i_h = i_bh % H
    if RIGHT:
        i_block = blocks - 1 - i_block
    if PACKED:
        if i_b == B:
            _clear_after(p_out, p_cu_q, B, T_q, i_h, i_block, blocks, first_v, 0.0, DV, BDV, BM)
            if not WIDE or first_v == 0:
                _clear_after(p_lse, p_cu_q, B, T_q, i_h, i_block, blocks, 0, float("-inf"), 1, 1, BM)
            return
    t_q, L_q = _sequence(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = _sequence(p_cu_k, p_k_lengths, i_b, T_k)
    rows = L_q if PACKED else T_q  # that there are to be written
    first = i_block * BM
    if first >= rows:
        return
    i_bq = i_b.to(tl.int64) * 0 if PACKED else i_b.to(tl.int64)
    i_hk = (i_h // G).to(tl.int64)
    p_q += i_bq * s_qb + i_h.to(tl.int64) * s_qh + t_q * s_qt
    p_k += i_bq * s_kb + i_hk * s_kh + t_k * s_kt
    p_v += i_bq * s_vb + i_hk * s_vh + t_k * s_vt
    if p_mask is not None:
        p_mask += i_b.to(tl.int64) * s_mb + i_h.to(tl.int64) * s_mh
    scale = _real(scale, ACC)
    cap = _real(cap, ACC)
    slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
    seed = tl.load(p_seed) if DROPOUT else i_b
    offset = (L_k - L_q) * lower

    i_q = first + tl.arange(0, BM)
    if WIDE:
        b_q = tl.zeros([BM, BD], p_q.dtype.element_ty)
    else:
        b_q = _tile(p_q, first, L_q, s_qt, s_qd, False, D, BD, BM)
    b_acc = tl.zeros([BM, BDV], ACC)
    b_max = tl.full([BM], float("-inf"), ACC)
    b_sum = tl.zeros([BM], ACC)
    begin, whole, until, end = _seen_keys(first, L_q, L_k, offset, left, right, LEFT, RIGHT, BM, BN)
    if LEFT:
        b_acc, b_max, b_sum = _attend(
            *(b_acc, b_max, b_sum, b_q, begin, whole, first, i_q, L_q, L_k, first_v, p_q, p_k, p_v),
            *(s_qt, s_qd, s_kt, s_kd, s_vt, s_vd, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
            *(slope, scale, cap, seed, i_bh, threshold, True, PACKED, LEFT, RIGHT, CAP, ALIBI, DROPOUT),
            *(PRECISION, D, DV, BD, BDV, BN),
        )
    b_acc, b_max, b_sum = _attend(
        *(b_acc, b_max, b_sum, b_q, whole, until, first, i_q, L_q, L_k, first_v, p_q, p_k, p_v),
        *(s_qt, s_qd, s_kt, s_kd, s_vt, s_vd, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
        *(slope, scale, cap, seed, i_bh, threshold, False, PACKED, LEFT, RIGHT, CAP, ALIBI, DROPOUT),
        *(PRECISION, D, DV, BD, BDV, BN),
    )
    b_acc, b_max, b_sum = _attend(
        *(b_acc, b_max, b_sum, b_q, until, end, first, i_q, L_q, L_k, first_v, p_q, p_k, p_v),
        *(s_qt, s_qd, s_kt, s_kd, s_vt, s_vd, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
        *(slope, scale, cap, seed, i_bh, threshold, True, PACKED, LEFT, RIGHT, CAP, ALIBI, DROPOUT),
        *(PRECISION, D, DV, BD, BDV, BN),
    )

    if LEFT or RIGHT or p_mask is not None:
        # A value that is no number may have come in with weight 0, from a key that the row does not see. Then all over
        # again: finite values; then which rows see +inf or NaN; -inf or NaN; either with weight 0, which is NaN.
        if _has_nan(b_acc):
            b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
            FEW: tl.constexpr = 16  # keys at a time: two results are held here
            for kind in range(4):
                b_part = tl.zeros([BM, BDV], ACC)
                for first_k in tl.range(begin, end, FEW, num_stages=1, disable_licm=True):
                    if WIDE:
                        b_s = _product(
                            *(p_q, first, L_q, s_qt, s_qd, p_k, first_k, L_k, s_kt, s_kd, ACC, PRECISION),
                            *(D, BD, BM, FEW),
                        )
                    else:
                        b_k = _tile(p_k, first_k, L_k, s_kt, s_kd, False, D, BD, FEW)
                        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
                    i_k = first_k + tl.arange(0, FEW)
                    b_s, _ = _score(
                        b_s,
                        *(first, i_q[:, None], i_k[None, :], L_k, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
                        *(slope, scale, cap, True, LEFT, RIGHT, CAP, ALIBI, EXACT),
                    )
                    b_p = tl.exp2(b_s - b_base[:, None])
                    if DROPOUT:
                        b_p = tl.where(_kept(seed, i_q, first_k, i_bh, threshold, False, FEW), b_p, 0.0)
                    m_row = tl.where(kind == 3, (b_p == 0) & (b_s != float("-inf")), b_p > 0)
                    b_p = tl.where(kind == 0, b_p, m_row.to(ACC))
                    b_v = _chunk(p_v, first_k, L_k, first_v, s_vt, s_vd, DV, BDV, FEW)
                    m_finite = tl.abs(b_v) < float("inf")
                    m_kind = (m_finite == 0) & ((kind == 3) | (tl.where(kind == 1, b_v, -b_v) != float("-inf")))
                    b_v = tl.where(kind == 0, tl.where(m_finite, b_v, 0.0), m_kind.to(b_v.dtype))
                    b_part = tl.dot(b_p.to(b_v.dtype), b_v, b_part, input_precision=PRECISION, out_dtype=ACC)
                b_far = tl.where(kind == 3, float("nan"), tl.where(kind == 1, float("inf"), float("-inf")))
                b_acc = tl.where(kind == 0, b_part, tl.where(b_part > 0, b_acc + b_far, b_acc))

    if DROPOUT:
        b_acc = b_acc * _real(rescale, ACC)
    b_out = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    b_lse = (b_max + tl.log2(b_sum)) * _LN2
    if p_mask is not None:  # a row whose scores are all the lowest number
        LOWEST: tl.constexpr = _LOWEST64 if tl.float64 == ACC else _LOWEST
        b_lse = tl.where((b_max < LOWEST / 2) & (b_max > float("-inf")), LOWEST, b_lse)
    m_real = i_q < L_q
    b_out = tl.where(m_real[:, None], b_out, 0.0)
    b_lse = tl.where(m_real, b_lse, float("-inf"))
    o_row = (i_bq * H + i_h) * T_q + t_q + first
    i_d = first_v + tl.arange(0, BDV)
    o_out = tl.arange(0, BM)[:, None] * DV + i_d[None, :]
    m_row = i_q < rows
    m_out = m_row[:, None] if DV == BDV else m_row[:, None] & (i_d < DV)[None, :]
    tl.store(p_out + o_row * DV + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_row + tl.arange(0, BM), b_lse, mask=m_row if not WIDE else m_row & (first_v == 0))


# ---- backward


@triton.jit
def _log2_sum(p_lse, p_rest, i_t, L, ACC: tl.constexpr):
    """The numbers of p = exp2(score - one - other), from row 0 of L. The first is +inf, which makes p 0, where there is
    no row or it sees no key; the other is 0 without p_rest."""
    if p_rest is not None:
        b_base = tl.load(p_lse + i_t, mask=i_t < L, other=float("inf"))
        return b_base, tl.load(p_rest + i_t, mask=i_t < L, other=0.0)
    LOWEST: tl.constexpr = _LOWEST64 if tl.float64 == ACC else _LOWEST
    b_lse = tl.load(p_lse + i_t, mask=i_t < L, other=float("-inf"))
    b_base = tl.where(b_lse < LOWEST / 2, LOWEST, b_lse * _LOG2E)
    return tl.where(b_lse == float("-inf"), float("inf"), b_base), tl.zeros_like(b_base)


# Grid as forward. Scores of one huge size, as under a mask of the lowest number, leave no room in lse for the logarithm
# of how many they are. So what backward reads is, in units of log2, lse and 0; of such rows the largest score, and the
# logarithm of the sum beside it.
@triton.jit(do_not_specialize=_SIZES)
def attention_normaliser_kernel(
    p_q,
    p_k,
    p_mask,
    p_slopes,
    p_q_lengths,
    p_k_lengths,
    p_cu_q,
    p_cu_k,
    p_lse,  # [B, H, Tq]
    p_base,  # [B, H, Tq], written
    p_rest,  # [B, H, Tq], written
    s_qb,
    s_qh,
    s_qt,
    s_qd,
    s_kb,
    s_kh,
    s_kt,
    s_kd,
    s_mb,
    s_mh,
    s_mq,
    s_mk,
    s_slope,
    B,
    H,
    G,
    T_q,
    T_k,
    T_mq,
    T_mk,
    blocks,
    scale,
    cap,
    left,
    right,
    lower,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if p_q.dtype.element_ty == tl.float64 else tl.float32
    HUGE: tl.constexpr = 2.0**40 if tl.float64 == ACC else 4096.0
    ALIBI: tl.constexpr = p_slopes is not None
    EXACT: tl.constexpr = p_q.dtype.element_ty.primitive_bitwidth >= 32
    i_bh = tl.program_id(0) // blocks
    i_b = i_bh // H
    i_h = i_bh % H
    first = tl.program_id(0) % blocks * BM
    t_q, L_q = _sequence(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = _sequence(p_cu_k, p_k_lengths, i_b, T_k)
    if first >= L_q:
        return
    i_bq = i_b.to(tl.int64) if p_cu_q is None else i_b.to(tl.int64) * 0
    p_q += i_bq * s_qb + i_h.to(tl.int64) * s_qh + t_q * s_qt
    p_k += i_bq * s_kb + (i_h // G).to(tl.int64) * s_kh + t_k * s_kt
    p_mask += i_b.to(tl.int64) * s_mb + i_h.to(tl.int64) * s_mh
    i_q = first + tl.arange(0, BM)
    o_row = (i_bq * H + i_h) * T_q + t_q
    b_lse = tl.load(p_lse + o_row + i_q, mask=i_q < L_q, other=float("-inf"))
    b_base = tl.where(b_lse == float("-inf"), float("inf"), b_lse * _LOG2E)
    b_rest = tl.zeros([BM], ACC)
    m_huge = (tl.abs(b_lse) > HUGE) & (tl.abs(b_lse) < float("inf"))
    scale = _real(scale, ACC)
    slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
    offset = (L_k - L_q) * lower
    if tl.max(m_huge.to(tl.int32), 0) != 0:
        b_max = tl.full([BM], float("-inf"), ACC)
        b_sum = tl.zeros([BM], ACC)
        begin, _whole, _until, end = _seen_keys(first, L_q, L_k, offset, left, right, LEFT, RIGHT, BM, BN)
        for first_k in tl.range(begin, end, BN, num_stages=1, disable_licm=True):
            b_s = _product(
                *(p_q, first, L_q, s_qt, s_qd, p_k, first_k, L_k, s_kt, s_kd, ACC, PRECISION, D, BD, BM, BN),
            )
            i_k = first_k + tl.arange(0, BN)
            b_s, _ = _score(
                b_s,
                *(first, i_q[:, None], i_k[None, :], L_k, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
                *(slope, scale, _real(cap, ACC), True, LEFT, RIGHT, CAP, ALIBI, EXACT),
            )
            b_top = tl.maximum(b_max, tl.max(b_s, 1))
            b_zero = tl.where(b_top == float("-inf"), 0.0, b_top)
            b_sum = b_sum * tl.exp2(b_max - b_zero) + tl.sum(tl.exp2(b_s - b_zero[:, None]), 1)
            b_max = b_top
        b_base = tl.where(m_huge, b_max, b_base)
        b_rest = tl.where(m_huge, tl.log2(b_sum), b_rest)
    tl.store(p_base + o_row + i_q, b_base, mask=i_q < L_q)
    tl.store(p_rest + o_row + i_q, b_rest, mask=i_q < L_q)


@triton.jit
def _step_to_rows(
    b_dq,  # [BM, BD]
    b_dlse,  # [BM], of weights
    b_q,  # unless heads are wide, and b_do
    b_do,
    b_base,  # [BM] log2 of the sums
    b_rest,  # [BM] what is beside it, with a float mask
    b_delta,  # [BM]
    begin,
    end,
    first_q,
    i_q,
    L_q,
    L_k,
    first_d,  # column of the gradient
    p_q,
    p_k,
    p_v,
    p_dout,
    p_dw,  # of these rows: gradient of the weights, or None
    p_ds,  # of these rows: gradient of the mask, or None
    s_qt,
    s_qd,
    s_kt,
    s_kd,
    s_vt,
    s_vd,
    s_ot,
    s_od,
    offset,
    left,
    right,
    p_mask,
    s_mq,
    s_mk,
    T_mq,
    T_mk,
    slope,
    scale,
    cap,
    seed,
    i_bh,
    threshold,
    rescale,
    EDGE: tl.constexpr,
    LEAN: tl.constexpr,
    CLEAN: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = b_dq.dtype
    PLAIN: tl.constexpr = not (EDGE or CAP or ALIBI or p_mask is not None)
    EXACT: tl.constexpr = b_q.dtype.primitive_bitwidth >= 32
    WIDE: tl.constexpr = D > BD or DV > BDV
    BM: tl.constexpr = b_dq.shape[0]
    for first in tl.range(begin, end, BN, disable_licm=EDGE or LEAN):
        i_k = first + tl.arange(0, BN)
        if WIDE:
            b_s = _product(
                *(p_q, first_q, L_q, s_qt, s_qd, p_k, first, L_k, s_kt, s_kd, ACC, PRECISION, D, BD, BM, BN),
            )
            b_k = _chunk(p_k, first, L_k, first_d, s_kt, s_kd, D, BD, BN)
        else:
            b_k = _tile(p_k, first, L_k, s_kt, s_kd, not EDGE, D, BD, BN)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        if PLAIN:
            b_t = b_s
            b_p = tl.exp2(b_s * (scale * _LOG2E) - b_base[:, None])
        else:
            b_s, b_t = _score(
                b_s,
                *(first_q, i_q[:, None], i_k[None, :], L_k, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
                *(slope, scale, cap, EDGE, LEFT, RIGHT, CAP, ALIBI, EXACT),
            )
            b_p = tl.exp2(b_s - b_base[:, None] - b_rest[:, None])
        if p_dw is not None:
            o_w = (i_q - first_q)[:, None] * T_mk + i_k[None, :]
            b_dp = tl.load(p_dw + o_w, mask=(i_q < L_q)[:, None] & (i_k < L_k)[None, :], other=0.0).to(ACC)
        elif WIDE:
            b_dp = _product(
                *(p_dout, first_q, L_q, s_ot, s_od, p_v, first, L_k, s_vt, s_vd, ACC, PRECISION, DV, BDV, BM, BN),
            )
        else:
            b_v = _tile(p_v, first, L_k, s_vt, s_vd, not EDGE, DV, BDV, BN)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            b_dp = tl.where(_kept(seed, i_q, first, i_bh, threshold, False, BN), b_dp * rescale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if not PLAIN:
            b_ds = tl.where(b_s == float("-inf"), 0.0, b_ds)
        if p_dw is not None:
            b_dlse -= tl.sum(b_ds, 1)
        if p_ds is not None:
            o_w = (i_q - first_q)[:, None] * T_mk + i_k[None, :]
            m_w = (i_q < L_q)[:, None] & (i_k < L_k)[None, :]
            if WIDE:
                m_w = m_w & (first_d == 0)
            tl.store(p_ds + o_w, b_ds.to(p_ds.dtype.element_ty), mask=m_w)
        if CAP:
            b_ds = b_ds * (1.0 - b_t * b_t)
        if CLEAN:
            b_k = tl.where(tl.abs(b_k) < float("inf"), b_k, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION, out_dtype=ACC)
    return b_dq, b_dlse


# Grid as forward. It also writes delta = sum(dout * out) - dlse, which the kernel by keys reads.
@triton.jit(do_not_specialize=_SIZES)
def attention_backward_rows_kernel(
    p_q,
    p_k,
    p_v,  # None of weights
    p_mask,
    p_slopes,
    p_q_lengths,
    p_k_lengths,
    p_cu_q,
    p_cu_k,
    p_seed,
    p_dout,  # [B, H, Tq, Dv]; None of weights
    p_out,  # [B, H, Tq, Dv]; None of weights
    p_lse,  # [B, H, Tq]
    p_rest,  # [B, H, Tq] with a float mask, else None: see attention_normaliser_kernel, whose base is then lse
    p_dlse,  # [B, H, Tq] or None; of weights, written
    p_dw,  # [B, H, T_mq, T_mk], or None
    p_delta,  # [B, H, Tq], written; None of weights
    p_dq,  # [B, H, Tq, D], written
    p_ds,  # [B, H, T_mq, T_mk] zeros, written where a row sees a key; or None
    s_qb,
    s_qh,
    s_qt,
    s_qd,
    s_kb,
    s_kh,
    s_kt,
    s_kd,
    s_vb,
    s_vh,
    s_vt,
    s_vd,
    s_ob,
    s_oh,
    s_ot,
    s_od,
    s_mb,
    s_mh,
    s_mq,
    s_mk,
    s_slope,
    B,
    H,
    G,
    T_q,
    T_k,
    T_mq,
    T_mk,
    blocks,
    scale,
    cap,
    left,
    right,
    lower,
    threshold,
    rescale,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if p_q.dtype.element_ty == tl.float64 else tl.float32
    ALIBI: tl.constexpr = p_slopes is not None
    DROPOUT: tl.constexpr = p_seed is not None
    PACKED: tl.constexpr = p_cu_q is not None
    WEIGHTS: tl.constexpr = p_dw is not None
    WIDE: tl.constexpr = D > BD or DV > BDV
    first_d = tl.program_id(1) * BD if WIDE else 0
    i_block = tl.program_id(0) % blocks
    i_bh = tl.program_id(0) // blocks
    i_b = i_bh // H
    i_h = i_bh % H
    if RIGHT:
        i_block = blocks - 1 - i_block
    if PACKED:
        if i_b == B:
            _clear_after(p_dq, p_cu_q, B, T_q, i_h, i_block, blocks, first_d, 0.0, D, BD, BM)
            if WEIGHTS and (not WIDE or first_d == 0):
                _clear_after(p_dlse, p_cu_q, B, T_q, i_h, i_block, blocks, 0, 0.0, 1, 1, BM)
            return
    t_q, L_q = _sequence(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = _sequence(p_cu_k, p_k_lengths, i_b, T_k)
    rows = L_q if PACKED else T_q
    first = i_block * BM
    if first >= rows:
        return
    i_bq = i_b.to(tl.int64) * 0 if PACKED else i_b.to(tl.int64)
    i_hk = (i_h // G).to(tl.int64)
    p_q += i_bq * s_qb + i_h.to(tl.int64) * s_qh + t_q * s_qt
    p_k += i_bq * s_kb + i_hk * s_kh + t_k * s_kt
    o_w = (i_bh.to(tl.int64) * T_mq + first) * T_mk
    if p_mask is not None:
        p_mask += i_b.to(tl.int64) * s_mb + i_h.to(tl.int64) * s_mh
    if p_ds is not None:
        p_ds += o_w
    scale = _real(scale, ACC)
    cap = _real(cap, ACC)
    rescale = _real(rescale, ACC)
    slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
    seed = tl.load(p_seed) if DROPOUT else i_b
    offset = (L_k - L_q) * lower

    i_q = first + tl.arange(0, BM)
    o_row = (i_bq * H + i_h) * T_q + t_q
    if WIDE:
        b_q = tl.zeros([BM, BD], p_q.dtype.element_ty)
    else:
        b_q = _tile(p_q, first, L_q, s_qt, s_qd, False, D, BD, BM)
    b_base, b_rest = _log2_sum(p_lse + o_row, None if p_rest is None else p_rest + o_row, i_q, L_q, ACC)
    b_delta = tl.zeros([BM], ACC)
    b_do = b_q
    if WEIGHTS:
        p_dw += o_w
    else:
        p_v += i_bq * s_vb + i_hk * s_vh + t_k * s_vt
        p_dout += i_bq * s_ob + i_h.to(tl.int64) * s_oh + t_q * s_ot
        if WIDE:
            for column in range(0, DV, BDV):
                b_x = _chunk(p_dout, first, L_q, column, s_ot, s_od, DV, BDV, BM)
                b_y = _chunk(p_out + o_row * DV, first, L_q, column, DV, 1, DV, BDV, BM)
                b_delta += tl.sum(b_x.to(ACC) * b_y.to(ACC), 1)
        else:
            b_do = _tile(p_dout, first, L_q, s_ot, s_od, False, DV, BDV, BM)
            b_out = _tile(p_out + o_row * DV, first, L_q, DV, 1, False, DV, BDV, BM)
            b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
        if p_dlse is not None:
            b_delta -= tl.load(p_dlse + o_row + i_q, mask=i_q < L_q, other=0.0)
        tl.store(p_delta + o_row + i_q, b_delta, mask=i_q < L_q if not WIDE else (i_q < L_q) & (first_d == 0))
    b_dq = tl.zeros([BM, BD], ACC)
    b_dlse = tl.zeros([BM], ACC)
    begin, whole, until, end = _seen_keys(first, L_q, L_k, offset, left, right, LEFT, RIGHT, BM, BN)
    if LEFT:
        b_dq, b_dlse = _step_to_rows(
            *(b_dq, b_dlse, b_q, b_do, b_base, b_rest, b_delta, begin, whole, first, i_q, L_q, L_k, first_d),
            *(p_q, p_k, p_v, p_dout, p_dw, p_ds, s_qt, s_qd, s_kt, s_kd, s_vt, s_vd, s_ot, s_od),
            *(offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk, slope, scale, cap),
            *(seed, i_bh, threshold, rescale, True, PACKED, False, LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION),
            *(D, DV, BD, BDV, BN),
        )
    b_dq, b_dlse = _step_to_rows(
        *(b_dq, b_dlse, b_q, b_do, b_base, b_rest, b_delta, whole, until, first, i_q, L_q, L_k, first_d),
        *(p_q, p_k, p_v, p_dout, p_dw, p_ds, s_qt, s_qd, s_kt, s_kd, s_vt, s_vd, s_ot, s_od),
        *(offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk, slope, scale, cap),
        *(seed, i_bh, threshold, rescale, False, PACKED, False, LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION),
        *(D, DV, BD, BDV, BN),
    )
    b_dq, b_dlse = _step_to_rows(
        *(b_dq, b_dlse, b_q, b_do, b_base, b_rest, b_delta, until, end, first, i_q, L_q, L_k, first_d),
        *(p_q, p_k, p_v, p_dout, p_dw, p_ds, s_qt, s_qd, s_kt, s_kd, s_vt, s_vd, s_ot, s_od),
        *(offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk, slope, scale, cap),
        *(seed, i_bh, threshold, rescale, True, PACKED, False, LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION),
        *(D, DV, BD, BDV, BN),
    )
    if LEFT or RIGHT or p_mask is not None:
        # As forward: what is no number may be a key that the row does not see.
        if _has_nan(b_dq):
            b_dq, b_dlse = tl.zeros([BM, BD], ACC), tl.zeros([BM], ACC)
            b_dq, b_dlse = _step_to_rows(
                *(b_dq, b_dlse, b_q, b_do, b_base, b_rest, b_delta, begin, end, first, i_q, L_q, L_k, first_d),
                *(p_q, p_k, p_v, p_dout, p_dw, p_ds, s_qt, s_qd, s_kt, s_kd, s_vt, s_vd, s_ot, s_od),
                *(offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk, slope, scale, cap),
                *(seed, i_bh, threshold, rescale, True, PACKED, True, LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION),
                *(D, DV, BD, BDV, BN),
            )
    m_row = i_q < rows
    i_d = first_d + tl.arange(0, BD)
    b_dq = tl.where((i_q < L_q)[:, None], b_dq * scale, 0.0)
    m_dq = m_row[:, None] if D == BD else m_row[:, None] & (i_d < D)[None, :]
    o_dq = (o_row + first) * D + (tl.arange(0, BM)[:, None] * D + i_d[None, :])
    tl.store(p_dq + o_dq, b_dq.to(p_dq.dtype.element_ty), mask=m_dq)
    if WEIGHTS:
        tl.store(
            p_dlse + o_row + i_q,
            tl.where(i_q < L_q, b_dlse, 0.0),
            mask=m_row if not WIDE else m_row & (first_d == 0),
        )


@triton.jit
def _step_to_keys(
    b_dk,  # [BN, BD]
    b_dv,  # [BN, BDV]
    b_k,  # unless heads are wide, and b_v
    b_v,
    begin,
    whole,
    until,
    end,
    i_k,
    first_k,
    L_q,
    L_k,
    first_d,  # columns of the gradients
    first_v,
    p_q,  # of this batch and head
    p_k,
    p_v,
    p_dout,
    p_dw,
    p_lse,
    p_rest,
    p_delta,
    o_do,  # where this batch and head begin in those, and in the mask
    o_dw,
    o_row,
    o_mask,
    s_qt,
    s_qd,
    s_kt,
    s_kd,
    s_vt,
    s_vd,
    s_ot,
    s_od,
    offset,
    left,
    right,
    p_mask,
    s_mq,
    s_mk,
    T_mq,
    T_mk,
    slope,
    scale,
    cap,
    seed,
    i_bh,
    threshold,
    rescale,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = b_dk.dtype
    EXTRA: tl.constexpr = CAP or ALIBI or p_mask is not None
    EXACT: tl.constexpr = b_k.dtype.primitive_bitwidth >= 32
    WIDE: tl.constexpr = D > BD or DV > BDV
    p_lse += o_row
    if p_rest is not None:
        p_rest += o_row
    if p_dw is None:
        p_dout += o_do
        p_delta += o_row
    else:
        p_dw += o_dw
    if p_mask is not None:
        p_mask += o_mask
    for first in tl.range(begin, end, BM, disable_licm=True):
        i_q = first + tl.arange(0, BM)
        if WIDE:
            b_s = _product(
                *(p_k, first_k, L_k, s_kt, s_kd, p_q, first, L_q, s_qt, s_qd, ACC, PRECISION, D, BD, BN, BM),
            )
            b_q = _chunk(p_q, first, L_q, first_d, s_qt, s_qd, D, BD, BM)
        else:
            b_q = _tile(p_q, first, L_q, s_qt, s_qd, False, D, BD, BM)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC)
        b_base, b_rest = _log2_sum(p_lse, p_rest, i_q, L_q, ACC)
        b_t = b_s
        if EXTRA:
            b_s, b_t = _score(
                b_s,
                *(first, i_q[None, :], i_k[:, None], L_k, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
                *(slope, scale, cap, False, LEFT, RIGHT, CAP, ALIBI, EXACT),
            )
            b_s = b_s - b_base[None, :] - b_rest[None, :]
        else:
            b_s = b_s * (scale * _LOG2E) - b_base[None, :]
        edge = (first < whole) | (first >= until)  # by blocks: inside, a row sees every key
        if LEFT or RIGHT:
            if edge:
                b_s = _hide(b_s, i_q[None, :], i_k[:, None], L_k, offset, left, right, LEFT, RIGHT)
        b_p = tl.exp2(b_s)
        if EXTRA:
            b_p = tl.where(b_s == float("-inf"), 0.0, b_p)
        if DROPOUT:
            m_kept = _kept(seed, i_q, first_k, i_bh, threshold, True, i_k.shape[0])
        if p_dw is not None:
            o_w = (i_q - first)[None, :] * T_mk + i_k[:, None]
            b_dp = tl.load(
                p_dw + tl.cast(first, tl.int64) * T_mk + o_w,
                mask=(i_q < L_q)[None, :] & (i_k < L_k)[:, None],
                other=0.0,
            ).to(ACC)
            if DROPOUT:
                b_dp = tl.where(m_kept, b_dp * rescale, 0.0)
            b_ds = b_p * b_dp
        else:
            if WIDE:
                b_do = _chunk(p_dout, first, L_q, first_v, s_ot, s_od, DV, BDV, BM)
            else:
                b_do = _tile(p_dout, first, L_q, s_ot, s_od, False, DV, BDV, BM)
            b_w = tl.where(m_kept, b_p, 0.0) if DROPOUT else b_p
            b_dv = tl.dot(b_w.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=ACC)
            if WIDE:
                b_dp = _product(
                    *(p_v, first_k, L_k, s_vt, s_vd, p_dout, first, L_q, s_ot, s_od, ACC, PRECISION, DV, BDV, BN, BM),
                )
            else:
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
            if DROPOUT:
                b_dp = tl.where(m_kept, b_dp * rescale, 0.0)
            b_delta = tl.load(p_delta + i_q, mask=i_q < L_q, other=0.0)
            b_ds = b_p * (b_dp - b_delta[None, :])
        if EXTRA:
            b_ds = tl.where(b_s == float("-inf"), 0.0, b_ds)
        elif LEFT or RIGHT:
            if edge:
                b_ds = tl.where(b_s == float("-inf"), 0.0, b_ds)
        if CAP:
            b_ds = b_ds * (1.0 - b_t * b_t)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=ACC)
    return b_dk, b_dv


# Grid: blocks of keys of each key head of each sequence, and one sequence more where they are packed. A program adds up
# what all query heads of its head, and all their rows, say.
@triton.jit(do_not_specialize=_SIZES)
def attention_backward_keys_kernel(
    p_q,
    p_k,
    p_v,  # None of weights
    p_mask,
    p_slopes,
    p_q_lengths,
    p_k_lengths,
    p_cu_q,
    p_cu_k,
    p_seed,
    p_dout,  # [B, H, Tq, Dv]; None of weights
    p_lse,  # [B, H, Tq]
    p_rest,  # [B, H, Tq] or None
    p_delta,  # [B, H, Tq]; None of weights
    p_dw,  # [B, H, T_mq, T_mk], or None
    p_dk,  # [B, H / G, Tk, D], written
    p_dv,  # [B, H / G, Tk, Dv], written; None of weights
    s_qb,
    s_qh,
    s_qt,
    s_qd,
    s_kb,
    s_kh,
    s_kt,
    s_kd,
    s_vb,
    s_vh,
    s_vt,
    s_vd,
    s_ob,
    s_oh,
    s_ot,
    s_od,
    s_mb,
    s_mh,
    s_mq,
    s_mk,
    s_slope,
    B,
    H,
    G,
    T_q,
    T_k,
    T_mq,
    T_mk,
    blocks,
    scale,
    cap,
    left,
    right,
    lower,
    threshold,
    rescale,
    GROUPED: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if p_q.dtype.element_ty == tl.float64 else tl.float32
    ALIBI: tl.constexpr = p_slopes is not None
    DROPOUT: tl.constexpr = p_seed is not None
    WEIGHTS: tl.constexpr = p_dw is not None
    WIDE: tl.constexpr = D > BD or DV > BDV
    first_d = tl.program_id(1) * BD if WIDE else 0
    first_v = tl.program_id(1) * BDV if WIDE else 0
    i_block = tl.program_id(0) % blocks
    heads = H // G
    i_b = tl.program_id(0) // blocks // heads
    i_hk = tl.program_id(0) // blocks % heads
    if p_cu_k is not None:
        if i_b == B:
            _clear_after(p_dk, p_cu_k, B, T_k, i_hk, i_block, blocks, first_d, 0.0, D, BD, BN)
            if not WEIGHTS:
                _clear_after(p_dv, p_cu_k, B, T_k, i_hk, i_block, blocks, first_v, 0.0, DV, BDV, BN)
            return
    t_q, L_q = _sequence(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = _sequence(p_cu_k, p_k_lengths, i_b, T_k)
    rows = L_k if p_cu_k is not None else T_k
    first = i_block * BN
    if first >= rows:
        return
    i_bq = i_b.to(tl.int64) if p_cu_q is None else i_b.to(tl.int64) * 0
    p_q += i_bq * s_qb + t_q * s_qt
    p_k += i_bq * s_kb + i_hk.to(tl.int64) * s_kh + t_k * s_kt
    if p_mask is not None:
        p_mask += i_b.to(tl.int64) * s_mb
    scale = _real(scale, ACC)
    cap = _real(cap, ACC)
    rescale = _real(rescale, ACC)
    seed = tl.load(p_seed) if DROPOUT else i_b
    offset = (L_k - L_q) * lower

    i_k = first + tl.arange(0, BN)
    if WIDE:
        b_k = tl.zeros([BN, BD], p_q.dtype.element_ty)
    else:
        b_k = _tile(p_k, first, L_k, s_kt, s_kd, False, D, BD, BN)
    b_v = b_k
    if not WEIGHTS:
        p_v += i_bq * s_vb + i_hk.to(tl.int64) * s_vh + t_k * s_vt
        p_dout += i_bq * s_ob + t_q * s_ot
        if not WIDE:
            b_v = _tile(p_v, first, L_k, s_vt, s_vd, False, DV, BDV, BN)
    b_dk = tl.zeros([BN, BD], ACC)
    b_dv = tl.zeros([BN, BDV], ACC)
    begin, whole, until, end = _seeing_rows(first, L_q, L_k, offset, left, right, LEFT, RIGHT, BM, BN)
    for i_g in range(G if GROUPED else 1):
        i_h = i_hk * G + i_g
        i_bh = i_b * H + i_h
        p_qh = p_q + i_h.to(tl.int64) * s_qh
        o_do = i_h.to(tl.int64) * s_oh
        o_dw = i_bh.to(tl.int64) * T_mq * T_mk
        o_mask = i_h.to(tl.int64) * s_mh
        o_row = (i_bq * H + i_h) * T_q + t_q
        slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
        b_dk, b_dv = _step_to_keys(
            *(b_dk, b_dv, b_k, b_v, begin, whole, until, end, i_k, first, L_q, L_k, first_d, first_v),
            *(p_qh, p_k, p_v, p_dout, p_dw, p_lse, p_rest, p_delta, o_do, o_dw, o_row, o_mask, s_qt, s_qd, s_kt, s_kd),
            *(s_vt, s_vd, s_ot, s_od, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk, slope, scale, cap),
            *(seed, i_bh, threshold, rescale, LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION, D, DV, BD, BDV, BM, BN),
        )
    m_row = i_k < rows
    m_real = (i_k < L_k)[:, None]
    o_row = (i_bq * heads + i_hk) * T_k + t_k + first
    o_t = tl.arange(0, BN)[:, None]
    i_d = first_d + tl.arange(0, BD)
    m_dk = m_row[:, None] if D == BD and not WIDE else m_row[:, None] & (i_d < D)[None, :]
    b_dk = tl.where(m_real, b_dk * scale, 0.0).to(p_dk.dtype.element_ty)
    tl.store(p_dk + o_row * D + (o_t * D + i_d[None, :]), b_dk, mask=m_dk)
    if not WEIGHTS:
        i_d = first_v + tl.arange(0, BDV)
        m_dv = m_row[:, None] if DV == BDV and not WIDE else m_row[:, None] & (i_d < DV)[None, :]
        if DROPOUT:
            b_dv = b_dv * rescale
        b_dv = tl.where(m_real, b_dv, 0.0).to(p_dv.dtype.element_ty)
        tl.store(p_dv + o_row * DV + (o_t * DV + i_d[None, :]), b_dv, mask=m_dv)


# ---- weights, and the gradient of a mask that several scores share


# Grid: tiles of rows and keys of each head of each sequence.
@triton.jit(do_not_specialize=_SIZES)
def attention_weights_kernel(
    p_q,
    p_k,
    p_mask,
    p_slopes,
    p_q_lengths,
    p_k_lengths,
    p_cu_q,
    p_cu_k,
    p_seed,
    p_lse,  # [B, H, Tq]
    p_rest,  # [B, H, Tq] or None
    p_w,  # [B, H, T_mq, T_mk], written
    s_qb,
    s_qh,
    s_qt,
    s_qd,
    s_kb,
    s_kh,
    s_kt,
    s_kd,
    s_mb,
    s_mh,
    s_mq,
    s_mk,
    s_slope,
    B,
    H,
    G,
    T_q,
    T_k,
    T_mq,
    T_mk,
    blocks,  # of keys
    scale,
    cap,
    left,
    right,
    lower,
    threshold,
    rescale,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if p_q.dtype.element_ty == tl.float64 else tl.float32
    ALIBI: tl.constexpr = p_slopes is not None
    DROPOUT: tl.constexpr = p_seed is not None
    EXACT: tl.constexpr = p_q.dtype.element_ty.primitive_bitwidth >= 32
    blocks_q = tl.cdiv(T_mq, BM)
    first_k = tl.program_id(0) % blocks * BN
    first = tl.program_id(0) // blocks % blocks_q * BM
    i_bh = tl.program_id(0) // blocks // blocks_q
    i_b = i_bh // H
    i_h = i_bh % H
    t_q, L_q = _sequence(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = _sequence(p_cu_k, p_k_lengths, i_b, T_k)
    i_bq = i_b.to(tl.int64) if p_cu_q is None else i_b.to(tl.int64) * 0
    p_q += i_bq * s_qb + i_h.to(tl.int64) * s_qh + t_q * s_qt
    p_k += i_bq * s_kb + (i_h // G).to(tl.int64) * s_kh + t_k * s_kt
    if p_mask is not None:
        p_mask += i_b.to(tl.int64) * s_mb + i_h.to(tl.int64) * s_mh
    scale = _real(scale, ACC)
    slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
    offset = (L_k - L_q) * lower
    i_q = first + tl.arange(0, BM)
    i_k = first_k + tl.arange(0, BN)
    b_s = _product(
        *(p_q, first, L_q, s_qt, s_qd, p_k, first_k, L_k, s_kt, s_kd, ACC, PRECISION, D, BD, BM, BN),
    )
    b_s, _ = _score(
        b_s,
        *(first, i_q[:, None], i_k[None, :], L_k, offset, left, right, p_mask, s_mq, s_mk, T_mq, T_mk),
        *(slope, scale, _real(cap, ACC), True, LEFT, RIGHT, CAP, ALIBI, EXACT),
    )
    o_row = (i_bq * H + i_h) * T_q + t_q
    b_base, b_rest = _log2_sum(p_lse + o_row, None if p_rest is None else p_rest + o_row, i_q, L_q, ACC)
    b_w = tl.exp2(b_s - b_base[:, None] - b_rest[:, None])
    b_w = tl.where(b_s == float("-inf"), 0.0, b_w)
    if DROPOUT:
        m_kept = _kept(tl.load(p_seed), i_q, first_k, i_bh, threshold, False, BN)
        b_w = tl.where(m_kept, b_w * _real(rescale, ACC), 0.0)
    o_w = (i_bh.to(tl.int64) * T_mq + i_q)[:, None] * T_mk + i_k[None, :]
    tl.store(p_w + o_w, b_w.to(p_w.dtype.element_ty), mask=(i_q < T_mq)[:, None] & (i_k < T_mk)[None, :])


# Grid: parts of the sums x tiles of the mask. Of a dimension that the mask shares, a program visits all there is, or
# its part of that; what it adds up lies in registers, tile on tile.
@triton.jit(do_not_specialize=[*_SIZES, "n_b", "n_h", "n_q", "n_k", "each", "tiles"])
def attention_mask_gradient_kernel(
    p_q,
    p_k,
    p_v,  # None of weights
    p_mask,
    p_slopes,
    p_q_lengths,
    p_k_lengths,
    p_cu_q,
    p_cu_k,
    p_seed,
    p_dout,  # None of weights
    p_lse,
    p_rest,
    p_delta,  # None of weights
    p_dw,  # or None
    p_dmask,  # [parts, *shape of the mask], written
    s_qb,
    s_qh,
    s_qt,
    s_qd,
    s_kb,
    s_kh,
    s_kt,
    s_kd,
    s_vb,
    s_vh,
    s_vt,
    s_vd,
    s_ob,
    s_oh,
    s_ot,
    s_od,
    s_mb,
    s_mh,
    s_mq,
    s_mk,
    s_slope,
    B,
    H,
    G,
    T_q,
    T_k,
    T_mq,
    T_mk,
    blocks,  # of keys that the mask tells apart
    scale,
    cap,
    left,
    right,
    lower,
    threshold,
    rescale,
    n_b,  # how many of the batch, heads, blocks of rows and blocks of keys share an element
    n_h,
    n_q,
    n_k,
    each,  # so many of n_b n_h n_q n_k in a part
    tiles,  # of the mask
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    SHARED_Q: tl.constexpr,
    SHARED_K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if p_q.dtype.element_ty == tl.float64 else tl.float32
    ALIBI: tl.constexpr = p_slopes is not None
    DROPOUT: tl.constexpr = p_seed is not None
    EXACT: tl.constexpr = p_q.dtype.element_ty.primitive_bitwidth >= 32
    i_part = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    blocks_q = 1 if SHARED_Q else tl.cdiv(T_mq, BM)
    mask_h = H // n_h
    i_tk = i_tile % blocks
    i_tq = i_tile // blocks % blocks_q
    i_th = i_tile // blocks // blocks_q % mask_h
    i_tb = i_tile // blocks // blocks_q // mask_h
    scale = _real(scale, ACC)
    cap = _real(cap, ACC)
    rescale = _real(rescale, ACC)
    seed = tl.load(p_seed) if DROPOUT else i_part
    b_acc = tl.zeros([BM, BN], ACC)
    for i in range(i_part * each, tl.minimum((i_part + 1) * each, n_b * n_h * n_q * n_k)):
        first_k = (i_tk + i % n_k) * BN
        first = (i_tq + i // n_k % n_q) * BM
        i_h = i_th + i // n_k // n_q % n_h
        i_b = i_tb + i // n_k // n_q // n_h
        t_q, L_q = _sequence(p_cu_q, p_q_lengths, i_b, T_q)
        t_k, L_k = _sequence(p_cu_k, p_k_lengths, i_b, T_k)
        offset = (L_k - L_q) * lower
        begin, _whole, _until, end = _seen_keys(first, L_q, L_k, offset, left, right, LEFT, RIGHT, BM, BN)
        if (first_k >= begin) & (first_k < end):
            i_bq = i_b.to(tl.int64) if p_cu_q is None else i_b.to(tl.int64) * 0
            i_hk = (i_h // G).to(tl.int64)
            i_q = first + tl.arange(0, BM)
            i_k = first_k + tl.arange(0, BN)
            p_qh = p_q + i_bq * s_qb + i_h.to(tl.int64) * s_qh + t_q * s_qt
            p_kh = p_k + i_bq * s_kb + i_hk * s_kh + t_k * s_kt
            b_s = _product(
                *(p_qh, first, L_q, s_qt, s_qd, p_kh, first_k, L_k, s_kt, s_kd, ACC, PRECISION, D, BD, BM, BN),
            )
            slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
            p_m = p_mask + i_b.to(tl.int64) * s_mb + i_h.to(tl.int64) * s_mh
            b_s, _ = _score(
                b_s,
                *(first, i_q[:, None], i_k[None, :], L_k, offset, left, right, p_m, s_mq, s_mk, T_mq, T_mk),
                *(slope, scale, cap, True, LEFT, RIGHT, CAP, ALIBI, EXACT),
            )
            o_row = (i_bq * H + i_h) * T_q + t_q
            b_base, b_rest = _log2_sum(p_lse + o_row, None if p_rest is None else p_rest + o_row, i_q, L_q, ACC)
            b_p = tl.exp2(b_s - b_base[:, None] - b_rest[:, None])
            if p_dw is not None:
                o_w = ((i_b * H + i_h).to(tl.int64) * T_mq + i_q)[:, None] * T_mk + i_k[None, :]
                b_dp = tl.load(p_dw + o_w, mask=(i_q < L_q)[:, None] & (i_k < L_k)[None, :], other=0.0).to(ACC)
            else:
                p_do = p_dout + i_bq * s_ob + i_h.to(tl.int64) * s_oh + t_q * s_ot
                p_vh = p_v + i_bq * s_vb + i_hk * s_vh + t_k * s_vt
                b_dp = _product(
                    *(p_do, first, L_q, s_ot, s_od, p_vh, first_k, L_k, s_vt, s_vd, ACC, PRECISION, DV, BDV, BM, BN),
                )
            if DROPOUT:
                m_kept = _kept(seed, i_q, first_k, i_b * H + i_h, threshold, False, BN)
                b_dp = tl.where(m_kept, b_dp * rescale, 0.0)
            if p_dw is None:
                b_dp -= tl.load(p_delta + o_row + i_q, mask=i_q < L_q, other=0.0)[:, None]
            b_acc += tl.where((b_s == float("-inf")) | (i_q >= L_q)[:, None], 0.0, b_p * b_dp)
    o_m = ((i_part * (B // n_b) + i_tb).to(tl.int64) * mask_h + i_th) * (1 if SHARED_Q else T_mq)
    keys = 1 if SHARED_K else T_mk
    i_k = i_tk * BN + tl.arange(0, BN)
    i_q = i_tq * BM + tl.arange(0, BM)
    if SHARED_Q:
        b_row = tl.sum(b_acc, 0)
        if SHARED_K:
            tl.store(p_dmask + o_m, tl.sum(b_row, 0))
        else:
            tl.store(p_dmask + o_m * keys + i_k, b_row, mask=i_k < T_mk)
    elif SHARED_K:
        tl.store(p_dmask + o_m + i_q, tl.sum(b_acc, 1), mask=i_q < T_mq)
    else:
        o_m = (o_m + i_q)[:, None] * keys + i_k[None, :]
        tl.store(p_dmask + o_m, b_acc, mask=(i_q < T_mq)[:, None] & (i_k < T_mk)[None, :])


# ---- launchers


class Config(NamedTuple):
    """What a program takes on."""

    BM: int  # rows
    BN: int  # keys
    num_warps: int
    num_stages: int


FORWARD, ROWS, KEYS, TILES = "forward", "rows", "keys", "tiles"

# By kernel and bytes of an element, for head sizes up to 64, 128 and 256: what ptxas keeps in registers.
CONFIGS: dict[tuple[str, int], tuple[Config, ...]] = {
    (FORWARD, 2): (Config(128, 64, 4, 3), Config(128, 128, 8, 3), Config(64, 64, 8, 2)),
    (ROWS, 2): (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
    (KEYS, 2): (Config(64, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 64, 8, 1)),
    (FORWARD, 4): (Config(64, 32, 8, 1), Config(16, 32, 8, 1)),
    (ROWS, 4): (Config(32, 16, 4, 1), Config(16, 16, 8, 1)),
    (KEYS, 4): (Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    (FORWARD, 8): (Config(32, 16, 8, 1), Config(32, 16, 8, 1)),
    (ROWS, 8): (Config(32, 16, 8, 1), Config(16, 16, 4, 1)),
    (KEYS, 8): (Config(32, 32, 4, 1), Config(16, 32, 8, 1)),
}
# With a mask, dropout, a window, alibi or a softcap, and of weights.
ROOMY: dict[tuple[str, int], tuple[Config, ...]] = {
    (FORWARD, 2): (Config(64, 64, 4, 2), Config(128, 64, 8, 2)),
    (ROWS, 2): (Config(128, 32, 8, 2), Config(128, 32, 8, 2), Config(32, 32, 8, 1)),
    (KEYS, 2): (Config(32, 64, 8, 2), Config(32, 64, 8, 1), Config(32, 32, 8, 1)),
}
# Where products go through registers and shared memory is less, as on sm_80.
SMALL: dict[tuple[str, int], tuple[Config, ...]] = {
    (FORWARD, 2): (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 8, 1)),
    (ROWS, 2): (Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1)),
    (KEYS, 2): (Config(32, 64, 8, 1), Config(32, 64, 8, 2), Config(32, 32, 8, 1)),
}
WARPGROUPS = 200 << 10  # bytes of shared memory: sm_90 and later have more
LARGEST = {2: 256, 4: 128, 8: 128}  # head size that is no wide one, by bytes of an element
# Of wide heads, and always by tiles, which hold nothing but scores: columns that are read at a time.
CHUNK = {2: 64, 4: 64, 8: 32}
WIDE: dict[tuple[str, int], Config] = {
    (FORWARD, 2): Config(64, 64, 8, 1),
    (ROWS, 2): Config(32, 32, 8, 1),
    (KEYS, 2): Config(64, 32, 8, 1),
    (TILES, 2): Config(64, 64, 8, 1),
    (FORWARD, 4): Config(32, 32, 8, 1),
    (ROWS, 4): Config(32, 32, 8, 1),
    (KEYS, 4): Config(16, 32, 8, 1),
    (TILES, 4): Config(16, 32, 8, 1),
    **{(kernel, 8): Config(16, 16, 4, 1) for kernel in (FORWARD, ROWS, KEYS, TILES)},
}


def needed(kernel: str, dtype: torch.dtype, BD: int, BDV: int, c: Config, roomy: bool = False) -> int:
    """Bytes of shared memory: what a program holds, the stages of what it reads past it, and tiles of scores on their
    way from one layout to another."""
    kept, read = (c.BN, c.BM) if kernel == KEYS else (c.BM, c.BN)
    held = kept * (BD if kernel == FORWARD else BD + BDV) + read * BD * (kernel == KEYS)
    tiles = c.BM * c.BN * ((5 if dtype == torch.float64 else 3) * (kernel == KEYS) + roomy)
    return (held + c.num_stages * read * (BD + BDV) + tiles) * dtype.itemsize


@functools.cache
def config(kernel: str, dtype: torch.dtype, D: int, Dv: int, roomy: bool = False, shared: int = 227 << 10) -> Config:
    """The largest that so many bytes of shared memory hold."""
    if kernel == TILES or is_wide(dtype, D, Dv):
        return WIDE[kernel, dtype.itemsize]
    BD, BDV = padded(D), padded(Dv)
    size = 0 if max(D, Dv) <= 64 else 1 if max(D, Dv) <= 128 else 2
    for table in (SMALL,) if shared < WARPGROUPS else (ROOMY,) if roomy else ():
        if size < len(table.get((kernel, dtype.itemsize), ())):
            break
    else:
        table = CONFIGS
    chosen = table[kernel, dtype.itemsize][size]
    while needed(kernel, dtype, BD, BDV, chosen, roomy) > shared:
        BM, BN, warps, stages = chosen
        if stages > 1:
            chosen = Config(BM, BN, warps, stages - 1)
        elif max(BM, BN) > 16:
            chosen = Config(BM // 2, BN, warps, 1) if BM >= BN else Config(BM, BN // 2, warps, 1)
        else:
            break
    return chosen


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 227 << 10
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def padded(D: int) -> int:
    return max(triton.next_power_of_2(D), 16)


def is_wide(dtype: torch.dtype, D: int, Dv: int) -> bool:
    return max(D, Dv) > LARGEST[dtype.itemsize]


def columns(kernel: str, dtype: torch.dtype, D: int, Dv: int) -> dict[str, int]:
    """D and Dv, and how many columns a program has at a time."""
    most = (CHUNK if kernel == TILES or is_wide(dtype, D, Dv) else LARGEST)[dtype.itemsize]
    return dict(D=D, DV=Dv, BD=min(padded(D), most), BDV=min(padded(Dv), most))


def unsupported(q: Tensor) -> list[str]:
    """Reasons why these kernels cannot take such inputs; an empty list: they can."""
    reasons = []
    if q.device.type != "cuda" and not _interpreted():
        reasons.append(f"the query is on {q.device}")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {q.dtype} is none of {', '.join(str(d) for d in DTYPES)}")
    return reasons


def _interpreted() -> bool:
    return not isinstance(attention_forward_kernel, triton.JITFunction)


FAR = 2**30  # a window of so many keys has no end


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _within_reach(t: Tensor) -> Tensor:
    """Offsets in a block of 256 rows are 32 bits wide."""
    _, _, rows, columns = t.stride()
    return t if 256 * rows + t.shape[3] * columns < 2**31 else t.contiguous()


def _must(right: bool, argument: str, condition: str, got: Any, error: type[Exception] = ValueError) -> None:
    if not right:
        raise error(f"attention: {argument} must {condition}, got {got}")


def _shaped(name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t is not None:
        _must(tuple(t.shape) == shape, name, f"have shape {list(shape)}", list(t.shape))
        _must(t.dtype == dtype, name, f"be {dtype}", t.dtype, TypeError)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    lengths: dict[str, Tensor | None],
    bounds: dict[str, Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """What kernels rely on where they read. Of lengths and bounds they take what is within the rows that there are:
    to look at the numbers would be to wait for the device."""
    others = dict(k=k, v=v, attn_mask=attn_mask, alibi_slopes=alibi_slopes, **lengths, **bounds, seed=seed)
    for name, t in others.items():
        _must(t is None or t.device == q.device, name, f"be on {q.device}", t.device if t is not None else None)
    for name, t in (("q", q), ("k", k), ("v", v), ("attn_mask", attn_mask)):
        _must(t is None or t.dim() == 4, name, "have 4 dimensions", list(t.shape) if t is not None else None)
    B, H, T_q, D = q.shape
    _, Hk, T_k, _ = k.shape
    _shaped("k", k, (B, Hk, T_k, D), q.dtype)
    if v is not None:
        _shaped("v", v, (B, Hk, T_k, v.shape[3]), q.dtype)
    _must(Hk == H or (Hk > 0 and H % Hk == 0), "q's heads", f"be a multiple of k's, {Hk}", H)
    absent = [bound is None for bound in bounds.values()]
    _must(all(absent) or not any(absent), "cu_q and cu_k", "be given together", "one of them")
    cu = bounds["cu_q"]
    if cu is not None:
        _must(v is not None, "cu_q and cu_k", "be absent where weights are asked for", "both")
        given = [name for name, t in dict(attn_mask=attn_mask, **lengths).items() if t is not None]
        _must(not given, "q_lengths, k_lengths and attn_mask", "be absent where rows are packed", ", ".join(given))
        _must(B == 1, "q", "have shape [1, H, N, D] where rows are packed", list(q.shape))
        _must(cu.dim() == 1 and cu.numel() > 0, "cu_q", "have shape [S + 1]", list(cu.shape))
        B = cu.numel() - 1
    for name, t in (lengths | bounds).items():
        if t is not None:
            _must(t.dtype in (torch.int32, torch.int64), name, "be int32 or int64", t.dtype, TypeError)
            _shaped(name, t, (B + (name in bounds),), t.dtype)
    if attn_mask is not None:
        _must(
            attn_mask.dtype in (torch.bool, q.dtype), "attn_mask", f"be bool or {q.dtype}", attn_mask.dtype, TypeError
        )
        fits = all(size in (1, full) for size, full in zip(attn_mask.shape, (B, H, T_q, T_k)))
        _must(fits, "attn_mask", f"have shape {[f'{n} or 1' for n in (B, H, T_q, T_k)]}", list(attn_mask.shape))
    if alibi_slopes is not None:
        fits = tuple(alibi_slopes.shape) in ((H,), (B, H))
        _must(fits, "alibi_slopes", f"have shape [H] or [B, H] = [{B}, {H}]", list(alibi_slopes.shape))
    _must(not dropout_p or seed is not None, "seed", "be given with dropout", seed)


class _Call:
    """The arguments that all kernels have in common, by their names."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        attn_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        q_lengths: Tensor | None,
        k_lengths: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        causal: int,
        window_left: int,
        window_right: int,
        softcap: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        if reasons := unsupported(q):
            raise NotImplementedError(f"attention: the Triton kernels do not run: {'; '.join(reasons)}")
        lengths, bounds = dict(q_lengths=q_lengths, k_lengths=k_lengths), dict(cu_q=cu_q, cu_k=cu_k)
        _check(q, k, v, attn_mask, alibi_slopes, lengths, bounds, dropout_p, seed)
        self.turned = scale < 0  # the kernels expect the highest score where q.k is highest
        if self.turned:
            q, scale = -q, -scale
        self.q, self.k, self.v = _within_reach(q), _within_reach(k), None if v is None else _within_reach(v)
        self.packed = cu_q is not None
        self.H, self.T_q, self.D = q.shape[1:]
        self.T_k = k.shape[2]
        self.Hk = k.shape[1]
        self.DV = self.D if v is None else v.shape[3]
        self.B = q.shape[0]
        self.max_q, self.max_k = self.T_q, self.T_k
        if cu_q is not None:
            self.B, self.max_q, self.max_k = cu_q.numel() - 1, max_q, max_k
        self.mask = (
            attn_mask.view(torch.uint8) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
        )
        self.has_bias = self.mask is not None and self.mask.dtype != torch.uint8
        self.acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        right = window_right if window_right >= 0 else FAR
        right = min(right, 0 if causal else FAR)
        left = min(window_left, FAR) if window_left >= 0 else FAR
        tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        drop = dropout_p > 0
        self.roomy = drop or left < FAR or softcap > 0 or v is None
        self.roomy |= attn_mask is not None or alibi_slopes is not None
        self.arguments: dict[str, Any] = dict(
            p_q=self.q,
            p_k=self.k,
            p_mask=self.mask,
            p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
            p_q_lengths=_contiguous(q_lengths),
            p_k_lengths=_contiguous(k_lengths),
            p_cu_q=_contiguous(cu_q),
            p_cu_k=_contiguous(cu_k),
            p_seed=seed if drop else None,
            **self.strides("q", self.q),
            **self.strides("k", self.k),
            **(dict(s_mb=0, s_mh=0, s_mq=0, s_mk=0) if self.mask is None else self._mask_strides(self.mask)),
            s_slope=self.H if alibi_slopes is not None and alibi_slopes.dim() == 2 and alibi_slopes.shape[0] > 1 else 0,
            B=self.B,
            H=self.H,
            G=self.H // max(self.Hk, 1),
            T_q=self.T_q,
            T_k=self.T_k,
            T_mq=self.max_q,
            T_mk=self.max_k,
            scale=_bits(scale),
            cap=_bits(softcap),
            left=left,
            right=right,
            lower=int(causal == 2),
            threshold=_signed(min(round(dropout_p * 2**32), 2**32 - 1)),
            rescale=_bits(1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
            LEFT=left < FAR,
            RIGHT=right < FAR,
            CAP=softcap > 0,
            PRECISION="tf32" if tf32 else "ieee",
        )
        sizes = columns(FORWARD, q.dtype, self.D, self.DV)
        self.chunks = triton.cdiv(self.D, sizes["BD"]), triton.cdiv(self.DV, sizes["BDV"])
        if self.v is not None:
            self.arguments |= self.values(self.v)

    @staticmethod
    def strides(name: str, t: Tensor | None) -> dict[str, int]:
        return dict(
            zip((f"s_{name}b", f"s_{name}h", f"s_{name}t", f"s_{name}d"), (0,) * 4 if t is None else t.stride())
        )

    @staticmethod
    def _mask_strides(mask: Tensor) -> dict[str, int]:
        steps = (0 if size == 1 else step for size, step in zip(mask.shape, mask.stride()))
        return dict(zip(("s_mb", "s_mh", "s_mq", "s_mk"), steps))

    def values(self, v: Tensor | None) -> dict[str, Any]:
        return dict(p_v=v, **self.strides("v", v))

    def choose(self, kernel: str) -> Config:
        roomy = self.roomy or (kernel == KEYS and self.packed and self.Hk != self.H)
        return config(kernel, self.q.dtype, self.D, self.DV, roomy, _shared_memory(self.q.device))

    def launch(self, kernel: Any, kind: str, programs: int, chunks: int, **arguments: Any) -> None:
        if programs:
            given = self.arguments | arguments | self.choose(kind)._asdict()
            given |= columns(kind, self.q.dtype, self.D, self.DV)
            names = (*kernel.arg_names, "num_warps", "num_stages")
            with torch.cuda.device_of(self.q):
                kernel[(programs, chunks)](**{name: given[name] for name in names})

    def by_rows(self, BM: int) -> tuple[int, int]:
        """Blocks of rows in a head, and programs."""
        blocks = max(triton.cdiv(self.max_q, BM), 1) if self.T_q else 0
        return blocks, blocks * self.H * (self.B + self.packed)

    def by_keys(self, BN: int) -> tuple[int, int]:
        blocks = max(triton.cdiv(self.max_k, BN), 1) if self.T_k else 0
        return blocks, blocks * self.Hk * (self.B + self.packed)

    def normaliser(self, lse: Tensor) -> dict[str, Tensor | None]:
        """What the other kernels read for the softmax's denominator."""
        if not self.has_bias:
            return dict(p_lse=lse, p_rest=None)
        base, rest = torch.empty_like(lse), torch.empty_like(lse)
        chosen = self.choose(TILES)
        blocks, _ = self.by_rows(chosen.BM)
        here = dict(p_lse=lse, p_base=base, p_rest=rest, blocks=blocks)
        self.launch(attention_normaliser_kernel, TILES, blocks * self.H * self.B, 1, **here)
        return dict(p_lse=base, p_rest=rest)

    def mask_gradient(
        self, sums: dict[str, Tensor | None], delta: Tensor | None, dout: Tensor | None, dw: Tensor | None
    ) -> Tensor:
        """Of a mask that several scores share, which the kernel by rows does not write."""
        mask = self.mask
        assert mask is not None
        chosen = self.choose(TILES)
        shape = (self.B, self.H, triton.cdiv(self.max_q, chosen.BM), triton.cdiv(self.max_k, chosen.BN))
        shared = [max(n, 1) if size == 1 else 1 for n, size in zip(shape, mask.shape)]
        tiles = functools.reduce(int.__mul__, (n // s for n, s in zip(shape, shared)))
        work = functools.reduce(int.__mul__, shared)
        if not tiles * work:
            return torch.zeros_like(mask, memory_format=torch.contiguous_format)
        parts = min(work, triton.cdiv(PROGRAMS, tiles))
        each = triton.cdiv(work, parts)
        parts = triton.cdiv(work, each)
        found = torch.empty(parts, *mask.shape, dtype=mask.dtype if parts == 1 else self.acc, device=mask.device)
        self.launch(
            attention_mask_gradient_kernel,
            TILES,
            parts * tiles,
            1,
            **(self.values(None) if self.v is None else {}),
            **self.strides("o", dout),
            **sums,
            p_dout=dout,
            p_delta=delta,
            p_dw=dw,
            p_dmask=found,
            blocks=shape[3] // shared[3],
            **dict(zip(("n_b", "n_h", "n_q", "n_k"), shared)),
            each=each,
            tiles=tiles,
            SHARED_Q=mask.shape[2] == 1,
            SHARED_K=mask.shape[3] == 1,
        )
        return found[0] if parts == 1 else found.sum(0).to(mask.dtype)

    def backward(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        out: Tensor | None,
        lse: Tensor,
        dw: Tensor | None,
        need_dmask: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """dq, dk, dv, dlse, dmask: of attention, dv from dout and dlse; of weights, dlse from dw."""
        q, k, v, mask = self.q, self.k, self.v, self.mask
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(k.shape, dtype=q.dtype, device=q.device)
        dv = None if v is None else torch.empty(v.shape, dtype=q.dtype, device=q.device)
        delta = None if v is None else torch.empty_like(lse)
        dout = None if dout is None else _within_reach(dout)
        if v is None:
            dlse = torch.empty_like(lse)
        elif dlse is not None:
            dlse = dlse.to(lse.dtype).contiguous()
        whole = need_dmask and mask is not None and mask.shape == (self.B, self.H, self.max_q, self.max_k)
        dmask = q.new_empty(0)
        if whole and mask is not None:
            dmask = torch.zeros_like(mask, memory_format=torch.contiguous_format)
        sums = self.normaliser(lse)
        common = dict(**self.strides("o", dout), **sums, p_dout=dout, p_delta=delta, p_dw=dw)
        if v is None:
            common |= self.values(None)
        chosen = self.choose(ROWS)
        blocks, programs = self.by_rows(chosen.BM)
        self.launch(
            attention_backward_rows_kernel,
            ROWS,
            programs,
            self.chunks[0],
            **common,
            p_out=out,
            p_dlse=dlse,
            p_dq=dq,
            p_ds=dmask if whole else None,
            blocks=blocks,
        )
        chosen = self.choose(KEYS)
        blocks, programs = self.by_keys(chosen.BN)
        self.launch(
            attention_backward_keys_kernel,
            KEYS,
            programs,
            max(self.chunks),
            **common,
            p_dk=dk,
            p_dv=dv,
            blocks=blocks,
            GROUPED=self.Hk != self.H,
        )
        if need_dmask and not whole:
            dmask = self.mask_gradient(sums, delta, dout, dw)
        return dq.neg_() if self.turned else dq, dk, dv, dlse, dmask


PROGRAMS = 512  # at least so many add up the gradient of a mask, whatever the device has: the sums follow from it


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _signed(x: int) -> int:
    """The int32 of the same bits: an argument has one type, whatever its value."""
    return x - 2**32 if x >= 2**31 else x


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the op seqkernels::attention_forward returns. First order: no gradient is recorded.

    Args:
        q: [B, H, Tq, D], with any strides; packed, with cu_q and cu_k: [1, H, Nq, D].
        k: [B, Hk, Tk, D], H a multiple of Hk. v: [B, Hk, Tk, Dv].
        attn_mask: [B or 1, H or 1, Tq or 1, Tk or 1], bool (True: seen) or of q's dtype (added). Not of packed rows,
            nor with lengths of those.
        alibi_slopes: float32 [H] or [B, H].
        q_lengths, k_lengths: int32 or int64 [B]. cu_q, cu_k: int32 or int64 [B + 1]. What exceeds the rows is cut off.
        causal: 0 no, 1 from the upper left, 2 to the lower right corner. window_left, window_right: -1 for none.
        seed: int64 [1], with dropout.
    Returns:
        out: [B, H, Tq, Dv], dtype of q. lse: [B, H, Tq] float32, or float64 of float64.
    Deterministic: yes.
    """
    call = _Call(
        *(q, k, v, attn_mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k),
        *(scale, causal, window_left, window_right, softcap, dropout_p, seed),
    )
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=call.acc, device=q.device)
    chosen = call.choose(FORWARD)
    blocks, programs = call.by_rows(chosen.BM)
    call.launch(attention_forward_kernel, FORWARD, programs, call.chunks[1], p_out=out, p_lse=lse, blocks=blocks)
    return out, lse


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op seqkernels::attention_backward returns: dq, dk, dv, and dmask, empty where it is not needed.

    Args:
        dout: [B, H, Tq, Dv]. dlse: [B, H, Tq] or None. The rest as forward took and returned it.
    Deterministic: yes.
    """
    call = _Call(
        *(q, k, v, attn_mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k),
        *(scale, causal, window_left, window_right, softcap, dropout_p, seed),
    )
    _shaped("dout", dout, (*q.shape[:3], call.DV), q.dtype)
    _shaped("out", out, (*q.shape[:3], call.DV), q.dtype)
    _shaped("lse", lse, tuple(q.shape[:3]), call.acc)
    _shaped("dlse", dlse, tuple(q.shape[:3]), call.acc)
    _must(not need_dmask or call.has_bias, "need_dmask", "be False where there is no float attn_mask", need_dmask)
    dq, dk, dv, _, dmask = call.backward(dout, dlse, out.contiguous(), lse.contiguous(), None, need_dmask)
    assert dv is not None
    return dq, dk, dv, dmask


def attention_weights(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    lse: Tensor,
) -> Tensor:
    """What the op seqkernels::attention_weights returns: [B, H, Tq, Tk], of q's dtype; not of packed rows."""
    call = _Call(
        *(q, k, None, attn_mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k),
        *(scale, causal, window_left, window_right, softcap, dropout_p, seed),
    )
    _shaped("lse", lse, tuple(q.shape[:3]), call.acc)
    weights = torch.empty(call.B, call.H, call.max_q, call.max_k, dtype=q.dtype, device=q.device)
    chosen = call.choose(TILES)
    blocks = triton.cdiv(call.max_k, chosen.BN)
    programs = call.B * call.H * triton.cdiv(call.max_q, chosen.BM) * blocks
    sums = call.normaliser(lse.contiguous())
    call.launch(attention_weights_kernel, TILES, programs, 1, **sums, p_w=weights, blocks=blocks)
    return weights


def attention_weights_backward(
    dweights: Tensor,
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    lse: Tensor,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op seqkernels::attention_weights_backward returns: dq, dk, dlse, and dmask, empty unless needed."""
    call = _Call(
        *(q, k, None, attn_mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k),
        *(scale, causal, window_left, window_right, softcap, dropout_p, seed),
    )
    _shaped("dweights", dweights, (*q.shape[:3], k.shape[2]), q.dtype)
    _shaped("lse", lse, tuple(q.shape[:3]), call.acc)
    _must(not need_dmask or call.has_bias, "need_dmask", "be False where there is no float attn_mask", need_dmask)
    dq, dk, _, dlse, dmask = call.backward(None, None, None, lse.contiguous(), dweights.contiguous(), need_dmask)
    assert dlse is not None
    return dq, dk, dlse, dmask
