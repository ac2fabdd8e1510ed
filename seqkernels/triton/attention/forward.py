"""Attention forward: the output and the logarithm of the sum of exponentials."""

# ruff: noqa: SIM102
# Nested conditions in a kernel: the outer one is known at compile time, the inner one is not.

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    LOWEST32,
    LOWEST64,
    SIZES,
    Dropout,
    MaskLayout,
    Scaling,
    Window,
    fill_after_last_sequence,
    float_from_bits,
    has_nan,
    kept_weights,
    load_chunk,
    load_rows,
    products,
    rows_of,
    scores_of,
    sequence_bounds,
    visible_keys,
)


@triton.jit
def _accumulate(
    b_acc,  # [BM, BDV]
    b_max,  # [BM] largest score so far
    b_sum,  # [BM]
    b_q,  # [BM, BD]; unused for wide heads, which read q again for every block of keys
    begin,
    end,
    first_q,
    first_v,  # column of v
    q,
    k,
    v,
    window,
    p_mask,
    layout,
    scaling,
    dropout,
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
    EDGE: tl.constexpr,
    NO_LICM: tl.constexpr,
):
    """Add keys begin to end to the online softmax.

    EDGE: apply the window and the end of the keys. NO_LICM: no loop-invariant code motion, which takes registers.
    """
    ACC: tl.constexpr = b_acc.dtype
    PLAIN: tl.constexpr = not (EDGE or CAP or ALIBI or p_mask is not None)
    EXACT: tl.constexpr = b_q.dtype.primitive_bitwidth >= 32
    WIDE: tl.constexpr = D > BD or DV > BDV
    BM: tl.constexpr = b_acc.shape[0]
    i_q = first_q + tl.arange(0, BM)
    for first in tl.range(begin, end, BN, disable_licm=EDGE or NO_LICM):
        if WIDE:
            b_s = products(q, first_q, k, first, ACC, PRECISION, D, BD, BM, BN)
        else:
            b_k = load_rows(k, first, D, BD, BN, WHOLE=not EDGE)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        if PLAIN:
            b_top = tl.maximum(b_max, tl.max(b_s, 1) * (scaling.scale * LOG2E))
            b_p = tl.exp2(b_s * (scaling.scale * LOG2E) - b_top[:, None])
            b_less = tl.exp2(b_max - b_top)
        else:
            i_k = first + tl.arange(0, BN)
            b_s, _ = scores_of(
                *(b_s, first_q, i_q[:, None], i_k[None, :], window, p_mask, layout, scaling),
                *(LEFT, RIGHT, CAP, ALIBI, EXACT, EDGE),
            )
            b_top = tl.maximum(b_max, tl.max(b_s, 1))
            b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
            b_p = tl.exp2(b_s - b_base[:, None])
            b_less = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_less + tl.sum(b_p, 1)
        b_acc = b_acc * b_less[:, None]
        b_max = b_top
        if DROPOUT:
            b_p = tl.where(kept_weights(dropout, i_q, first, BN, TRANSPOSED=False), b_p, 0.0)
        if WIDE:
            b_v = load_chunk(v, first, first_v, DV, BDV, BN)
        else:
            b_v = load_rows(v, first, DV, BDV, BN, WHOLE=not EDGE)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION, out_dtype=ACC)
    return b_acc, b_max, b_sum


# Grid: (blocks of queries x heads x sequences, chunks of columns of v). Packed rows have one sequence more, for the
# rows after the last one. With a right bound the blocks with most keys run first. Heads of more than BD or BDV columns
# are read in chunks; each program computes the scores again for its chunk of the output.
@triton.jit(do_not_specialize=SIZES)
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
    s_q,
    s_k,
    s_v,
    s_m,
    s_slope,  # of the batch
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
    lower_right,
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
    EXACT: tl.constexpr = p_q.dtype.element_ty.primitive_bitwidth >= 32
    first_v = tl.program_id(1) * BDV if WIDE else 0
    i_block = tl.program_id(0) % blocks
    i_bh = tl.program_id(0) // blocks
    i_b = i_bh // H
    i_h = i_bh % H
    if RIGHT:
        i_block = blocks - 1 - i_block
    if PACKED:
        if i_b == B:
            fill_after_last_sequence(p_out, p_cu_q, B, T_q, i_h, i_block, blocks, first_v, 0.0, DV, BDV, BM)
            if not WIDE or first_v == 0:
                fill_after_last_sequence(p_lse, p_cu_q, B, T_q, i_h, i_block, blocks, 0, float("-inf"), 1, 1, BM)
            return
    t_q, L_q = sequence_bounds(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = sequence_bounds(p_cu_k, p_k_lengths, i_b, T_k)
    end_q = L_q if PACKED else T_q  # of the queries to write
    first = i_block * BM
    if first >= end_q:
        return
    i_batch = i_b.to(tl.int64) * 0 if PACKED else i_b.to(tl.int64)
    i_hk = (i_h // G).to(tl.int64)
    q = rows_of(p_q, s_q, i_batch, i_h, t_q, L_q)
    k = rows_of(p_k, s_k, i_batch, i_hk, t_k, L_k)
    v = rows_of(p_v, s_v, i_batch, i_hk, t_k, L_k)
    if p_mask is not None:
        p_mask += i_b.to(tl.int64) * s_m.b + i_h.to(tl.int64) * s_m.h
    scale = float_from_bits(scale, ACC)
    cap = float_from_bits(cap, ACC)
    slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
    seed = tl.load(p_seed) if DROPOUT else i_b
    window = Window(L_q, L_k, (L_k - L_q) * lower_right, left, right)
    layout = MaskLayout(s_m.q, s_m.k, T_mq, T_mk)
    scaling = Scaling(slope, scale, cap)
    dropout = Dropout(seed, i_bh, threshold)

    i_q = first + tl.arange(0, BM)
    if WIDE:
        b_q = tl.zeros([BM, BD], p_q.dtype.element_ty)
    else:
        b_q = load_rows(q, first, D, BD, BM, WHOLE=False)
    b_acc = tl.zeros([BM, BDV], ACC)
    b_max = tl.full([BM], float("-inf"), ACC)
    b_sum = tl.zeros([BM], ACC)
    begin, whole, until, end = visible_keys(first, window, LEFT, RIGHT, BM, BN)
    if LEFT:
        b_acc, b_max, b_sum = _accumulate(
            *(b_acc, b_max, b_sum, b_q, begin, whole, first, first_v, q, k, v),
            *(window, p_mask, layout, scaling, dropout, LEFT, RIGHT, CAP, ALIBI, DROPOUT),
            *(PRECISION, D, DV, BD, BDV, BN),
            EDGE=True,
            NO_LICM=PACKED,
        )
    b_acc, b_max, b_sum = _accumulate(
        *(b_acc, b_max, b_sum, b_q, whole, until, first, first_v, q, k, v),
        *(window, p_mask, layout, scaling, dropout, LEFT, RIGHT, CAP, ALIBI, DROPOUT),
        *(PRECISION, D, DV, BD, BDV, BN),
        EDGE=False,
        NO_LICM=PACKED,
    )
    b_acc, b_max, b_sum = _accumulate(
        *(b_acc, b_max, b_sum, b_q, until, end, first, first_v, q, k, v),
        *(window, p_mask, layout, scaling, dropout, LEFT, RIGHT, CAP, ALIBI, DROPOUT),
        *(PRECISION, D, DV, BD, BDV, BN),
        EDGE=True,
        NO_LICM=PACKED,
    )

    if LEFT or RIGHT or p_mask is not None:
        # A masked key has weight 0, and 0 times an infinite or NaN value is NaN. Then the output is computed again in
        # four passes: the sum of the finite values; whether +inf or NaN has a positive weight; whether -inf or NaN has;
        # whether any of them has weight 0 at a visible key, which gives NaN.
        if has_nan(b_acc):
            b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
            FEW: tl.constexpr = 16  # keys of a block: two outputs are in registers
            for kind in range(4):
                b_part = tl.zeros([BM, BDV], ACC)
                for first_k in tl.range(begin, end, FEW, num_stages=1, disable_licm=True):
                    if WIDE:
                        b_s = products(q, first, k, first_k, ACC, PRECISION, D, BD, BM, FEW)
                    else:
                        b_k = load_rows(k, first_k, D, BD, FEW, WHOLE=False)
                        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
                    i_k = first_k + tl.arange(0, FEW)
                    b_s, _ = scores_of(
                        *(b_s, first, i_q[:, None], i_k[None, :], window, p_mask, layout, scaling),
                        *(LEFT, RIGHT, CAP, ALIBI, EXACT),
                        EDGE=True,
                    )
                    b_p = tl.exp2(b_s - b_base[:, None])
                    if DROPOUT:
                        b_p = tl.where(kept_weights(dropout, i_q, first_k, FEW, TRANSPOSED=False), b_p, 0.0)
                    m_row = tl.where(kind == 3, (b_p == 0) & (b_s != float("-inf")), b_p > 0)
                    b_p = tl.where(kind == 0, b_p, m_row.to(ACC))
                    b_v = load_chunk(v, first_k, first_v, DV, BDV, FEW)
                    m_finite = tl.abs(b_v) < float("inf")
                    m_kind = (m_finite == 0) & ((kind == 3) | (tl.where(kind == 1, b_v, -b_v) != float("-inf")))
                    b_v = tl.where(kind == 0, tl.where(m_finite, b_v, 0.0), m_kind.to(b_v.dtype))
                    b_part = tl.dot(b_p.to(b_v.dtype), b_v, b_part, input_precision=PRECISION, out_dtype=ACC)
                b_far = tl.where(kind == 3, float("nan"), tl.where(kind == 1, float("inf"), float("-inf")))
                b_acc = tl.where(kind == 0, b_part, tl.where(b_part > 0, b_acc + b_far, b_acc))

    if DROPOUT:
        b_acc = b_acc * float_from_bits(rescale, ACC)
    b_out = b_acc / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    b_lse = (b_max + tl.log2(b_sum)) * LN2
    if p_mask is not None:  # a query whose scores are all the lowest finite number
        LOWEST: tl.constexpr = LOWEST64 if tl.float64 == ACC else LOWEST32
        b_lse = tl.where((b_max < LOWEST / 2) & (b_max > float("-inf")), LOWEST, b_lse)
    m_real = i_q < L_q
    b_out = tl.where(m_real[:, None], b_out, 0.0)
    b_lse = tl.where(m_real, b_lse, float("-inf"))
    o_row = (i_batch * H + i_h) * T_q + t_q + first
    i_d = first_v + tl.arange(0, BDV)
    o_out = tl.arange(0, BM)[:, None] * DV + i_d[None, :]
    m_row = i_q < end_q
    m_out = m_row[:, None] if DV == BDV else m_row[:, None] & (i_d < DV)[None, :]
    tl.store(p_out + o_row * DV + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_row + tl.arange(0, BM), b_lse, mask=m_row if not WIDE else m_row & (first_v == 0))
