"""The attention weights, and the gradient of a mask whose elements several scores share."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    SIZES,
    Dropout,
    MaskLayout,
    Scaling,
    Window,
    float_from_bits,
    kept_weights,
    log2_normaliser,
    products,
    rows_of,
    scores_of,
    sequence_bounds,
    visible_keys,
)


# Grid: tiles of queries and keys x heads x sequences.
@triton.jit(do_not_specialize=SIZES)
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
    p_lse,  # [B, H, Tq]; with p_rest, the base of attention_normaliser_kernel
    p_rest,  # [B, H, Tq] or None
    p_w,  # [B, H, T_mq, T_mk], written
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
    blocks,  # of keys
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
    t_q, L_q = sequence_bounds(p_cu_q, p_q_lengths, i_b, T_q)
    t_k, L_k = sequence_bounds(p_cu_k, p_k_lengths, i_b, T_k)
    i_batch = i_b.to(tl.int64) if p_cu_q is None else i_b.to(tl.int64) * 0
    q = rows_of(p_q, s_q, i_batch, i_h, t_q, L_q)
    k = rows_of(p_k, s_k, i_batch, i_h, t_k, L_k, G)
    if p_mask is not None:
        p_mask += i_b.to(tl.int64) * s_m.b + i_h.to(tl.int64) * s_m.h
    scale = float_from_bits(scale, ACC)
    slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
    window = Window(L_q, L_k, (L_k - L_q) * lower_right, left, right)
    layout = MaskLayout(s_m.q, s_m.k, T_mq, T_mk)
    scaling = Scaling(slope, scale, float_from_bits(cap, ACC))
    i_q = first + tl.arange(0, BM)
    i_k = first_k + tl.arange(0, BN)
    b_s = products(q, first, k, first_k, ACC, PRECISION, D, BD, BM, BN)
    b_s, _ = scores_of(
        *(b_s, first, i_q[:, None], i_k[None, :], window, p_mask, layout, scaling),
        *(LEFT, RIGHT, CAP, ALIBI, EXACT),
        EDGE=True,
    )
    o_row = (i_batch * H + i_h) * T_q + t_q
    b_base, b_rest = log2_normaliser(p_lse + o_row, None if p_rest is None else p_rest + o_row, i_q, L_q, ACC)
    b_w = tl.exp2(b_s - b_base[:, None] - b_rest[:, None])
    b_w = tl.where(b_s == float("-inf"), 0.0, b_w)
    if DROPOUT:
        dropout = Dropout(tl.load(p_seed), i_bh, threshold)
        m_kept = kept_weights(dropout, i_q, first_k, BN, TRANSPOSED=False)
        b_w = tl.where(m_kept, b_w * float_from_bits(rescale, ACC), 0.0)
    o_w = (i_bh.to(tl.int64) * T_mq + i_q)[:, None] * T_mk + i_k[None, :]
    tl.store(p_w + o_w, b_w.to(p_w.dtype.element_ty), mask=(i_q < T_mq)[:, None] & (i_k < T_mk)[None, :])


# Grid: tiles of the mask x parts of the sums. Of a dimension that the mask broadcasts, a program visits all indices of
# its part, and adds up the tiles of scores in registers.
@triton.jit(do_not_specialize=[*SIZES, "n_b", "n_h", "n_q", "n_k", "part_size", "tiles"])
def attention_mask_gradient_kernel(
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
    p_dout,  # None for the attention weights
    p_lse,
    p_rest,
    p_delta,  # None for the attention weights
    p_dw,  # or None
    p_dmask,  # [parts, *shape of the mask], written
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
    blocks,  # of keys in the mask: 1 if it broadcasts them
    scale,
    cap,
    left,
    right,
    lower_right,
    threshold,
    rescale,
    n_b,  # number of sequences, heads, blocks of queries and blocks of keys that share an element of the mask
    n_h,
    n_q,
    n_k,
    part_size,  # number of the n_b n_h n_q n_k tiles of scores that a program adds up
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
    scale = float_from_bits(scale, ACC)
    cap = float_from_bits(cap, ACC)
    rescale = float_from_bits(rescale, ACC)
    seed = tl.load(p_seed) if DROPOUT else i_part
    layout = MaskLayout(s_m.q, s_m.k, T_mq, T_mk)
    b_acc = tl.zeros([BM, BN], ACC)
    for i in range(i_part * part_size, tl.minimum((i_part + 1) * part_size, n_b * n_h * n_q * n_k)):
        first_k = (i_tk + i % n_k) * BN
        first = (i_tq + i // n_k % n_q) * BM
        i_h = i_th + i // n_k // n_q % n_h
        i_b = i_tb + i // n_k // n_q // n_h
        t_q, L_q = sequence_bounds(p_cu_q, p_q_lengths, i_b, T_q)
        t_k, L_k = sequence_bounds(p_cu_k, p_k_lengths, i_b, T_k)
        window = Window(L_q, L_k, (L_k - L_q) * lower_right, left, right)
        begin, _whole, _until, end = visible_keys(first, window, LEFT, RIGHT, BM, BN)
        if (first_k >= begin) & (first_k < end):
            i_batch = i_b.to(tl.int64) if p_cu_q is None else i_b.to(tl.int64) * 0
            i_hk = (i_h // G).to(tl.int64)
            i_q = first + tl.arange(0, BM)
            i_k = first_k + tl.arange(0, BN)
            q = rows_of(p_q, s_q, i_batch, i_h, t_q, L_q)
            k = rows_of(p_k, s_k, i_batch, i_hk, t_k, L_k)
            b_s = products(q, first, k, first_k, ACC, PRECISION, D, BD, BM, BN)
            slope = tl.load(p_slopes + i_b.to(tl.int64) * s_slope + i_h).to(ACC) if ALIBI else scale
            p_m = p_mask + i_b.to(tl.int64) * s_m.b + i_h.to(tl.int64) * s_m.h
            b_s, _ = scores_of(
                *(b_s, first, i_q[:, None], i_k[None, :], window, p_m, layout, Scaling(slope, scale, cap)),
                *(LEFT, RIGHT, CAP, ALIBI, EXACT),
                EDGE=True,
            )
            o_row = (i_batch * H + i_h) * T_q + t_q
            b_base, b_rest = log2_normaliser(p_lse + o_row, None if p_rest is None else p_rest + o_row, i_q, L_q, ACC)
            b_p = tl.exp2(b_s - b_base[:, None] - b_rest[:, None])
            if p_dw is not None:
                o_w = ((i_b * H + i_h).to(tl.int64) * T_mq + i_q)[:, None] * T_mk + i_k[None, :]
                b_dp = tl.load(p_dw + o_w, mask=(i_q < L_q)[:, None] & (i_k < L_k)[None, :], other=0.0).to(ACC)
            else:
                dout = rows_of(p_dout, s_o, i_batch, i_h, t_q, L_q)
                v = rows_of(p_v, s_v, i_batch, i_hk, t_k, L_k)
                b_dp = products(dout, first, v, first_k, ACC, PRECISION, DV, BDV, BM, BN)
            if DROPOUT:
                dropout = Dropout(seed, i_b * H + i_h, threshold)
                m_kept = kept_weights(dropout, i_q, first_k, BN, TRANSPOSED=False)
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
