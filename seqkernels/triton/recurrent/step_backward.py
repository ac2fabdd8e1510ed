"""Backward of one step and direction, given the gradient of h through the recurrent projection of the next step."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import load, restore, store
from .cells import GRUGates, LSTMGates, MGUGates, gru_backward, lstm_backward, mgu_backward
from .step import BACKWARD, Step, dh_of, has_step, options_of, reset_at, state_before


@triton.jit(do_not_specialize=BACKWARD)
def lstm_step_backward_kernel(
    p_saved,
    initial,
    rows,
    sequences,
    masks,
    upstream,
    written,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_after,
    row_after,
    n_after,
    H,
    COUPLED: tl.constexpr,
    BU: tl.constexpr,
):
    S: tl.constexpr = rows.p_y.dtype.element_ty
    ACC: tl.constexpr = upstream.p_product.dtype.element_ty
    G: tl.constexpr = 3 if COUPLED else 4
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_before = (row_before + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h
    o_x = (row + i_b) * (G * H) + i_h
    reset = Step(t_reset, row_reset, n_reset)
    before = Step(t_before, row_before, n_before)
    after = Step(t_after, row_after, n_after)

    b_dh = dh_of(upstream, sequences, after, i_b, o_y, o_state, m, m_h, ACC)
    b_h_prev = state_before(rows.p_y, initial.p_h0, sequences, reset, before, i_b, o_before, o_state, m, ACC)
    b_c_prev = state_before(rows.p_cells, initial.p_c0, sequences, reset, before, i_b, o_before, o_state, m, ACC)
    b_dc = load(upstream.p_dc, o_state, m, ACC)
    if upstream.p_dcells is not None:
        b_dc += load(upstream.p_dcells, o_y, m, ACC)
    b_i = load(p_saved, o_x, m, ACC)
    b_g = load(p_saved, o_x + (G - 2) * H, m, ACC)
    b_o = load(p_saved, o_x + (G - 1) * H, m, ACC)
    b_f = b_i
    if not COUPLED:
        b_f = load(p_saved, o_x + H, m, ACC)
    b_saved = LSTMGates(b_i, b_f, b_g, b_o)
    b_c = load(rows.p_cells, o_y, m, ACC)
    b_direct = tl.zeros([BU], ACC)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, COUPLED, ACC)
        b_direct += b_dh * options.zoneout_h
        b_dh -= b_direct
        b_d, b_dc, b_new_c = lstm_backward(b_saved, b_c, b_c_prev, b_dh, b_dc, options, S, COUPLED, True)
    else:
        b_d, b_dc, b_new_c = lstm_backward(b_saved, b_c, b_c_prev, b_dh, b_dc, None, S, COUPLED, False)
    store(written.p_dx, o_x, b_d.i, m)
    store(written.p_dx, o_x + (G - 2) * H, b_d.g, m)
    store(written.p_dx, o_x + (G - 1) * H, b_d.o, m)
    if not COUPLED:
        store(written.p_dx, o_x + H, b_d.f, m)
    if written.p_dpeephole is not None:
        o_peephole = (row + i_b) * ((G - 1) * H) + i_h
        store(written.p_dpeephole, o_peephole, b_d.i * b_c_prev, m)
        store(written.p_dpeephole, o_peephole + (G - 2) * H, b_d.o * b_new_c, m)
        if not COUPLED:
            store(written.p_dpeephole, o_peephole + H, b_d.f * b_c_prev, m)
    if sequences.p_reset is not None:
        is_reset = reset_at(sequences, i_b, reset)
        b_dc = tl.where(is_reset, 0.0, b_dc)
        b_direct = tl.where(is_reset, 0.0, b_direct)
    store(upstream.p_dc, o_state, b_dc, m)
    store(upstream.p_direct, o_state, b_direct, m)
    if upstream.p_variational is not None:
        b_h_prev *= load(upstream.p_variational, o_state, m, ACC)
    store(written.p_h, (row + i_b) * H + i_h, b_h_prev, m)


@triton.jit(do_not_specialize=BACKWARD)
def gru_step_backward_kernel(
    p_saved,
    initial,
    rows,
    sequences,
    masks,
    upstream,
    written,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_after,
    row_after,
    n_after,
    H,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = upstream.p_product.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_before = (row_before + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h
    reset = Step(t_reset, row_reset, n_reset)
    before = Step(t_before, row_before, n_before)
    after = Step(t_after, row_after, n_after)

    b_dh = dh_of(upstream, sequences, after, i_b, o_y, o_state, m, m_h, ACC)
    b_h_prev = state_before(rows.p_y, initial.p_h0, sequences, reset, before, i_b, o_before, o_state, m, ACC)
    o_saved = (row + i_b) * (4 * H) + i_h
    b_r = load(p_saved, o_saved, m, ACC)
    b_z = load(p_saved, o_saved + H, m, ACC)
    b_n = load(p_saved, o_saved + 2 * H, m, ACC)
    b_hn = load(p_saved, o_saved + 3 * H, m, ACC)
    b_saved = GRUGates(b_r, b_z, b_n, b_hn)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, False, ACC)
        b_zoneout = b_dh * options.zoneout_h
        b_d, b_direct = gru_backward(b_saved, b_h_prev, b_dh - b_zoneout, options, True)
        b_direct += b_zoneout
    else:
        b_d, b_direct = gru_backward(b_saved, b_h_prev, b_dh, None, False)
    o_x = (row + i_b) * (3 * H) + i_h
    store(written.p_dx, o_x, b_d.r, m)
    store(written.p_dx, o_x + H, b_d.z, m)
    store(written.p_dx, o_x + 2 * H, b_d.n, m)
    store(written.p_dh_of_n, (row + i_b) * H + i_h, b_d.h_n, m)
    if sequences.p_reset is not None:
        b_direct = tl.where(reset_at(sequences, i_b, reset), 0.0, b_direct)
    store(upstream.p_direct, o_state, b_direct, m)
    if upstream.p_variational is not None:
        b_h_prev *= load(upstream.p_variational, o_state, m, ACC)
    store(written.p_h, (row + i_b) * H + i_h, b_h_prev, m)


@triton.jit(do_not_specialize=BACKWARD)
def mgu_step_backward_kernel(
    p_saved,
    initial,
    rows,
    sequences,
    masks,
    upstream,
    written,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_after,
    row_after,
    n_after,
    H,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = upstream.p_product.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_before = (row_before + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h
    reset = Step(t_reset, row_reset, n_reset)
    before = Step(t_before, row_before, n_before)
    after = Step(t_after, row_after, n_after)

    b_dh = dh_of(upstream, sequences, after, i_b, o_y, o_state, m, m_h, ACC)
    b_h_prev = state_before(rows.p_y, initial.p_h0, sequences, reset, before, i_b, o_before, o_state, m, ACC)
    o_saved = (row + i_b) * (3 * H) + i_h
    b_f = load(p_saved, o_saved, m, ACC)
    b_n = load(p_saved, o_saved + H, m, ACC)
    b_hn = load(p_saved, o_saved + 2 * H, m, ACC)
    b_saved = MGUGates(b_f, b_n, b_hn)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, False, ACC)
        b_zoneout = b_dh * options.zoneout_h
        b_d, b_direct = mgu_backward(b_saved, b_h_prev, b_dh - b_zoneout, options, True)
        b_direct += b_zoneout
    else:
        b_d, b_direct = mgu_backward(b_saved, b_h_prev, b_dh, None, False)
    o_x = (row + i_b) * (2 * H) + i_h
    store(written.p_dx, o_x, b_d.f, m)
    store(written.p_dx, o_x + H, b_d.n, m)
    store(written.p_dh_of_n, (row + i_b) * H + i_h, b_d.h_n, m)
    if sequences.p_reset is not None:
        b_direct = tl.where(reset_at(sequences, i_b, reset), 0.0, b_direct)
    store(upstream.p_direct, o_state, b_direct, m)
    if upstream.p_variational is not None:
        b_h_prev *= load(upstream.p_variational, o_state, m, ACC)
    store(written.p_h, (row + i_b) * H + i_h, b_h_prev, m)


@triton.jit(do_not_specialize=BACKWARD)
def reset_before_backward_kernel(
    p_saved,
    p_dgate,  # [B, H] term of the gradient of f through h, in the type of the computation; MGU
    initial,
    rows,
    sequences,
    masks,
    upstream,
    written,  # dx: z and n
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_after,
    row_after,
    n_after,
    H,
    MINIMAL: tl.constexpr,  # MGU
    BU: tl.constexpr,
):
    """First kernel of a backward step of a GRU or MGU in RESET_BEFORE: n, and z of a GRU."""
    ACC: tl.constexpr = upstream.p_product.dtype.element_ty
    G: tl.constexpr = 2 if MINIMAL else 3
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_before = (row_before + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h
    reset = Step(t_reset, row_reset, n_reset)
    before = Step(t_before, row_before, n_before)
    after = Step(t_after, row_after, n_after)

    b_dh = dh_of(upstream, sequences, after, i_b, o_y, o_state, m, m_h, ACC)
    b_h_prev = state_before(rows.p_y, initial.p_h0, sequences, reset, before, i_b, o_before, o_state, m, ACC)
    o_x = (row + i_b) * (G * H) + i_h
    b_gate = load(p_saved, o_x + (G - 2) * H, m, ACC)  # z; MGU: f
    b_n = load(p_saved, o_x + (G - 1) * H, m, ACC)
    b_direct = tl.zeros([BU], ACC)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, False, ACC)
        b_direct += b_dh * options.zoneout_h
        b_dh -= b_direct
        b_gate, b_slope = restore(b_gate, options.gate_clip, False)
        b_n, b_slope_n = restore(b_n, options.gate_clip, True)
        b_n *= options.keep
        b_slope_n *= options.keep
    else:
        b_gate, b_slope = restore(b_gate, None, False)
        b_n, b_slope_n = restore(b_n, None, True)
    if MINIMAL:
        b_direct += b_dh * (1.0 - b_gate)
        store(p_dgate, o_state, b_dh * (b_n - b_h_prev), m)
        store(written.p_dx, o_x + H, b_dh * b_gate * b_slope_n, m)
    else:
        b_direct += b_dh * b_gate
        store(written.p_dx, o_x + H, b_dh * (b_h_prev - b_n) * b_slope, m)
        store(written.p_dx, o_x + 2 * H, b_dh * (1.0 - b_gate) * b_slope_n, m)
    if sequences.p_reset is not None:
        b_direct = tl.where(reset_at(sequences, i_b, reset), 0.0, b_direct)
    store(upstream.p_direct, o_state, b_direct, m)
    if upstream.p_variational is not None:
        b_h_prev *= load(upstream.p_variational, o_state, m, ACC)
    store(written.p_h, (row + i_b) * H + i_h, b_h_prev, m)


@triton.jit(do_not_specialize=BACKWARD)
def reset_before_gates_backward_kernel(
    p_saved,
    p_dreset_h,  # [B, H] gradient of r * h (MGU: f * h)
    p_dgate,  # [B, H] output of reset_before_backward_kernel; MGU
    p_direct,
    p_variational,
    p_gate_clip,  # [1], or None without options
    p_h,  # [N, H] input of the recurrent projection
    p_dx,  # [N, G * H] output: r; MGU: f
    p_reset_h,  # [N, H] output: r * h, the input of the recurrent projection of n
    sequences,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    H,
    MINIMAL: tl.constexpr,
    BU: tl.constexpr,
):
    """Second kernel of a backward step of a GRU or MGU in RESET_BEFORE: r, or f of an MGU."""
    ACC: tl.constexpr = p_dreset_h.dtype.element_ty
    G: tl.constexpr = 2 if MINIMAL else 3
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_state = i_b * H + i_h
    o_x = (row + i_b) * (G * H) + i_h
    b_d = load(p_dreset_h, o_state, m, ACC)
    b_h = load(p_h, (row + i_b) * H + i_h, m, ACC)
    gate_clip = None
    if p_gate_clip is not None:
        gate_clip = tl.load(p_gate_clip)
    b_r, b_slope = restore(load(p_saved, o_x, m, ACC), gate_clip, False)
    b_dr = b_d * b_h
    if MINIMAL:
        b_dr += load(p_dgate, o_state, m, ACC)
    store(p_dx, o_x, b_dr * b_slope, m)
    store(p_reset_h, (row + i_b) * H + i_h, b_r * b_h, m)
    b_d *= b_r
    if p_variational is not None:
        b_d *= load(p_variational, o_state, m, ACC)
    if sequences.p_reset is not None:
        b_d = tl.where(reset_at(sequences, i_b, Step(t_reset, row_reset, n_reset)), 0.0, b_d)
    store(p_direct, o_state, load(p_direct, o_state, m, ACC) + b_d, m)


@triton.jit(do_not_specialize=BACKWARD)
def rnn_step_backward_kernel(
    p_saved,
    initial,
    rows,
    sequences,
    masks,
    upstream,
    written,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_after,
    row_after,
    n_after,
    H,
    RELU: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = upstream.p_product.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_before = (row_before + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h
    reset = Step(t_reset, row_reset, n_reset)
    before = Step(t_before, row_before, n_before)
    after = Step(t_after, row_after, n_after)

    b_dh = dh_of(upstream, sequences, after, i_b, o_y, o_state, m, m_h, ACC)
    b_h_prev = state_before(rows.p_y, initial.p_h0, sequences, reset, before, i_b, o_before, o_state, m, ACC)
    b_direct = tl.zeros([BU], ACC)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, False, ACC)
        b_h = load(p_saved, (row + i_b) * H + i_h, m, ACC)
        b_direct += b_dh * options.zoneout_h
        b_dh -= b_direct
    else:
        b_h = load(rows.p_y, o_y, m, ACC)
    b_dx = tl.where(b_h > 0, b_dh, 0.0) if RELU else b_dh * (1.0 - b_h * b_h)
    store(written.p_dx, (row + i_b) * H + i_h, b_dx, m)
    if sequences.p_reset is not None:
        b_direct = tl.where(reset_at(sequences, i_b, reset), 0.0, b_direct)
    store(upstream.p_direct, o_state, b_direct, m)
    if upstream.p_variational is not None:
        b_h_prev *= load(upstream.p_variational, o_state, m, ACC)
    store(written.p_h, (row + i_b) * H + i_h, b_h_prev, m)
