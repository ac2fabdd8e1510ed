"""Functions that the attention kernels share, and the groups of arguments that they take.

Rows are queries, keys, values or output rows of one head of one sequence. Scores are in units of log2, so that the
exponential is exp2. Query i attends to the keys from i + offset - left to i + offset + right.

Strides are arguments of the kernels in groups. Pointers that may be None, and sizes, are plain arguments: Triton 3.6
ignores do_not_specialize inside a tuple.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST32 = tl.constexpr(-3.4028234663852886e38)
LOWEST64 = tl.constexpr(-1.7976931348623157e308)

# Not specialized. scale, cap and rescale are the bits of a float64.
SIZES = ["B", "H", "G", "T_q", "T_k", "T_mq", "T_mk", "blocks", "scale", "cap", "left", "right", "lower_right"]
SIZES += ["threshold", "rescale"]


class Strides(NamedTuple):
    """Strides of a [B, heads, T, columns] tensor; of packed rows B is 1."""

    b: Any
    h: Any
    t: Any
    d: Any


class MaskStrides(NamedTuple):
    """Strides of the [B or 1, H or 1, Tq or 1, Tk or 1] mask: 0 for a dimension of size 1, and without a mask."""

    b: Any
    h: Any
    q: Any
    k: Any


class Rows(NamedTuple):
    """Rows of one head of one sequence, [L, columns]."""

    p: tl.tensor
    L: tl.tensor
    s_t: tl.tensor
    s_d: tl.tensor


class Window(NamedTuple):
    """Which keys a query attends to."""

    L_q: tl.tensor
    L_k: tl.tensor
    offset: tl.tensor
    left: tl.tensor
    right: tl.tensor


class MaskLayout(NamedTuple):
    """Strides and sizes of the mask of one head of one sequence."""

    s_q: tl.tensor
    s_k: tl.tensor
    T_q: tl.tensor
    T_k: tl.tensor


class Scaling(NamedTuple):
    slope: tl.tensor  # of ALiBi
    scale: tl.tensor
    cap: tl.tensor


class Dropout(NamedTuple):
    seed: tl.tensor
    i_bh: tl.tensor  # sequence and head
    threshold: tl.tensor  # a weight is kept if its random uint32 is at least this


@triton.jit
def float_from_bits(bits, ACC: tl.constexpr):
    """The number whose float64 bits are passed as an integer: Triton rounds a float argument to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def sequence_bounds(p_cu, p_lengths, i_b, T):
    """First row and number of rows of a sequence, clamped to the T rows of the tensor."""
    begin = (T * 0).to(tl.int64)
    end = T.to(tl.int64)
    if p_cu is not None:
        begin = tl.minimum(tl.maximum(tl.load(p_cu + i_b).to(tl.int64), begin), end)
        end = tl.minimum(tl.maximum(tl.load(p_cu + i_b + 1).to(tl.int64), begin), end)
    elif p_lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(p_lengths + i_b).to(tl.int64), begin), end)
    return begin, (end - begin).to(tl.int32)


@triton.jit
def fill_after_last_sequence(
    p_out, p_cu, B, T, i_h, i_block, blocks, first_d, value, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):
    """Write value to the packed rows of this head after the last sequence, in columns first_d to first_d + BD. out is
    [1, H, T, D]."""
    begin = tl.minimum(tl.maximum(tl.load(p_cu + B).to(tl.int64), 0), T)
    o_d = first_d + tl.arange(0, BD)
    for first in range(begin + i_block * ROWS, T, blocks * ROWS):
        o_t = first + tl.arange(0, ROWS)
        p = p_out + (i_h.to(tl.int64) * T + o_t)[:, None] * D + o_d[None, :]
        tl.store(p, tl.full([ROWS, BD], value, p_out.dtype.element_ty), mask=(o_t < T)[:, None] & (o_d < D)[None, :])


@triton.jit
def rows_of(p, strides, i_b, i_h, t, L, G=1):
    """The L rows from row t of batch index i_b, an int64, and head i_h // G."""
    o_rows = i_b * strides.b + (i_h // G).to(tl.int64) * strides.h + t * strides.t
    return Rows(p + o_rows, L, strides.t, strides.d)


@triton.jit
def load_rows(rows, first, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """[ROWS, BD] from row first; zeros past the last row and column. WHOLE: all ROWS rows exist."""
    i_t = tl.arange(0, ROWS)
    i_d = tl.arange(0, BD)
    p = rows.p + tl.cast(first, tl.int64) * rows.s_t + (i_t[:, None] * rows.s_t + i_d[None, :] * rows.s_d)
    if WHOLE:
        if D == BD:
            return tl.load(p)
        return tl.load(p, mask=(i_d < D)[None, :], other=0.0)
    if D == BD:
        return tl.load(p, mask=(first + i_t < rows.L)[:, None], other=0.0)
    return tl.load(p, mask=(first + i_t < rows.L)[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def load_chunk(rows, first, first_d, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BD] from row first and column first_d; zeros past the last row and column."""
    i_t = tl.arange(0, ROWS)
    i_d = first_d + tl.arange(0, BD)
    p = rows.p + tl.cast(first, tl.int64) * rows.s_t + (i_t[:, None] * rows.s_t + i_d[None, :] * rows.s_d)
    return tl.load(p, mask=(first + i_t < rows.L)[:, None] & (i_d < D)[None, :], other=0.0)


@triton.jit
def products(
    x,
    first_x,
    y,
    first_y,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BX: tl.constexpr,
    BY: tl.constexpr,
):
    """[BX, BY] dot products of rows of x and rows of y. Heads of more than BD columns are read in chunks of columns."""
    if D <= BD:
        b_x = load_rows(x, first_x, D, BD, BX, WHOLE=False)
        b_y = load_rows(y, first_y, D, BD, BY, WHOLE=False)
        return tl.dot(b_x, tl.trans(b_y), input_precision=PRECISION, out_dtype=ACC)
    b_z = tl.zeros([BX, BY], ACC)
    for first_d in range(0, D, BD):
        b_x = load_chunk(x, first_x, first_d, D, BD, BX)
        b_y = load_chunk(y, first_y, first_d, D, BD, BY)
        b_z = tl.dot(b_x, tl.trans(b_y), b_z, input_precision=PRECISION, out_dtype=ACC)
    return b_z


@triton.jit
def has_nan(x):
    """Whether any element is NaN. One reduction over all elements: Triton 3.6 does not compile two for sm_100."""
    return tl.max(tl.reshape((x != x).to(tl.int32), [x.shape[0] * x.shape[1]]), 0) != 0


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """Hyperbolic tangent. EXACT: accurate near 0 too, where the quotient cancels; the polynomials are those of the
    Cephes library, http://www.netlib.org/cephes"""
    if EXACT:
        e = tl.exp2(-2.0 * LOG2E * tl.abs(x))
        y = (1.0 - e) / (1.0 + e)
        near = tl.minimum(tl.maximum(x, -1.0), 1.0)  # clamped: the polynomials overflow for large x
        z = near * near
        if x.dtype == tl.float64:
            above = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
            below = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
            r = above / below
        else:
            r = -5.70498872745e-3 * z + 2.06390887954e-2
            r = (r * z - 5.37397155531e-2) * z + 1.33314422036e-1
            r = r * z - 3.33332819422e-1
        y = tl.where(z < 0.390625, near + near * z * r, tl.where(x < 0, -y, y))
        return tl.where(x == x, y, x)
    return 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E * x))


@triton.jit
def apply_window(b_s, i_q, i_k, window, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The scores, -inf for keys outside of the window or past the last key."""
    m_visible = i_k < window.L_k
    if RIGHT:
        m_visible = m_visible & (i_k <= i_q + (window.offset + window.right))
    if LEFT:
        m_visible = m_visible & (i_k >= i_q + (window.offset - window.left))
    return tl.where(m_visible, b_s, float("-inf"))


@triton.jit
def scores_of(
    b_s,  # dot products of queries and keys, [queries, keys] or [keys, queries]
    first,  # query
    i_q,  # positions in their sequences, broadcast to b_s
    i_k,
    window,
    p_mask,  # of this head of this sequence, or None
    layout,  # of the mask
    scaling,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    EXACT: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Scores in units of log2, with the softcap, ALiBi and mask applied, -inf for masked keys; and tanh(score / cap).

    EDGE: apply the window and the end of the keys.
    """
    b_t = b_s
    if CAP:
        b_t = tanh(b_s * (scaling.scale / scaling.cap), EXACT)
        b_s = b_t * (scaling.cap * LOG2E)
    else:
        b_s = b_s * (scaling.scale * LOG2E)
    if ALIBI:
        b_s -= (scaling.slope * LOG2E) * tl.abs(i_q + window.offset - i_k).to(b_s.dtype)
    if p_mask is not None:
        o_q = tl.minimum(i_q, layout.T_q - 1) - first
        o_k = tl.minimum(i_k, layout.T_k - 1)
        b_m = tl.load(p_mask + tl.cast(first, tl.int64) * layout.s_q + (o_q * layout.s_q + o_k * layout.s_k))
        if p_mask.dtype.element_ty == tl.uint8:
            b_s = tl.where(b_m != 0, b_s, float("-inf"))
        else:
            b_m = b_m.to(b_s.dtype)
            # As in torch, a mask of the lowest finite number gives finite scores.
            b_s += tl.maximum(b_m * LOG2E, LOWEST64 if b_s.dtype == tl.float64 else LOWEST32)
            b_s = tl.where(b_m == float("-inf"), float("-inf"), b_s)
    if EDGE:
        b_s = apply_window(b_s, i_q, i_k, window, LEFT, RIGHT)
    return b_s, b_t


@triton.jit
def kept_weights(dropout, i_q, first_k, BN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which weights dropout keeps: bool [queries, BN], or [BN, queries] if TRANSPOSED. A Philox counter serves four
    keys."""
    i_k = first_k // 4 + tl.arange(0, BN // 4)
    if TRANSPOSED:
        c_k = i_k[:, None] + (i_q * 0)[None, :]
        c_q = (i_k * 0)[:, None] + i_q[None, :]
    else:
        c_k = i_k[None, :] + (i_q * 0)[:, None]
        c_q = (i_k * 0)[None, :] + i_q[:, None]
    r0, r1, r2, r3 = tl.philox(dropout.seed, c_k, c_q, c_k * 0 + dropout.i_bh, c_k * 0, n_rounds=7)
    t = dropout.threshold.to(tl.uint32)
    r02 = tl.join((r0 >= t).to(tl.int8), (r2 >= t).to(tl.int8))
    r13 = tl.join((r1 >= t).to(tl.int8), (r3 >= t).to(tl.int8))
    r = tl.join(r02, r13)  # [.., .., 2, 2]: word 2 x + y at [x, y]
    if TRANSPOSED:
        b_kept = tl.reshape(tl.permute(r, (0, 2, 3, 1)), (BN, i_q.shape[0]))
    else:
        b_kept = tl.reshape(r, (i_q.shape[0], BN))
    return b_kept != 0


@triton.jit
def visible_keys(first, window, LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The keys that queries first to first + BM attend to, as begin, whole, until, end: from whole to until are blocks
    of BN keys that all of these queries attend to."""
    last = tl.minimum(first + BM, window.L_q) - 1
    begin = first * 0
    whole = begin
    end = tl.where(first < window.L_q, window.L_k, 0)
    until = end
    if RIGHT:
        until = tl.minimum(end, tl.maximum(first + window.offset + window.right + 1, 0))
        end = tl.minimum(end, tl.maximum(last + window.offset + window.right + 1, 0))
    if LEFT:
        begin = tl.maximum(first + window.offset - window.left, 0) // BN * BN
        whole = tl.minimum((tl.maximum(last + window.offset - window.left, 0) + BN - 1) // BN * BN, end)
    return begin, whole, tl.maximum(until // BN * BN, whole), end


@triton.jit
def attending_queries(first, window, LEFT: tl.constexpr, RIGHT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The queries that attend to keys first to first + BN, as begin, whole, until, end: from whole to until are blocks
    of BM queries that attend to all of these keys."""
    last = tl.minimum(first + BN, window.L_k) - 1
    begin = first * 0
    whole = begin
    end = tl.where(first < window.L_k, window.L_q, 0)
    until = end
    if LEFT:
        until = tl.minimum(end, tl.maximum(first - window.offset + window.left + 1, 0))
        end = tl.minimum(end, tl.maximum(last - window.offset + window.left + 1, 0))
    if RIGHT:
        begin = tl.maximum(first - window.offset - window.right, 0) // BM * BM
        whole = tl.minimum((tl.maximum(last - window.offset - window.right, 0) + BM - 1) // BM * BM, end)
    return begin, whole, tl.maximum(until // BM * BM, whole), end


@triton.jit
def log2_normaliser(p_lse, p_rest, i_q, L_q, ACC: tl.constexpr):
    """base and rest of the weights p = exp2(score - base - rest). base is +inf, so that p is 0, past the last query and
    for a query without keys. Without p_rest, rest is 0."""
    if p_rest is not None:
        b_base = tl.load(p_lse + i_q, mask=i_q < L_q, other=float("inf"))
        return b_base, tl.load(p_rest + i_q, mask=i_q < L_q, other=0.0)
    LOWEST: tl.constexpr = LOWEST64 if tl.float64 == ACC else LOWEST32
    b_lse = tl.load(p_lse + i_q, mask=i_q < L_q, other=float("-inf"))
    b_base = tl.where(b_lse < LOWEST / 2, LOWEST, b_lse * LOG2E)
    return tl.where(b_lse == float("-inf"), float("inf"), b_base), tl.zeros_like(b_base)
