"""The best paths of each sequence, by the algorithm of Viterbi.

Of equal paths, the one whose last tags have smaller numbers comes first. A score of NaN or infinity makes a maximum and
so the sum of the maxima infinite; the scores of the sequence are then NaN. Tags of paths that do not exist are not
written.

Dimensions: B sequences, T steps, K tags, N paths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chain import (
    SIZES,
    count_of,
    highest,
    load_ends,
    load_pairs,
    load_scores,
    step_at,
)


@triton.jit
def _below_infinity(x):
    """x, with infinity in place of NaN."""
    return tl.where(x < float("inf"), x, float("inf"))


@triton.jit
def _best(b_x, b_m):
    """max_i x_i + m_ij of each column, and the first i that reaches it."""
    b = tl.where(b_m < float("inf"), b_x[:, None] + b_m, float("inf"))
    return tl.max(b, 0, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _finite(x):
    return tl.where(x == float("-inf"), 0.0, x)


# Grid: (B). RESIDENT: one matrix of transitions serves all steps and stays in registers.
@triton.jit(do_not_specialize=SIZES)
def crf_viterbi_kernel(
    scores,
    steps,
    p_rows,  # [B, K] of the compute type, memory in which a program collects blocks of columns
    p_back,  # int32 [B, T, K]: the best tag before
    p_tags,  # int64 [B, T]
    p_scores,  # [B] float64
    T,
    s_b,
    s_t,
    s_pairs_b,
    s_pairs_t,
    K,
    RESIDENT: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
):
    ACC: tl.constexpr = p_rows.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_k = tl.arange(0, BK)
    m_k = i_k < K
    n = count_of(steps, i_b, T)
    p_emissions = scores.p_emissions + i_b * s_b
    p_m = scores.p_transitions + i_b * s_pairs_b * K * K
    p_rows += i_b * K
    p_back += i_b * T * K
    if RESIDENT:
        b_m = load_pairs(p_m, K, 1, i_k, i_k, K, ACC)

    b_x = load_ends(scores.p_start, i_k, m_k, ACC)
    total = tl.full([], 0, tl.float64)
    i_t = step_at(steps, i_b, 0, n > 0, T)
    for i_s in range(n):
        b_e = load_scores(p_emissions + i_t * s_t, i_k, m_k, ACC)
        i_next = step_at(steps, i_b, i_s + 1, i_s + 1 < n, T)
        if i_s > 0:
            p_t = p_back + tl.cast(i_s, tl.int64) * K
            if RESIDENT:
                b_x, i_from = _best(b_x, b_m)
                tl.store(p_t + i_k, i_from, mask=m_k)
            elif BJ == BK:
                b_x, i_from = _best(b_x, load_pairs(p_m + i_t * s_pairs_t * K * K, K, 1, i_k, i_k, K, ACC))
                tl.store(p_t + i_k, i_from, mask=m_k)
            else:
                for i_j in range(0, K, BJ):
                    i_to = i_j + tl.arange(0, BJ)
                    b_y, i_from = _best(b_x, load_pairs(p_m + i_t * s_pairs_t * K * K, K, 1, i_k, i_to, K, ACC))
                    tl.store(p_t + i_to, i_from, mask=i_to < K)
                    tl.store(p_rows + i_to, b_y, mask=i_to < K)
                tl.debug_barrier()
                b_x = load_scores(p_rows, i_k, m_k, ACC)
                tl.debug_barrier()
        b_x += b_e
        most = _finite(highest(b_x, 0))
        b_x -= most
        total += most.to(tl.float64)
        i_t = i_next
    b_x = _below_infinity(b_x + load_ends(scores.p_end, i_k, m_k, ACC))
    best, i_tag = tl.max(b_x, 0, return_indices=True, return_indices_tie_break_left=True)
    score = total + best.to(tl.float64)
    tl.store(p_scores + i_b, tl.where(n == 0, 0.0, tl.where(score < float("inf"), score, float("nan"))))

    if (score < float("inf")) & (score > float("-inf")):
        tl.debug_barrier()
        for i in range(n):
            i_s = n - 1 - i
            tl.store(p_tags + i_b * T + step_at(steps, i_b, i_s, i_s >= 0, T), i_tag.to(tl.int64))
            i_tag = tl.load(p_back + tl.cast(i_s, tl.int64) * K + i_tag, mask=i_s > 0, other=0)


# Grid: (B). Each tag keeps the N best paths that end in it, in descending order. The next tag merges the lists: N times
# it takes the best of their heads.
@triton.jit(do_not_specialize=SIZES)
def crf_several_kernel(
    scores,
    steps,
    p_lists,  # [B, 2, K, N] of the compute type: scores of the paths of two steps
    p_back,  # int32 [B, T, K, N]: tag * N + rank of the path before
    p_last,  # int32 [B, N]: the same of the last step
    p_tags,  # int64 [B, N, T]
    p_scores,  # [B, N] float64
    T,
    s_b,
    s_t,
    s_pairs_b,
    s_pairs_t,
    K,
    N,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    BN: tl.constexpr,
):
    ACC: tl.constexpr = p_lists.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_k = tl.arange(0, BK)
    m_k = i_k < K
    n = count_of(steps, i_b, T)
    size = K * N
    p_emissions = scores.p_emissions + i_b * s_b
    p_m = scores.p_transitions + i_b * s_pairs_b * K * K
    p_lists += i_b * 2 * size
    p_back += i_b * T * size
    p_scores += i_b * N
    p_last += i_b * N

    i_t = step_at(steps, i_b, 0, n > 0, T)
    b_x = load_ends(scores.p_start, i_k, m_k, ACC)
    b_x += tl.load(p_emissions + i_t * s_t + i_k, mask=m_k & (n > 0), other=float("-inf")).to(ACC)
    most = _finite(highest(b_x, 0))
    total = most.to(tl.float64)
    for r in range(N):
        tl.store(p_lists + i_k * N + r, tl.where(r == 0, b_x, float("-inf")), mask=m_k)
    tl.debug_barrier()
    for i_s in range(1, n):
        i_t = step_at(steps, i_b, i_s, i_s < n, T)
        p_from, p_to = p_lists + (i_s + 1) % 2 * size, p_lists + i_s % 2 * size
        p_t = p_back + tl.cast(i_s, tl.int64) * size
        for i_j in range(0, K, BJ):
            i_to = i_j + tl.arange(0, BJ)
            m_to = i_to < K
            b_m = load_pairs(p_m + i_t * s_pairs_t * K * K, K, 1, i_k, i_to, K, ACC)
            b_e = load_scores(p_emissions + i_t * s_t, i_to, m_to, ACC)
            i_rank = tl.zeros([BK, BJ], tl.int32)
            b_head = load_scores(p_from, i_k * N, m_k, ACC)[:, None] + tl.zeros([BK, BJ], ACC)
            for r in range(N):
                b_y, i_from, i_rank, b_head = _next(b_head, i_rank, most, b_m, p_from, i_k, m_k, N)
                tl.store(p_to + i_to * N + r, b_y + b_e, mask=m_to)
                tl.store(p_t + i_to * N + r, i_from, mask=m_to)
        tl.debug_barrier()
        most = _finite(highest(load_scores(p_to, i_k * N, m_k, ACC), 0))
        total += most.to(tl.float64)

    # The end is one column.
    p_from = p_lists + (n + 1) % 2 * size
    b_end = load_ends(scores.p_end, i_k, m_k, ACC)[:, None]
    i_rank = tl.zeros([BK, 1], tl.int32)
    b_head = load_scores(p_from, i_k * N, m_k, ACC)[:, None]
    for r in range(N):
        b_y, i_from, i_rank, b_head = _next(b_head, i_rank, most, b_end, p_from, i_k, m_k, N)
        b_y = total + b_y.to(tl.float64)
        b_y = tl.where(n == 0, tl.where(r == 0, 0.0, float("-inf")), tl.where(b_y < float("inf"), b_y, float("nan")))
        tl.store(p_scores + r + tl.arange(0, 1), b_y)
        tl.store(p_last + r + tl.arange(0, 1), i_from)
    tl.debug_barrier()
    for i_first in range(0, N, BN):
        i_r = i_first + tl.arange(0, BN)
        m_r = i_r < N
        b_y = tl.load(p_scores + i_r, mask=m_r, other=float("-inf"))
        m_r = m_r & (b_y < float("inf")) & (b_y > float("-inf"))
        i_path = tl.load(p_last + i_r, mask=m_r, other=0)
        for i in range(n):
            i_s = n - 1 - i
            i_t = step_at(steps, i_b, i_s, i_s >= 0, T)
            tl.store(p_tags + (i_b * N + i_r) * T + i_t, (i_path // N).to(tl.int64), mask=m_r)
            i_path = tl.load(p_back + tl.cast(i_s, tl.int64) * size + i_path, mask=m_r & (i_s > 0), other=0)


@triton.jit
def _next(b_head, i_rank, less, b_m, p_from, i_k, m_k, N):
    """The best of the heads [BK, BJ] and its origin; then that head is replaced by the next path of its list."""
    b = tl.where(b_m < float("inf"), b_head - less + b_m, float("inf"))
    b_y, i_best = tl.max(b, 0, return_indices=True, return_indices_tie_break_left=True)
    m = i_k[:, None] == i_best[None, :]
    i_from = i_best * N + tl.sum(tl.where(m, i_rank, 0), 0)
    i_rank += m.to(tl.int32)
    p = p_from + i_k[:, None] * N + i_rank
    b_next = tl.load(p, mask=m & m_k[:, None] & (i_rank < N), other=float("-inf"))
    return b_y, i_from, i_rank, tl.where(m, b_next, b_head)
