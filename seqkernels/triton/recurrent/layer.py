"""Arguments and functions shared by the kernels that run all steps of a layer in one launch.

Grid: (sequences / BB, directions). A program runs all steps of BB sequences with W_hh in shared memory or registers;
programs do not communicate. Tiles are [BB, BH]. Units beyond H have zero weights and pre-activations and are not
stored, so that they do not affect the others.

Pointers are grouped in the named tuples below. Sizes that vary from call to call are separate arguments, because Triton
3.6 ignores do_not_specialize inside of tuples.

Dimensions: B sequences, T steps, N rows of x and y (T * B, or the number of packed rows), H hidden, G gates. A row is
one step of one sequence: t * B + b, or starts[t] + b with packed input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import load

SIZES = ["T", "B", "N"]  # not specialized


class Inputs(NamedTuple):
    """Inputs of forward and backward."""

    p_w_hh: Any  # [directions, G * H, H]
    p_bias: Any  # [directions, H] b_hn of GRU and MGU, which the reset gate multiplies, or None
    p_h0: Any  # [directions, B, H] or None
    p_c0: Any  # [directions, B, H] or None; LSTM
    p_lengths: Any  # [B] or None
    p_starts: Any  # [T] first row of each step of packed input, or None
    p_reset: Any  # uint8 [N] or None


class Outputs(NamedTuple):
    """Outputs of forward. Backward reads y, cells and saved."""

    p_y: Any  # [N, directions * H]
    p_cells: Any  # [N, directions * H]; LSTM
    p_h_n: Any  # [directions, B, H]
    p_c_n: Any  # [directions, B, H]; LSTM
    p_saved: Any  # [directions, N, saved width], or None


class Gradients(NamedTuple):
    """Upstream gradients (dy, dh_n, dc_n) and outputs of backward."""

    p_dy: Any  # like y, or None
    p_dh_n: Any  # [directions, B, H] or None
    p_dc_n: Any  # [directions, B, H] or None; LSTM
    p_dx: Any  # [directions, N, G * H] gradients of the input projection
    p_dh_of_n: Any  # [directions, N, H] gradients of the recurrent projection of n; GRU and MGU
    p_h: Any  # [directions, N, H] input of the recurrent projection at each step
    p_dh0: Any  # [directions, B, H]
    p_dc0: Any  # [directions, B, H]; LSTM


class Block(NamedTuple):
    """The sequences, units and direction of one program."""

    direction: tl.tensor
    i_b: tl.tensor  # [BB]
    i_h: tl.tensor  # [1, BH]
    m_h: tl.tensor  # [1, BH] units below H
    m_state: tl.tensor  # [BB, BH]
    o_state: tl.tensor  # [BB, BH] offsets in [directions, B, H]
    lengths: tl.tensor  # [BB]
    longest: tl.tensor
    s_y: tl.tensor  # row stride of y


@triton.jit
def block_of(inputs, T, B, H, BB: tl.constexpr, BH: tl.constexpr):
    direction = tl.program_id(1)
    i_b = tl.program_id(0) * BB + tl.arange(0, BB)
    i_h = tl.arange(0, BH)[None, :]
    m_b = i_b < B
    m_h = i_h < H
    lengths, longest = _lengths(inputs.p_lengths, i_b, m_b, T)
    s_y = tl.num_programs(1) * H
    o_state = (direction * B + i_b).to(tl.int64)[:, None] * H + i_h
    m_state = m_b[:, None] & m_h
    return Block(direction, i_b, i_h, m_h, m_state, o_state, lengths, longest, s_y)


@triton.jit
def _lengths(p_lengths, i_b, m_b, T):
    """[BB] lengths, clamped to [0, T], and their maximum."""
    if p_lengths is None:
        lengths = tl.where(m_b, T, 0)
        longest = T
    else:
        lengths = tl.load(p_lengths + i_b, mask=m_b, other=0).to(tl.int32)
        lengths = tl.minimum(tl.maximum(lengths, 0), T)
        longest = tl.max(lengths, axis=0)
    return lengths, longest


@triton.jit
def rows_of(inputs, block, t, T, B):
    """[BB] rows of step t; undefined if a sequence has no step t."""
    if inputs.p_starts is None:
        start = tl.cast(t, tl.int64) * B
    else:
        start = tl.load(inputs.p_starts + t, mask=(t >= 0) & (t < T), other=0)
    return start + block.i_b


@triton.jit
def has_step(block, t):
    """[BB, BH] whether the sequence has step t, which may be outside of [0, T)."""
    return ((t >= 0) & (t < block.lengths))[:, None] & block.m_h


@triton.jit
def reset_at(inputs, block, t, T, B):
    """[BB, 1] whether step t starts from zero states. The reverse direction uses the reset of step t + 1."""
    t += block.direction
    o_row = rows_of(inputs, block, t, T, B)
    return (tl.load(inputs.p_reset + o_row, mask=t < block.lengths, other=0) != 0)[:, None]


@triton.jit
def weight(p_w_hh, GATE: tl.constexpr, H, TRANSPOSED: tl.constexpr, BH: tl.constexpr):
    """[BH, BH] rows of W_hh of one gate, or their transpose; zeros beyond H."""
    i_u = tl.arange(0, BH)
    i_v = tl.arange(0, BH)
    if TRANSPOSED:
        o_w = (GATE * H + i_v[None, :]) * H + i_u[:, None]
    else:
        o_w = (GATE * H + i_u[:, None]) * H + i_v[None, :]
    return tl.load(p_w_hh + o_w, mask=(i_u < H)[:, None] & (i_v < H)[None, :], other=0)


@triton.jit
def state(p_state, o, m, ACC: tl.constexpr):
    """Loads a state or its gradient; zeros if None."""
    if p_state is None:
        return tl.zeros(o.shape, ACC)
    else:
        return load(p_state, o, m, ACC)
