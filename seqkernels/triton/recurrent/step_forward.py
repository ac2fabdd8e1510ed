"""Forward of one step and direction, given the recurrent projection."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import activate, clip, load, relu, restore, store, tanh
from .cells import GRUGates, LSTMGates, MGUGates, gru_forward, lstm_forward, mgu_forward
from .step import FORWARD, Step, has_step, options_of, reset_at


@triton.jit(do_not_specialize=FORWARD)
def lstm_step_forward_kernel(
    p_x,  # [N, G * H] input projection with all biases, in the type of the computation
    p_product,  # [B, G * H] recurrent projection
    p_h,  # [B, H] state, updated in place; also p_c
    p_c,
    p_saved,  # [N, G * H] gates, or None
    rows,
    sequences,
    masks,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    COUPLED: tl.constexpr,
    BU: tl.constexpr,
):
    S: tl.constexpr = rows.p_y.dtype.element_ty
    ACC: tl.constexpr = p_x.dtype.element_ty
    G: tl.constexpr = 3 if COUPLED else 4
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_x = (row + i_b) * (G * H) + i_h
    o_product = i_b * (G * H) + i_h
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h

    b_i = load(p_product, o_product, m, ACC)
    b_g = load(p_product, o_product + (G - 2) * H, m, ACC)
    b_o = load(p_product, o_product + (G - 1) * H, m, ACC)
    b_f = b_i
    if not COUPLED:
        b_f = load(p_product, o_product + H, m, ACC)
    b_h = load(p_h, o_state, m, ACC)
    b_c = load(p_c, o_state, m, ACC)
    if sequences.p_reset is not None:
        is_reset = reset_at(sequences, i_b, Step(t_reset, row_reset, n_reset))
        b_i = tl.where(is_reset, 0.0, b_i)
        b_f = tl.where(is_reset, 0.0, b_f)
        b_g = tl.where(is_reset, 0.0, b_g)
        b_o = tl.where(is_reset, 0.0, b_o)
        b_h = tl.where(is_reset, 0.0, b_h)
        b_c = tl.where(is_reset, 0.0, b_c)
    b_i += load(p_x, o_x, m, ACC)
    b_g += load(p_x, o_x + (G - 2) * H, m, ACC)
    b_o += load(p_x, o_x + (G - 1) * H, m, ACC)
    if not COUPLED:
        b_f += load(p_x, o_x + H, m, ACC)
    b_x = LSTMGates(b_i, b_f, b_g, b_o)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, COUPLED, ACC)
        b_new_h, b_c, b_saved = lstm_forward(b_x, b_c, options, S, COUPLED, True)
        b_h = b_new_h + options.zoneout_h * (b_h - b_new_h)
    else:
        b_h, b_c, b_saved = lstm_forward(b_x, b_c, None, S, COUPLED, False)
    store(p_h, o_state, b_h, m)
    store(p_c, o_state, b_c, m)
    store(rows.p_y, o_y, b_h, m)
    store(rows.p_cells, o_y, b_c, m)
    if p_saved is not None:
        o_saved = (row_saved + i_b) * (G * H) + i_h
        store(p_saved, o_saved, b_saved.i, m)
        store(p_saved, o_saved + (G - 2) * H, b_saved.g, m)
        store(p_saved, o_saved + (G - 1) * H, b_saved.o, m)
        if not COUPLED:
            store(p_saved, o_saved + H, b_saved.f, m)


@triton.jit(do_not_specialize=FORWARD)
def gru_step_forward_kernel(
    p_x,  # [N, 3H] input projection with all biases except b_hn
    p_product,  # [B, 3H]
    p_bias,  # [H] b_hn, or None
    p_h,
    p_saved,  # [N, 4H] r, z, n and the recurrent projection of n, or None
    rows,
    sequences,
    masks,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_x = (row + i_b) * (3 * H) + i_h
    o_product = i_b * (3 * H) + i_h
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h

    b_r = load(p_product, o_product, m, ACC)
    b_z = load(p_product, o_product + H, m, ACC)
    b_hn = load(p_product, o_product + 2 * H, m, ACC)
    b_h = load(p_h, o_state, m, ACC)
    if sequences.p_reset is not None:
        is_reset = reset_at(sequences, i_b, Step(t_reset, row_reset, n_reset))
        b_r = tl.where(is_reset, 0.0, b_r)
        b_z = tl.where(is_reset, 0.0, b_z)
        b_hn = tl.where(is_reset, 0.0, b_hn)
        b_h = tl.where(is_reset, 0.0, b_h)
    if p_bias is not None:
        b_hn += load(p_bias, i_h, m, ACC)
    b_r += load(p_x, o_x, m, ACC)
    b_z += load(p_x, o_x + H, m, ACC)
    b_n = load(p_x, o_x + 2 * H, m, ACC)
    b_x = GRUGates(b_r, b_z, b_n, b_hn)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, False, ACC)
        b_new_h, b_saved = gru_forward(b_x, b_h, options, True)
        b_h = b_new_h + options.zoneout_h * (b_h - b_new_h)
    else:
        b_h, b_saved = gru_forward(b_x, b_h, None, False)
    store(p_h, o_state, b_h, m)
    store(rows.p_y, o_y, b_h, m)
    if p_saved is not None:
        o_saved = (row_saved + i_b) * (4 * H) + i_h
        store(p_saved, o_saved, b_saved.r, m)
        store(p_saved, o_saved + H, b_saved.z, m)
        store(p_saved, o_saved + 2 * H, b_saved.n, m)
        store(p_saved, o_saved + 3 * H, b_saved.h_n, m)


@triton.jit(do_not_specialize=FORWARD)
def mgu_step_forward_kernel(
    p_x,  # [N, 2H] input projection with all biases except b_hn
    p_product,  # [B, 2H]
    p_bias,  # [H] b_hn, or None
    p_h,
    p_saved,  # [N, 3H] f, n and the recurrent projection of n, or None
    rows,
    sequences,
    masks,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_x = (row + i_b) * (2 * H) + i_h
    o_product = i_b * (2 * H) + i_h
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h

    b_f = load(p_product, o_product, m, ACC)
    b_hn = load(p_product, o_product + H, m, ACC)
    b_h = load(p_h, o_state, m, ACC)
    if sequences.p_reset is not None:
        is_reset = reset_at(sequences, i_b, Step(t_reset, row_reset, n_reset))
        b_f = tl.where(is_reset, 0.0, b_f)
        b_hn = tl.where(is_reset, 0.0, b_hn)
        b_h = tl.where(is_reset, 0.0, b_h)
    if p_bias is not None:
        b_hn += load(p_bias, i_h, m, ACC)
    b_f += load(p_x, o_x, m, ACC)
    b_n = load(p_x, o_x + H, m, ACC)
    b_x = MGUGates(b_f, b_n, b_hn)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, False, ACC)
        b_new_h, b_saved = mgu_forward(b_x, b_h, options, True)
        b_h = b_new_h + options.zoneout_h * (b_h - b_new_h)
    else:
        b_h, b_saved = mgu_forward(b_x, b_h, None, False)
    store(p_h, o_state, b_h, m)
    store(rows.p_y, o_y, b_h, m)
    if p_saved is not None:
        o_saved = (row_saved + i_b) * (3 * H) + i_h
        store(p_saved, o_saved, b_saved.f, m)
        store(p_saved, o_saved + H, b_saved.n, m)
        store(p_saved, o_saved + 2 * H, b_saved.h_n, m)


@triton.jit(do_not_specialize=FORWARD)
def reset_before_gates_kernel(
    p_x,  # [N, G * H] input projection with all biases
    p_product,  # [B, (G - 1) * H] recurrent projection of the gates before n
    p_h,
    p_reset_h,  # [B, H] output: r * h (MGU: f * h), the input of the recurrent projection of n
    p_saved,  # [.., G * H] output: r and z (MGU: f), which reset_before_forward_kernel reads
    p_variational,  # [B, H] factors of h in the recurrent projection, or None
    p_gate_clip,  # [1], or None without options
    sequences,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    MINIMAL: tl.constexpr,  # MGU
    BU: tl.constexpr,
):
    """First kernel of a step of a GRU or MGU in RESET_BEFORE: the gates before n."""
    ACC: tl.constexpr = p_x.dtype.element_ty
    G: tl.constexpr = 2 if MINIMAL else 3
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_x = (row + i_b) * (G * H) + i_h
    o_product = i_b * ((G - 1) * H) + i_h
    o_saved = (row_saved + i_b) * (G * H) + i_h
    b_r = load(p_product, o_product, m, ACC)
    b_h = load(p_h, i_b * H + i_h, m, ACC)
    if p_variational is not None:
        b_h *= load(p_variational, i_b * H + i_h, m, ACC)
    if sequences.p_reset is not None:
        is_reset = reset_at(sequences, i_b, Step(t_reset, row_reset, n_reset))
        b_r = tl.where(is_reset, 0.0, b_r)
        b_h = tl.where(is_reset, 0.0, b_h)
    b_r += load(p_x, o_x, m, ACC)
    gate_clip = None
    if p_gate_clip is not None:
        gate_clip = tl.load(p_gate_clip)
    b_r, b_saved = activate(b_r, gate_clip, False)
    store(p_saved, o_saved, b_saved, m)
    if not MINIMAL:
        b_z = load(p_product, o_product + H, m, ACC)
        if sequences.p_reset is not None:
            b_z = tl.where(is_reset, 0.0, b_z)
        b_z += load(p_x, o_x + H, m, ACC)
        b_z, b_saved = activate(b_z, gate_clip, False)
        store(p_saved, o_saved + H, b_saved, m)
    store(p_reset_h, i_b * H + i_h, b_r * b_h, i_h < H)


@triton.jit(do_not_specialize=FORWARD)
def reset_before_forward_kernel(
    p_x,
    p_product,  # [B, H] recurrent projection of n
    p_h,
    p_saved,  # [.., G * H] reads the other gates and writes n
    rows,
    sequences,
    masks,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    MINIMAL: tl.constexpr,
    BU: tl.constexpr,
):
    """Second kernel of a step of a GRU or MGU in RESET_BEFORE: n and h."""
    ACC: tl.constexpr = p_x.dtype.element_ty
    G: tl.constexpr = 2 if MINIMAL else 3
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & has_step(sequences, i_b, Step(t, row, i_b + 1))
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h
    o_saved = (row_saved + i_b) * (G * H) + i_h
    b_n = load(p_product, o_state, m, ACC) + load(p_x, (row + i_b) * (G * H) + (G - 1) * H + i_h, m, ACC)
    b_gate = load(p_saved, o_saved + (G - 2) * H, m, ACC)  # z; MGU: f
    b_h = load(p_h, o_state, m, ACC)
    if sequences.p_reset is not None:
        b_h = tl.where(reset_at(sequences, i_b, Step(t_reset, row_reset, n_reset)), 0.0, b_h)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, False, ACC)
        b_gate, _ = restore(b_gate, options.gate_clip, False)
        b_n, b_saved = activate(b_n, options.gate_clip, True)
        b_n *= options.keep
        b_new_h = b_h + b_gate * (b_n - b_h) if MINIMAL else b_n + b_gate * (b_h - b_n)
        b_h = b_new_h + options.zoneout_h * (b_h - b_new_h)
    else:
        b_n, b_saved = activate(b_n, None, True)
        b_h = b_h + b_gate * (b_n - b_h) if MINIMAL else b_n + b_gate * (b_h - b_n)
    store(p_saved, o_saved + (G - 1) * H, b_saved, m)
    store(p_h, o_state, b_h, m)
    store(rows.p_y, o_y, b_h, m)


@triton.jit(do_not_specialize=FORWARD)
def rnn_step_forward_kernel(
    p_x,  # [N, H] input projection with all biases
    p_product,
    p_h,
    p_saved,  # [N, H] activation, or a value with its derivative; None without options, where backward uses y
    rows,
    sequences,
    masks,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    RELU: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & has_step(sequences, i_b, Step(t, row, i_b + 1))
    reset = Step(t_reset, row_reset, n_reset)
    o_y = (row + i_b) * rows.stride + rows.first + i_h
    o_state = i_b * H + i_h
    b_new_h = load(p_product, o_state, m, ACC)
    if sequences.p_reset is not None:
        b_new_h = tl.where(reset_at(sequences, i_b, reset), 0.0, b_new_h)
    b_new_h += load(p_x, (row + i_b) * H + i_h, m, ACC)
    if masks.p_numbers is not None:
        options = options_of(masks, o_y, i_h, m, H, False, ACC)
        b_h = load(p_h, o_state, m, ACC)
        if sequences.p_reset is not None:
            b_h = tl.where(reset_at(sequences, i_b, reset), 0.0, b_h)
        at_limit = tl.abs(b_new_h) >= options.gate_clip
        b_new_h = clip(b_new_h, options.gate_clip)
        b_new_h = relu(b_new_h) if RELU else tanh(b_new_h)
        if p_saved is not None:  # a value with derivative 0: 0 for relu, 1 for tanh
            b_saved = tl.where(at_limit, 0.0 if RELU else 1.0, b_new_h)
            store(p_saved, (row_saved + i_b) * H + i_h, b_saved, m)
        b_new_h = b_new_h + options.zoneout_h * (b_h - b_new_h)
    else:
        b_new_h = relu(b_new_h) if RELU else tanh(b_new_h)
    store(p_h, o_state, b_new_h, m)
    store(rows.p_y, o_y, b_new_h, m)
