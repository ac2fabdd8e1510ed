"""EmbeddingBag forward.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bags import MAX, MEAN, MIN, NO_FAULT, SIZES, bounds

_NO_FAULT = tl.constexpr(NO_FAULT)
_NO_POSITION = tl.constexpr(2**31 - 1)
_MEAN, _MAX, _MIN = tl.constexpr(MEAN), tl.constexpr(MAX), tl.constexpr(MIN)


# Grid: (bags / BB, columns / BD). A program loads tiles of BB x BR rows and BD columns, accumulates BB x BR partial
# results, and reduces them over BR at the end.
@triton.jit(do_not_specialize=SIZES)
def embedding_bag_forward_kernel(
    table,
    bags,
    p_out,  # [B, D]
    p_arg,  # int32 [B, D] for max and min, otherwise None
    p_fault,  # int64 [2]: first position of an invalid index, and first bag with invalid offsets
    E,
    D,
    N,
    B,
    L,
    padding,
    MODE: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_LAST_OFFSET: tl.constexpr,
    FLOAT64: tl.constexpr,
    BB: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    EXTREME: tl.constexpr = MODE >= _MAX
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    i_b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_b = i_b < B
    m_d = i_d < D

    b_begin, b_length, m_misfit = bounds(bags, i_b, m_b, N, B, L, HAS_LAST_OFFSET)
    if bags.p_offsets is not None:
        i_fault = tl.min(tl.where(m_misfit, i_b, _NO_FAULT), axis=0)
        if i_fault != _NO_FAULT:
            tl.atomic_min(p_fault + 1, i_fault)

    # The identity of a sum is -0, which preserves a sum of -0. Triton converts a literal -0.0 to 0, and -x to 0 - x.
    b_zero = tl.full([], -1, ACC) * 0.0
    if EXTREME:
        b_acc = tl.zeros([BB, BR, BD], ACC)
        b_at = tl.full([BB, BR, BD], -1, tl.int32)  # position in the bag of each partial result
    else:
        b_acc = tl.full([BB, BR, BD], 1, ACC) * b_zero
        b_count = tl.zeros([BB, BR], tl.int32)
        b_divisor = tl.zeros([BB, BR], ACC)
    b_fault = tl.full([BB, BR], _NO_FAULT, tl.int64)

    for i_r in range(0, tl.max(b_length, axis=0), BR):
        i_k = (i_r + tl.arange(0, BR)).to(tl.int64)  # position in the bag
        o_k = b_begin[:, None] + i_k[None, :]
        m_k = i_k[None, :] < b_length[:, None]
        b_row = tl.load(bags.p_indices + o_k, mask=m_k, other=0).to(tl.int64)
        m_fault = m_k & ((b_row < 0) | (b_row >= E))
        b_fault = tl.where(m_fault & (o_k < b_fault), o_k, b_fault)
        m_k = m_k & (m_fault == 0)
        if HAS_PADDING:
            m_k = m_k & (b_row != padding)
        m_row = m_k[:, :, None] & m_d[None, None, :]
        b_value = tl.load(
            table.p_table + b_row[:, :, None] * table.s_row + i_d[None, None, :].to(tl.int64) * table.s_column,
            mask=m_row,
            other=0,
        ).to(ACC)
        if bags.p_weights is not None:
            b_weight = tl.load(bags.p_weights + o_k, mask=m_k, other=0).to(ACC)
            b_value = b_value * b_weight[:, :, None]
        if EXTREME:
            if MODE == _MIN:
                b_value = b_value * -1.0
            m_better = (b_at < 0) | (b_value > b_acc) | ((b_value != b_value) & (b_acc == b_acc))
            m_better = m_better & m_row
            b_acc = tl.where(m_better, b_value, b_acc)
            b_at = tl.where(m_better, i_k.to(tl.int32)[None, :, None], b_at)
        else:
            b_acc += tl.where(m_row, b_value, b_zero)
            b_count += m_k.to(tl.int32)
            if BY_WEIGHT:
                b_divisor += b_weight

    i_fault = tl.min(tl.min(b_fault, axis=1), axis=0)
    if i_fault != _NO_FAULT:
        tl.atomic_min(p_fault, i_fault)

    if EXTREME:
        m_found = b_at >= 0
        m_nan = m_found & (b_acc != b_acc)
        b_best = tl.max(tl.where(m_found & (m_nan == 0), b_acc, float("-inf")), axis=1)
        m_best = m_found & (b_acc == b_best[:, None, :])
        i_best = tl.min(tl.where(m_best, b_at, _NO_POSITION), axis=1)
        i_nan = tl.min(tl.where(m_nan, b_at, _NO_POSITION), axis=1)
        i_best = tl.where(i_nan != _NO_POSITION, i_nan, i_best)  # [BB, BD]
        # Selects the value at that position, which preserves its sign and the bits of a NaN.
        b_out = tl.sum(tl.where(b_at == i_best[:, None, :], b_acc, b_zero), axis=1)
        if MODE == _MIN:
            b_out = b_out * -1.0
        m_empty = i_best == _NO_POSITION
        i_best = tl.where(m_empty, -1, i_best)
    else:
        b_out = tl.sum(b_acc, axis=1)
        b_total = tl.sum(b_count, axis=1)
        m_empty = (b_total == 0)[:, None]
        if MODE == _MEAN:
            b_over = tl.sum(b_divisor, axis=1) if BY_WEIGHT else b_total.to(ACC)
            b_over = tl.where(b_total == 0, 1.0, b_over)[:, None]
            b_out = b_out / b_over if FLOAT64 else tl.div_rn(b_out, b_over)

    o_out = i_b[:, None] * D + i_d[None, :]
    m_out = m_b[:, None] & m_d[None, :]
    tl.store(p_out + o_out, tl.where(m_empty, 0.0, b_out).to(p_out.dtype.element_ty), mask=m_out)
    if EXTREME:
        tl.store(p_arg + o_out, i_best, mask=m_out)
