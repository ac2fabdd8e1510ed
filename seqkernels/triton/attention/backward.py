"""Attention backward: the gradient of q by blocks of queries, the gradients of k and v by blocks of keys.

Both kernels compute the scores again and need no atomics. Backward of the attention weights uses the same kernels, with
the gradient dw of the weights in place of v and dout.
"""

# ruff: noqa: SIM102
# Nested conditions in a kernel: the outer one is known at compile time, the inner one is not.

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    SIZES,
    Dropout,
    MaskLayout,
    Rows,
    Scaling,
    Window,
    apply_window,
    attending_queries,
    fill_after_last_sequence,
    float_from_bits,
    has_nan,
    kept_weights,
    load_chunk,
    load_rows,
    log2_normaliser,
    products,
    rows_of,
    scores_of,
    sequence_bounds,
    visible_keys,
)


# Grid: blocks of queries x heads x sequences. Backward computes the weights as exp2(score - base - rest), in units of
# log2. In general base is lse and rest is 0. For scores of a huge magnitude, as with a mask of the lowest finite
# number, rounding removes the logarithm of the sum from lse: then base is the largest score, and rest that logarithm.
@triton.jit(do_not_specialize=SIZES)
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
    s_q,
    s_k,
    s_m,
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
    lower_right,
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
    t_q, L_q = sequence_bounds(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = sequence_bounds(p_cu_k, p_k_lengths, i_b, T_k)
    if first >= L_q:
        return
    i_batch = i_b.to(tl.int64) if p_cu_q is None else i_b.to(tl.int64) * 0
    q = rows_of(p_q, s_q, i_batch, i_h, t_q, L_q)
    k = rows_of(p_k, s_k, i_batch, i_h, t_k, L_k, G)
    p_mask += i_b.to(tl.int64) * s_m.b + i_h.to(tl.int64) * s_m.h
    i_q = first + tl.arange(0, BM)
    o_row = (i_batch * H + i_h) * T_q + t_q
    b_lse = tl.load(p_lse + o_row + i_q, mask=i_q < L_q, other=float("-inf"))
    b_base = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    b_rest = tl.zeros([BM], ACC)
    m_huge = (tl.abs(b_lse) > HUGE) & (tl.abs(b_lse) < float("inf"))
    scale = float_from_bits(scale, ACC)
    slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
    window = Window(L_q, L_k, (L_k - L_q) * lower_right, left, right)
    layout = MaskLayout(s_m.q, s_m.k, T_mq, T_mk)
    scaling = Scaling(slope, scale, float_from_bits(cap, ACC))
    if tl.max(m_huge.to(tl.int32), 0) != 0:
        b_max = tl.full([BM], float("-inf"), ACC)
        b_sum = tl.zeros([BM], ACC)
        begin, _whole, _until, end = visible_keys(first, window, LEFT, RIGHT, BM, BN)
        for first_k in tl.range(begin, end, BN, num_stages=1, disable_licm=True):
            b_s = products(q, first, k, first_k, ACC, PRECISION, D, BD, BM, BN)
            i_k = first_k + tl.arange(0, BN)
            b_s, _ = scores_of(
                *(b_s, first, i_q[:, None], i_k[None, :], window, p_mask, layout, scaling),
                *(LEFT, RIGHT, CAP, ALIBI, EXACT),
                EDGE=True,
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
def _accumulate_by_rows(
    b_dq,  # [BM, BD]
    b_dlse,  # [BM], of the attention weights
    b_q,  # [BM, BD], as b_do unused for wide heads
    b_do,  # [BM, BDV]
    b_base,  # [BM], see attention_normaliser_kernel
    b_rest,  # [BM]
    b_delta,  # [BM]
    begin,
    end,
    first_q,
    first_d,  # column of q
    q,
    k,
    v,  # of attention, as dout
    dout,
    p_dw,  # gradient of the weights of these queries, or None
    p_ds,  # gradient of the mask of these queries, or None
    window,
    p_mask,
    layout,
    scaling,
    dropout,
    rescale,  # factor of the weights that dropout keeps
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
    FINITE: tl.constexpr,
):
    """Add the part of keys begin to end to the gradient of q.

    EDGE: apply the window and the end of the keys. NO_LICM: no loop-invariant code motion, which takes registers.
    FINITE: replace infinite and NaN keys by 0.
    """
    ACC: tl.constexpr = b_dq.dtype
    PLAIN: tl.constexpr = not (EDGE or CAP or ALIBI or p_mask is not None)
    EXACT: tl.constexpr = b_q.dtype.primitive_bitwidth >= 32
    WIDE: tl.constexpr = D > BD or DV > BDV
    BM: tl.constexpr = b_dq.shape[0]
    i_q = first_q + tl.arange(0, BM)
    for first in tl.range(begin, end, BN, disable_licm=EDGE or NO_LICM):
        i_k = first + tl.arange(0, BN)
        if WIDE:
            b_s = products(q, first_q, k, first, ACC, PRECISION, D, BD, BM, BN)
            b_k = load_chunk(k, first, first_d, D, BD, BN)
        else:
            b_k = load_rows(k, first, D, BD, BN, WHOLE=not EDGE)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=ACC)
        if PLAIN:
            b_t = b_s
            b_p = tl.exp2(b_s * (scaling.scale * LOG2E) - b_base[:, None])
        else:
            b_s, b_t = scores_of(
                *(b_s, first_q, i_q[:, None], i_k[None, :], window, p_mask, layout, scaling),
                *(LEFT, RIGHT, CAP, ALIBI, EXACT, EDGE),
            )
            b_p = tl.exp2(b_s - b_base[:, None] - b_rest[:, None])
        if p_dw is not None:
            o_w = (i_q - first_q)[:, None] * layout.T_k + i_k[None, :]
            m_w = (i_q < window.L_q)[:, None] & (i_k < window.L_k)[None, :]
            b_dp = tl.load(p_dw + o_w, mask=m_w, other=0.0).to(ACC)
        elif WIDE:
            b_dp = products(dout, first_q, v, first, ACC, PRECISION, DV, BDV, BM, BN)
        else:
            b_v = load_rows(v, first, DV, BDV, BN, WHOLE=not EDGE)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACC)
        if DROPOUT:
            b_dp = tl.where(kept_weights(dropout, i_q, first, BN, TRANSPOSED=False), b_dp * rescale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if not PLAIN:
            b_ds = tl.where(b_s == float("-inf"), 0.0, b_ds)
        if p_dw is not None:
            b_dlse -= tl.sum(b_ds, 1)
        if p_ds is not None:
            o_s = (i_q - first_q)[:, None] * layout.T_k + i_k[None, :]
            m_s = (i_q < window.L_q)[:, None] & (i_k < window.L_k)[None, :]
            if WIDE:
                m_s = m_s & (first_d == 0)
            tl.store(p_ds + o_s, b_ds.to(p_ds.dtype.element_ty), mask=m_s)
        if CAP:
            b_ds = b_ds * (1.0 - b_t * b_t)
        if FINITE:
            b_k = tl.where(tl.abs(b_k) < float("inf"), b_k, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION, out_dtype=ACC)
    return b_dq, b_dlse


# Grid as in attention_forward_kernel, with chunks of columns of q. It also writes delta = sum(dout * out) - dlse, which
# attention_backward_keys_kernel reads.
@triton.jit(do_not_specialize=SIZES)
def attention_backward_rows_kernel(
    p_q,
    p_k,
    p_v,  # None for the attention weights
    p_mask,
    p_slopes,
    p_q_lengths,
    p_k_lengths,
    p_cu_q,
    p_cu_k,
    p_seed,
    p_dout,  # [B, H, Tq, Dv]; None for the attention weights
    p_out,  # [B, H, Tq, Dv]; None for the attention weights
    p_lse,  # [B, H, Tq]; with p_rest, the base of attention_normaliser_kernel
    p_rest,  # [B, H, Tq] with a float mask, else None
    p_dlse,  # [B, H, Tq] or None; for the attention weights, written
    p_dw,  # [B, H, T_mq, T_mk], or None
    p_delta,  # [B, H, Tq], written; None for the attention weights
    p_dq,  # [B, H, Tq, D], written
    p_ds,  # [B, H, T_mq, T_mk] zeros, written at visible keys; or None
    s_q,
    s_k,
    s_v,
    s_o,  # of dout
    s_m,
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
            fill_after_last_sequence(p_dq, p_cu_q, B, T_q, i_h, i_block, blocks, first_d, 0.0, D, BD, BM)
            if WEIGHTS and (not WIDE or first_d == 0):
                fill_after_last_sequence(p_dlse, p_cu_q, B, T_q, i_h, i_block, blocks, 0, 0.0, 1, 1, BM)
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
    o_w = (i_bh.to(tl.int64) * T_mq + first) * T_mk
    if p_mask is not None:
        p_mask += i_b.to(tl.int64) * s_m.b + i_h.to(tl.int64) * s_m.h
    if p_ds is not None:
        p_ds += o_w
    scale = float_from_bits(scale, ACC)
    cap = float_from_bits(cap, ACC)
    rescale = float_from_bits(rescale, ACC)
    slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
    seed = tl.load(p_seed) if DROPOUT else i_b
    window = Window(L_q, L_k, (L_k - L_q) * lower_right, left, right)
    layout = MaskLayout(s_m.q, s_m.k, T_mq, T_mk)
    scaling = Scaling(slope, scale, cap)
    dropout = Dropout(seed, i_bh, threshold)

    i_q = first + tl.arange(0, BM)
    o_row = (i_batch * H + i_h) * T_q + t_q
    if WIDE:
        b_q = tl.zeros([BM, BD], p_q.dtype.element_ty)
    else:
        b_q = load_rows(q, first, D, BD, BM, WHOLE=False)
    b_base, b_rest = log2_normaliser(p_lse + o_row, None if p_rest is None else p_rest + o_row, i_q, L_q, ACC)
    b_delta = tl.zeros([BM], ACC)
    b_do = b_q
    v = q  # v and dout are unused for the attention weights
    dout = q
    if WEIGHTS:
        p_dw += o_w
    else:
        v = rows_of(p_v, s_v, i_batch, i_hk, t_k, L_k)
        dout = rows_of(p_dout, s_o, i_batch, i_h, t_q, L_q)
        if WIDE:
            for column in range(0, DV, BDV):
                b_x = load_chunk(dout, first, column, DV, BDV, BM)
                b_y = load_chunk(Rows(p_out + o_row * DV, L_q, DV, 1), first, column, DV, BDV, BM)
                b_delta += tl.sum(b_x.to(ACC) * b_y.to(ACC), 1)
        else:
            b_do = load_rows(dout, first, DV, BDV, BM, WHOLE=False)
            b_out = load_rows(Rows(p_out + o_row * DV, L_q, DV, 1), first, DV, BDV, BM, WHOLE=False)
            b_delta = tl.sum(b_do.to(ACC) * b_out.to(ACC), 1)
        if p_dlse is not None:
            b_delta -= tl.load(p_dlse + o_row + i_q, mask=i_q < L_q, other=0.0)
        tl.store(p_delta + o_row + i_q, b_delta, mask=i_q < L_q if not WIDE else (i_q < L_q) & (first_d == 0))
    b_dq = tl.zeros([BM, BD], ACC)
    b_dlse = tl.zeros([BM], ACC)
    begin, whole, until, end = visible_keys(first, window, LEFT, RIGHT, BM, BN)
    if LEFT:
        b_dq, b_dlse = _accumulate_by_rows(
            *(b_dq, b_dlse, b_q, b_do, b_base, b_rest, b_delta, begin, whole, first, first_d),
            *(q, k, v, dout, p_dw, p_ds, window, p_mask, layout, scaling, dropout, rescale),
            *(LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION, D, DV, BD, BDV, BN),
            EDGE=True,
            NO_LICM=PACKED,
            FINITE=False,
        )
    b_dq, b_dlse = _accumulate_by_rows(
        *(b_dq, b_dlse, b_q, b_do, b_base, b_rest, b_delta, whole, until, first, first_d),
        *(q, k, v, dout, p_dw, p_ds, window, p_mask, layout, scaling, dropout, rescale),
        *(LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION, D, DV, BD, BDV, BN),
        EDGE=False,
        NO_LICM=PACKED,
        FINITE=False,
    )
    b_dq, b_dlse = _accumulate_by_rows(
        *(b_dq, b_dlse, b_q, b_do, b_base, b_rest, b_delta, until, end, first, first_d),
        *(q, k, v, dout, p_dw, p_ds, window, p_mask, layout, scaling, dropout, rescale),
        *(LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION, D, DV, BD, BDV, BN),
        EDGE=True,
        NO_LICM=PACKED,
        FINITE=False,
    )
    if LEFT or RIGHT or p_mask is not None:
        # As in attention_forward_kernel: an infinite or NaN key that is masked has gradient 0, and 0 times it is NaN.
        if has_nan(b_dq):
            b_dq, b_dlse = tl.zeros([BM, BD], ACC), tl.zeros([BM], ACC)
            b_dq, b_dlse = _accumulate_by_rows(
                *(b_dq, b_dlse, b_q, b_do, b_base, b_rest, b_delta, begin, end, first, first_d),
                *(q, k, v, dout, p_dw, p_ds, window, p_mask, layout, scaling, dropout, rescale),
                *(LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION, D, DV, BD, BDV, BN),
                EDGE=True,
                NO_LICM=PACKED,
                FINITE=True,
            )
    m_row = i_q < end_q
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
def _accumulate_by_keys(
    b_dk,  # [BN, BD]
    b_dv,  # [BN, BDV]
    b_k,  # [BN, BD], as b_v unused for wide heads
    b_v,  # [BN, BDV]
    begin,
    whole,
    until,
    end,
    first_k,
    first_d,  # column of k
    first_v,  # column of v
    q,
    k,
    v,  # of attention, as dout and p_delta
    p_lse,  # of this head of this sequence, as p_rest, p_delta, p_dw and p_mask
    p_rest,
    dout,
    p_delta,
    p_dw,
    window,
    p_mask,
    layout,
    scaling,
    dropout,
    rescale,  # factor of the weights that dropout keeps
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
    """Add the part of queries begin to end of one head to the gradients of k and v. From whole to until are blocks of
    queries that attend to all keys of this block."""
    ACC: tl.constexpr = b_dk.dtype
    EXTRA: tl.constexpr = CAP or ALIBI or p_mask is not None
    EXACT: tl.constexpr = b_k.dtype.primitive_bitwidth >= 32
    WIDE: tl.constexpr = D > BD or DV > BDV
    i_k = first_k + tl.arange(0, BN)
    for first in tl.range(begin, end, BM, disable_licm=True):
        i_q = first + tl.arange(0, BM)
        if WIDE:
            b_s = products(k, first_k, q, first, ACC, PRECISION, D, BD, BN, BM)
            b_q = load_chunk(q, first, first_d, D, BD, BM)
        else:
            b_q = load_rows(q, first, D, BD, BM, WHOLE=False)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=ACC)
        b_base, b_rest = log2_normaliser(p_lse, p_rest, i_q, window.L_q, ACC)
        b_t = b_s
        if EXTRA:
            b_s, b_t = scores_of(
                *(b_s, first, i_q[None, :], i_k[:, None], window, p_mask, layout, scaling),
                *(LEFT, RIGHT, CAP, ALIBI, EXACT),
                EDGE=False,
            )
            b_s = b_s - b_base[None, :] - b_rest[None, :]
        else:
            b_s = b_s * (scaling.scale * LOG2E) - b_base[None, :]
        edge = (first < whole) | (first >= until)
        if LEFT or RIGHT:
            if edge:
                b_s = apply_window(b_s, i_q[None, :], i_k[:, None], window, LEFT, RIGHT)
        b_p = tl.exp2(b_s)
        if EXTRA:
            b_p = tl.where(b_s == float("-inf"), 0.0, b_p)
        if DROPOUT:
            m_kept = kept_weights(dropout, i_q, first_k, BN, TRANSPOSED=True)
        if p_dw is not None:
            o_w = (i_q - first)[None, :] * layout.T_k + i_k[:, None]
            b_dp = tl.load(
                p_dw + tl.cast(first, tl.int64) * layout.T_k + o_w,
                mask=(i_q < window.L_q)[None, :] & (i_k < window.L_k)[:, None],
                other=0.0,
            ).to(ACC)
            if DROPOUT:
                b_dp = tl.where(m_kept, b_dp * rescale, 0.0)
            b_ds = b_p * b_dp
        else:
            if WIDE:
                b_do = load_chunk(dout, first, first_v, DV, BDV, BM)
            else:
                b_do = load_rows(dout, first, DV, BDV, BM, WHOLE=False)
            b_w = tl.where(m_kept, b_p, 0.0) if DROPOUT else b_p
            b_dv = tl.dot(b_w.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=ACC)
            if WIDE:
                b_dp = products(v, first_k, dout, first, ACC, PRECISION, DV, BDV, BN, BM)
            else:
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=ACC)
            if DROPOUT:
                b_dp = tl.where(m_kept, b_dp * rescale, 0.0)
            b_delta = tl.load(p_delta + i_q, mask=i_q < window.L_q, other=0.0)
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


# Grid: (blocks of keys x key heads x sequences, chunks of columns). Packed rows have one sequence more, for the rows
# after the last one. A program adds up the gradients of all query heads of its key head and of all their queries.
@triton.jit(do_not_specialize=SIZES)
def attention_backward_keys_kernel(
    p_q,
    p_k,
    p_v,  # None for the attention weights
    p_mask,
    p_slopes,
    p_q_lengths,
    p_k_lengths,
    p_cu_q,
    p_cu_k,
    p_seed,
    p_dout,  # [B, H, Tq, Dv]; None for the attention weights
    p_lse,  # [B, H, Tq]; with p_rest, the base of attention_normaliser_kernel
    p_rest,  # [B, H, Tq] or None
    p_delta,  # [B, H, Tq]; None for the attention weights
    p_dw,  # [B, H, T_mq, T_mk], or None
    p_dk,  # [B, H / G, Tk, D], written
    p_dv,  # [B, H / G, Tk, Dv], written; None for the attention weights
    s_q,
    s_k,
    s_v,
    s_o,  # of dout
    s_m,
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
    lower_right,
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
            fill_after_last_sequence(p_dk, p_cu_k, B, T_k, i_hk, i_block, blocks, first_d, 0.0, D, BD, BN)
            if not WEIGHTS:
                fill_after_last_sequence(p_dv, p_cu_k, B, T_k, i_hk, i_block, blocks, first_v, 0.0, DV, BDV, BN)
            return
    t_q, L_q = sequence_bounds(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = sequence_bounds(p_cu_k, p_k_lengths, i_b, T_k)
    end_k = L_k if p_cu_k is not None else T_k  # of the keys to write
    first = i_block * BN
    if first >= end_k:
        return
    i_batch = i_b.to(tl.int64) if p_cu_q is None else i_b.to(tl.int64) * 0
    p_q += i_batch * s_q.b + t_q * s_q.t
    k = rows_of(p_k, s_k, i_batch, i_hk, t_k, L_k)
    if p_mask is not None:
        p_mask += i_b.to(tl.int64) * s_m.b
    scale = float_from_bits(scale, ACC)
    cap = float_from_bits(cap, ACC)
    rescale = float_from_bits(rescale, ACC)
    seed = tl.load(p_seed) if DROPOUT else i_b
    window = Window(L_q, L_k, (L_k - L_q) * lower_right, left, right)
    layout = MaskLayout(s_m.q, s_m.k, T_mq, T_mk)

    i_k = first + tl.arange(0, BN)
    if WIDE:
        b_k = tl.zeros([BN, BD], p_q.dtype.element_ty)
    else:
        b_k = load_rows(k, first, D, BD, BN, WHOLE=False)
    b_v = b_k
    v = k  # unused for the attention weights
    if not WEIGHTS:
        v = rows_of(p_v, s_v, i_batch, i_hk, t_k, L_k)
        p_dout += i_batch * s_o.b + t_q * s_o.t
        if not WIDE:
            b_v = load_rows(v, first, DV, BDV, BN, WHOLE=False)
    b_dk = tl.zeros([BN, BD], ACC)
    b_dv = tl.zeros([BN, BDV], ACC)
    begin, whole, until, end = attending_queries(first, window, LEFT, RIGHT, BM, BN)
    for i_g in range(G if GROUPED else 1):
        i_h = i_hk * G + i_g
        i_bh = i_b * H + i_h
        q = Rows(p_q + i_h.to(tl.int64) * s_q.h, L_q, s_q.t, s_q.d)
        o_dout = i_h.to(tl.int64) * s_o.h
        o_w = i_bh.to(tl.int64) * T_mq * T_mk
        o_mask = i_h.to(tl.int64) * s_m.h
        o_row = (i_batch * H + i_h) * T_q + t_q
        slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
        b_dk, b_dv = _accumulate_by_keys(
            *(b_dk, b_dv, b_k, b_v, begin, whole, until, end, first, first_d, first_v, q, k, v),
            p_lse + o_row,
            None if p_rest is None else p_rest + o_row,
            q if WEIGHTS else Rows(p_dout + o_dout, L_q, s_o.t, s_o.d),
            None if WEIGHTS else p_delta + o_row,
            p_dw + o_w if WEIGHTS else None,
            window,
            None if p_mask is None else p_mask + o_mask,
            *(layout, Scaling(slope, scale, cap), Dropout(seed, i_bh, threshold), rescale),
            *(LEFT, RIGHT, CAP, ALIBI, DROPOUT, PRECISION, D, DV, BD, BDV, BM, BN),
        )
    m_row = i_k < end_k
    m_real = (i_k < L_k)[:, None]
    o_row = (i_batch * heads + i_hk) * T_k + t_k + first
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
