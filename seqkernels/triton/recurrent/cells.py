"""The cells: forward and backward of one step, without the products.

Each cell is one pair of functions. The kernels that run all steps in one launch and those that run one step both call
them. A plain cell has no OPTIONS, and their code is not compiled; `options` is then None.

Sources: seqkernels.reference.recurrent, cell by cell.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from seqkernels.triton.recurrent.arithmetic import activate, clip, restore, tanh


class Options(NamedTuple):
    """Values of a cell's options for the units at hand; each is neutral where its option is off."""

    peephole_i: tl.tensor
    peephole_f: tl.tensor
    peephole_o: tl.tensor
    keep: tl.tensor  # factor of the candidate: recurrent dropout
    zoneout_h: tl.tensor  # share of the old h that stays
    zoneout_c: tl.tensor  # share of the old c that stays
    gate_clip: tl.tensor
    cell_clip: tl.tensor


class LSTMGates(NamedTuple):
    """i, f, g, o: pre-activations, saved activations or gradients. The f of a coupled LSTM is unused."""

    i: tl.tensor
    f: tl.tensor
    g: tl.tensor
    o: tl.tensor


class GRUGates(NamedTuple):
    """r, z, n: pre-activations (n without the share of h), saved activations or gradients; h_n: share of h in n."""

    r: tl.tensor
    z: tl.tensor
    n: tl.tensor
    h_n: tl.tensor


class MGUGates(NamedTuple):
    """f, n and h_n, as in GRUGates."""

    f: tl.tensor
    n: tl.tensor
    h_n: tl.tensor


@triton.jit
def lstm_forward(x, c, options, S: tl.constexpr, COUPLED: tl.constexpr, OPTIONS: tl.constexpr):
    """x: pre-activations without peepholes. Returns h, c and the saved gates. S: the type in which c is stored."""
    x_i = x.i
    x_f = x.f
    x_o = x.o
    gate_clip = None
    if OPTIONS:
        gate_clip = options.gate_clip
        x_i += options.peephole_i * c
        x_f += options.peephole_f * c
    i, saved_i = activate(x_i, gate_clip, False)
    if COUPLED:
        f, saved_f = 1.0 - i, saved_i
    else:
        f, saved_f = activate(x_f, gate_clip, False)
    g, saved_g = activate(x.g, gate_clip, True)
    if OPTIONS:
        new_c = clip(f * c + i * (g * options.keep), options.cell_clip).to(S).to(c.dtype)
        x_o += options.peephole_o * new_c
        c = (new_c + options.zoneout_c * (c - new_c)).to(S).to(c.dtype)
    else:
        new_c = (f * c + i * g).to(S).to(c.dtype)
        c = new_c
    o, saved_o = activate(x_o, gate_clip, False)
    return o * tanh(new_c), c, LSTMGates(saved_i, saved_f, saved_g, saved_o)


@triton.jit
def lstm_backward(saved, c, c_prev, dh, dc, options, S: tl.constexpr, COUPLED: tl.constexpr, OPTIONS: tl.constexpr):
    """Gradients of the pre-activations and of c_prev, and the c from which h was computed, before zoneout."""
    gate_clip = None
    if OPTIONS:
        gate_clip = options.gate_clip
    i, slope_i = restore(saved.i, gate_clip, False)
    if COUPLED:
        f, slope_f = 1.0 - i, slope_i
    else:
        f, slope_f = restore(saved.f, gate_clip, False)
    g, slope_g = restore(saved.g, gate_clip, True)
    o, slope_o = restore(saved.o, gate_clip, False)
    new_c = c
    if OPTIONS:
        g *= options.keep
        slope_g *= options.keep
        unclipped = f * c_prev + i * g
        new_c = tl.where(options.zoneout_c == 0, c, clip(unclipped, options.cell_clip).to(S).to(c.dtype))
        dc_zoneout = dc * options.zoneout_c
        dc -= dc_zoneout
    tanh_c = tanh(new_c)
    d_o = dh * tanh_c * slope_o
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    if OPTIONS:
        dc += d_o * options.peephole_o
        dc = tl.where(tl.abs(unclipped) >= options.cell_clip, 0.0, dc)
    d_g = dc * i * slope_g
    if COUPLED:
        d_i = dc * (g - c_prev) * slope_i
        d_f = d_i
    else:
        d_i = dc * g * slope_i
        d_f = dc * c_prev * slope_f
    dc *= f
    if OPTIONS:
        dc += d_i * options.peephole_i + dc_zoneout
        if not COUPLED:
            dc += d_f * options.peephole_f
    return LSTMGates(d_i, d_f, d_g, d_o), dc, new_c


@triton.jit
def gru_forward(x, h, options, OPTIONS: tl.constexpr):
    """x: r and z with their shares of h. Returns h and the saved gates."""
    gate_clip = None
    if OPTIONS:
        gate_clip = options.gate_clip
    r, saved_r = activate(x.r, gate_clip, False)
    z, saved_z = activate(x.z, gate_clip, False)
    n, saved_n = activate(x.n + r * x.h_n, gate_clip, True)
    if OPTIONS:
        n *= options.keep
    return n + z * (h - n), GRUGates(saved_r, saved_z, saved_n, x.h_n)


@triton.jit
def gru_backward(saved, h_prev, dh, options, OPTIONS: tl.constexpr):
    """Gradients of the pre-activations (n: of the share of x, h_n: of that of h), and of h_prev by way of z."""
    gate_clip = None
    if OPTIONS:
        gate_clip = options.gate_clip
    r, slope_r = restore(saved.r, gate_clip, False)
    z, slope_z = restore(saved.z, gate_clip, False)
    n, slope_n = restore(saved.n, gate_clip, True)
    if OPTIONS:
        n *= options.keep
        slope_n *= options.keep
    d_n = dh * (1.0 - z) * slope_n
    return GRUGates(d_n * saved.h_n * slope_r, dh * (h_prev - n) * slope_z, d_n, d_n * r), dh * z


@triton.jit
def mgu_forward(x, h, options, OPTIONS: tl.constexpr):
    """x: f with its share of h. Returns h and the saved gates."""
    gate_clip = None
    if OPTIONS:
        gate_clip = options.gate_clip
    f, saved_f = activate(x.f, gate_clip, False)
    n, saved_n = activate(x.n + f * x.h_n, gate_clip, True)
    if OPTIONS:
        n *= options.keep
    return h + f * (n - h), MGUGates(saved_f, saved_n, x.h_n)


@triton.jit
def mgu_backward(saved, h_prev, dh, options, OPTIONS: tl.constexpr):
    """As gru_backward; the last result is the gradient of h_prev by way of 1 - f."""
    gate_clip = None
    if OPTIONS:
        gate_clip = options.gate_clip
    f, slope_f = restore(saved.f, gate_clip, False)
    n, slope_n = restore(saved.n, gate_clip, True)
    if OPTIONS:
        n *= options.keep
        slope_n *= options.keep
    d_n = dh * f * slope_n
    d_f = (dh * (n - h_prev) + d_n * saved.h_n) * slope_f
    return MGUGates(d_f, d_n, d_n * f), dh * (1.0 - f)
