"""log Z and the scores of given tags.

Dimensions: B sequences, T steps, K tags.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chain import (
    SIZES,
    count_of,
    load_ends,
    load_scores,
    log_product,
    normalise,
    prepare,
    product,
    step_at,
)


# Grid: (B). RESIDENT: one matrix of transitions serves all steps and stays in registers as e^transitions.
@triton.jit(do_not_specialize=SIZES)
def crf_forward_kernel(
    scores,
    steps,
    p_alpha,  # [B, T, K] of the compute type: log of the sums over the paths to a tag, less their maximum
    p_log_z,  # [B] float64
    p_score,  # [B] float64
    T,
    s_b,
    s_t,
    s_pairs_b,
    s_pairs_t,
    K,
    RESIDENT: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
    BS: tl.constexpr,
):
    ACC: tl.constexpr = p_alpha.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_k = tl.arange(0, BK)
    m_k = i_k < K
    n = count_of(steps, i_b, T)
    p_emissions = scores.p_emissions + i_b * s_b
    p_m = scores.p_transitions + i_b * s_pairs_b * K * K
    p_alpha += i_b * T * K
    if RESIDENT:
        b_weights, b_shift, m_open = prepare(p_m, K, 1, K, ACC, BK)

    b_x = load_ends(scores.p_start, i_k, m_k, ACC)
    total = tl.full([], 0, tl.float64)
    i_t = step_at(steps, i_b, 0, n > 0, T)
    for i_s in range(n):
        b_e = load_scores(p_emissions + i_t * s_t, i_k, m_k, ACC)
        i_next = step_at(steps, i_b, i_s + 1, i_s + 1 < n, T)
        p_row = p_alpha + i_t * K
        if i_s > 0:
            if RESIDENT:
                b_x = product(b_x, b_weights, b_shift, m_open, p_m, K, 1, p_row, K, BK)
            else:
                b_x = log_product(b_x, p_m + i_t * s_pairs_t * K * K, K, 1, p_row, K, BK, BJ)
        b_x, most = normalise(b_x + b_e)
        total += most.to(tl.float64)
        tl.store(p_row + i_k, b_x, mask=m_k)
        i_t = i_next
    b_x, most = normalise(b_x + load_ends(scores.p_end, i_k, m_k, ACC))
    log_z = total + most.to(tl.float64) + tl.log(tl.sum(tl.exp(b_x), 0).to(tl.float64))
    log_z = tl.where(most == float("-inf"), float("-inf"), log_z)
    tl.store(p_log_z + i_b, tl.where(n == 0, 0.0, log_z))
    tl.store(p_score + i_b, _score(scores, steps, i_b, n, T, s_b, s_t, s_pairs_b, s_pairs_t, K, BS))


@triton.jit
def _score(scores, steps, i_b, n, T, s_b, s_t, s_pairs_b, s_pairs_t, K, BS: tl.constexpr):
    """Score of the tags of a sequence in float64, BS steps at a time; NaN if a tag is out of range."""
    F: tl.constexpr = tl.float64
    b_sum = tl.zeros([BS], F)
    if steps.p_tags is not None:
        p_tags = steps.p_tags + i_b * T
        for i_first in range(0, n, BS):
            i_s = i_first + tl.arange(0, BS)
            m, m_pair = i_s < n, (i_s > 0) & (i_s < n)
            i_t = step_at(steps, i_b, i_s, m, T)
            i_tag = tl.load(p_tags + i_t, mask=m, other=0)
            i_before = tl.load(p_tags + step_at(steps, i_b, i_s - 1, m_pair, T), mask=m_pair, other=0)
            m_valid = (i_tag >= 0) & (i_tag < K)
            m_pair = m_pair & m_valid & (i_before >= 0) & (i_before < K)
            m = m & m_valid
            o_e = i_b * s_b + i_t * s_t + i_tag
            o_m = ((i_b * s_pairs_b + i_t * s_pairs_t) * K + i_before) * K + i_tag
            b_sum += tl.load(scores.p_emissions + o_e, mask=m, other=0).to(F)
            b_sum += tl.load(scores.p_transitions + o_m, mask=m_pair, other=0).to(F)
            if scores.p_start is not None:
                b_sum += tl.load(scores.p_start + i_tag, mask=m & (i_s == 0), other=0).to(F)
            if scores.p_end is not None:
                b_sum += tl.load(scores.p_end + i_tag, mask=m & (i_s == n - 1), other=0).to(F)
            b_sum = tl.where(m_valid, b_sum, float("nan"))
    return tl.sum(b_sum, 0)
