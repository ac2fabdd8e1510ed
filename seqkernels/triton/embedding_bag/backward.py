"""EmbeddingBag backward: gradients of the table and of the per-sample weights, summed in the order of positions.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .bags import MAX, MEAN, SIZES, bounds

_MEAN, _MAX = tl.constexpr(MEAN), tl.constexpr(MAX)


class Positions(NamedTuple):
    """Outputs of positions_kernel."""

    p_row: Any  # int64 [N] table row of each position; E for padding and positions outside of all bags
    p_bag: Any  # int64 [N] bag
    p_place: Any  # int32 [N] position in the bag
    p_divisor: Any  # [B] divisors of a mean, or None


class Occurrences(NamedTuple):
    """Positions sorted by row; the sort is stable."""

    p_row: Any  # int64 [N]
    p_position: Any  # int64 [N]
    p_end: Any  # int64 [N] end of the occurrences of the same row
    p_output: Any  # int64 [N] row of the output, or None if it equals the row of the table


@triton.jit
def _counted(bags, begin, length, i_r, E, padding, HAS_PADDING: tl.constexpr, BR: tl.constexpr):
    """BR positions of a bag from i_r on: positions in the indices, bounds mask, mask of those that count, rows."""
    i_k = i_r + tl.arange(0, BR)
    o_k = begin + i_k
    m_k = i_k < length
    b_row = tl.load(bags.p_indices + o_k, mask=m_k, other=0).to(tl.int64)
    m_counted = m_k & (b_row >= 0) & (b_row < E)
    if HAS_PADDING:
        m_counted = m_counted & (b_row != padding)
    return o_k, m_k, m_counted, b_row


# Grid: (bags,).
@triton.jit(do_not_specialize=SIZES)
def positions_kernel(
    bags,
    positions,
    E,
    N,
    B,
    L,
    padding,
    BY_WEIGHT: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_LAST_OFFSET: tl.constexpr,
    BR: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    begin, length, _misfit = bounds(bags, i_b, i_b < B, N, B, L, HAS_LAST_OFFSET)
    b_count = tl.zeros([BR], tl.int32)
    if positions.p_divisor is not None:
        ACC: tl.constexpr = positions.p_divisor.dtype.element_ty
        b_total = tl.zeros([BR], ACC)
    for i_r in range(0, length, BR):
        o_k, m_k, m_counted, b_row = _counted(bags, begin, length, i_r, E, padding, HAS_PADDING, BR)
        tl.store(positions.p_row + o_k, tl.where(m_counted, b_row, E), mask=m_k)
        tl.store(positions.p_bag + o_k, o_k * 0 + i_b, mask=m_k)
        tl.store(positions.p_place + o_k, (o_k - begin).to(tl.int32), mask=m_k)
        b_count += m_counted.to(tl.int32)
        if positions.p_divisor is not None and BY_WEIGHT:
            b_total += tl.load(bags.p_weights + o_k, mask=m_counted, other=0).to(ACC)
    if positions.p_divisor is not None:
        count = tl.sum(b_count, axis=0)
        divisor = tl.sum(b_total, axis=0) if BY_WEIGHT else count.to(ACC)
        tl.store(positions.p_divisor + i_b, tl.where(count == 0, 1.0, divisor))


# Grid: (N, columns / BD). The program of the first occurrence of a row sums all its occurrences, BK at a time; the
# other programs exit.
@triton.jit(do_not_specialize=["E", "N"])
def table_gradient_kernel(
    p_grad,  # [B, D]
    p_arg,  # int32 [B, D] for max and min, otherwise None
    p_weights,  # [N] per-sample weights, or None
    positions,
    occurrences,
    p_out,  # [E, D], or [U, D] for the rows that occur
    E,
    N,
    D,
    BY_FREQUENCY: tl.constexpr,
    FLOAT64: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    i = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = i_d < D
    row = tl.load(occurrences.p_row + i)
    before = tl.load(occurrences.p_row + i - 1, mask=i > 0, other=-1)
    is_first = (row < E) & (row != before)
    end = tl.where(is_first, tl.load(occurrences.p_end + i), i)
    b_acc = tl.zeros([BD], ACC)
    for i_r in range(i, end, BK):
        i_k = i_r + tl.arange(0, BK)
        m_k = i_k < end
        o_k = tl.load(occurrences.p_position + i_k, mask=m_k, other=0)
        b_bag = tl.load(positions.p_bag + o_k, mask=m_k, other=0)
        o_grad = b_bag[:, None] * D + i_d[None, :]
        m = m_k[:, None] & m_d[None, :]
        b_grad = tl.load(p_grad + o_grad, mask=m, other=0).to(ACC)
        if p_arg is not None:
            b_place = tl.load(positions.p_place + o_k, mask=m_k, other=0)
            m_won = tl.load(p_arg + o_grad, mask=m, other=-1) == b_place[:, None]
            b_grad = tl.where(m & m_won, b_grad, 0.0)
        if p_weights is not None:
            b_grad *= tl.load(p_weights + o_k, mask=m_k, other=0).to(ACC)[:, None]
        if positions.p_divisor is not None:
            b_grad = b_grad / tl.load(positions.p_divisor + b_bag, mask=m_k, other=1)[:, None]
        b_acc += tl.sum(tl.where(m, b_grad, 0.0), axis=0)
    if BY_FREQUENCY:
        b_acc = b_acc / tl.maximum(end - i, 1).to(ACC)
    o_row = row
    if occurrences.p_output is not None:
        o_row = tl.load(occurrences.p_output + i)
    tl.store(p_out + o_row * D + i_d, b_acc.to(p_out.dtype.element_ty), mask=m_d & is_first)


@triton.jit
def _products(
    p_grad, p_arg, table, i_b, begin, o_k, m_counted, b_row, D, ACC: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    """[BR] dot products of rows and the gradient of the bag; for max and min, over the columns that select the row."""
    b_dot = tl.zeros([BR], ACC)
    for first in range(0, D, BD):
        i_d = first + tl.arange(0, BD)
        m_d = i_d < D
        b_grad = tl.load(p_grad + i_b * D + i_d, mask=m_d, other=0).to(ACC)
        m = m_counted[:, None] & m_d[None, :]
        o_value = b_row[:, None] * table.s_row + i_d[None, :].to(tl.int64) * table.s_column
        b_value = tl.load(table.p_table + o_value, mask=m, other=0).to(ACC)
        if p_arg is not None:
            b_arg = tl.load(p_arg + i_b * D + i_d, mask=m_d, other=-1)
            m = m & (b_arg[None, :] == (o_k - begin).to(tl.int32)[:, None])
        b_dot += tl.sum(tl.where(m, b_value * b_grad[None, :], 0.0), axis=1)
    return b_dot


# Grid: (bags,).
@triton.jit(do_not_specialize=SIZES)
def weights_gradient_kernel(
    p_grad,  # [B, D]
    p_arg,  # int32 [B, D] for max and min, otherwise None
    table,
    bags,
    p_out,  # [N], zeros outside of all bags
    E,
    N,
    B,
    L,
    padding,
    D,
    MODE: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_LAST_OFFSET: tl.constexpr,
    FLOAT64: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    i_b = tl.program_id(0).to(tl.int64)
    begin, length, _misfit = bounds(bags, i_b, i_b < B, N, B, L, HAS_LAST_OFFSET)
    # Mean divided by s = sum of w: d out / d w_k = (row_k - out) / s.
    divisor = tl.full([], 1, ACC)
    of_output = tl.zeros([], ACC)
    if MODE == _MEAN:
        b_count = tl.zeros([BR], tl.int32)
        b_total = tl.zeros([BR], ACC)
        b_output = tl.zeros([BR], ACC)
        for i_r in range(0, length, BR):
            o_k, _m_k, m_counted, b_row = _counted(bags, begin, length, i_r, E, padding, HAS_PADDING, BR)
            b_count += m_counted.to(tl.int32)
            if BY_WEIGHT:
                b_weight = tl.load(bags.p_weights + o_k, mask=m_counted, other=0).to(ACC)
                b_total += b_weight
                b_dot = _products(p_grad, p_arg, table, i_b, begin, o_k, m_counted, b_row, D, ACC, BR, BD)
                b_output += tl.where(m_counted, b_weight * b_dot, 0.0)
        count = tl.sum(b_count, axis=0)
        divisor = tl.where(count == 0, 1.0, tl.sum(b_total, axis=0) if BY_WEIGHT else count.to(ACC))
        of_output = tl.sum(b_output, axis=0) / divisor
    for i_r in range(0, length, BR):
        o_k, m_k, m_counted, b_row = _counted(bags, begin, length, i_r, E, padding, HAS_PADDING, BR)
        b_dot = _products(p_grad, p_arg, table, i_b, begin, o_k, m_counted, b_row, D, ACC, BR, BD)
        b_d = (b_dot - of_output) / divisor
        tl.store(p_out + o_k, tl.where(m_counted, b_d, 0.0).to(p_out.dtype.element_ty), mask=m_k)
