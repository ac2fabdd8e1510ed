"""Arguments shared by the kernels of chains, the steps of a sequence, and products of a vector with the transitions.

Vectors of K tags are padded with -infinity to BK elements. They hold logarithms with a maximum of zero; the maxima are
summed in float64.

Dimensions: B sequences, T steps, K tags.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Not specialized, because the layout of a tile, and so the order of its sums, would depend on their divisibility.
SIZES = ["B", "T", "N", "chunk", "s_b", "s_t", "s_pairs_b", "s_pairs_t"]


class Scores(NamedTuple):
    p_emissions: Any  # [B, T, K], strides s_b, s_t, 1
    p_transitions: Any  # [B, T, K, K] from, to; strides s_pairs_b, s_pairs_t (in matrices; 0 if shared), K, 1
    p_start: Any  # [K], or None
    p_end: Any  # [K], or None


class Steps(NamedTuple):
    """The steps of each sequence: the first `counts`, or with a mask those of `steps`."""

    p_counts: Any  # [B], or None: T
    p_steps: Any  # [B, T] with a mask, otherwise None: included steps in order
    p_before: Any  # [B, T] with a mask, otherwise None: the included step before; -1 at excluded and first steps
    p_tags: Any  # [B, T], or None


@triton.jit
def count_of(steps, i_b, T):
    """Number of steps of a sequence; invalid lengths are clamped."""
    if steps.p_counts is None:
        n = tl.cast(T, tl.int32)
    else:
        n = tl.minimum(tl.maximum(tl.load(steps.p_counts + i_b), 0), T).to(tl.int32)
    return n


@triton.jit
def step_at(steps, i_b, i_s, m, T):
    """The steps with the numbers i_s among those of a sequence."""
    if steps.p_steps is None:
        i_t = tl.cast(i_s, tl.int64)
    else:
        i_t = tl.load(steps.p_steps + i_b * T + i_s, mask=m, other=0)
    return i_t


@triton.jit
def load_scores(p, i_k, m_k, ACC: tl.constexpr):
    return tl.load(p + i_k, mask=m_k, other=float("-inf")).to(ACC)


@triton.jit
def load_ends(p, i_k, m_k, ACC: tl.constexpr):
    """Scores of the first or last tag, or zeros; -infinity in padding."""
    if p is None:
        b = tl.where(m_k, tl.zeros(i_k.shape, ACC), float("-inf"))
    else:
        b = load_scores(p, i_k, m_k, ACC)
    return b


@triton.jit
def highest(x, axis: tl.constexpr):
    """The maximum; infinity if an element is NaN, so that x - highest(x) has a NaN."""
    return tl.max(tl.where(x == x, x, float("inf")), axis)


@triton.jit
def normalise(b_x):
    """Subtracts the maximum, which is also returned. Leaves a vector of -infinity as it is."""
    most = highest(b_x, 0)
    return b_x - tl.where(most == float("-inf"), 0.0, most), most


@triton.jit
def load_pairs(p_m, s_from, s_to, i_from, i_to, K, ACC: tl.constexpr):
    """A tile of transitions or of their transpose."""
    m = (i_from < K)[:, None] & (i_to < K)[None, :]
    return load_scores(p_m, i_from[:, None] * s_from + i_to[None, :] * s_to, m, ACC)


# The product of x with transitions is y_j = log sum_i e^(x_i + m_ij).


@triton.jit
def _columns(b_x, p_m, s_from, s_to, i_to, K, BK: tl.constexpr):
    b = b_x[:, None] + load_pairs(p_m, s_from, s_to, tl.arange(0, BK), i_to, K, b_x.dtype)
    most = highest(b, 0)
    less = tl.where(most == float("-inf"), 0.0, most)
    return tl.log(tl.sum(tl.exp(b - less[None, :]), 0)) + less


@triton.jit
def log_product(b_x, p_m, s_from, s_to, p_row, K, BK: tl.constexpr, BJ: tl.constexpr):
    """The product in log space, by blocks of BJ columns.

    p_row: [K], memory in which the program collects several blocks.
    """
    if BJ == BK:
        b_y = _columns(b_x, p_m, s_from, s_to, tl.arange(0, BK), K, BK)
    else:
        for i_j in range(0, K, BJ):
            i_to = i_j + tl.arange(0, BJ)
            tl.store(p_row + i_to, _columns(b_x, p_m, s_from, s_to, i_to, K, BK), mask=i_to < K)
        tl.debug_barrier()
        i_k = tl.arange(0, BK)
        b_y = tl.load(p_row + i_k, mask=i_k < K, other=float("-inf"))
        tl.debug_barrier()  # the caller may write to the row
    return b_y


@triton.jit
def prepare(p_m, s_from, s_to, K, ACC: tl.constexpr, BK: tl.constexpr):
    """e^(m_ij - shift_j) with shift_j the maximum of a column, shift, and whether a column has a finite score."""
    i_k = tl.arange(0, BK)
    b_m = load_pairs(p_m, s_from, s_to, i_k, i_k, K, ACC)
    most = highest(b_m, 0)
    m_open = most != float("-inf")
    b_shift = tl.where(m_open, most, 0.0)
    return tl.exp(b_m - b_shift[None, :]), b_shift, m_open


@triton.jit
def product(b_x, b_weights, b_shift, m_open, p_m, s_from, s_to, p_row, K, BK: tl.constexpr):
    """The product with prepared transitions. Columns whose sum underflows are computed again in log space."""
    TINY: tl.constexpr = 1e-290 if b_x.dtype == tl.float64 else 1e-25
    b_sum = tl.sum(tl.exp(b_x)[:, None] * b_weights, 0)
    b_y = tl.log(b_sum) + b_shift
    m_low = m_open & (b_sum < TINY)
    if tl.max(m_low.to(tl.int32), 0) != 0:
        b_y = tl.where(m_low, log_product(b_x, p_m, s_from, s_to, p_row, K, BK, BK // 4), b_y)
    return b_y
