"""Forward of a layer, all steps in one launch. The input projection is prefetched one step ahead."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import load, relu, store, tanh
from .cells import GRUGates, LSTMGates, MGUGates, gru_forward, lstm_forward, mgu_forward
from .layer import SIZES, block_of, has_step, reset_at, rows_of, state, weight


@triton.jit
def _load_lstm(p_x, o_row, block, m, H, ACC: tl.constexpr):
    o_x = o_row[:, None] * (4 * H) + block.i_h
    i = load(p_x, o_x, m, ACC)
    f = load(p_x, o_x + H, m, ACC)
    g = load(p_x, o_x + 2 * H, m, ACC)
    o = load(p_x, o_x + 3 * H, m, ACC)
    return LSTMGates(i, f, g, o)


@triton.jit(do_not_specialize=SIZES)
def lstm_forward_kernel(
    p_x,  # [directions, N, 4H] input projection with all biases, in the type of the computation
    inputs,
    outputs,
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = outputs.p_y.dtype.element_ty
    ACC: tl.constexpr = p_x.dtype.element_ty
    block = block_of(inputs, T, B, H, BB, BH)
    i_d = block.direction
    p_x += i_d.to(tl.int64) * N * (4 * H)
    p_w_hh = inputs.p_w_hh + i_d * (4 * H) * H

    b_wi = weight(p_w_hh, 0, H, True, BH)
    b_wf = weight(p_w_hh, 1, H, True, BH)
    b_wg = weight(p_w_hh, 2, H, True, BH)
    b_wo = weight(p_w_hh, 3, H, True, BH)
    b_h = state(inputs.p_h0, block.o_state, block.m_state, S)
    b_c = state(inputs.p_c0, block.o_state, block.m_state, ACC)

    i_t = i_d * (block.longest - 1)
    o_row = rows_of(inputs, block, i_t, T, B)
    b_x = _load_lstm(p_x, o_row, block, has_step(block, i_t), H, ACC)
    for _ in range(block.longest):
        m_now = (i_t < block.lengths)[:, None] & block.m_h
        o_y = o_row[:, None] * block.s_y + i_d * H + block.i_h
        o_saved = (i_d.to(tl.int64) * N + o_row)[:, None] * (4 * H) + block.i_h
        if inputs.p_reset is not None:
            m_reset = reset_at(inputs, block, i_t, T, B)
            b_h = tl.where(m_reset, 0.0, b_h).to(S)
            b_c = tl.where(m_reset, 0.0, b_c)
        b_i = tl.dot(b_h, b_wi, b_x.i, input_precision=PRECISION, out_dtype=ACC)
        b_f = tl.dot(b_h, b_wf, b_x.f, input_precision=PRECISION, out_dtype=ACC)
        b_g = tl.dot(b_h, b_wg, b_x.g, input_precision=PRECISION, out_dtype=ACC)
        b_o = tl.dot(b_h, b_wo, b_x.o, input_precision=PRECISION, out_dtype=ACC)

        i_t += 1 - 2 * i_d
        o_row = rows_of(inputs, block, i_t, T, B)
        b_x = _load_lstm(p_x, o_row, block, has_step(block, i_t), H, ACC)

        b_new_h, b_new_c, b_saved = lstm_forward(LSTMGates(b_i, b_f, b_g, b_o), b_c, None, S, False, False)
        b_h = tl.where(m_now, b_new_h.to(S), b_h)
        b_c = tl.where(m_now, b_new_c, b_c)
        store(outputs.p_y, o_y, b_h, m_now)
        store(outputs.p_cells, o_y, b_c, m_now)
        if outputs.p_saved is not None:
            store(outputs.p_saved, o_saved, b_saved.i, m_now)
            store(outputs.p_saved, o_saved + H, b_saved.f, m_now)
            store(outputs.p_saved, o_saved + 2 * H, b_saved.g, m_now)
            store(outputs.p_saved, o_saved + 3 * H, b_saved.o, m_now)
    store(outputs.p_h_n, block.o_state, b_h, block.m_state)
    store(outputs.p_c_n, block.o_state, b_c, block.m_state)


@triton.jit
def _load_gru(p_x, o_row, block, m, H, ACC: tl.constexpr):
    """Loads the input projection; h_n is a placeholder."""
    o_x = o_row[:, None] * (3 * H) + block.i_h
    r = load(p_x, o_x, m, ACC)
    z = load(p_x, o_x + H, m, ACC)
    n = load(p_x, o_x + 2 * H, m, ACC)
    return GRUGates(r, z, n, n)


@triton.jit(do_not_specialize=SIZES)
def gru_forward_kernel(
    p_x,  # [directions, N, 3H] input projection with all biases except b_hn
    inputs,
    outputs,  # saved: [directions, N, 4H] r, z, n and the recurrent projection of n
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = outputs.p_y.dtype.element_ty
    ACC: tl.constexpr = p_x.dtype.element_ty
    block = block_of(inputs, T, B, H, BB, BH)
    i_d = block.direction
    p_x += i_d.to(tl.int64) * N * (3 * H)
    p_w_hh = inputs.p_w_hh + i_d * (3 * H) * H

    b_wr = weight(p_w_hh, 0, H, True, BH)
    b_wz = weight(p_w_hh, 1, H, True, BH)
    b_wn = weight(p_w_hh, 2, H, True, BH)
    b_bias = state(inputs.p_bias, i_d * H + block.i_h, block.m_h, ACC)
    b_h = state(inputs.p_h0, block.o_state, block.m_state, S)

    i_t = i_d * (block.longest - 1)
    o_row = rows_of(inputs, block, i_t, T, B)
    b_x = _load_gru(p_x, o_row, block, has_step(block, i_t), H, ACC)
    for _ in range(block.longest):
        m_now = (i_t < block.lengths)[:, None] & block.m_h
        o_y = o_row[:, None] * block.s_y + i_d * H + block.i_h
        o_saved = (i_d.to(tl.int64) * N + o_row)[:, None] * (4 * H) + block.i_h
        if inputs.p_reset is not None:
            b_h = tl.where(reset_at(inputs, block, i_t, T, B), 0.0, b_h).to(S)
        b_r = tl.dot(b_h, b_wr, b_x.r, input_precision=PRECISION, out_dtype=ACC)
        b_z = tl.dot(b_h, b_wz, b_x.z, input_precision=PRECISION, out_dtype=ACC)
        b_hn = tl.dot(b_h, b_wn, input_precision=PRECISION, out_dtype=ACC) + b_bias
        b_n = b_x.n

        i_t += 1 - 2 * i_d
        o_row = rows_of(inputs, block, i_t, T, B)
        b_x = _load_gru(p_x, o_row, block, has_step(block, i_t), H, ACC)

        b_new_h, b_saved = gru_forward(GRUGates(b_r, b_z, b_n, b_hn), b_h.to(ACC), None, False)
        b_h = tl.where(m_now, b_new_h.to(S), b_h)
        store(outputs.p_y, o_y, b_h, m_now)
        if outputs.p_saved is not None:
            store(outputs.p_saved, o_saved, b_saved.r, m_now)
            store(outputs.p_saved, o_saved + H, b_saved.z, m_now)
            store(outputs.p_saved, o_saved + 2 * H, b_saved.n, m_now)
            store(outputs.p_saved, o_saved + 3 * H, b_saved.h_n, m_now)
    store(outputs.p_h_n, block.o_state, b_h, block.m_state)


@triton.jit
def _load_mgu(p_x, o_row, block, m, H, ACC: tl.constexpr):
    """Loads the input projection; h_n is a placeholder."""
    o_x = o_row[:, None] * (2 * H) + block.i_h
    f = load(p_x, o_x, m, ACC)
    n = load(p_x, o_x + H, m, ACC)
    return MGUGates(f, n, n)


@triton.jit(do_not_specialize=SIZES)
def mgu_forward_kernel(
    p_x,  # [directions, N, 2H] input projection with all biases except b_hn
    inputs,
    outputs,  # saved: [directions, N, 3H] f, n and the recurrent projection of n
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = outputs.p_y.dtype.element_ty
    ACC: tl.constexpr = p_x.dtype.element_ty
    block = block_of(inputs, T, B, H, BB, BH)
    i_d = block.direction
    p_x += i_d.to(tl.int64) * N * (2 * H)
    p_w_hh = inputs.p_w_hh + i_d * (2 * H) * H

    b_wf = weight(p_w_hh, 0, H, True, BH)
    b_wn = weight(p_w_hh, 1, H, True, BH)
    b_bias = state(inputs.p_bias, i_d * H + block.i_h, block.m_h, ACC)
    b_h = state(inputs.p_h0, block.o_state, block.m_state, S)

    i_t = i_d * (block.longest - 1)
    o_row = rows_of(inputs, block, i_t, T, B)
    b_x = _load_mgu(p_x, o_row, block, has_step(block, i_t), H, ACC)
    for _ in range(block.longest):
        m_now = (i_t < block.lengths)[:, None] & block.m_h
        o_y = o_row[:, None] * block.s_y + i_d * H + block.i_h
        o_saved = (i_d.to(tl.int64) * N + o_row)[:, None] * (3 * H) + block.i_h
        if inputs.p_reset is not None:
            b_h = tl.where(reset_at(inputs, block, i_t, T, B), 0.0, b_h).to(S)
        b_f = tl.dot(b_h, b_wf, b_x.f, input_precision=PRECISION, out_dtype=ACC)
        b_hn = tl.dot(b_h, b_wn, input_precision=PRECISION, out_dtype=ACC) + b_bias
        b_n = b_x.n

        i_t += 1 - 2 * i_d
        o_row = rows_of(inputs, block, i_t, T, B)
        b_x = _load_mgu(p_x, o_row, block, has_step(block, i_t), H, ACC)

        b_new_h, b_saved = mgu_forward(MGUGates(b_f, b_n, b_hn), b_h.to(ACC), None, False)
        b_h = tl.where(m_now, b_new_h.to(S), b_h)
        store(outputs.p_y, o_y, b_h, m_now)
        if outputs.p_saved is not None:
            store(outputs.p_saved, o_saved, b_saved.f, m_now)
            store(outputs.p_saved, o_saved + H, b_saved.n, m_now)
            store(outputs.p_saved, o_saved + 2 * H, b_saved.h_n, m_now)
    store(outputs.p_h_n, block.o_state, b_h, block.m_state)


@triton.jit(do_not_specialize=SIZES)
def rnn_forward_kernel(
    p_x,  # [directions, N, H] input projection with all biases
    inputs,
    outputs,  # saved: None, because backward only reads y
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
    ACC: tl.constexpr = p_x.dtype.element_ty
    block = block_of(inputs, T, B, H, BB, BH)
    i_d = block.direction
    p_x += i_d.to(tl.int64) * N * H

    b_w = weight(inputs.p_w_hh + i_d * H * H, 0, H, True, BH)
    b_h = state(inputs.p_h0, block.o_state, block.m_state, S)

    i_t = i_d * (block.longest - 1)
    o_row = rows_of(inputs, block, i_t, T, B)
    b_x = load(p_x, o_row[:, None] * H + block.i_h, has_step(block, i_t), ACC)
    for _ in range(block.longest):
        m_now = (i_t < block.lengths)[:, None] & block.m_h
        o_y = o_row[:, None] * block.s_y + i_d * H + block.i_h
        if inputs.p_reset is not None:
            b_h = tl.where(reset_at(inputs, block, i_t, T, B), 0.0, b_h).to(S)
        b_new_h = tl.dot(b_h, b_w, b_x, input_precision=PRECISION, out_dtype=ACC)

        i_t += 1 - 2 * i_d
        o_row = rows_of(inputs, block, i_t, T, B)
        b_x = load(p_x, o_row[:, None] * H + block.i_h, has_step(block, i_t), ACC)

        b_new_h = relu(b_new_h) if RELU else tanh(b_new_h)
        b_h = tl.where(m_now, b_new_h.to(S), b_h)
        store(outputs.p_y, o_y, b_h, m_now)
    store(outputs.p_h_n, block.o_state, b_h, block.m_state)
