"""Gradients of log Z, which are the marginal probabilities of tags and of pairs of tags, and of the scores of tags.

beta is computed backward in log space, as alpha is forward. With gamma = emissions + beta:
    P(y_s = k) = e^(alpha_k + beta_k) / sum_k e^(alpha_k + beta_k)
    P(y_s-1 = i, y_s = j) = P(y_s-1 = i) e^(m_ij + gamma_j) / sum_j e^(m_ij + gamma_j)
The first kernel walks the steps of a sequence and writes gamma and the marginals. The second computes the probabilities
of pairs from them, for many steps at once: they add up to those of tags, also where rounding makes the logarithms of
large scores imprecise.

Dimensions: B sequences, T steps, K tags.
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
    log_product,
    normalise,
    prepare,
    product,
    step_at,
)


# Grid: (B). RESIDENT: as in crf_forward_kernel.
@triton.jit(do_not_specialize=SIZES)
def crf_backward_kernel(
    scores,
    steps,
    p_alpha,  # [B, T, K] of the compute type
    p_dlog_z,  # [B] float64
    p_dscore,  # [B] float64
    p_gamma,  # [B, T, K] of the compute type, output
    p_marginals,  # [B, T, K] of the compute type, output: times dlog_z
    p_demissions,  # [B, T, K]
    p_dstart,  # [B, K] float64, zeros on entry: the part of each sequence
    p_dend,  # [B, K] float64, zeros on entry
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
    ACC: tl.constexpr = p_alpha.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_k = tl.arange(0, BK)
    m_k = i_k < K
    n = count_of(steps, i_b, T)
    p_emissions = scores.p_emissions + i_b * s_b
    p_m = scores.p_transitions + i_b * s_pairs_b * K * K
    o_b = i_b * T * K
    if RESIDENT:
        b_weights, b_shift, m_open = prepare(p_m, 1, K, K, ACC, BK)

    dlog_z = tl.load(p_dlog_z + i_b).to(ACC)
    b_beta, _ = normalise(load_ends(scores.p_end, i_k, m_k, ACC))
    i_t = step_at(steps, i_b, n - 1, n > 0, T)
    for i in range(n):
        i_s = n - 1 - i
        o_t = o_b + i_t * K
        b_alpha = load_scores(p_alpha + o_t, i_k, m_k, ACC)
        b_e = load_scores(p_emissions + i_t * s_t, i_k, m_k, ACC)
        i_before = step_at(steps, i_b, i_s - 1, i_s > 0, T)

        b_p, most = normalise(b_alpha + b_beta)
        b_p = tl.exp(b_p)
        b_p = b_p * (dlog_z / tl.sum(b_p, 0))
        b_p = tl.where((most == float("-inf")) | (dlog_z == 0), 0.0, b_p)  # no path is possible, or no gradient
        b_d = b_p.to(tl.float64)
        if steps.p_tags is not None:
            b_d += tl.where(i_k == tl.load(steps.p_tags + i_b * T + i_t), tl.load(p_dscore + i_b), 0.0)
        b_gamma, _ = normalise(b_beta + b_e)
        tl.store(p_marginals + o_t + i_k, b_p, mask=m_k)
        tl.store(p_demissions + o_t + i_k, b_d.to(ACC).to(p_demissions.dtype.element_ty), mask=m_k)
        tl.store(p_gamma + o_t + i_k, b_gamma, mask=m_k)
        tl.store(p_dend + i_b * K + i_k, b_d, mask=m_k & (i == 0))
        tl.store(p_dstart + i_b * K + i_k, b_d, mask=m_k & (i_s == 0))
        if i_s > 0:
            p_row = p_gamma + o_b + i_before * K
            if RESIDENT:
                b_beta = product(b_gamma, b_weights, b_shift, m_open, p_m, 1, K, p_row, K, BK)
            else:
                b_beta = log_product(b_gamma, p_m + i_t * s_pairs_t * K * K, 1, K, p_row, K, BK, BJ)
            b_beta, _ = normalise(b_beta)
        i_t = i_before


# A group is what shares a matrix of transitions: one step or all, of one sequence or of `chunk`. Grid: (groups times
# blocks of BI rows of the matrix). A program computes BS steps at a time and sums in float64.
@triton.jit(do_not_specialize=SIZES)
def crf_pairs_kernel(
    scores,
    steps,
    p_gamma,  # [B, T, K]
    p_marginals,  # [B, T, K]
    p_dscore,  # [B] float64
    p_out,  # [groups, K, K] of the storage type, or float64 sums of chunks
    B,
    T,
    s_pairs_b,
    s_pairs_t,
    K,
    chunk,
    BY_SEQUENCE: tl.constexpr,
    BY_STEP: tl.constexpr,
    BS: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    ACC: tl.constexpr = p_gamma.dtype.element_ty
    blocks = tl.cdiv(K, BI)
    i_group = (tl.program_id(0) // blocks).to(tl.int64)
    i_i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    i_j = tl.arange(0, BK)
    m_i, m_j = i_i < K, i_j < K
    i_first = i_group * 0  # the step of the group, or the first of all
    i_chunk = i_group
    if BY_STEP:
        i_first = i_group % T
        i_chunk = i_group // T
    i_begin = i_chunk if BY_SEQUENCE else i_chunk * chunk
    i_end = i_begin + 1 if BY_SEQUENCE else tl.minimum(i_begin + chunk, B)
    p_m = scores.p_transitions + (i_begin * s_pairs_b + i_first * s_pairs_t) * K * K
    b_m = load_pairs(p_m, K, 1, i_i, i_j, K, ACC)[None, :, :]

    b_sum = tl.zeros([BS, BI, BK], tl.float64)
    for i_b in range(i_begin, i_end):
        n = count_of(steps, i_b, T)
        last = n if steps.p_before is None else T
        if BY_STEP:
            last = i_first + 1
        for i_block in range(i_first, last, BS):
            i_t = i_block + tl.arange(0, BS)
            if steps.p_before is None:
                i_before = tl.where(i_t < n, i_t - 1, -1).to(tl.int64)
            else:
                i_before = tl.load(steps.p_before + i_b * T + i_t, mask=i_t < T, other=-1)
            m_s = i_before >= 0
            o_t, o_before = (i_b * T + i_t) * K, (i_b * T + i_before) * K
            p_t = p_gamma + o_t[:, None, None] + i_j[None, None, :]
            b_gamma = tl.load(p_t, mask=m_s[:, None, None] & m_j[None, None, :], other=float("-inf"))
            p_t = p_marginals + o_before[:, None] + i_i[None, :]
            b_p = tl.load(p_t, mask=m_s[:, None] & m_i[None, :], other=0)
            b = b_m + b_gamma
            most = highest(b, 2)
            b = tl.exp(b - tl.where(most == float("-inf"), 0.0, most)[:, :, None])
            b_scale = tl.where(b_p == 0, 0.0, b_p / tl.sum(b, 2))[:, :, None]
            b_sum += tl.where(b_scale == 0, 0.0, b * b_scale).to(tl.float64)
            if steps.p_tags is not None:
                i_tag = tl.load(steps.p_tags + i_b * T + i_t, mask=m_s, other=-1)
                i_from = tl.load(steps.p_tags + i_b * T + i_before, mask=m_s, other=-1)
                m = (i_i[None, :] == i_from[:, None])[:, :, None] & (i_j[None, :] == i_tag[:, None])[:, None, :]
                b_sum += tl.where(m, tl.load(p_dscore + i_b), 0.0)
    o_out = i_group * K * K + i_i[:, None] * K + i_j[None, :]
    b_out = tl.sum(b_sum, 0)
    if p_out.dtype.element_ty != tl.float64:
        b_out = b_out.to(ACC)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_i[:, None] & m_j[None, :])
