"""Recurrent layers in Triton: fused cells, and the whole recurrence in one kernel where W_hh is small.

Dimensions: B sequences, T steps, N rows of x and y (T * B, or packed: the real tokens), D input, H hidden, G gates.
A row is one step of one sequence: t * B + b, or packed starts[t] + b.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqkernels.functional import _recurrent_ops
from seqkernels.functional._recurrent_extras import NO_EXTRAS, Extras
from seqkernels.functional._recurrent_kinds import Kind, kind_named
from seqkernels.reference import recurrent as definition

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# ---- arithmetic of cells
#
# e, None in a plain cell: peepholes of i, f and o, the factor of the candidate, the shares of the old h and c that
# stay, gate_clip, cell_clip.


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))  # at most 1: nothing overflows
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(x):
    """Near 0 the quotient cancels; there the polynomials of the Cephes library, http://www.netlib.org/cephes"""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    x_near = tl.minimum(tl.maximum(x, -1.0), 1.0)  # farther off they do not hold, and shall not overflow
    z = x_near * x_near
    if x.dtype == tl.float64:
        above = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
        below = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
        near = above / below
    else:
        near = -5.70498872745e-3 * z + 2.06390887954e-2
        near = (near * z - 5.37397155531e-2) * z + 1.33314422036e-1
        near = near * z - 3.33332819422e-1
    return tl.where(z < 0.390625, x_near + x_near * z * near, tl.where(x < 0, -y, y))


@triton.jit
def _limited(x, limit):  # NaN stays NaN
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)


@triton.jit
def _activate(x, gate_clip, TANH: tl.constexpr, OPTIONS: tl.constexpr):
    """The value, and what is kept of it for backward: at the limit of gate_clip, where no gradient passes, 2 or -2."""
    kept_high = x
    if OPTIONS:
        x = _limited(x, gate_clip)
    value = _tanh(x) if TANH else _sigmoid(x)
    kept = value
    if OPTIONS:
        kept = tl.where(kept_high >= gate_clip, 2.0, tl.where(kept_high <= -gate_clip, -2.0, value))
    return value, kept


@triton.jit
def _reopen(kept, gate_clip, TANH: tl.constexpr, OPTIONS: tl.constexpr):
    """Value and slope from what was kept."""
    value = kept
    if OPTIONS:
        at_limit = tl.abs(kept) > 1.5
        limit = tl.where(kept > 0, gate_clip, -gate_clip)
        value = tl.where(at_limit, _tanh(limit) if TANH else _sigmoid(limit), kept)
    slope = 1.0 - value * value if TANH else value * (1.0 - value)
    if OPTIONS:
        slope = tl.where(at_limit, 0.0, slope)
    return value, slope


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # NaN stays NaN


@triton.jit
def _lstm_forward(x_i, x_f, x_g, x_o, c, e, S: tl.constexpr, COUPLED: tl.constexpr, OPTIONS: tl.constexpr):
    """h, c and what is kept of the gates."""
    gate_clip = None
    if OPTIONS:
        peephole_i, peephole_f, peephole_o, keep, _, zone_c, gate_clip, cell_clip = e
        x_i += peephole_i * c
        x_f += peephole_f * c
    i, kept_i = _activate(x_i, gate_clip, False, OPTIONS)
    if COUPLED:
        f, kept_f = 1.0 - i, kept_i
    else:
        f, kept_f = _activate(x_f, gate_clip, False, OPTIONS)
    g, kept_g = _activate(x_g, gate_clip, True, OPTIONS)
    if OPTIONS:
        now = _limited(f * c + i * (g * keep), cell_clip).to(S).to(c.dtype)
        x_o += peephole_o * now
        c = (now + zone_c * (c - now)).to(S).to(c.dtype)
    else:
        now = (f * c + i * g).to(S).to(c.dtype)
        c = now
    o, kept_o = _activate(x_o, gate_clip, False, OPTIONS)
    return o * _tanh(now), c, kept_i, kept_f, kept_g, kept_o


@triton.jit
def _lstm_backward(
    kept_i, kept_f, kept_g, kept_o, c, c_prev, dh, dc, e, S: tl.constexpr, COUPLED: tl.constexpr, OPTIONS: tl.constexpr
):
    """Gradients of the gates' pre-activations and of c_prev, and the c that h was made of."""
    gate_clip = None
    if OPTIONS:
        peephole_i, peephole_f, peephole_o, keep, _, zone_c, gate_clip, cell_clip = e
    i, slope_i = _reopen(kept_i, gate_clip, False, OPTIONS)
    if COUPLED:
        f, slope_f = 1.0 - i, slope_i
    else:
        f, slope_f = _reopen(kept_f, gate_clip, False, OPTIONS)
    g, slope_g = _reopen(kept_g, gate_clip, True, OPTIONS)
    o, slope_o = _reopen(kept_o, gate_clip, False, OPTIONS)
    now = c
    if OPTIONS:
        g *= keep
        slope_g *= keep
        unclipped = f * c_prev + i * g
        now = tl.where(zone_c == 0, c, _limited(unclipped, cell_clip).to(S).to(c.dtype))
        dc_around = dc * zone_c
        dc -= dc_around
    tanh_c = _tanh(now)
    d_o = dh * tanh_c * slope_o
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    if OPTIONS:
        dc += d_o * peephole_o
        dc = tl.where(tl.abs(unclipped) >= cell_clip, 0.0, dc)
    d_g = dc * i * slope_g
    if COUPLED:
        d_i = dc * (g - c_prev) * slope_i
        d_f = d_i
    else:
        d_i = dc * g * slope_i
        d_f = dc * c_prev * slope_f
    dc *= f
    if OPTIONS:
        dc += d_i * peephole_i + dc_around
        if not COUPLED:
            dc += d_f * peephole_f
    return d_i, d_f, d_g, d_o, dc, now


@triton.jit
def _gru_forward(x_r, x_z, x_n, h_n, h, e, OPTIONS: tl.constexpr):
    """x_r and x_z come with their shares of h. h and what is kept of the gates."""
    gate_clip = None
    if OPTIONS:
        _, _, _, keep, _, _, gate_clip, _ = e
    r, kept_r = _activate(x_r, gate_clip, False, OPTIONS)
    z, kept_z = _activate(x_z, gate_clip, False, OPTIONS)
    n, kept_n = _activate(x_n + r * h_n, gate_clip, True, OPTIONS)
    if OPTIONS:
        n *= keep
    return n + z * (h - n), kept_r, kept_z, kept_n


@triton.jit
def _gru_backward(kept_r, kept_z, kept_n, h_n, h_prev, dh, e, OPTIONS: tl.constexpr):
    """Gradients of r, z, n as x sees them, of n as h sees it, and of h_prev by way of z."""
    gate_clip = None
    if OPTIONS:
        _, _, _, keep, _, _, gate_clip, _ = e
    r, slope_r = _reopen(kept_r, gate_clip, False, OPTIONS)
    z, slope_z = _reopen(kept_z, gate_clip, False, OPTIONS)
    n, slope_n = _reopen(kept_n, gate_clip, True, OPTIONS)
    if OPTIONS:
        n *= keep
        slope_n *= keep
    d_n = dh * (1.0 - z) * slope_n
    return d_n * h_n * slope_r, dh * (h_prev - n) * slope_z, d_n, d_n * r, dh * z


# ---- the walk


@triton.jit
def _row(p_starts, t, T, i_b, B):
    """[..] rows of step t; any number where there is no such step."""
    if p_starts is None:
        start = tl.cast(t, tl.int64) * B
    else:
        start = tl.load(p_starts + t, mask=(t >= 0) & (t < T), other=0)
    return start + i_b


@triton.jit
def _lengths(p_lengths, i_b, m_b, T):
    """[..] steps of each sequence, and of the longest of them."""
    if p_lengths is None:
        b_length = tl.where(m_b, T, 0)
        longest = T
    else:
        b_length = tl.load(p_lengths + i_b, mask=m_b, other=0).to(tl.int32)
        b_length = tl.minimum(tl.maximum(b_length, 0), T)  # whatever they are, nothing outside is read
        longest = tl.max(b_length, axis=0)
    return b_length, longest


@triton.jit
def _starts_anew(p_reset, p_starts, t, i_d, T, i_b, B, b_length):
    """[..] whether step t starts from zeros: at a reset, or walking back where the step before in the walk has one."""
    i_t = t + i_d
    return tl.load(p_reset + _row(p_starts, i_t, T, i_b, B), mask=i_t < b_length, other=0) != 0


@triton.jit
def _weight(p_w_hh, GATE: tl.constexpr, H, TRANSPOSED: tl.constexpr, BH: tl.constexpr):
    """[BH, BH] one gate's rows of W_hh, or their transpose; zeros beyond H."""
    i_u = tl.arange(0, BH)
    i_v = tl.arange(0, BH)
    if TRANSPOSED:
        o_w = (GATE * H + i_v[None, :]) * H + i_u[:, None]
    else:
        o_w = (GATE * H + i_u[:, None]) * H + i_v[None, :]
    return tl.load(p_w_hh + o_w, mask=(i_u < H)[:, None] & (i_v < H)[None, :], other=0)


@triton.jit
def _load(p, o, m, ACC: tl.constexpr):
    return tl.load(p + o, mask=m, other=0).to(ACC)


@triton.jit
def _store(p, o, value, m):
    tl.store(p + o, value.to(p.dtype.element_ty), mask=m)


@triton.jit
def _initial(p_states, o_state, m, ACC: tl.constexpr):
    if p_states is None:
        return tl.zeros(o_state.shape, ACC)
    else:
        return _load(p_states, o_state, m, ACC)


# ---- the recurrence, W_hh in shared memory or registers
#
# Grid: (sequences / BB, directions). A program walks its BB sequences through all of their steps; nothing passes
# between programs. Forward reads the shares of x one step ahead. Tiles are [BB, BH]; beyond H weights and shares of x
# are zeros and nothing is stored, so no such unit reaches a real one.

_WALK = ["T", "B", "N"]


@triton.jit(do_not_specialize=_WALK)
def lstm_forward_kernel(
    p_x,  # [directions, N, 4H] shares of x with all biases, in the type that is computed in
    p_w_hh,  # [directions, 4H, H]
    p_bias,  # unused; as in the other kinds
    p_h0,  # [directions, B, H] or None, as p_c0
    p_c0,
    p_lengths,  # [B] or None
    p_starts,  # [T] of packed rows, or None
    p_reset,  # uint8 [N] or None
    p_y,  # [N, directions * H], as p_cells
    p_cells,
    p_h_n,  # [directions, B, H], as p_c_n
    p_c_n,
    p_saved,  # [directions, N, 4H] gates, or None
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = p_y.dtype.element_ty
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_d = tl.program_id(1)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    i_h = tl.arange(0, BH)[None, :]
    m_b = i_b < B
    m_h = i_h < H
    b_length, longest = _lengths(p_lengths, i_b, m_b, T)
    s_y = tl.num_programs(1) * H
    o_state = (i_d * B + i_b).to(tl.int64)[:, None] * H + i_h
    m_state = m_b[:, None] & m_h
    p_x += i_d.to(tl.int64) * N * (4 * H)
    p_w_hh += i_d * (4 * H) * H

    b_wi = _weight(p_w_hh, 0, H, True, BH)
    b_wf = _weight(p_w_hh, 1, H, True, BH)
    b_wg = _weight(p_w_hh, 2, H, True, BH)
    b_wo = _weight(p_w_hh, 3, H, True, BH)
    b_h = _initial(p_h0, o_state, m_state, S)
    b_c = _initial(p_c0, o_state, m_state, ACC)

    i_t = i_d * (longest - 1)
    o_row = _row(p_starts, i_t, T, i_b, B)
    o_x = o_row[:, None] * (4 * H) + i_h
    m_x = ((i_t >= 0) & (i_t < b_length))[:, None] & m_h
    b_xi = _load(p_x, o_x, m_x, ACC)
    b_xf = _load(p_x, o_x + H, m_x, ACC)
    b_xg = _load(p_x, o_x + 2 * H, m_x, ACC)
    b_xo = _load(p_x, o_x + 3 * H, m_x, ACC)
    for _ in range(longest):
        m_now = (i_t < b_length)[:, None] & m_h
        o_y = o_row[:, None] * s_y + i_d * H + i_h
        o_saved = (i_d.to(tl.int64) * N + o_row)[:, None] * (4 * H) + i_h
        if p_reset is not None:
            m_anew = _starts_anew(p_reset, p_starts, i_t, i_d, T, i_b, B, b_length)[:, None]
            b_h = tl.where(m_anew, 0.0, b_h).to(S)
            b_c = tl.where(m_anew, 0.0, b_c)
        b_i = tl.dot(b_h, b_wi, b_xi, input_precision=PRECISION, out_dtype=ACC)
        b_f = tl.dot(b_h, b_wf, b_xf, input_precision=PRECISION, out_dtype=ACC)
        b_g = tl.dot(b_h, b_wg, b_xg, input_precision=PRECISION, out_dtype=ACC)
        b_o = tl.dot(b_h, b_wo, b_xo, input_precision=PRECISION, out_dtype=ACC)

        i_t += 1 - 2 * i_d
        o_row = _row(p_starts, i_t, T, i_b, B)
        o_x = o_row[:, None] * (4 * H) + i_h
        m_x = ((i_t >= 0) & (i_t < b_length))[:, None] & m_h
        b_xi = _load(p_x, o_x, m_x, ACC)
        b_xf = _load(p_x, o_x + H, m_x, ACC)
        b_xg = _load(p_x, o_x + 2 * H, m_x, ACC)
        b_xo = _load(p_x, o_x + 3 * H, m_x, ACC)

        b_new, b_newc, b_i, b_f, b_g, b_o = _lstm_forward(b_i, b_f, b_g, b_o, b_c, None, S, False, False)
        b_h = tl.where(m_now, b_new.to(S), b_h)
        b_c = tl.where(m_now, b_newc, b_c)
        _store(p_y, o_y, b_h, m_now)
        _store(p_cells, o_y, b_c, m_now)
        if p_saved is not None:
            _store(p_saved, o_saved, b_i, m_now)
            _store(p_saved, o_saved + H, b_f, m_now)
            _store(p_saved, o_saved + 2 * H, b_g, m_now)
            _store(p_saved, o_saved + 3 * H, b_o, m_now)
    _store(p_h_n, o_state, b_h, m_state)
    _store(p_c_n, o_state, b_c, m_state)


@triton.jit(do_not_specialize=_WALK)
def lstm_backward_kernel(
    p_w_hh,  # as forward's, as what follows
    p_h0,
    p_c0,
    p_lengths,
    p_starts,
    p_reset,
    p_y,
    p_cells,
    p_saved,
    p_dy,  # like y, or None
    p_dh_n,  # [directions, B, H] or None, as p_dc_n
    p_dc_n,
    p_dx,  # [directions, N, 4H] gradients of the pre-activations
    p_dhn,  # unused; as in the other kinds
    p_fed,  # [directions, N, H] the h that each step's products saw
    p_dh0,  # [directions, B, H], as p_dc0
    p_dc0,
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = p_y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if S == tl.float64 else tl.float32  # noqa: SIM300
    i_d = tl.program_id(1)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    i_h = tl.arange(0, BH)[None, :]
    m_b = i_b < B
    m_h = i_h < H
    b_length, longest = _lengths(p_lengths, i_b, m_b, T)
    s_y = tl.num_programs(1) * H
    o_state = (i_d * B + i_b).to(tl.int64)[:, None] * H + i_h
    m_state = m_b[:, None] & m_h
    p_w_hh += i_d * (4 * H) * H

    b_wi = _weight(p_w_hh, 0, H, False, BH)
    b_wf = _weight(p_w_hh, 1, H, False, BH)
    b_wg = _weight(p_w_hh, 2, H, False, BH)
    b_wo = _weight(p_w_hh, 3, H, False, BH)
    b_h0 = _initial(p_h0, o_state, m_state, ACC)
    b_c0 = _initial(p_c0, o_state, m_state, ACC)
    b_dh = _initial(p_dh_n, o_state, m_state, ACC)
    b_dc = _initial(p_dc_n, o_state, m_state, ACC)

    i_t = (1 - i_d) * (longest - 1)
    o_row = _row(p_starts, i_t, T, i_b, B)
    o_y = o_row[:, None] * s_y + i_d * H + i_h
    b_c = _load(p_cells, o_y, ((i_t >= 0) & (i_t < b_length))[:, None] & m_h, ACC)
    for _ in range(longest):
        m_now = (i_t < b_length)[:, None] & m_h
        o_wide = (i_d.to(tl.int64) * N + o_row)[:, None] * (4 * H) + i_h
        o_fed = (i_d.to(tl.int64) * N + o_row)[:, None] * H + i_h
        i_before = i_t - 1 + 2 * i_d
        o_before = _row(p_starts, i_before, T, i_b, B)
        o_y_before = o_before[:, None] * s_y + i_d * H + i_h
        m_before = ((i_before >= 0) & (i_before < b_length))[:, None] & m_h
        b_before = _load(p_cells, o_y_before, m_before, ACC)
        b_prev = tl.where(m_before, b_before, b_c0)
        b_hprev = tl.where(m_before, _load(p_y, o_y_before, m_before, ACC), b_h0)
        if p_reset is not None:
            m_anew = _starts_anew(p_reset, p_starts, i_t, i_d, T, i_b, B, b_length)[:, None]
            b_prev = tl.where(m_anew, 0.0, b_prev)
            b_hprev = tl.where(m_anew, 0.0, b_hprev)
        _store(p_fed, o_fed, b_hprev, m_now)
        b_dnow = b_dh
        if p_dy is not None:
            b_dnow += _load(p_dy, o_y, m_now, ACC)
        b_di, b_df, b_dg, b_do, b_dprev, _ = _lstm_backward(
            _load(p_saved, o_wide, m_now, ACC),
            _load(p_saved, o_wide + H, m_now, ACC),
            _load(p_saved, o_wide + 2 * H, m_now, ACC),
            _load(p_saved, o_wide + 3 * H, m_now, ACC),
            b_c,
            b_prev,
            b_dnow,
            b_dc,
            None,
            S,
            False,
            False,
        )
        b_di = tl.where(m_now, b_di, 0.0).to(S)
        b_df = tl.where(m_now, b_df, 0.0).to(S)
        b_dg = tl.where(m_now, b_dg, 0.0).to(S)
        b_do = tl.where(m_now, b_do, 0.0).to(S)
        _store(p_dx, o_wide, b_di, m_now)
        _store(p_dx, o_wide + H, b_df, m_now)
        _store(p_dx, o_wide + 2 * H, b_dg, m_now)
        _store(p_dx, o_wide + 3 * H, b_do, m_now)
        b_d = tl.dot(b_di, b_wi, input_precision=PRECISION, out_dtype=ACC)
        b_d = tl.dot(b_df, b_wf, b_d, input_precision=PRECISION, out_dtype=ACC)
        b_d = tl.dot(b_dg, b_wg, b_d, input_precision=PRECISION, out_dtype=ACC)
        b_d = tl.dot(b_do, b_wo, b_d, input_precision=PRECISION, out_dtype=ACC)
        if p_reset is not None:
            b_d = tl.where(m_anew, 0.0, b_d)
            b_dprev = tl.where(m_anew, 0.0, b_dprev)
        b_dh = tl.where(m_now, b_d, b_dh)
        b_dc = tl.where(m_now, b_dprev, b_dc)
        b_c = b_before
        i_t = i_before
        o_row = o_before
        o_y = o_y_before
    _store(p_dh0, o_state, b_dh, m_state)
    _store(p_dc0, o_state, b_dc, m_state)


@triton.jit(do_not_specialize=_WALK)
def gru_forward_kernel(
    p_x,  # [directions, N, 3H] shares of x with all biases but b_hn
    p_w_hh,  # [directions, 3H, H]
    p_bias,  # [directions, H] b_hn, or None
    p_h0,
    p_c0,  # unused
    p_lengths,
    p_starts,
    p_reset,
    p_y,
    p_cells,  # unused
    p_h_n,
    p_c_n,  # unused
    p_saved,  # [directions, N, 4H] r, z, n and the share of h in n, or None
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = p_y.dtype.element_ty
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_d = tl.program_id(1)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    i_h = tl.arange(0, BH)[None, :]
    m_b = i_b < B
    m_h = i_h < H
    b_length, longest = _lengths(p_lengths, i_b, m_b, T)
    s_y = tl.num_programs(1) * H
    o_state = (i_d * B + i_b).to(tl.int64)[:, None] * H + i_h
    m_state = m_b[:, None] & m_h
    p_x += i_d.to(tl.int64) * N * (3 * H)
    p_w_hh += i_d * (3 * H) * H

    b_wr = _weight(p_w_hh, 0, H, True, BH)
    b_wz = _weight(p_w_hh, 1, H, True, BH)
    b_wn = _weight(p_w_hh, 2, H, True, BH)
    b_bias = _initial(p_bias, i_d * H + i_h, m_h, ACC)
    b_h = _initial(p_h0, o_state, m_state, S)

    i_t = i_d * (longest - 1)
    o_row = _row(p_starts, i_t, T, i_b, B)
    o_x = o_row[:, None] * (3 * H) + i_h
    m_x = ((i_t >= 0) & (i_t < b_length))[:, None] & m_h
    b_xr = _load(p_x, o_x, m_x, ACC)
    b_xz = _load(p_x, o_x + H, m_x, ACC)
    b_xn = _load(p_x, o_x + 2 * H, m_x, ACC)
    for _ in range(longest):
        m_now = (i_t < b_length)[:, None] & m_h
        o_y = o_row[:, None] * s_y + i_d * H + i_h
        o_saved = (i_d.to(tl.int64) * N + o_row)[:, None] * (4 * H) + i_h
        if p_reset is not None:
            m_anew = _starts_anew(p_reset, p_starts, i_t, i_d, T, i_b, B, b_length)[:, None]
            b_h = tl.where(m_anew, 0.0, b_h).to(S)
        b_r = tl.dot(b_h, b_wr, b_xr, input_precision=PRECISION, out_dtype=ACC)
        b_z = tl.dot(b_h, b_wz, b_xz, input_precision=PRECISION, out_dtype=ACC)
        b_hn = tl.dot(b_h, b_wn, input_precision=PRECISION, out_dtype=ACC) + b_bias
        b_n = b_xn

        i_t += 1 - 2 * i_d
        o_row = _row(p_starts, i_t, T, i_b, B)
        o_x = o_row[:, None] * (3 * H) + i_h
        m_x = ((i_t >= 0) & (i_t < b_length))[:, None] & m_h
        b_xr = _load(p_x, o_x, m_x, ACC)
        b_xz = _load(p_x, o_x + H, m_x, ACC)
        b_xn = _load(p_x, o_x + 2 * H, m_x, ACC)

        b_new, b_r, b_z, b_n = _gru_forward(b_r, b_z, b_n, b_hn, b_h.to(ACC), None, False)
        b_h = tl.where(m_now, b_new.to(S), b_h)
        _store(p_y, o_y, b_h, m_now)
        if p_saved is not None:
            _store(p_saved, o_saved, b_r, m_now)
            _store(p_saved, o_saved + H, b_z, m_now)
            _store(p_saved, o_saved + 2 * H, b_n, m_now)
            _store(p_saved, o_saved + 3 * H, b_hn, m_now)
    _store(p_h_n, o_state, b_h, m_state)


@triton.jit(do_not_specialize=_WALK)
def gru_backward_kernel(
    p_w_hh,
    p_h0,
    p_c0,  # unused
    p_lengths,
    p_starts,
    p_reset,
    p_y,
    p_cells,  # unused
    p_saved,
    p_dy,
    p_dh_n,
    p_dc_n,  # unused
    p_dx,  # [directions, N, 3H] gradients of the pre-activations, as x sees them
    p_dhn,  # [directions, N, H] that of n, as h sees it
    p_fed,
    p_dh0,
    p_dc0,  # unused
    T,
    B,
    N,
    H,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = p_y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if S == tl.float64 else tl.float32  # noqa: SIM300
    i_d = tl.program_id(1)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    i_h = tl.arange(0, BH)[None, :]
    m_b = i_b < B
    m_h = i_h < H
    b_length, longest = _lengths(p_lengths, i_b, m_b, T)
    s_y = tl.num_programs(1) * H
    o_state = (i_d * B + i_b).to(tl.int64)[:, None] * H + i_h
    m_state = m_b[:, None] & m_h
    p_w_hh += i_d * (3 * H) * H

    b_wr = _weight(p_w_hh, 0, H, False, BH)
    b_wz = _weight(p_w_hh, 1, H, False, BH)
    b_wn = _weight(p_w_hh, 2, H, False, BH)
    b_h0 = _initial(p_h0, o_state, m_state, ACC)
    b_dh = _initial(p_dh_n, o_state, m_state, ACC)

    i_t = (1 - i_d) * (longest - 1)
    o_row = _row(p_starts, i_t, T, i_b, B)
    for _ in range(longest):
        m_now = (i_t < b_length)[:, None] & m_h
        o_narrow = (i_d.to(tl.int64) * N + o_row)[:, None]
        i_before = i_t - 1 + 2 * i_d
        o_before = _row(p_starts, i_before, T, i_b, B)
        m_before = ((i_before >= 0) & (i_before < b_length))[:, None] & m_h
        b_hprev = tl.where(m_before, _load(p_y, o_before[:, None] * s_y + i_d * H + i_h, m_before, ACC), b_h0)
        if p_reset is not None:
            m_anew = _starts_anew(p_reset, p_starts, i_t, i_d, T, i_b, B, b_length)[:, None]
            b_hprev = tl.where(m_anew, 0.0, b_hprev)
        _store(p_fed, o_narrow * H + i_h, b_hprev, m_now)
        b_dnow = b_dh
        if p_dy is not None:
            b_dnow += _load(p_dy, o_row[:, None] * s_y + i_d * H + i_h, m_now, ACC)
        o_saved = o_narrow * (4 * H) + i_h
        b_dr, b_dz, b_dn, b_dhn, b_direct = _gru_backward(
            _load(p_saved, o_saved, m_now, ACC),
            _load(p_saved, o_saved + H, m_now, ACC),
            _load(p_saved, o_saved + 2 * H, m_now, ACC),
            _load(p_saved, o_saved + 3 * H, m_now, ACC),
            b_hprev,
            b_dnow,
            None,
            False,
        )
        b_dr = tl.where(m_now, b_dr, 0.0).to(S)
        b_dz = tl.where(m_now, b_dz, 0.0).to(S)
        b_dhn = tl.where(m_now, b_dhn, 0.0).to(S)
        o_dx = o_narrow * (3 * H) + i_h
        _store(p_dx, o_dx, b_dr, m_now)
        _store(p_dx, o_dx + H, b_dz, m_now)
        _store(p_dx, o_dx + 2 * H, b_dn, m_now)
        _store(p_dhn, o_narrow * H + i_h, b_dhn, m_now)
        b_d = tl.dot(b_dr, b_wr, b_direct, input_precision=PRECISION, out_dtype=ACC)
        b_d = tl.dot(b_dz, b_wz, b_d, input_precision=PRECISION, out_dtype=ACC)
        b_d = tl.dot(b_dhn, b_wn, b_d, input_precision=PRECISION, out_dtype=ACC)
        if p_reset is not None:
            b_d = tl.where(m_anew, 0.0, b_d)
        b_dh = tl.where(m_now, b_d, b_dh)
        i_t = i_before
        o_row = o_before
    _store(p_dh0, o_state, b_dh, m_state)


@triton.jit(do_not_specialize=_WALK)
def rnn_forward_kernel(
    p_x,  # [directions, N, H] shares of x with all biases
    p_w_hh,  # [directions, H, H]
    p_bias,  # unused
    p_h0,
    p_c0,  # unused
    p_lengths,
    p_starts,
    p_reset,
    p_y,
    p_cells,  # unused
    p_h_n,
    p_c_n,  # unused
    p_saved,  # unused: y tells all
    T,
    B,
    N,
    H,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = p_y.dtype.element_ty
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_d = tl.program_id(1)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    i_h = tl.arange(0, BH)[None, :]
    m_b = i_b < B
    m_h = i_h < H
    b_length, longest = _lengths(p_lengths, i_b, m_b, T)
    s_y = tl.num_programs(1) * H
    o_state = (i_d * B + i_b).to(tl.int64)[:, None] * H + i_h
    m_state = m_b[:, None] & m_h
    p_x += i_d.to(tl.int64) * N * H

    b_w = _weight(p_w_hh + i_d * H * H, 0, H, True, BH)
    b_h = _initial(p_h0, o_state, m_state, S)

    i_t = i_d * (longest - 1)
    o_row = _row(p_starts, i_t, T, i_b, B)
    m_x = ((i_t >= 0) & (i_t < b_length))[:, None] & m_h
    b_x = _load(p_x, o_row[:, None] * H + i_h, m_x, ACC)
    for _ in range(longest):
        m_now = (i_t < b_length)[:, None] & m_h
        o_y = o_row[:, None] * s_y + i_d * H + i_h
        if p_reset is not None:
            m_anew = _starts_anew(p_reset, p_starts, i_t, i_d, T, i_b, B, b_length)[:, None]
            b_h = tl.where(m_anew, 0.0, b_h).to(S)
        b_new = tl.dot(b_h, b_w, b_x, input_precision=PRECISION, out_dtype=ACC)

        i_t += 1 - 2 * i_d
        o_row = _row(p_starts, i_t, T, i_b, B)
        m_x = ((i_t >= 0) & (i_t < b_length))[:, None] & m_h
        b_x = _load(p_x, o_row[:, None] * H + i_h, m_x, ACC)

        b_new = _relu(b_new) if RELU else _tanh(b_new)
        b_h = tl.where(m_now, b_new.to(S), b_h)
        _store(p_y, o_y, b_h, m_now)
    _store(p_h_n, o_state, b_h, m_state)


@triton.jit(do_not_specialize=_WALK)
def rnn_backward_kernel(
    p_w_hh,
    p_h0,
    p_c0,  # unused
    p_lengths,
    p_starts,
    p_reset,
    p_y,
    p_cells,  # unused
    p_saved,  # unused
    p_dy,
    p_dh_n,
    p_dc_n,  # unused
    p_dx,  # [directions, N, H]
    p_dhn,  # unused
    p_fed,
    p_dh0,
    p_dc0,  # unused
    T,
    B,
    N,
    H,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BH: tl.constexpr,
):
    S: tl.constexpr = p_y.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if S == tl.float64 else tl.float32  # noqa: SIM300
    i_d = tl.program_id(1)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    i_h = tl.arange(0, BH)[None, :]
    m_b = i_b < B
    m_h = i_h < H
    b_length, longest = _lengths(p_lengths, i_b, m_b, T)
    s_y = tl.num_programs(1) * H
    o_state = (i_d * B + i_b).to(tl.int64)[:, None] * H + i_h
    m_state = m_b[:, None] & m_h

    b_w = _weight(p_w_hh + i_d * H * H, 0, H, False, BH)
    b_h0 = _initial(p_h0, o_state, m_state, ACC)
    b_dh = _initial(p_dh_n, o_state, m_state, ACC)

    i_t = (1 - i_d) * (longest - 1)
    o_row = _row(p_starts, i_t, T, i_b, B)
    m_y = ((i_t >= 0) & (i_t < b_length))[:, None] & m_h
    b_h = _load(p_y, o_row[:, None] * s_y + i_d * H + i_h, m_y, ACC)
    for _ in range(longest):
        m_now = (i_t < b_length)[:, None] & m_h
        o_narrow = (i_d.to(tl.int64) * N + o_row)[:, None] * H + i_h
        i_before = i_t - 1 + 2 * i_d
        o_before = _row(p_starts, i_before, T, i_b, B)
        m_before = ((i_before >= 0) & (i_before < b_length))[:, None] & m_h
        b_before = _load(p_y, o_before[:, None] * s_y + i_d * H + i_h, m_before, ACC)
        b_hprev = tl.where(m_before, b_before, b_h0)
        if p_reset is not None:
            m_anew = _starts_anew(p_reset, p_starts, i_t, i_d, T, i_b, B, b_length)[:, None]
            b_hprev = tl.where(m_anew, 0.0, b_hprev)
        _store(p_fed, o_narrow, b_hprev, m_now)
        b_dnow = b_dh
        if p_dy is not None:
            b_dnow += _load(p_dy, o_row[:, None] * s_y + i_d * H + i_h, m_now, ACC)
        b_dx = tl.where(b_h > 0, b_dnow, 0.0) if RELU else b_dnow * (1.0 - b_h * b_h)
        b_dx = tl.where(m_now, b_dx, 0.0).to(S)
        _store(p_dx, o_narrow, b_dx, m_now)
        b_d = tl.dot(b_dx, b_w, input_precision=PRECISION, out_dtype=ACC)
        if p_reset is not None:
            b_d = tl.where(m_anew, 0.0, b_d)
        b_dh = tl.where(m_now, b_d, b_dh)
        b_h = b_before
        i_t = i_before
        o_row = o_before
    _store(p_dh0, o_state, b_dh, m_state)


# ---- fused cells: one step of one direction, all that is not a matrix product
#
# Grid: (sequences that have the step, units / BU). Arrays of rows are whole; `row` is where the step begins in them. A
# step after the one at hand (t_, row_ and n_, its number of sequences) may not exist: then n_ is 0. Where there are
# lengths, what is not written is zero already.

_STEP = ["t", "row", "t_reset", "row_reset", "n_reset", "row_saved"]
_STEP_BACK = [*_STEP[:-1], "t_before", "row_before", "n_before", "t_closed", "row_closed", "n_closed"]


@triton.jit
def _flag(p_reset, p_lengths, i_b, t, row, n):
    """Whether sequence i_b has a reset at step t."""
    flag = tl.load(p_reset + row + i_b, mask=_has(p_lengths, i_b, t, n), other=0)
    return flag != 0


@triton.jit
def _has(p_lengths, i_b, t, n):
    """Whether sequence i_b has step t, which n sequences may have."""
    has = i_b < n
    if p_lengths is not None:
        has = has & (t < tl.load(p_lengths + i_b))
    return has


@triton.jit
def _options(
    p_peephole, p_zone_h, p_zone_c, p_keep, p_numbers, o_mask, i_h, m, H, COUPLED: tl.constexpr, ACC: tl.constexpr
):
    """e, neutral where an option is off."""
    gate_clip = tl.load(p_numbers)
    cell_clip = tl.load(p_numbers + 1)
    peephole_i = 0.0
    peephole_f = 0.0
    peephole_o = 0.0
    if p_peephole is not None:
        peephole_i = _load(p_peephole, i_h, m, ACC)
        if COUPLED:
            peephole_o = _load(p_peephole, H + i_h, m, ACC)
        else:
            peephole_f = _load(p_peephole, H + i_h, m, ACC)
            peephole_o = _load(p_peephole, 2 * H + i_h, m, ACC)
    zone_h = tl.load(p_numbers + 2)
    if p_zone_h is not None:
        zone_h = _load(p_zone_h, o_mask, m, ACC)
    zone_c = tl.load(p_numbers + 3)
    if p_zone_c is not None:
        zone_c = _load(p_zone_c, o_mask, m, ACC)
    keep = 1.0
    if p_keep is not None:
        keep = _load(p_keep, o_mask, m, ACC) * tl.load(p_numbers + 4)
    return peephole_i, peephole_f, peephole_o, keep, zone_h, zone_c, gate_clip, cell_clip


@triton.jit(do_not_specialize=_STEP)
def lstm_cell_forward_kernel(
    p_x,  # [N, G * H] shares of x with all biases, in the type that is computed in
    p_product,  # [B, G * H] shares of h
    p_h,  # [B, H] states, which move on, as p_c
    p_c,
    p_y,  # [N, ..] row stride s_y, this direction's units from `first` on, as p_cells and the masks
    p_cells,
    p_saved,  # [N, G * H] gates, or None
    p_lengths,  # [B] or None
    p_reset,  # uint8 [N] or None
    p_peephole,  # [(G - 1) * H] or None
    p_zone_h,  # uint8 [N, ..] or None, as p_zone_c and p_keep
    p_zone_c,
    p_keep,
    p_numbers,  # [5] gate_clip, cell_clip, the shares of the old h and c that stay, the factor of a kept candidate
    t,
    row,
    t_reset,  # the step whose reset says that this one starts from zeros
    row_reset,
    n_reset,
    row_saved,
    H,
    s_y,
    first,
    COUPLED: tl.constexpr,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    S: tl.constexpr = p_y.dtype.element_ty
    ACC: tl.constexpr = p_x.dtype.element_ty
    G: tl.constexpr = 3 if COUPLED else 4
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & _has(p_lengths, i_b, t, i_b + 1)
    o_x = (row + i_b) * (G * H) + i_h
    o_product = i_b * (G * H) + i_h
    o_y = (row + i_b) * s_y + first + i_h
    o_state = i_b * H + i_h

    b_i = _load(p_product, o_product, m, ACC)
    b_g = _load(p_product, o_product + (G - 2) * H, m, ACC)
    b_o = _load(p_product, o_product + (G - 1) * H, m, ACC)
    b_f = b_i
    if not COUPLED:
        b_f = _load(p_product, o_product + H, m, ACC)
    b_h = _load(p_h, o_state, m, ACC)
    b_c = _load(p_c, o_state, m, ACC)
    if p_reset is not None:
        anew = _flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset)
        b_i = tl.where(anew, 0.0, b_i)
        b_f = tl.where(anew, 0.0, b_f)
        b_g = tl.where(anew, 0.0, b_g)
        b_o = tl.where(anew, 0.0, b_o)
        b_h = tl.where(anew, 0.0, b_h)
        b_c = tl.where(anew, 0.0, b_c)
    b_i += _load(p_x, o_x, m, ACC)
    b_g += _load(p_x, o_x + (G - 2) * H, m, ACC)
    b_o += _load(p_x, o_x + (G - 1) * H, m, ACC)
    if not COUPLED:
        b_f += _load(p_x, o_x + H, m, ACC)
    if OPTIONS:
        e = _options(p_peephole, p_zone_h, p_zone_c, p_keep, p_numbers, o_y, i_h, m, H, COUPLED, ACC)
        b_new, b_c, b_i, b_f, b_g, b_o = _lstm_forward(b_i, b_f, b_g, b_o, b_c, e, S, COUPLED, True)
        b_h = b_new + e[4] * (b_h - b_new)
    else:
        b_h, b_c, b_i, b_f, b_g, b_o = _lstm_forward(b_i, b_f, b_g, b_o, b_c, None, S, COUPLED, False)
    _store(p_h, o_state, b_h, m)
    _store(p_c, o_state, b_c, m)
    _store(p_y, o_y, b_h, m)
    _store(p_cells, o_y, b_c, m)
    if p_saved is not None:
        o_saved = (row_saved + i_b) * (G * H) + i_h
        _store(p_saved, o_saved, b_i, m)
        _store(p_saved, o_saved + (G - 2) * H, b_g, m)
        _store(p_saved, o_saved + (G - 1) * H, b_o, m)
        if not COUPLED:
            _store(p_saved, o_saved + H, b_f, m)


@triton.jit
def _arriving(
    p_dy, p_product, p_direct, p_variational, p_reset, p_lengths, closed, i_b, o_y, o_state, m, m_h, ACC: tl.constexpr
):
    """Gradient of this step's h. A sequence without this step keeps in p_direct what came from later ones."""
    b_product = _load(p_product, o_state, m_h, ACC)
    if p_reset is not None:
        b_product = tl.where(_flag(p_reset, p_lengths, i_b, closed[0], closed[1], closed[2]), 0.0, b_product)
    if p_variational is not None:
        b_product *= _load(p_variational, o_state, m_h, ACC)
    b_dh = _load(p_direct, o_state, m_h, ACC) + b_product
    _store(p_direct, o_state, b_dh, m_h)
    if p_dy is not None:
        b_dh += _load(p_dy, o_y, m, ACC)
    return b_dh


@triton.jit
def _before(p_rows, p_states0, p_reset, p_lengths, reset, before, i_b, o_before, o_state, m, ACC: tl.constexpr):
    """A state before this step."""
    m_before = m & _has(p_lengths, i_b, before[0], before[1])
    b_state = _load(p_rows, o_before, m_before, ACC)
    if p_states0 is not None:
        b_state = tl.where(m_before, b_state, _load(p_states0, o_state, m, ACC))
    if p_reset is not None:
        b_state = tl.where(_flag(p_reset, p_lengths, i_b, reset[0], reset[1], reset[2]), 0.0, b_state)
    return b_state


@triton.jit(do_not_specialize=_STEP_BACK)
def lstm_cell_backward_kernel(
    p_h0,  # [B, H] or None, as p_c0
    p_c0,
    p_y,
    p_cells,
    p_saved,
    p_lengths,
    p_reset,
    p_peephole,
    p_zone_h,
    p_zone_c,
    p_keep,
    p_numbers,
    p_variational,  # [B, H] factors of h in the products, or None
    p_dy,  # as y, or None, as p_dcells
    p_dcells,
    p_product,  # [B, H] gradient of h by way of the next step's products
    p_direct,  # [B, H] and by other ways; it and p_dc move on
    p_dc,
    p_dx,  # [N, G * H]
    p_fed,  # [N, H] the h that the products saw
    p_dpeephole,  # [N, (G - 1) * H] what each row adds to that gradient, or None
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_closed,  # the step whose reset says that no state passed from this step to the next of the walk
    row_closed,
    n_closed,
    H,
    s_y,
    first,
    COUPLED: tl.constexpr,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    S: tl.constexpr = p_y.dtype.element_ty
    ACC: tl.constexpr = p_product.dtype.element_ty
    G: tl.constexpr = 3 if COUPLED else 4
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & _has(p_lengths, i_b, t, i_b + 1)
    o_y = (row + i_b) * s_y + first + i_h
    o_before = (row_before + i_b) * s_y + first + i_h
    o_state = i_b * H + i_h
    o_x = (row + i_b) * (G * H) + i_h
    closed = (t_closed, row_closed, n_closed)
    reset = (t_reset, row_reset, n_reset)
    before = (t_before, n_before)

    b_dh = _arriving(
        p_dy, p_product, p_direct, p_variational, p_reset, p_lengths, closed, i_b, o_y, o_state, m, m_h, ACC
    )
    b_hprev = _before(p_y, p_h0, p_reset, p_lengths, reset, before, i_b, o_before, o_state, m, ACC)
    b_cprev = _before(p_cells, p_c0, p_reset, p_lengths, reset, before, i_b, o_before, o_state, m, ACC)
    b_dc = _load(p_dc, o_state, m, ACC)
    if p_dcells is not None:
        b_dc += _load(p_dcells, o_y, m, ACC)
    b_i = _load(p_saved, o_x, m, ACC)
    b_g = _load(p_saved, o_x + (G - 2) * H, m, ACC)
    b_o = _load(p_saved, o_x + (G - 1) * H, m, ACC)
    b_f = b_i
    if not COUPLED:
        b_f = _load(p_saved, o_x + H, m, ACC)
    b_c = _load(p_cells, o_y, m, ACC)
    b_direct = tl.zeros([BU], ACC)
    if OPTIONS:
        e = _options(p_peephole, p_zone_h, p_zone_c, p_keep, p_numbers, o_y, i_h, m, H, COUPLED, ACC)
        b_direct += b_dh * e[4]
        b_dh -= b_direct
        b_di, b_df, b_dg, b_do, b_dc, b_now = _lstm_backward(
            b_i, b_f, b_g, b_o, b_c, b_cprev, b_dh, b_dc, e, S, COUPLED, True
        )
    else:
        b_di, b_df, b_dg, b_do, b_dc, b_now = _lstm_backward(
            b_i, b_f, b_g, b_o, b_c, b_cprev, b_dh, b_dc, None, S, COUPLED, False
        )
    _store(p_dx, o_x, b_di, m)
    _store(p_dx, o_x + (G - 2) * H, b_dg, m)
    _store(p_dx, o_x + (G - 1) * H, b_do, m)
    if not COUPLED:
        _store(p_dx, o_x + H, b_df, m)
    if p_dpeephole is not None:
        o_peephole = (row + i_b) * ((G - 1) * H) + i_h
        _store(p_dpeephole, o_peephole, b_di * b_cprev, m)
        _store(p_dpeephole, o_peephole + (G - 2) * H, b_do * b_now, m)
        if not COUPLED:
            _store(p_dpeephole, o_peephole + H, b_df * b_cprev, m)
    if p_reset is not None:
        anew = _flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset)
        b_dc = tl.where(anew, 0.0, b_dc)
        b_direct = tl.where(anew, 0.0, b_direct)
    _store(p_dc, o_state, b_dc, m)
    _store(p_direct, o_state, b_direct, m)
    if p_variational is not None:
        b_hprev *= _load(p_variational, o_state, m, ACC)
    _store(p_fed, (row + i_b) * H + i_h, b_hprev, m)


@triton.jit(do_not_specialize=_STEP)
def gru_cell_forward_kernel(
    p_x,  # [N, 3H] shares of x with all biases but b_hn
    p_product,  # [B, 3H]
    p_bias,  # [H] b_hn, or None
    p_h,
    p_y,
    p_saved,  # [N, 4H] r, z, n and the share of h in n, or None
    p_lengths,
    p_reset,
    p_zone_h,
    p_keep,
    p_numbers,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    s_y,
    first,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & _has(p_lengths, i_b, t, i_b + 1)
    o_x = (row + i_b) * (3 * H) + i_h
    o_product = i_b * (3 * H) + i_h
    o_y = (row + i_b) * s_y + first + i_h
    o_state = i_b * H + i_h

    b_r = _load(p_product, o_product, m, ACC)
    b_z = _load(p_product, o_product + H, m, ACC)
    b_hn = _load(p_product, o_product + 2 * H, m, ACC)
    b_h = _load(p_h, o_state, m, ACC)
    if p_reset is not None:
        anew = _flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset)
        b_r = tl.where(anew, 0.0, b_r)
        b_z = tl.where(anew, 0.0, b_z)
        b_hn = tl.where(anew, 0.0, b_hn)
        b_h = tl.where(anew, 0.0, b_h)
    if p_bias is not None:
        b_hn += _load(p_bias, i_h, m, ACC)
    b_r += _load(p_x, o_x, m, ACC)
    b_z += _load(p_x, o_x + H, m, ACC)
    b_n = _load(p_x, o_x + 2 * H, m, ACC)
    if OPTIONS:
        e = _options(None, p_zone_h, None, p_keep, p_numbers, o_y, i_h, m, H, False, ACC)
        b_new, b_r, b_z, b_n = _gru_forward(b_r, b_z, b_n, b_hn, b_h, e, True)
        b_h = b_new + e[4] * (b_h - b_new)
    else:
        b_h, b_r, b_z, b_n = _gru_forward(b_r, b_z, b_n, b_hn, b_h, None, False)
    _store(p_h, o_state, b_h, m)
    _store(p_y, o_y, b_h, m)
    if p_saved is not None:
        o_saved = (row_saved + i_b) * (4 * H) + i_h
        _store(p_saved, o_saved, b_r, m)
        _store(p_saved, o_saved + H, b_z, m)
        _store(p_saved, o_saved + 2 * H, b_n, m)
        _store(p_saved, o_saved + 3 * H, b_hn, m)


@triton.jit(do_not_specialize=_STEP_BACK)
def gru_cell_backward_kernel(
    p_h0,
    p_y,
    p_saved,
    p_lengths,
    p_reset,
    p_zone_h,
    p_keep,
    p_numbers,
    p_variational,
    p_dy,
    p_product,
    p_direct,
    p_dx,  # [N, 3H] as x sees them
    p_dhn,  # [N, H] that of n, as h sees it
    p_fed,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_closed,
    row_closed,
    n_closed,
    H,
    s_y,
    first,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_product.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & _has(p_lengths, i_b, t, i_b + 1)
    o_y = (row + i_b) * s_y + first + i_h
    o_before = (row_before + i_b) * s_y + first + i_h
    o_state = i_b * H + i_h
    closed = (t_closed, row_closed, n_closed)
    reset = (t_reset, row_reset, n_reset)
    before = (t_before, n_before)

    b_dh = _arriving(
        p_dy, p_product, p_direct, p_variational, p_reset, p_lengths, closed, i_b, o_y, o_state, m, m_h, ACC
    )
    b_hprev = _before(p_y, p_h0, p_reset, p_lengths, reset, before, i_b, o_before, o_state, m, ACC)
    o_saved = (row + i_b) * (4 * H) + i_h
    b_r = _load(p_saved, o_saved, m, ACC)
    b_z = _load(p_saved, o_saved + H, m, ACC)
    b_n = _load(p_saved, o_saved + 2 * H, m, ACC)
    b_hn = _load(p_saved, o_saved + 3 * H, m, ACC)
    if OPTIONS:
        e = _options(None, p_zone_h, None, p_keep, p_numbers, o_y, i_h, m, H, False, ACC)
        b_stays = b_dh * e[4]
        b_dr, b_dz, b_dn, b_dhn, b_direct = _gru_backward(b_r, b_z, b_n, b_hn, b_hprev, b_dh - b_stays, e, True)
        b_direct += b_stays
    else:
        b_dr, b_dz, b_dn, b_dhn, b_direct = _gru_backward(b_r, b_z, b_n, b_hn, b_hprev, b_dh, None, False)
    o_x = (row + i_b) * (3 * H) + i_h
    _store(p_dx, o_x, b_dr, m)
    _store(p_dx, o_x + H, b_dz, m)
    _store(p_dx, o_x + 2 * H, b_dn, m)
    _store(p_dhn, (row + i_b) * H + i_h, b_dhn, m)
    if p_reset is not None:
        b_direct = tl.where(_flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset), 0.0, b_direct)
    _store(p_direct, o_state, b_direct, m)
    if p_variational is not None:
        b_hprev *= _load(p_variational, o_state, m, ACC)
    _store(p_fed, (row + i_b) * H + i_h, b_hprev, m)


@triton.jit(do_not_specialize=_STEP)
def gru_before_cell_gates_kernel(
    p_x,  # [N, 3H] shares of x with all biases
    p_product,  # [B, 2H] shares of h in r and z
    p_h,
    p_q,  # [B, H] r times h, for the product of n
    p_saved,  # [.., 3H] r and z, of which z is read again
    p_lengths,
    p_reset,
    p_variational,
    p_numbers,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & _has(p_lengths, i_b, t, i_b + 1)
    o_x = (row + i_b) * (3 * H) + i_h
    o_product = i_b * (2 * H) + i_h
    o_saved = (row_saved + i_b) * (3 * H) + i_h
    b_r = _load(p_product, o_product, m, ACC)
    b_z = _load(p_product, o_product + H, m, ACC)
    b_h = _load(p_h, i_b * H + i_h, m, ACC)
    if p_variational is not None:
        b_h *= _load(p_variational, i_b * H + i_h, m, ACC)
    if p_reset is not None:
        anew = _flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset)
        b_r = tl.where(anew, 0.0, b_r)
        b_z = tl.where(anew, 0.0, b_z)
        b_h = tl.where(anew, 0.0, b_h)
    b_r += _load(p_x, o_x, m, ACC)
    b_z += _load(p_x, o_x + H, m, ACC)
    gate_clip = 0.0
    if OPTIONS:
        gate_clip = tl.load(p_numbers)
    b_r, b_kept = _activate(b_r, gate_clip, False, OPTIONS)
    _store(p_saved, o_saved, b_kept, m)
    b_z, b_kept = _activate(b_z, gate_clip, False, OPTIONS)
    _store(p_saved, o_saved + H, b_kept, m)
    _store(p_q, i_b * H + i_h, b_r * b_h, i_h < H)


@triton.jit(do_not_specialize=_STEP)
def gru_before_cell_forward_kernel(
    p_x,
    p_product,  # [B, H] share of r times h in n
    p_h,
    p_y,
    p_saved,  # [.., 3H] n joins r and z
    p_lengths,
    p_reset,
    p_zone_h,
    p_keep,
    p_numbers,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    s_y,
    first,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & _has(p_lengths, i_b, t, i_b + 1)
    o_y = (row + i_b) * s_y + first + i_h
    o_state = i_b * H + i_h
    o_saved = (row_saved + i_b) * (3 * H) + i_h
    b_n = _load(p_product, o_state, m, ACC) + _load(p_x, (row + i_b) * (3 * H) + 2 * H + i_h, m, ACC)
    b_z = _load(p_saved, o_saved + H, m, ACC)
    b_h = _load(p_h, o_state, m, ACC)
    if p_reset is not None:
        b_h = tl.where(_flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset), 0.0, b_h)
    if OPTIONS:
        e = _options(None, p_zone_h, None, p_keep, p_numbers, o_y, i_h, m, H, False, ACC)
        b_z, _ = _reopen(b_z, e[6], False, True)
        b_n, b_kept = _activate(b_n, e[6], True, True)
        b_n *= e[3]
        b_new = b_n + b_z * (b_h - b_n)
        b_h = b_new + e[4] * (b_h - b_new)
    else:
        b_n, b_kept = _activate(b_n, None, True, False)
        b_h = b_n + b_z * (b_h - b_n)
    _store(p_saved, o_saved + 2 * H, b_kept, m)
    _store(p_h, o_state, b_h, m)
    _store(p_y, o_y, b_h, m)


@triton.jit(do_not_specialize=_STEP_BACK)
def gru_before_cell_backward_kernel(
    p_h0,
    p_y,
    p_saved,
    p_lengths,
    p_reset,
    p_zone_h,
    p_keep,
    p_numbers,
    p_variational,
    p_dy,
    p_product,
    p_direct,
    p_dx,  # [N, 3H]: z and n
    p_fed,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_closed,
    row_closed,
    n_closed,
    H,
    s_y,
    first,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_product.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & _has(p_lengths, i_b, t, i_b + 1)
    o_y = (row + i_b) * s_y + first + i_h
    o_before = (row_before + i_b) * s_y + first + i_h
    o_state = i_b * H + i_h
    closed = (t_closed, row_closed, n_closed)
    reset = (t_reset, row_reset, n_reset)
    before = (t_before, n_before)

    b_dh = _arriving(
        p_dy, p_product, p_direct, p_variational, p_reset, p_lengths, closed, i_b, o_y, o_state, m, m_h, ACC
    )
    b_hprev = _before(p_y, p_h0, p_reset, p_lengths, reset, before, i_b, o_before, o_state, m, ACC)
    o_x = (row + i_b) * (3 * H) + i_h
    b_z = _load(p_saved, o_x + H, m, ACC)
    b_n = _load(p_saved, o_x + 2 * H, m, ACC)
    if OPTIONS:
        e = _options(None, p_zone_h, None, p_keep, p_numbers, o_y, i_h, m, H, False, ACC)
        b_direct = b_dh * e[4]
        b_dh -= b_direct
        b_z, b_slope_z = _reopen(b_z, e[6], False, True)
        b_n, b_slope_n = _reopen(b_n, e[6], True, True)
        b_n *= e[3]
        b_slope_n *= e[3]
        b_direct += b_dh * b_z
    else:
        b_z, b_slope_z = _reopen(b_z, None, False, False)
        b_n, b_slope_n = _reopen(b_n, None, True, False)
        b_direct = b_dh * b_z
    _store(p_dx, o_x + H, b_dh * (b_hprev - b_n) * b_slope_z, m)
    _store(p_dx, o_x + 2 * H, b_dh * (1.0 - b_z) * b_slope_n, m)
    if p_reset is not None:
        b_direct = tl.where(_flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset), 0.0, b_direct)
    _store(p_direct, o_state, b_direct, m)
    if p_variational is not None:
        b_hprev *= _load(p_variational, o_state, m, ACC)
    _store(p_fed, (row + i_b) * H + i_h, b_hprev, m)


@triton.jit(do_not_specialize=_STEP_BACK)
def gru_before_cell_gates_backward_kernel(
    p_saved,
    p_lengths,
    p_reset,
    p_numbers,
    p_variational,
    p_dq,  # [B, H] gradient of r times h
    p_direct,
    p_fed,
    p_dx,  # [N, 3H]: r
    p_q,  # [N, H] r times h, which the product of n saw
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    H,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_dq.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & _has(p_lengths, i_b, t, i_b + 1)
    o_state = i_b * H + i_h
    o_x = (row + i_b) * (3 * H) + i_h
    b_dq = _load(p_dq, o_state, m, ACC)
    b_fed = _load(p_fed, (row + i_b) * H + i_h, m, ACC)
    gate_clip = 0.0
    if OPTIONS:
        gate_clip = tl.load(p_numbers)
    b_r, b_slope = _reopen(_load(p_saved, o_x, m, ACC), gate_clip, False, OPTIONS)
    _store(p_dx, o_x, b_dq * b_fed * b_slope, m)
    _store(p_q, (row + i_b) * H + i_h, b_r * b_fed, m)
    b_dq *= b_r
    if p_variational is not None:
        b_dq *= _load(p_variational, o_state, m, ACC)
    if p_reset is not None:
        b_dq = tl.where(_flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset), 0.0, b_dq)
    _store(p_direct, o_state, _load(p_direct, o_state, m, ACC) + b_dq, m)


@triton.jit(do_not_specialize=_STEP)
def rnn_cell_forward_kernel(
    p_x,  # [N, H] shares of x with all biases
    p_product,
    p_h,
    p_y,
    p_saved,  # [N, H] what tells the slope, or None: y does
    p_lengths,
    p_reset,
    p_zone_h,
    p_numbers,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    row_saved,
    H,
    s_y,
    first,
    RELU: tl.constexpr,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_x.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m = (i_h < H) & _has(p_lengths, i_b, t, i_b + 1)
    o_y = (row + i_b) * s_y + first + i_h
    o_state = i_b * H + i_h
    b_new = _load(p_product, o_state, m, ACC)
    if p_reset is not None:
        b_new = tl.where(_flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset), 0.0, b_new)
    b_new += _load(p_x, (row + i_b) * H + i_h, m, ACC)
    if OPTIONS:
        e = _options(None, p_zone_h, None, None, p_numbers, o_y, i_h, m, H, False, ACC)
        b_h = _load(p_h, o_state, m, ACC)
        if p_reset is not None:
            b_h = tl.where(_flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset), 0.0, b_h)
        at_limit = tl.abs(b_new) >= e[6]
        b_new = _limited(b_new, e[6])
        b_new = _relu(b_new) if RELU else _tanh(b_new)
        if p_saved is not None:  # a slope of 0 is that of 0 for relu, and of 1 for tanh
            b_kept = tl.where(at_limit, 0.0 if RELU else 1.0, b_new)
            _store(p_saved, (row_saved + i_b) * H + i_h, b_kept, m)
        b_new = b_new + e[4] * (b_h - b_new)
    else:
        b_new = _relu(b_new) if RELU else _tanh(b_new)
    _store(p_h, o_state, b_new, m)
    _store(p_y, o_y, b_new, m)


@triton.jit(do_not_specialize=_STEP_BACK)
def rnn_cell_backward_kernel(
    p_h0,
    p_y,
    p_saved,
    p_lengths,
    p_reset,
    p_zone_h,
    p_numbers,
    p_variational,
    p_dy,
    p_product,
    p_direct,
    p_dx,
    p_fed,
    t,
    row,
    t_reset,
    row_reset,
    n_reset,
    t_before,
    row_before,
    n_before,
    t_closed,
    row_closed,
    n_closed,
    H,
    s_y,
    first,
    RELU: tl.constexpr,
    OPTIONS: tl.constexpr,
    BU: tl.constexpr,
):
    ACC: tl.constexpr = p_product.dtype.element_ty
    i_b = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BU + tl.arange(0, BU)
    m_h = i_h < H
    m = m_h & _has(p_lengths, i_b, t, i_b + 1)
    o_y = (row + i_b) * s_y + first + i_h
    o_before = (row_before + i_b) * s_y + first + i_h
    o_state = i_b * H + i_h
    closed = (t_closed, row_closed, n_closed)
    reset = (t_reset, row_reset, n_reset)
    before = (t_before, n_before)

    b_dh = _arriving(
        p_dy, p_product, p_direct, p_variational, p_reset, p_lengths, closed, i_b, o_y, o_state, m, m_h, ACC
    )
    b_hprev = _before(p_y, p_h0, p_reset, p_lengths, reset, before, i_b, o_before, o_state, m, ACC)
    b_direct = tl.zeros([BU], ACC)
    if OPTIONS:
        e = _options(None, p_zone_h, None, None, p_numbers, o_y, i_h, m, H, False, ACC)
        b_h = _load(p_saved, (row + i_b) * H + i_h, m, ACC)
        b_direct += b_dh * e[4]
        b_dh -= b_direct
    else:
        b_h = _load(p_y, o_y, m, ACC)
    b_dx = tl.where(b_h > 0, b_dh, 0.0) if RELU else b_dh * (1.0 - b_h * b_h)
    _store(p_dx, (row + i_b) * H + i_h, b_dx, m)
    if p_reset is not None:
        b_direct = tl.where(_flag(p_reset, p_lengths, i_b, t_reset, row_reset, n_reset), 0.0, b_direct)
    _store(p_direct, o_state, b_direct, m)
    if p_variational is not None:
        b_hprev *= _load(p_variational, o_state, m, ACC)
    _store(p_fed, (row + i_b) * H + i_h, b_hprev, m)


# ---- launching


MOST_REGISTERS = 255  # of a thread; said aloud, else ptxas spills some to let more programs in


class Config(NamedTuple):
    """How a recurrence kernel is launched."""

    BB: int  # sequences of a program
    BH: int  # units, a power of two
    num_warps: int
    maxnreg: int = MOST_REGISTERS


LARGEST = 128  # units of a recurrence kernel
BU = 128  # units of a program of a fused cell: 4 per lane of its one warp
PRECISION = "tf32x3"  # of products of float32: three products of tf32, which together keep its bits
SMALLEST = 16  # what a matrix product takes


def config(kind_name: str, dtype: torch.dtype, H: int, shared: int) -> Config | None:
    """None where the kind has no recurrence kernel or W_hh does not fit in so many bytes of shared memory: such layers
    run step by step."""
    BH = max(triton.next_power_of_2(H), SMALLEST)
    if kind_name not in GATES or BH > LARGEST or needed(kind_name, dtype, BH) > shared:
        return None
    return Config(16, BH, 4 if BH <= 32 else 8)


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # of the kinds that have recurrence kernels


def needed(kind_name: str, dtype: torch.dtype, BH: int) -> int:
    """Bytes of shared memory, or somewhat more: W_hh, of float32 as what tf32 keeps of it and the rest, and tiles of h
    and of gates on their way into products."""
    parts, gates = 2 if dtype == torch.float32 else 1, GATES[kind_name]
    return (gates * BH * parts + SMALLEST * (gates + 1)) * BH * dtype.itemsize + (4 << 10)


@functools.cache
def shared_memory(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that a program can have for products of dtype."""
    if _interpreted():
        return 1 << 20
    if dtype == torch.float64:
        return 0  # Triton 3.6 fails to compile chains of float64 products
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


@dataclasses.dataclass
class _Call:
    """One layer, as the ops take it, in the form that kernels take."""

    kind_name: str
    x: Tensor
    states0: Sequence[Tensor | None]
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    bidirectional: bool
    extras: Extras

    def __post_init__(self) -> None:
        kind, x, extras = definition.KINDS[self.kind_name], self.x, self.extras
        if reasons := unsupported(self.kind_name, x, self.weights, self.bidirectional, extras):
            raise NotImplementedError(f"{self.kind_name}: the Triton kernels do not run: {'; '.join(reasons)}")
        self.directions = 2 if self.bidirectional else 1
        each = len(self.weights) // self.directions
        names = definition.weight_names(kind, each, extras.peephole)
        self.names = names
        self.of = [
            dict(zip(names, (w.contiguous() for w in self.weights[d * each : (d + 1) * each])))
            for d in range(self.directions)
        ]
        self.G = kind.gates
        self.D, self.H = x.shape[-1], self.of[0]["w_hh"].shape[1]
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.batch_sizes is None:
            self.T, self.B = x.shape[:2]
            self.sizes, self.starts = [self.B] * self.T, [t * self.B for t in range(self.T)]
            if self.lengths is not None:
                self.lengths = self.lengths.to(x.device, torch.int64)
        else:
            self.sizes = self.batch_sizes.tolist()
            self.T, self.B = len(self.sizes), self.sizes[0] if self.sizes else 0
            self.starts = [0, *torch.tensor(self.sizes, dtype=torch.int64).cumsum(0).tolist()][: self.T]
        self.N = sum(self.sizes)
        self.x2 = x.reshape(self.N, self.D)
        self.states0 = [None if s is None else s.contiguous() for s in self.states0]
        self.reset = None if extras.reset is None else extras.reset.contiguous().view(torch.uint8)
        self.masks = {name: _bytes(getattr(extras, name)) for name in ("zoneout_h", "zoneout_c", "candidate")}
        self.variational = None if extras.variational is None else extras.variational.contiguous()
        masks = any(m is not None for m in self.masks.values())
        # What every cell that takes options has to look at.
        self.options = masks or extras.peephole or len(extras.numbers) > 0
        cell_clip, gate_clip, zone_h, zone_c, p = extras.numbers or (math.inf, math.inf, 0.0, 0.0, 0.0)
        self.numbers = None
        if self.options:
            self.numbers = torch.empty(5, dtype=self.acc, device=x.device)
            for at, value in enumerate((gate_clip, cell_clip, zone_h, zone_c, 1 / (1 - p) if p < 1 else 0.0)):
                self.numbers[at].fill_(value)
        self.lone = self.options or self.variational is not None  # recurrence kernels have none of it

    def config(self) -> Config | None:
        shared = shared_memory(self.x.device, self.x.dtype)
        return None if self.lone else config(self.kind_name, self.x.dtype, self.H, shared)

    # -- shapes

    @property
    def saved_width(self) -> int:
        """Of a row: i, f, g, o; r, z, n and n's share of h; r, z, n; an RNN's y tells all, unless options hide it."""
        if self.kind_name.startswith("rnn"):
            return self.H * self.options
        return self.H * (4 if self.kind_name == "gru" else self.G)

    @property
    def has_c(self) -> bool:
        return definition.KINDS[self.kind_name].states == 2

    def rows(self, *widths: int, dtype: torch.dtype | None = None) -> Tensor:
        """[widths.., N rows ..]: zero where a sequence may not have a row that nobody writes."""
        *front, width = widths
        new = self.x.new_zeros if self.lengths is not None else self.x.new_empty
        return new(*front, self.N, width, dtype=dtype or self.x.dtype)

    def state(self, at: int, dtype: torch.dtype) -> Tensor:
        """[directions, B, H] a copy of the initial state."""
        given = self.states0[at]
        if given is None:
            return self.x.new_zeros(self.directions, self.B, self.H, dtype=dtype)
        return given.to(dtype, copy=True)

    # -- products

    def from_x(self) -> Tensor:
        """[directions, N, G * H] shares of x, with every bias that may be added before the products with h."""
        out = self.x.new_empty(self.directions, self.N, self.G * self.H, dtype=self.acc)
        for d, w in enumerate(self.of):
            out[d] = self.product(self.x2, w["w_ih"].T)
            if "b_ih" in w:
                out[d] += w["b_ih"]
                early = self.G - (self.kind_name == "gru")
                out[d, :, : early * self.H] += w["b_hh"][: early * self.H]
        return out

    def late_bias(self) -> Tensor | None:
        """[directions, H] b_hn of a GRU, which r multiplies."""
        if self.kind_name != "gru" or "b_hh" not in self.of[0]:
            return None
        return torch.stack([w["b_hh"][2 * self.H :] for w in self.of])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """In the type that is computed in; of half types with float32 sums."""
        if a.dtype == self.acc:
            return a @ b
        if a.device.type == "cuda":
            return torch.mm(a, b, out_dtype=self.acc)
        return a.to(self.acc) @ b.to(self.acc)

    # -- the walk

    def walk(self, d: int) -> Sequence[int]:
        return range(self.T) if d == 0 else range(self.T - 1, -1, -1)

    def step(self, t: int) -> tuple[int, int, int]:
        """t, its first row, and how many sequences may have it."""
        return (t, self.starts[t], self.sizes[t]) if 0 <= t < self.T else (t, 0, 0)

    def anew(self, t: int, d: int) -> dict[str, int]:
        return dict(zip(("t_reset", "row_reset", "n_reset"), self.step(t + d)))

    def around(self, t: int, d: int) -> dict[str, int]:
        """The step before t in the walk, and that whose reset says that nothing passed from t on."""
        before = self.step(t + 2 * d - 1)
        closed = self.step(t + 1 - d)
        return {
            **dict(zip(("t_before", "row_before", "n_before"), before)),
            **dict(zip(("t_closed", "row_closed", "n_closed"), closed)),
        }

    def grid(self, t: int) -> tuple[int, int]:
        return self.sizes[t], triton.cdiv(self.H, BU)

    # -- forward

    def forward(self, save: bool) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """y, the last states, what backward needs, and every c."""
        y = self.rows(self.directions * self.H)
        cells = [self.rows(self.directions * self.H)] if self.has_c else []
        width = self.saved_width if save else 0
        saved = self.x.new_empty(self.directions, self.N, width)
        chosen = self.config()
        from_x = self.from_x()
        states = [self.state(at, self.x.dtype) for at in range(1 + self.has_c)]
        if self.N and chosen is not None:
            self.recurrence(chosen, from_x, y, cells, states, saved if width else None)
        elif self.N:
            for d in range(self.directions):
                self.steps(d, from_x[d], y, cells, states, saved[d] if width else None)
        shape = *self.x.shape[:-1], self.directions * self.H
        return y.view(shape), states, saved, [c.view(shape) for c in cells]

    def recurrence(
        self, chosen: Config, from_x: Tensor, y: Tensor, cells: list[Tensor], last: list[Tensor], saved: Tensor | None
    ) -> None:
        lengths, starts = self.device_walk()
        grid = triton.cdiv(self.B, chosen.BB), self.directions
        _kernel(self.kind_name, "forward")[grid](
            p_x=from_x,
            p_w_hh=torch.stack([w["w_hh"] for w in self.of]),
            p_bias=self.late_bias(),
            p_h0=self.states0[0],
            p_c0=self.states0[1] if self.has_c else None,
            p_lengths=lengths,
            p_starts=starts,
            p_reset=self.reset,
            p_y=y,
            p_cells=cells[0] if cells else None,
            p_h_n=last[0],
            p_c_n=last[1] if self.has_c else None,
            p_saved=saved,
            **self.sizes_of(chosen),
        )

    def sizes_of(self, chosen: Config) -> dict[str, Any]:
        relu = {"RELU": self.kind_name == "rnn_relu"} if self.kind_name.startswith("rnn") else {}
        sizes = dict(T=self.T, B=self.B, N=self.N, H=self.H)
        return {**sizes, **relu, "PRECISION": PRECISION, **chosen._asdict(), "num_stages": 1}

    def device_walk(self) -> tuple[Tensor | None, Tensor | None]:
        """lengths [B] and, of packed rows, starts [T]."""
        if self.batch_sizes is None:
            return self.lengths, None
        device, sizes = self.x.device, torch.tensor(self.sizes)
        lengths = (sizes.unsqueeze(1) > torch.arange(self.B)).sum(0)
        return lengths.to(device), torch.tensor(self.starts).to(device)

    def common(self, t: int, d: int, *options: str) -> dict[str, Any]:
        """What all fused cells take, and of the options those named."""
        t, row, _ = self.step(t)
        masks = {"zone_h": "zoneout_h", "zone_c": "zoneout_c", "keep": "candidate"}
        return dict(
            p_lengths=self.lengths,
            p_reset=self.reset,
            p_numbers=self.numbers,
            t=t,
            row=row,
            **self.anew(t, d),
            H=self.H,
            OPTIONS=self.options,
            BU=BU,
            num_warps=1,
            maxnreg=MOST_REGISTERS,
            **{f"p_{name}": self.masks[masks[name]] for name in options},
        )

    def steps(
        self, d: int, from_x: Tensor, y: Tensor, cells: list[Tensor], states: list[Tensor], saved: Tensor | None
    ) -> None:
        """One direction, a product and a fused cell per step."""
        w, H = self.of[d], self.H
        h = states[0][d]
        bias = self.late_bias()
        coupled = self.kind_name == "lstm_coupled"
        layout = dict(s_y=y.shape[1], first=d * H)
        scratch, q = None, None
        if self.kind_name == "gru_before":
            scratch = saved if saved is not None else self.x.new_empty(self.B, 3 * H)
            q = torch.empty_like(h)
        for t in self.walk(d):
            n, grid = self.sizes[t], self.grid(t)
            fed = h[:n] if self.variational is None else h[:n] * self.variational[d, :n]
            at: dict[str, Any] = dict(p_x=from_x, p_h=h, row_saved=self.starts[t])
            if self.kind_name == "gru_before":
                at["p_saved"], at["row_saved"] = scratch, self.starts[t] if saved is not None else 0
                gates = self.product(fed, w["w_hh"][: 2 * H].T)
                variational = None if self.variational is None else self.variational[d]
                gru_before_cell_gates_kernel[grid](
                    **at, p_product=gates, p_q=q, p_variational=variational, **self.common(t, d)
                )
                assert q is not None
                product = self.product(q[:n], w["w_hh"][2 * H :].T)
                gru_before_cell_forward_kernel[grid](
                    **at, p_product=product, p_y=y, **layout, **self.common(t, d, "zone_h", "keep")
                )
                continue
            at.update(p_product=self.product(fed, w["w_hh"].T), p_y=y, p_saved=saved, **layout)
            if self.has_c:
                lstm_cell_forward_kernel[grid](
                    **at,
                    p_c=states[1][d],
                    p_cells=cells[0],
                    p_peephole=w.get("w_p"),
                    COUPLED=coupled,
                    **self.common(t, d, "zone_h", "zone_c", "keep"),
                )
            elif self.kind_name == "gru":
                gru_cell_forward_kernel[grid](
                    **at, p_bias=None if bias is None else bias[d], **self.common(t, d, "zone_h", "keep")
                )
            else:
                rnn_cell_forward_kernel[grid](**at, RELU=self.kind_name == "rnn_relu", **self.common(t, d, "zone_h"))

    # -- backward

    def backward(
        self,
        dy: Tensor | None,
        dlast: Sequence[Tensor | None],
        y: Tensor,
        saved: Tensor,
        cells: Sequence[Tensor],
        dcells: Tensor | None,
        need_dx: bool,
        need_dw: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """dx, the gradients of the initial states, and of the weights."""
        dirs, H = self.directions, self.H
        dlast = [None if g is None else g.contiguous() for g in dlast]
        dy, dcells = (None if g is None else g.contiguous() for g in (dy, dcells))
        d_x = self.rows(dirs, self.G * H)
        d_hn = self.rows(dirs, H) if self.kind_name == "gru" else None
        fed = self.rows(dirs, H)
        q = self.rows(dirs, H) if self.kind_name == "gru_before" else None
        d_peephole = self.rows(dirs, (self.G - 1) * H, dtype=self.acc) if "w_p" in self.names else None
        chosen = None if dcells is not None else self.config()
        if not self.N:
            given = [torch.zeros_like(s) if g is None else g for g, s in zip(dlast, self.zero_states())]
            dstates = list(given)
        elif chosen is not None:
            dstates = [self.x.new_empty(dirs, self.B, H) for _ in dlast]
            lengths, starts = self.device_walk()
            _kernel(self.kind_name, "backward")[triton.cdiv(self.B, chosen.BB), dirs](
                p_w_hh=torch.stack([w["w_hh"] for w in self.of]),
                p_h0=self.states0[0],
                p_c0=self.states0[1] if self.has_c else None,
                p_lengths=lengths,
                p_starts=starts,
                p_reset=self.reset,
                p_y=y,
                p_cells=cells[0] if self.has_c else None,
                p_saved=saved if self.saved_width else None,
                p_dy=dy,
                p_dh_n=dlast[0],
                p_dc_n=dlast[1] if self.has_c else None,
                p_dx=d_x,
                p_dhn=d_hn,
                p_fed=fed,
                p_dh0=dstates[0],
                p_dc0=dstates[1] if self.has_c else None,
                **self.sizes_of(chosen),
            )
        else:
            carried = [
                self.x.new_zeros(dirs, self.B, H, dtype=self.acc) if g is None else g.to(self.acc, copy=True)
                for g in dlast
            ]
            for d in range(dirs):
                rows = dict(p_dx=d_x[d], p_fed=fed[d])
                own = dict(d_hn=d_hn, q=q, d_peephole=d_peephole)
                self.steps_back(
                    d, dy, dcells, y, cells, saved, carried, rows, {k: v[d] for k, v in own.items() if v is not None}
                )
            dstates = [c.to(self.x.dtype) for c in carried]
        dx = self.x.new_empty(0)
        if need_dx:
            total = self.x.new_zeros(self.N, self.D, dtype=self.acc)
            for d, w in enumerate(self.of):
                total += self.product(d_x[d], w["w_ih"])
            dx = total.to(self.x.dtype).view(self.x.shape)
        dw = []
        if need_dw:
            if self.lengths is not None:  # what lies beyond may be anything: times zero it must not be NaN
                valid = torch.arange(self.T, device=self.x.device).unsqueeze(1) < self.lengths
                self.x2 = torch.where(valid.view(-1, 1), self.x2, 0)
            for d in range(dirs):
                dw += self.weight_gradients(
                    *(None if t is None else t[d] for t in (d_x, d_hn, fed, q, d_peephole))  # type: ignore[arg-type]
                )
        return dx, dstates, dw

    def zero_states(self) -> list[Tensor]:
        return [self.x.new_zeros(self.directions, self.B, self.H) for _ in range(1 + self.has_c)]

    def steps_back(
        self,
        d: int,
        dy: Tensor | None,
        dcells: Tensor | None,
        y: Tensor,
        cells: Sequence[Tensor],
        saved: Tensor,
        carried: list[Tensor],
        rows: dict[str, Any],
        own: dict[str, Tensor],
    ) -> None:
        """`carried` comes as the gradients of the last states and becomes those of the initial ones."""
        w, H, w_hh = self.of[d], self.H, self.of[d]["w_hh"]
        direct = carried[0][d]
        product = torch.zeros_like(direct)
        variational = None if self.variational is None else self.variational[d]
        h0 = None if self.states0[0] is None else self.states0[0][d]
        d_x = rows["p_dx"]
        for t in reversed(self.walk(d)):
            n, start, grid = self.sizes[t], self.starts[t], self.grid(t)
            here = slice(start, start + n)
            at = dict(
                p_h0=h0,
                p_y=y,
                p_saved=saved[d] if self.saved_width else None,
                p_variational=variational,
                p_dy=dy,
                p_product=product,
                p_direct=direct,
                s_y=self.directions * H,
                first=d * H,
                **rows,
                **self.around(t, d),
            )
            if self.has_c:
                lstm_cell_backward_kernel[grid](
                    **at,
                    p_c0=None if self.states0[1] is None else self.states0[1][d],
                    p_cells=cells[0],
                    p_dcells=dcells,
                    p_dc=carried[1][d],
                    p_peephole=w.get("w_p"),
                    p_dpeephole=own.get("d_peephole"),
                    COUPLED=self.kind_name == "lstm_coupled",
                    **self.common(t, d, "zone_h", "zone_c", "keep"),
                )
                product[:n] = self.product(d_x[here], w_hh)
            elif self.kind_name == "gru":
                gru_cell_backward_kernel[grid](**at, p_dhn=own["d_hn"], **self.common(t, d, "zone_h", "keep"))
                product[:n] = self.product(d_x[here, : 2 * H], w_hh[: 2 * H])
                product[:n] += self.product(own["d_hn"][here], w_hh[2 * H :])
            elif self.kind_name == "gru_before":
                gru_before_cell_backward_kernel[grid](**at, **self.common(t, d, "zone_h", "keep"))
                dq = self.product(d_x[here, 2 * H :], w_hh[2 * H :])
                gru_before_cell_gates_backward_kernel[grid](
                    p_saved=saved[d],
                    p_variational=variational,
                    p_dq=dq,
                    p_direct=direct,
                    p_q=own["q"],
                    **rows,
                    **self.common(t, d),
                )
                product[:n] = self.product(d_x[here, : 2 * H], w_hh[: 2 * H])
            else:
                rnn_cell_backward_kernel[grid](**at, RELU=self.kind_name == "rnn_relu", **self.common(t, d, "zone_h"))
                product[:n] = self.product(d_x[here], w_hh)
        if variational is not None:
            product *= variational
        if self.reset is not None and d == 0:  # walking back, nothing comes before the last step
            first = self.reset.view(-1)[: self.sizes[0]].bool()
            if self.lengths is not None:
                first &= self.lengths > 0
            product[: self.sizes[0]].masked_fill_(first.unsqueeze(1), 0)
        direct += product

    def weight_gradients(
        self, d_x: Tensor, d_hn: Tensor | None, fed: Tensor, q: Tensor | None, d_peephole: Tensor | None
    ) -> list[Tensor]:
        """Of one direction: products over all rows, after the loop."""
        H = self.H
        d_h = d_x if d_hn is None else torch.cat((d_x[:, : 2 * H], d_hn), 1)
        if q is None:
            d_w_hh = self.product(d_h.T, fed)
        else:
            d_w_hh = torch.cat((self.product(d_x[:, : 2 * H].T, fed), self.product(d_x[:, 2 * H :].T, q)))
        found = {"w_ih": self.product(d_x.T, self.x2), "w_hh": d_w_hh}
        if "b_ih" in self.names:
            found["b_ih"], found["b_hh"] = (g.sum(0, dtype=self.acc) for g in (d_x, d_h))
        if d_peephole is not None:
            found["w_p"] = d_peephole.sum(0)
        return [found[name].to(self.x.dtype) for name in self.names]


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


_KERNELS = {
    ("lstm", "forward"): lstm_forward_kernel,
    ("lstm", "backward"): lstm_backward_kernel,
    ("gru", "forward"): gru_forward_kernel,
    ("gru", "backward"): gru_backward_kernel,
    ("rnn", "forward"): rnn_forward_kernel,
    ("rnn", "backward"): rnn_backward_kernel,
}


def _kernel(kind_name: str, way: str) -> Any:
    return _KERNELS[kind_name.partition("_")[0], way]


# ---- the ops' form


def unsupported(
    kind_name: str, x: Tensor, weights: Sequence[Tensor], bidirectional: bool = False, extras: Extras | None = None
) -> list[str]:
    """Reasons why these kernels cannot take such inputs; an empty list: they can."""
    extras = extras or NO_EXTRAS
    reasons = []
    if x.device.type != "cuda" and not _interpreted():
        reasons.append(f"the tensors are on {x.device}")
    if x.dtype not in DTYPES:
        reasons.append(f"dtype {x.dtype} is none of {', '.join(str(d) for d in DTYPES)}")
    if kind_name not in SUPPORTED:
        reasons.append(f"{kind_name} is none of {', '.join(SUPPORTED)}")
    elif extras.heads != 1:
        reasons.append("there is more than one head")
    else:
        each = len(weights) // (2 if bidirectional else 1)
        if "w_hr" in definition.weight_names(definition.KINDS[kind_name], each, extras.peephole):
            reasons.append("there is a projection")
    return reasons


SUPPORTED = ("lstm", "lstm_coupled", "gru", "gru_before", "rnn_tanh", "rnn_relu")


def _infer(kind_name: str, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _call(kind_name, x, *args)
    y, last, *_ = call.forward(save=False)
    return y, *last


def _forward(kind_name: str, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    states = definition.KINDS[kind_name].states
    taken = states + 4 + len(NO_EXTRAS)
    call = _call(kind_name, x, *args[:taken])
    recompute = bool(args[taken]) if len(args) > taken else False
    y, last, saved, cells = call.forward(save=not recompute)
    return y, *last, saved, *cells


def _backward(kind_name: str, dy: Tensor | None, *args: Any) -> tuple[Any, ...]:
    states = definition.KINDS[kind_name].states
    dlast, rest = args[:states], args[states:]
    inputs, rest = rest[: states + 5], rest[states + 5 :]
    y, saved, *rest_ = rest
    cells, rest_ = rest_[: states - 1], rest_[states - 1 :]
    need_dx, need_dw, *more = rest_
    extras, more = more[: len(NO_EXTRAS)], more[len(NO_EXTRAS) :]
    call = _call(kind_name, *inputs, *extras)
    if call.saved_width and not saved.shape[-1]:  # recomputed rather than kept
        saved = call.forward(save=True)[2]
    dcells = more[0] if more else None
    dx, dstates, dw = call.backward(dy, dlast, y, saved, cells, dcells, need_dx, need_dw)
    return dx, *dstates, dw


def _call(kind_name: str, x: Tensor, *args: Any) -> _Call:
    states = definition.KINDS[kind_name].states
    weights, batch_sizes, lengths, bidirectional, *extras = args[states:]
    return _Call(kind_name, x, args[:states], weights, batch_sizes, lengths, bidirectional, Extras(*extras))


def _kind(name: str) -> Kind:
    infer, forward, backward = (functools.partial(f, name) for f in (_infer, _forward, _backward))
    return dataclasses.replace(kind_named(name), infer=infer, forward=forward, backward=backward)


# Each has infer, forward and backward with the arguments of the ops seqkernels::<kind>, <kind>_forward and
# <kind>_backward. What `saved` holds is the kernels' own affair.
KINDS = {name: _kind(name) for name in SUPPORTED}


def layer(
    kind_name: str,
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    bidirectional: bool = False,
    extras: Extras | None = None,
    recompute: bool = False,
    every: bool = False,
) -> tuple[Tensor, ...]:
    """One layer, both directions, as `seqkernels.functional` runs it on the ops; the arguments are not checked again.

    Args:
        kind_name: lstm, lstm_coupled, gru, gru_before, rnn_tanh or rnn_relu.
        x: [T, B, D], or [N, D] with batch_sizes; float64, float32, float16 or bfloat16; gradient: yes.
        states0: [directions, B, H] h0 and of an LSTM c0, None for zeros. Gradient: yes.
        weights: per direction w_ih [G * H, D], w_hh [G * H, H], b_ih and b_hh [G * H] or absent, with a peephole
            w_p [3H] ([2H] of a coupled LSTM). Gradient: yes.
        batch_sizes: [T] int64 on the CPU, of packed rows. lengths: [B] integers, of a padded batch.
        extras: masks and options, as the ops take them; heads are not supported.
        recompute: what backward needs is computed again there.
        every: also return every c.
    Returns:
        y like x, zero beyond each length; the last states; with `every` the c of each step, laid out like y.
    Raises:
        NotImplementedError: these kernels do not take such inputs; the message says why.
    Deterministic: yes. Second derivatives are those of the definition in seqkernels.reference. torch.func's transforms
    are not supported.
    """
    if kind_name not in KINDS:
        raise NotImplementedError(
            f"{kind_name}: the Triton kernels do not run: " + unsupported(kind_name, x, weights)[-1]
        )
    return _recurrent_ops.layer(
        *(KINDS[kind_name], x, states0, list(weights), batch_sizes, lengths, bidirectional),
        *(extras, recompute, every),
    )


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when this file was imported: the kernels then run on the CPU, in numpy."""
    return not isinstance(lstm_forward_kernel, triton.JITFunction)
