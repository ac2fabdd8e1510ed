"""Activations, loads and stores of the recurrent kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))  # at most 1: no overflow
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """tanh. Uses the polynomials of the Cephes library, http://www.netlib.org/cephes, near 0, where 1 - e cancels."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    x_near = tl.minimum(tl.maximum(x, -1.0), 1.0)  # limits the polynomials, which are valid near 0, to avoid overflow
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
def relu(x):
    return tl.where(x < 0, 0.0, x)  # propagates NaN


@triton.jit
def clip(x, limit):
    """Clamps x to [-limit, limit]; propagates NaN."""
    x = tl.where(x > limit, limit, x)
    return tl.where(x < -limit, -limit, x)


@triton.jit
def activate(x, gate_clip, TANH: tl.constexpr):
    """The activation and its saved form: 2 or -2 where gate_clip limits x, which makes the gradient 0.

    gate_clip: None without the option.
    """
    before = x
    if gate_clip is not None:
        x = clip(x, gate_clip)
    value = tanh(x) if TANH else sigmoid(x)
    saved = value
    if gate_clip is not None:
        saved = tl.where(before >= gate_clip, 2.0, tl.where(before <= -gate_clip, -2.0, value))
    return value, saved


@triton.jit
def restore(saved, gate_clip, TANH: tl.constexpr):
    """The activation and its derivative, from the saved form."""
    value = saved
    if gate_clip is not None:
        at_limit = tl.abs(saved) > 1.5
        limit = tl.where(saved > 0, gate_clip, -gate_clip)
        value = tl.where(at_limit, tanh(limit) if TANH else sigmoid(limit), saved)
    slope = 1.0 - value * value if TANH else value * (1.0 - value)
    if gate_clip is not None:
        slope = tl.where(at_limit, 0.0, slope)
    return value, slope


@triton.jit
def load(p, o, m, ACC: tl.constexpr):
    return tl.load(p + o, mask=m, other=0).to(ACC)


@triton.jit
def store(p, o, value, m):
    tl.store(p + o, value.to(p.dtype.element_ty), mask=m)
