"""Backward of a layer, all steps in one launch, in the reverse order of forward.

The launcher computes the weight gradients afterwards, as matrix products over all rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import load, store
from .cells import GRUGates, LSTMGates, MGUGates, gru_backward, lstm_backward, mgu_backward
from .layer import SIZES, block_of, has_step, reset_at, rows_of, state, weight


@triton.jit(do_not_specialize=SIZES)
def lstm_backward_kernel(
    inputs,
    outputs,
    gradients,
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = outputs.p_y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if S == tl.float64 else tl.float32  # noqa: SIM300
    block = block_of(inputs, T, B, H, BB, BH)
    i_d = block.direction
    i_h = block.i_h
    p_w_hh = inputs.p_w_hh + i_d * (4 * H) * H
    p_saved = outputs.p_saved
    p_dx = gradients.p_dx

    b_wi = weight(p_w_hh, 0, H, False, BH)
    b_wf = weight(p_w_hh, 1, H, False, BH)
    b_wg = weight(p_w_hh, 2, H, False, BH)
    b_wo = weight(p_w_hh, 3, H, False, BH)
    b_h0 = state(inputs.p_h0, block.o_state, block.m_state, ACC)
    b_c0 = state(inputs.p_c0, block.o_state, block.m_state, ACC)
    b_dh = state(gradients.p_dh_n, block.o_state, block.m_state, ACC)
    b_dc = state(gradients.p_dc_n, block.o_state, block.m_state, ACC)

    i_t = (1 - i_d) * (block.longest - 1)
    o_row = rows_of(inputs, block, i_t, T, B)
    o_y = o_row[:, None] * block.s_y + i_d * H + i_h
    b_c = load(outputs.p_cells, o_y, has_step(block, i_t), ACC)
    for _ in range(block.longest):
        m_now = (i_t < block.lengths)[:, None] & block.m_h
        o_gates = (i_d.to(tl.int64) * N + o_row)[:, None] * (4 * H) + i_h
        o_h = (i_d.to(tl.int64) * N + o_row)[:, None] * H + i_h
        i_before = i_t - 1 + 2 * i_d
        o_row_before = rows_of(inputs, block, i_before, T, B)
        o_y_before = o_row_before[:, None] * block.s_y + i_d * H + i_h
        m_before = has_step(block, i_before)
        b_c_before = load(outputs.p_cells, o_y_before, m_before, ACC)
        b_c_prev = tl.where(m_before, b_c_before, b_c0)
        b_h_prev = tl.where(m_before, load(outputs.p_y, o_y_before, m_before, ACC), b_h0)
        if inputs.p_reset is not None:
            m_reset = reset_at(inputs, block, i_t, T, B)
            b_c_prev = tl.where(m_reset, 0.0, b_c_prev)
            b_h_prev = tl.where(m_reset, 0.0, b_h_prev)
        store(gradients.p_h, o_h, b_h_prev, m_now)
        b_dh_now = b_dh
        if gradients.p_dy is not None:
            b_dh_now += load(gradients.p_dy, o_y, m_now, ACC)
        b_saved_i = load(p_saved, o_gates, m_now, ACC)
        b_saved_f = load(p_saved, o_gates + H, m_now, ACC)
        b_saved_g = load(p_saved, o_gates + 2 * H, m_now, ACC)
        b_saved_o = load(p_saved, o_gates + 3 * H, m_now, ACC)
        b_saved = LSTMGates(b_saved_i, b_saved_f, b_saved_g, b_saved_o)
        b_d, b_dc_prev, _ = lstm_backward(b_saved, b_c, b_c_prev, b_dh_now, b_dc, None, S, False, False)
        b_di = tl.where(m_now, b_d.i, 0.0).to(S)
        b_df = tl.where(m_now, b_d.f, 0.0).to(S)
        b_dg = tl.where(m_now, b_d.g, 0.0).to(S)
        b_do = tl.where(m_now, b_d.o, 0.0).to(S)
        store(p_dx, o_gates, b_di, m_now)
        store(p_dx, o_gates + H, b_df, m_now)
        store(p_dx, o_gates + 2 * H, b_dg, m_now)
        store(p_dx, o_gates + 3 * H, b_do, m_now)
        b_dh_prev = tl.dot(b_di, b_wi, input_precision=PRECISION, out_dtype=ACC)
        b_dh_prev = tl.dot(b_df, b_wf, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        b_dh_prev = tl.dot(b_dg, b_wg, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        b_dh_prev = tl.dot(b_do, b_wo, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        if inputs.p_reset is not None:
            b_dh_prev = tl.where(m_reset, 0.0, b_dh_prev)
            b_dc_prev = tl.where(m_reset, 0.0, b_dc_prev)
        b_dh = tl.where(m_now, b_dh_prev, b_dh)
        b_dc = tl.where(m_now, b_dc_prev, b_dc)
        b_c = b_c_before
        i_t = i_before
        o_row = o_row_before
        o_y = o_y_before
    store(gradients.p_dh0, block.o_state, b_dh, block.m_state)
    store(gradients.p_dc0, block.o_state, b_dc, block.m_state)


@triton.jit
def _h_before(outputs, block, b_h0, i_before, o_row_before, H, ACC: tl.constexpr):
    """[BB, BH] h of the preceding step, or the initial h."""
    m_before = has_step(block, i_before)
    o_y = o_row_before[:, None] * block.s_y + block.direction * H + block.i_h
    return tl.where(m_before, load(outputs.p_y, o_y, m_before, ACC), b_h0)


@triton.jit(do_not_specialize=SIZES)
def gru_backward_kernel(
    inputs,
    outputs,
    gradients,
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = outputs.p_y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if S == tl.float64 else tl.float32  # noqa: SIM300
    block = block_of(inputs, T, B, H, BB, BH)
    i_d = block.direction
    i_h = block.i_h
    p_w_hh = inputs.p_w_hh + i_d * (3 * H) * H
    p_saved = outputs.p_saved
    p_dx = gradients.p_dx

    b_wr = weight(p_w_hh, 0, H, False, BH)
    b_wz = weight(p_w_hh, 1, H, False, BH)
    b_wn = weight(p_w_hh, 2, H, False, BH)
    b_h0 = state(inputs.p_h0, block.o_state, block.m_state, ACC)
    b_dh = state(gradients.p_dh_n, block.o_state, block.m_state, ACC)

    i_t = (1 - i_d) * (block.longest - 1)
    o_row = rows_of(inputs, block, i_t, T, B)
    for _ in range(block.longest):
        m_now = (i_t < block.lengths)[:, None] & block.m_h
        o_narrow = (i_d.to(tl.int64) * N + o_row)[:, None]
        i_before = i_t - 1 + 2 * i_d
        o_row_before = rows_of(inputs, block, i_before, T, B)
        b_h_prev = _h_before(outputs, block, b_h0, i_before, o_row_before, H, ACC)
        if inputs.p_reset is not None:
            m_reset = reset_at(inputs, block, i_t, T, B)
            b_h_prev = tl.where(m_reset, 0.0, b_h_prev)
        store(gradients.p_h, o_narrow * H + i_h, b_h_prev, m_now)
        b_dh_now = b_dh
        if gradients.p_dy is not None:
            b_dh_now += load(gradients.p_dy, o_row[:, None] * block.s_y + i_d * H + i_h, m_now, ACC)
        o_saved = o_narrow * (4 * H) + i_h
        b_r = load(p_saved, o_saved, m_now, ACC)
        b_z = load(p_saved, o_saved + H, m_now, ACC)
        b_n = load(p_saved, o_saved + 2 * H, m_now, ACC)
        b_hn = load(p_saved, o_saved + 3 * H, m_now, ACC)
        b_d, b_dh_prev = gru_backward(GRUGates(b_r, b_z, b_n, b_hn), b_h_prev, b_dh_now, None, False)
        b_dr = tl.where(m_now, b_d.r, 0.0).to(S)
        b_dz = tl.where(m_now, b_d.z, 0.0).to(S)
        b_dhn = tl.where(m_now, b_d.h_n, 0.0).to(S)
        o_dx = o_narrow * (3 * H) + i_h
        store(p_dx, o_dx, b_dr, m_now)
        store(p_dx, o_dx + H, b_dz, m_now)
        store(p_dx, o_dx + 2 * H, b_d.n, m_now)
        store(gradients.p_dh_of_n, o_narrow * H + i_h, b_dhn, m_now)
        b_dh_prev = tl.dot(b_dr, b_wr, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        b_dh_prev = tl.dot(b_dz, b_wz, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        b_dh_prev = tl.dot(b_dhn, b_wn, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        if inputs.p_reset is not None:
            b_dh_prev = tl.where(m_reset, 0.0, b_dh_prev)
        b_dh = tl.where(m_now, b_dh_prev, b_dh)
        i_t = i_before
        o_row = o_row_before
    store(gradients.p_dh0, block.o_state, b_dh, block.m_state)


@triton.jit(do_not_specialize=SIZES)
def mgu_backward_kernel(
    inputs,
    outputs,
    gradients,
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = outputs.p_y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if S == tl.float64 else tl.float32  # noqa: SIM300
    block = block_of(inputs, T, B, H, BB, BH)
    i_d = block.direction
    i_h = block.i_h
    p_w_hh = inputs.p_w_hh + i_d * (2 * H) * H
    p_saved = outputs.p_saved
    p_dx = gradients.p_dx

    b_wf = weight(p_w_hh, 0, H, False, BH)
    b_wn = weight(p_w_hh, 1, H, False, BH)
    b_h0 = state(inputs.p_h0, block.o_state, block.m_state, ACC)
    b_dh = state(gradients.p_dh_n, block.o_state, block.m_state, ACC)

    i_t = (1 - i_d) * (block.longest - 1)
    o_row = rows_of(inputs, block, i_t, T, B)
    for _ in range(block.longest):
        m_now = (i_t < block.lengths)[:, None] & block.m_h
        o_narrow = (i_d.to(tl.int64) * N + o_row)[:, None]
        i_before = i_t - 1 + 2 * i_d
        o_row_before = rows_of(inputs, block, i_before, T, B)
        b_h_prev = _h_before(outputs, block, b_h0, i_before, o_row_before, H, ACC)
        if inputs.p_reset is not None:
            m_reset = reset_at(inputs, block, i_t, T, B)
            b_h_prev = tl.where(m_reset, 0.0, b_h_prev)
        store(gradients.p_h, o_narrow * H + i_h, b_h_prev, m_now)
        b_dh_now = b_dh
        if gradients.p_dy is not None:
            b_dh_now += load(gradients.p_dy, o_row[:, None] * block.s_y + i_d * H + i_h, m_now, ACC)
        o_saved = o_narrow * (3 * H) + i_h
        b_f = load(p_saved, o_saved, m_now, ACC)
        b_n = load(p_saved, o_saved + H, m_now, ACC)
        b_hn = load(p_saved, o_saved + 2 * H, m_now, ACC)
        b_d, b_dh_prev = mgu_backward(MGUGates(b_f, b_n, b_hn), b_h_prev, b_dh_now, None, False)
        b_df = tl.where(m_now, b_d.f, 0.0).to(S)
        b_dhn = tl.where(m_now, b_d.h_n, 0.0).to(S)
        o_dx = o_narrow * (2 * H) + i_h
        store(p_dx, o_dx, b_df, m_now)
        store(p_dx, o_dx + H, b_d.n, m_now)
        store(gradients.p_dh_of_n, o_narrow * H + i_h, b_dhn, m_now)
        b_dh_prev = tl.dot(b_df, b_wf, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        b_dh_prev = tl.dot(b_dhn, b_wn, b_dh_prev, input_precision=PRECISION, out_dtype=ACC)
        if inputs.p_reset is not None:
            b_dh_prev = tl.where(m_reset, 0.0, b_dh_prev)
        b_dh = tl.where(m_now, b_dh_prev, b_dh)
        i_t = i_before
        o_row = o_row_before
    store(gradients.p_dh0, block.o_state, b_dh, block.m_state)


@triton.jit(do_not_specialize=SIZES)
def rnn_backward_kernel(
    inputs,
    outputs,
    gradients,
    T,
    B,
    N,
    H,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = outputs.p_y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if S == tl.float64 else tl.float32  # noqa: SIM300
    block = block_of(inputs, T, B, H, BB, BH)
    i_d = block.direction
    i_h = block.i_h

    b_w = weight(inputs.p_w_hh + i_d * H * H, 0, H, False, BH)
    b_h0 = state(inputs.p_h0, block.o_state, block.m_state, ACC)
    b_dh = state(gradients.p_dh_n, block.o_state, block.m_state, ACC)

    i_t = (1 - i_d) * (block.longest - 1)
    o_row = rows_of(inputs, block, i_t, T, B)
    b_h = load(outputs.p_y, o_row[:, None] * block.s_y + i_d * H + i_h, has_step(block, i_t), ACC)
    for _ in range(block.longest):
        m_now = (i_t < block.lengths)[:, None] & block.m_h
        o_narrow = (i_d.to(tl.int64) * N + o_row)[:, None] * H + i_h
        i_before = i_t - 1 + 2 * i_d
        o_row_before = rows_of(inputs, block, i_before, T, B)
        m_before = has_step(block, i_before)
        b_h_before = load(outputs.p_y, o_row_before[:, None] * block.s_y + i_d * H + i_h, m_before, ACC)
        b_h_prev = tl.where(m_before, b_h_before, b_h0)
        if inputs.p_reset is not None:
            m_reset = reset_at(inputs, block, i_t, T, B)
            b_h_prev = tl.where(m_reset, 0.0, b_h_prev)
        store(gradients.p_h, o_narrow, b_h_prev, m_now)
        b_dh_now = b_dh
        if gradients.p_dy is not None:
            b_dh_now += load(gradients.p_dy, o_row[:, None] * block.s_y + i_d * H + i_h, m_now, ACC)
        b_dx = tl.where(b_h > 0, b_dh_now, 0.0) if RELU else b_dh_now * (1.0 - b_h * b_h)
        b_dx = tl.where(m_now, b_dx, 0.0).to(S)
        store(gradients.p_dx, o_narrow, b_dx, m_now)
        b_dh_prev = tl.dot(b_dx, b_w, input_precision=PRECISION, out_dtype=ACC)
        if inputs.p_reset is not None:
            b_dh_prev = tl.where(m_reset, 0.0, b_dh_prev)
        b_dh = tl.where(m_now, b_dh_prev, b_dh)
        b_h = b_h_before
        i_t = i_before
        o_row = o_row_before
    store(gradients.p_dh0, block.o_state, b_dh, block.m_state)
