"""Cells: forward and backward of one step, without the matrix products.

Both the kernels for all steps and the kernels for one step call these functions. Without OPTIONS, the code of the
options is not compiled, and `options` is None.

Source: the definitions of the cells in seqkernels.reference.recurrent.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import activate, clip, restore, tanh


class Options(NamedTuple):
    """Options of a cell for the units of a tile; a disabled option has its neutral value."""

    peephole_i: tl.tensor
    peephole_f: tl.tensor
    peephole_o: tl.tensor
    keep: tl.tensor  # factor of the candidate for recurrent dropout
    zoneout_h: tl.tensor  # factor of the previous h
    zoneout_c: tl.tensor  # factor of the previous c
    gate_clip: tl.tensor
    cell_clip: tl.tensor


class LSTMGates(NamedTuple):
    """i, f, g, o: pre-activations, saved activations or gradients. A coupled LSTM does not use f."""

    i: tl.tensor
    f: tl.tensor
    g: tl.tensor
    o: tl.tensor


class GRUGates(NamedTuple):
    """r, z, n: pre-activations, saved activations or gradients. h_n: recurrent projection of n, not included in n."""

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
    """x: pre-activations without peepholes. S: storage type of c. Returns h, c and the saved gates."""
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
    """Returns the gradients of the pre-activations and of c_prev, and c before zoneout, from which h is computed."""
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
    """x: r and z include the recurrent projection. Returns h and the saved gates."""
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
    """Returns the gradients of the pre-activations and the term dh * z of the gradient of h_prev.

    n is the gradient of the input projection of n, h_n that of its recurrent projection.
    """
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
    """x: f includes the recurrent projection. Returns h and the saved gates."""
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
    """As gru_backward; the last result is the term dh * (1 - f) of the gradient of h_prev."""
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
