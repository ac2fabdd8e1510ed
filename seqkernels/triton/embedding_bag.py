"""EmbeddingBag forward in Triton.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM, MEAN, MAX, MIN = range(4)  # as the ops take a mode
BY_COUNT, BY_WEIGHT = range(2)  # and what a mean divides by
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

NO_FAULT = torch.iinfo(torch.int64).max
_NO_FAULT = tl.constexpr(NO_FAULT)
_NO_POSITION = tl.constexpr(2**31 - 1)
_MEAN, _MAX, _MIN = tl.constexpr(MEAN), tl.constexpr(MAX), tl.constexpr(MIN)


# Grid: (bags / BB, columns / BD). A program gathers BB x BR rows at a time, BD columns of each, and keeps as many
# running results as it has rows in flight; they meet once, after the last row.
@triton.jit(do_not_specialize=["E", "N", "B", "L", "padding"])
def embedding_bag_forward_kernel(
    p_table,  # [E, D], strides s_row, s_column
    p_indices,  # [N]
    p_offsets,  # [B] or [B + 1], or None: every bag has L indices
    p_weights,  # [N] or None
    p_out,  # [B, D]
    p_arg,  # int32 [B, D] of max and min, else None
    p_fault,  # int64 [2]: the first position of a bad index, and the first bag with bad offsets
    E,
    D,
    N,
    B,
    L,
    padding,
    s_row,
    s_column,
    MODE: tl.constexpr,
    BY_WEIGHT: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_LAST_OFFSET: tl.constexpr,
    FLOAT64: tl.constexpr,
    BB: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    EXTREME: tl.constexpr = MODE >= _MAX
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    i_b = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_b = i_b < B
    m_d = i_d < D

    if p_offsets is None:
        b_begin = i_b * L
        b_length = tl.where(m_b, L, 0).to(tl.int64)
    else:
        b_begin = tl.load(p_offsets + i_b, mask=m_b, other=0).to(tl.int64)
        m_next = m_b if HAS_LAST_OFFSET else i_b + 1 < B
        b_end = tl.where(m_next, tl.load(p_offsets + i_b + 1, mask=m_next, other=0).to(tl.int64), N)
        m_misfit = m_b & ((b_begin < 0) | (b_end < b_begin) | (b_end > N) | ((i_b == 0) & (b_begin != 0)))
        i_fault = tl.min(tl.where(m_misfit, i_b, _NO_FAULT), axis=0)
        if i_fault != _NO_FAULT:
            tl.atomic_min(p_fault + 1, i_fault)
        b_length = tl.where(m_b & (m_misfit == 0), b_end - b_begin, 0)

    # -0: what a sum of -0 alone needs to stay -0. Triton makes 0 of a literal -0.0, and 0 - x of -x.
    b_zero = tl.full([], -1, ACC) * 0.0
    if EXTREME:
        b_acc = tl.zeros([BB, BR, BD], ACC)
        b_at = tl.full([BB, BR, BD], -1, tl.int32)  # the position in its bag that each running result came from
    else:
        b_acc = tl.full([BB, BR, BD], 1, ACC) * b_zero
        b_count = tl.zeros([BB, BR], tl.int32)
        b_divisor = tl.zeros([BB, BR], ACC)
    b_fault = tl.full([BB, BR], _NO_FAULT, tl.int64)

    for i_r in range(0, tl.max(b_length, axis=0), BR):
        i_k = (i_r + tl.arange(0, BR)).to(tl.int64)  # position in its bag
        o_k = b_begin[:, None] + i_k[None, :]
        m_k = i_k[None, :] < b_length[:, None]
        b_row = tl.load(p_indices + o_k, mask=m_k, other=0).to(tl.int64)
        m_fault = m_k & ((b_row < 0) | (b_row >= E))
        b_fault = tl.where(m_fault & (o_k < b_fault), o_k, b_fault)
        m_k = m_k & (m_fault == 0)
        if HAS_PADDING:
            m_k = m_k & (b_row != padding)
        m_row = m_k[:, :, None] & m_d[None, None, :]
        b_value = tl.load(
            p_table + b_row[:, :, None] * s_row + i_d[None, None, :].to(tl.int64) * s_column, mask=m_row, other=0
        ).to(ACC)
        if p_weights is not None:
            b_weight = tl.load(p_weights + o_k, mask=m_k, other=0).to(ACC)
            b_value = b_value * b_weight[:, :, None]
        if EXTREME:
            if MODE == _MIN:
                b_value = b_value * -1.0
            m_better = (b_at < 0) | (b_value > b_acc) | ((b_value != b_value) & (b_acc == b_acc))
            m_better = m_better & m_row
            b_acc = tl.where(m_better, b_value, b_acc)
            b_at = tl.where(m_better, i_k.to(tl.int32)[None, :, None], b_at)
        else:
            b_acc += tl.where(m_row, b_value, b_zero)
            b_count += m_k.to(tl.int32)
            if BY_WEIGHT:
                b_divisor += b_weight

    i_fault = tl.min(tl.min(b_fault, axis=1), axis=0)
    if i_fault != _NO_FAULT:
        tl.atomic_min(p_fault, i_fault)

    if EXTREME:
        m_found = b_at >= 0
        m_nan = m_found & (b_acc != b_acc)
        b_best = tl.max(tl.where(m_found & (m_nan == 0), b_acc, float("-inf")), axis=1)
        m_best = m_found & (b_acc == b_best[:, None, :])
        i_best = tl.min(tl.where(m_best, b_at, _NO_POSITION), axis=1)
        i_nan = tl.min(tl.where(m_nan, b_at, _NO_POSITION), axis=1)
        i_best = tl.where(i_nan != _NO_POSITION, i_nan, i_best)  # [BB, BD]
        # The value itself, with its sign and its NaN's bits: the one that stands at that position.
        b_out = tl.sum(tl.where(b_at == i_best[:, None, :], b_acc, b_zero), axis=1)
        if MODE == _MIN:
            b_out = b_out * -1.0
        m_empty = i_best == _NO_POSITION
        i_best = tl.where(m_empty, -1, i_best)
    else:
        b_out = tl.sum(b_acc, axis=1)
        b_total = tl.sum(b_count, axis=1)
        m_empty = (b_total == 0)[:, None]
        if MODE == _MEAN:
            b_over = tl.sum(b_divisor, axis=1) if BY_WEIGHT else b_total.to(ACC)
            b_over = tl.where(b_total == 0, 1.0, b_over)[:, None]
            b_out = b_out / b_over if FLOAT64 else tl.div_rn(b_out, b_over)

    o_out = i_b[:, None] * D + i_d[None, :]
    m_out = m_b[:, None] & m_d[None, :]
    tl.store(p_out + o_out, tl.where(m_empty, 0.0, b_out).to(p_out.dtype.element_ty), mask=m_out)
    if EXTREME:
        tl.store(p_arg + o_out, i_best, mask=m_out)


class Config(NamedTuple):
    """What a program takes on, and with how many warps."""

    BB: int  # bags
    BR: int  # rows of each at a time
    BD: int  # columns
    num_warps: int
    # Said aloud, else ptxas spills a register here and there to come down to the next lower level of use.
    maxnreg: int = 128


SHORT = 8  # bags of up to so many indices, on average, share a program
COLUMNS = (16, 32, 64, 128, 256)


def config(D: int, mean_length: float, float64: bool, extreme: bool) -> Config:
    """4 KiB of float32 rows in flight per warp: 32 elements per lane, that is 8 loads of 16 bytes. Half of that where a
    lane keeps 64-bit values or their positions as well."""
    BD = min(max(triton.next_power_of_2(D), COLUMNS[0]), COLUMNS[-1])
    tile = 1024 >> float64 >> extreme
    rows = max(tile // BD, 1)
    if mean_length <= SHORT:
        BR = min(rows, SHORT // 2)
        return Config(rows // BR, BR, BD, 1)
    if mean_length <= 4 * rows:
        return Config(1, rows, BD, 1)
    return Config(1, 4 * rows, BD, 4)


def configs(float64: bool, extreme: bool) -> list[Config]:
    """Every one that `config` may choose."""
    return sorted({config(D, L, float64, extreme) for D in COLUMNS for L in (SHORT, SHORT + 1, 1 << 20)})


def unsupported(weight: Tensor, indices: Tensor) -> list[str]:
    """Reasons why these kernels cannot take such inputs; an empty list: they can."""
    reasons = []
    if weight.device.type != "cuda" and not _interpreted():
        reasons.append(f"the table is on {weight.device}")
    if indices.device != weight.device:
        reasons.append(f"the table is on {weight.device} and the indices are on {indices.device}")
    if weight.dtype not in DTYPES:
        reasons.append(f"dtype {weight.dtype} is none of {', '.join(str(d) for d in DTYPES)}")
    return reasons


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    mode: int = SUM,
    padding_idx: int = -1,
    include_last_offset: bool = False,
    mean_by: int = BY_COUNT,
    *,
    fault: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the op seqkernels::embedding_bag_forward returns, by a Triton kernel. First order: no gradient is recorded.

    Args:
        weight: [E, D] float64, float32, float16 or bfloat16, with any strides.
        indices: int32 or int64, [N] with offsets, or [B, L] without.
        offsets: int32 or int64, [B] where each bag begins, or [B + 1] with include_last_offset.
        per_sample_weights: like indices, of the table's dtype, or float32 with a 16-bit table.
        mode: 0 sum, 1 mean, 2 max, 3 min.
        padding_idx: this row does not count; -1: none.
        mean_by: a mean divides by 0 the number of rows, 1 the sum of their weights.
        fault: int64 [2], written: the first position of an index outside the table, and the first bag whose offsets do
            not fit, or NO_FAULT. Such rows and bags are left out, and nothing outside is read. None: the call waits
            for the kernel and raises instead.
    Returns:
        output [B, D], dtype of weight, accumulated in float32 (float64 of float64).
        arg: int32 [B, D] of max and min, which position of its bag won, -1 where none did; else [0].
    Raises:
        ValueError: a shape, an option, an index or an offset does not fit. TypeError: a dtype does not.
        NotImplementedError: these kernels do not take such inputs; the message says why.
    Deterministic: yes. The last bits of a bag's sum also follow from the mean length of the bags of its call.
    """
    L = _check(weight, indices, offsets, per_sample_weights, mode, include_last_offset, mean_by, fault)
    E, D = weight.shape
    if offsets is None:
        B, N = indices.shape[0], indices.numel()
    else:
        B, N = max(offsets.numel() - include_last_offset, 0), indices.numel()
    out = weight.new_empty(B, D)
    extreme = mode in (MAX, MIN)
    arg = torch.empty((B, D) if extreme else 0, dtype=torch.int32, device=weight.device)
    found = torch.empty(2, dtype=torch.int64, device=weight.device) if fault is None else fault
    found.fill_(NO_FAULT)
    if B and D:
        float64 = weight.dtype == torch.float64
        chosen = config(D, N / B, float64, extreme)
        grid = triton.cdiv(B, chosen.BB), triton.cdiv(D, chosen.BD)
        embedding_bag_forward_kernel[grid](
            weight,
            indices.contiguous(),
            None if offsets is None else offsets.contiguous(),
            None if per_sample_weights is None else per_sample_weights.contiguous(),
            out,
            arg if extreme else None,
            found,
            *(E, D, N, B, L, padding_idx, *weight.stride()),
            MODE=mode,
            BY_WEIGHT=mode == MEAN and mean_by == BY_WEIGHT and per_sample_weights is not None,
            HAS_PADDING=padding_idx >= 0,
            HAS_LAST_OFFSET=include_last_offset,
            FLOAT64=float64,
            **chosen._asdict(),
        )
        if fault is None:
            _raise(found, E, N, indices, offsets, include_last_offset)
    return out, arg


def _check(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    mode: int,
    include_last_offset: bool,
    mean_by: int,
    fault: Tensor | None,
) -> int:
    """Raises where an argument does not fit; L where every bag has as many indices, else 0."""
    if reasons := unsupported(weight, indices):
        raise NotImplementedError(f"embedding_bag: the Triton kernel does not run: {'; '.join(reasons)}")
    if weight.dim() != 2:
        raise ValueError(f"embedding_bag: weight must have shape [E, D], got {list(weight.shape)}")
    if mode not in (SUM, MEAN, MAX, MIN):
        raise ValueError(f"embedding_bag: mode must be 0 (sum), 1 (mean), 2 (max) or 3 (min), got {mode}")
    if mean_by not in (BY_COUNT, BY_WEIGHT):
        raise ValueError(f"embedding_bag: mean_by must be 0 (count) or 1 (weight), got {mean_by}")
    for name, t in (("indices", indices), ("offsets", offsets)):
        if t is not None and t.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"embedding_bag: {name} must be int32 or int64, got {t.dtype}")
    if indices.dim() != (2 if offsets is None else 1):
        shape = "[B, L] without offsets" if offsets is None else "[N] with offsets"
        raise ValueError(f"embedding_bag: indices must have shape {shape}, got {list(indices.shape)}")
    if offsets is not None:
        if offsets.dim() != 1:
            raise ValueError(f"embedding_bag: offsets must have one dimension, got {list(offsets.shape)}")
        if include_last_offset and not offsets.numel():
            raise ValueError("embedding_bag: offsets must have at least one element with include_last_offset, got none")
    elif include_last_offset:
        raise ValueError("embedding_bag: include_last_offset must be False without offsets, got True")
    for name, t in (("offsets", offsets), ("per_sample_weights", weights), ("fault", fault)):
        if t is not None and t.device != weight.device:
            raise ValueError(f"embedding_bag: {name} must be on {weight.device} as weight is, got {t.device}")
    if weights is not None:
        if weights.shape != indices.shape:
            raise ValueError(
                f"embedding_bag: per_sample_weights must have the shape of indices, {list(indices.shape)}, "
                f"got {list(weights.shape)}"
            )
        if weights.dtype != weight.dtype and not (weights.dtype == torch.float32 and weight.dtype.itemsize == 2):
            raise TypeError(
                f"embedding_bag: per_sample_weights must be {weight.dtype} as weight is, or float32 with a 16-bit "
                f"table, got {weights.dtype}"
            )
    if fault is not None and (fault.dtype != torch.int64 or fault.shape != (2,) or not fault.is_contiguous()):
        raise ValueError(f"embedding_bag: fault must be int64 [2], got {fault.dtype} {list(fault.shape)}")
    return indices.shape[1] if offsets is None else 0


def _raise(fault: Tensor, E: int, N: int, indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> None:
    at, bag = fault.tolist()
    if offsets is not None and bag != NO_FAULT:
        begin, end = ([*offsets.tolist(), *[N] * (not include_last_offset)])[bag : bag + 2]
        raise ValueError(
            f"embedding_bag: offsets must begin at 0, not decrease and end at {N} at most, "
            f"got {begin} and then {end} at bag {bag}"
        )
    if at != NO_FAULT:
        raise ValueError(
            f"embedding_bag: indices must lie in [0, {E}), got {int(indices.flatten()[at])} at position {at}"
        )


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when this file was imported: the kernels then run on the CPU, in numpy."""
    return not isinstance(embedding_bag_forward_kernel, triton.JITFunction)
