"""What the kernels share that run all steps of a layer in one launch.

Grid: (sequences / BB, directions). A program runs all steps of its BB sequences with W_hh in shared memory or
registers; programs do not communicate. Tiles are [BB, BH]. Beyond H, weights and pre-activations are zeros and nothing
is stored, so the padding units do not reach real ones.

Kernels take pointers in the groups below. The sizes that may differ from call to call stay ordinary arguments: Triton
3.6 ignores do_not_specialize for what is inside a tuple.

Dimensions: B sequences, T steps, N rows of x and y (T * B, or of packed input the real steps), H hidden, G gates. A row
is one step of one sequence: t * B + b, or starts[t] + b of packed input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from seqkernels.triton.recurrent.arithmetic import load

SIZES = ["T", "B", "N"]  # not specialized


class Inputs(NamedTuple):
    """What forward and backward read."""

    p_w_hh: Any  # [directions, G * H, H]
    p_bias: Any  # [directions, H] b_hn, or None: of a GRU or an MGU, whose reset gate multiplies it
    p_h0: Any  # [directions, B, H] or None, as p_c0
    p_c0: Any  # of an LSTM
    p_lengths: Any  # [B] or None
    p_starts: Any  # [T] first row of each step of packed input, or None
    p_reset: Any  # uint8 [N] or None


class Outputs(NamedTuple):
    p_y: Any  # [N, directions * H], as p_cells
    p_cells: Any  # of an LSTM
    p_h_n: Any  # [directions, B, H], as p_c_n
    p_c_n: Any  # of an LSTM
    p_saved: Any  # [directions, N, saved width], or None


class Gradients(NamedTuple):
    """Gradients that come in, and those that backward writes."""

    p_dy: Any  # like y, or None
    p_dh_n: Any  # [directions, B, H] or None, as p_dc_n
    p_dc_n: Any  # of an LSTM
    p_dx: Any  # [directions, N, G * H] of the pre-activations, as x sees them
    p_dh_of_n: Any  # [directions, N, H] of the share of h in n: of a GRU or an MGU
    p_h: Any  # [directions, N, H] written: the h that each step's products read
    p_dh0: Any  # [directions, B, H], as p_dc0
    p_dc0: Any  # of an LSTM


class Block(NamedTuple):
    """The sequences, units and direction of one program."""

    direction: tl.tensor
    i_b: tl.tensor  # [BB]
    i_h: tl.tensor  # [1, BH]
    m_h: tl.tensor  # [1, BH] units that exist
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
    """[BB] steps of each sequence, and of the longest of them. Lengths outside [0, T] count as the nearest within."""
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
    """[BB] rows of step t; any number where there is no such step."""
    if inputs.p_starts is None:
        start = tl.cast(t, tl.int64) * B
    else:
        start = tl.load(inputs.p_starts + t, mask=(t >= 0) & (t < T), other=0)
    return start + block.i_b


@triton.jit
def has_step(block, t):
    """[BB, BH] whether the sequence has step t, which may lie outside [0, T)."""
    return ((t >= 0) & (t < block.lengths))[:, None] & block.m_h


@triton.jit
def reset_at(inputs, block, t, T, B):
    """[BB, 1] whether step t starts from zero states. In the reverse direction the reset is that of step t + 1."""
    t += block.direction
    o_row = rows_of(inputs, block, t, T, B)
    return (tl.load(inputs.p_reset + o_row, mask=t < block.lengths, other=0) != 0)[:, None]


@triton.jit
def weight(p_w_hh, GATE: tl.constexpr, H, TRANSPOSED: tl.constexpr, BH: tl.constexpr):
    """[BH, BH] one gate's rows of W_hh, or their transpose; zeros beyond H."""
    i_u = tl.arange(0, BH)
    i_v = tl.arange(0, BH)
    if TRANSPOSED:
        o_w = (GATE * H + i_v[None, :]) * H + i_u[:, None]
    else:
        o_w = (GATE * H + i_u[:, None]) * H + i_v[None, :]
    return tl.load(p_w_hh + o_w, mask=(i_u < H)[:, None] & (i_v < H)[None, :], other=0)


@triton.jit
def state(p_state, o, m, ACC: tl.constexpr):
    """A state or its gradient; zeros where it is None."""
    if p_state is None:
        return tl.zeros(o.shape, ACC)
    else:
        return load(p_state, o, m, ACC)
