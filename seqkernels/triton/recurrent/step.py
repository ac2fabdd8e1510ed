"""Arguments and functions shared by the kernels that run one step of one direction, without the matrix products.

Grid: (sequences with the step, units / BU). Tensors of rows contain all steps; `row` is the first row of the step. A
neighbouring step has the arguments t_..., row_... and n_..., its number of sequences; n_... is 0 if there is no such
step. With lengths, the launcher fills the rows of padding with zeros.

Pointers are grouped in the named tuples below. The numbers of a step are separate arguments, because Triton 3.6 ignores
do_not_specialize inside of tuples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import load, store
from .cells import Options

# Not specialized. t, row: this step. t_reset, ..: the step whose reset zeroes the input states of this step.
FORWARD = ["t", "row", "t_reset", "row_reset", "n_reset", "row_saved"]
# t_before, ..: the step whose states this step reads. t_after, ..: the step whose reset zeroes the states of this step
# for the next step.
BACKWARD = [*FORWARD[:-1], "t_before", "row_before", "n_before", "t_after", "row_after", "n_after"]


class Step(NamedTuple):
    """A step or, with n = 0, a placeholder for a step outside of the sequence."""

    t: tl.tensor
    row: tl.tensor  # first row of the step
    n: tl.tensor  # number of sequences with the step


class Sequences(NamedTuple):
    p_lengths: Any  # [B] or None
    p_reset: Any  # uint8 [N] or None


class Masks(NamedTuple):
    """Options of the cell; p_numbers is None without options."""

    p_peephole: Any  # [(G - 1) * H] or None; LSTM
    p_zoneout_h: Any  # uint8 [N, directions * H] or None; also p_zoneout_c and p_candidate
    p_zoneout_c: Any
    p_candidate: Any
    p_numbers: Any  # [5] gate_clip, cell_clip, factors of the previous h and c (zoneout), factor of a kept candidate


class Rows(NamedTuple):
    """Rows of y and of tensors with its layout."""

    p_y: Any  # [N, directions * H]
    p_cells: Any  # [N, directions * H]; LSTM
    stride: Any  # row stride
    first: Any  # first unit of this direction


class Initial(NamedTuple):
    p_h0: Any  # [B, H] or None
    p_c0: Any  # [B, H] or None; LSTM


class Upstream(NamedTuple):
    """Upstream gradients of a step."""

    p_dy: Any  # like y, or None
    p_dcells: Any  # like y, or None; LSTM
    p_product: Any  # [B, H] gradient of h through the recurrent projection of the next step
    p_direct: Any  # [B, H] gradient of h through all other terms; updated in place by each step
    p_dc: Any  # [B, H] gradient of c, updated in place by each step; LSTM
    p_variational: Any  # [B, H] factors of h in the recurrent projection, or None


class Written(NamedTuple):
    """Outputs of a backward step besides the gradients of the states."""

    p_dx: Any  # [N, G * H] gradients of the input projection
    p_dh_of_n: Any  # [N, H] gradients of the recurrent projection of n; GRU and MGU
    p_h: Any  # [N, H] input of the recurrent projection
    p_dpeephole: Any  # [N, (G - 1) * H] peephole gradient of each row, or None; LSTM


@triton.jit
def has_step(sequences, i_b, step):
    """Whether sequence i_b has the step."""
    has = i_b < step.n
    if sequences.p_lengths is not None:
        has = has & (step.t < tl.load(sequences.p_lengths + i_b))
    return has


@triton.jit
def reset_at(sequences, i_b, step):
    """Whether sequence i_b has a reset at the step."""
    m = has_step(sequences, i_b, step)
    return tl.load(sequences.p_reset + step.row + i_b, mask=m, other=0) != 0


@triton.jit
def options_of(masks, o_mask, i_h, m, H, COUPLED: tl.constexpr, ACC: tl.constexpr):
    """Loads the options; a disabled option has its neutral value."""
    gate_clip = tl.load(masks.p_numbers)
    cell_clip = tl.load(masks.p_numbers + 1)
    peephole_i = 0.0
    peephole_f = 0.0
    peephole_o = 0.0
    if masks.p_peephole is not None:
        peephole_i = load(masks.p_peephole, i_h, m, ACC)
        if COUPLED:
            peephole_o = load(masks.p_peephole, H + i_h, m, ACC)
        else:
            peephole_f = load(masks.p_peephole, H + i_h, m, ACC)
            peephole_o = load(masks.p_peephole, 2 * H + i_h, m, ACC)
    zoneout_h = tl.load(masks.p_numbers + 2)
    if masks.p_zoneout_h is not None:
        zoneout_h = load(masks.p_zoneout_h, o_mask, m, ACC)
    zoneout_c = tl.load(masks.p_numbers + 3)
    if masks.p_zoneout_c is not None:
        zoneout_c = load(masks.p_zoneout_c, o_mask, m, ACC)
    keep = 1.0
    if masks.p_candidate is not None:
        keep = load(masks.p_candidate, o_mask, m, ACC) * tl.load(masks.p_numbers + 4)
    return Options(peephole_i, peephole_f, peephole_o, keep, zoneout_h, zoneout_c, gate_clip, cell_clip)


@triton.jit
def dh_of(upstream, sequences, after, i_b, o_y, o_state, m, m_h, ACC: tl.constexpr):
    """Gradient of h of this step. p_direct of a sequence without this step remains unchanged."""
    b_product = load(upstream.p_product, o_state, m_h, ACC)
    if sequences.p_reset is not None:
        b_product = tl.where(reset_at(sequences, i_b, after), 0.0, b_product)
    if upstream.p_variational is not None:
        b_product *= load(upstream.p_variational, o_state, m_h, ACC)
    b_dh = load(upstream.p_direct, o_state, m_h, ACC) + b_product
    store(upstream.p_direct, o_state, b_dh, m_h)
    if upstream.p_dy is not None:
        b_dh += load(upstream.p_dy, o_y, m, ACC)
    return b_dh


@triton.jit
def state_before(p_rows, p_initial, sequences, reset, before, i_b, o_before, o_state, m, ACC: tl.constexpr):
    """Input state of this step. reset: the step whose reset zeroes it; before: the step that computed it."""
    m_before = m & has_step(sequences, i_b, before)
    b_state = load(p_rows, o_before, m_before, ACC)
    if p_initial is not None:
        b_state = tl.where(m_before, b_state, load(p_initial, o_state, m, ACC))
    if sequences.p_reset is not None:
        b_state = tl.where(reset_at(sequences, i_b, reset), 0.0, b_state)
    return b_state
