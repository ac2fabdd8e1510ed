"""Arguments shared by the kernels of bags, and the bounds of a bag.

Pointers and strides are grouped in the named tuples below. Sizes that vary from call to call are separate arguments,
because Triton 3.6 ignores do_not_specialize inside of tuples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

SUM, MEAN, MAX, MIN = range(4)  # modes of the ops
BY_COUNT, BY_WEIGHT = range(2)  # divisor of a mean: the number of rows, or the sum of their weights
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NO_FAULT = 2**63 - 1
SIZES = ["E", "N", "B", "L", "padding"]  # not specialized


class Table(NamedTuple):
    p_table: Any  # [E, D]
    s_row: Any
    s_column: Any


class Bags(NamedTuple):
    p_indices: Any  # [N]
    p_offsets: Any  # [B] or [B + 1], or None if each bag has L indices
    p_weights: Any  # [N] per-sample weights, or None


@triton.jit
def bounds(bags, i_b, m_b, N, B, L, HAS_LAST_OFFSET: tl.constexpr):
    """First position and number of indices of each bag, and whether its offsets are invalid, which gives 0 indices."""
    if bags.p_offsets is None:
        begin = i_b * L
        m_misfit = i_b < 0
        length = tl.where(m_b, L, 0).to(tl.int64)
    else:
        begin = tl.load(bags.p_offsets + i_b, mask=m_b, other=0).to(tl.int64)
        m_next = m_b if HAS_LAST_OFFSET else i_b + 1 < B
        end = tl.where(m_next, tl.load(bags.p_offsets + i_b + 1, mask=m_next, other=0).to(tl.int64), N)
        m_misfit = m_b & ((begin < 0) | (end < begin) | (end > N) | ((i_b == 0) & (begin != 0)))
        length = tl.where(m_b & (m_misfit == 0), end - begin, 0)
    return begin, length, m_misfit
