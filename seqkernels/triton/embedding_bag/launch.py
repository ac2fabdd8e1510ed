"""Launchers of the kernels of bags.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag, U rows that occur.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...functional._checks import IndexRuntimeError, ValueRuntimeError
from .backward import (
    Occurrences,
    Positions,
    positions_kernel,
    table_gradient_kernel,
    weights_gradient_kernel,
)
from .bags import (
    BY_COUNT,
    BY_WEIGHT,
    DTYPES,
    MAX,
    MEAN,
    MIN,
    NO_FAULT,
    SUM,
    Bags,
    Table,
)
from .forward import embedding_bag_forward_kernel


class Config(NamedTuple):
    """Launch configuration of the forward kernel."""

    BB: int  # bags per program
    BR: int  # rows of a bag per tile
    BD: int  # columns per program
    num_warps: int
    maxnreg: int = 128  # without the limit, ptxas spills registers to raise the occupancy


SHORT = 8  # maximum mean length of bags that share a program
COLUMNS = (16, 32, 64, 128, 256)


def config(D: int, mean_length: float, float64: bool, extreme: bool) -> Config:
    """Configuration with tiles of 4 KiB of float32 rows per warp: 32 elements per lane, in 8 loads of 16 bytes.

    float64 halves the number of elements, and so do modes that also store positions.
    """
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
    """All results of `config`."""
    return sorted({config(D, L, float64, extreme) for D in COLUMNS for L in (SHORT, SHORT + 1, 1 << 20)})


def unsupported(weight: Tensor, indices: Tensor) -> list[str]:
    """Reasons why these kernels do not support the inputs; empty if they do."""
    reasons = []
    if weight.device.type != "cuda" and not interpreted():
        reasons.append(f"the table is on {weight.device}")
    if indices.device != weight.device:
        reasons.append(f"the table is on {weight.device} and the indices are on {indices.device}")
    if weight.dtype not in DTYPES:
        reasons.append(f"dtype {weight.dtype} is none of {', '.join(str(d) for d in DTYPES)}")
    return reasons


def forward(
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
    """The op seqkernels_triton::embedding_bag_forward. Autograd does not record this function.

    Args:
        weight: [E, D] float64, float32, float16 or bfloat16, with any strides.
        indices: int32 or int64, [N] with offsets, or [B, L] without.
        offsets: int32 or int64, [B] start of each bag, or [B + 1] with include_last_offset.
        per_sample_weights: shaped like indices, of the table's dtype, or float32 with a 16-bit table.
        mode: 0 sum, 1 mean, 2 max, 3 min.
        padding_idx: row excluded from the reduction; -1: none.
        mean_by: divisor of a mean: 0, the number of rows, or 1, the sum of their weights.
        fault: int64 [2], output: the first position of an index outside the table, and the first bag with invalid
            offsets, or NO_FAULT. The kernel skips these rows and bags and reads nothing out of bounds. If None, the
            call synchronizes and raises instead.
    Returns:
        output: [B, D], dtype of weight, accumulated in float32, or float64 for float64.
        arg: for max and min int32 [B, D], the position of the selected row in the bag, -1 for a bag without rows;
            otherwise [0].
    Raises:
        ValueError: invalid shape, option or offset. IndexError: index out of range. TypeError: invalid dtype.
        NotImplementedError: these kernels do not support the inputs; the message lists the reasons.
    Deterministic: yes. The last bits of the sum of a bag depend on the mean length of the bags in the call.
    """
    L = _check(weight, indices, offsets, per_sample_weights, mode, include_last_offset, mean_by, fault)
    E, D = weight.shape
    B, N = number_of(indices, offsets, include_last_offset)
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
            table=Table(weight, *weight.stride()),
            bags=bags_of(indices, offsets, per_sample_weights),
            p_out=out,
            p_arg=arg if extreme else None,
            p_fault=found,
            E=E,
            D=D,
            N=N,
            B=B,
            L=L,
            padding=padding_idx,
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
    """Checks the arguments. Returns the length L of the bags without offsets, 0 with offsets."""
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
            raise ValueError(f"embedding_bag: {name} must be on the device of weight, {weight.device}, got {t.device}")
    if weights is not None:
        if weights.shape != indices.shape:
            raise ValueError(
                f"embedding_bag: per_sample_weights must have the shape of indices, {list(indices.shape)}, "
                f"got {list(weights.shape)}"
            )
        if weights.dtype != weight.dtype and not (weights.dtype == torch.float32 and weight.dtype.itemsize == 2):
            raise TypeError(
                f"embedding_bag: per_sample_weights must have weight's dtype, {weight.dtype}, or float32 with a 16-bit "
                f"table, got {weights.dtype}"
            )
    if fault is not None and (fault.dtype != torch.int64 or fault.shape != (2,) or not fault.is_contiguous()):
        raise ValueError(f"embedding_bag: fault must be int64 [2], got {fault.dtype} {list(fault.shape)}")
    return indices.shape[1] if offsets is None else 0


def _raise(fault: Tensor, E: int, N: int, indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> None:
    at, bag = fault.tolist()
    if offsets is not None and bag != NO_FAULT:
        begin, end = ([*offsets.tolist(), *[N] * (not include_last_offset)])[bag : bag + 2]
        raise ValueRuntimeError(
            f"embedding_bag: offsets must begin at 0, not decrease and end at {N} at most, "
            f"got {begin} and then {end} at bag {bag}"
        )
    if at != NO_FAULT:
        raise IndexRuntimeError(
            f"embedding_bag: indices must lie in [0, {E}), got {int(indices.flatten()[at])} at position {at}"
        )


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were imported, so that they run on the CPU in numpy."""
    return not isinstance(embedding_bag_forward_kernel, triton.JITFunction)


def number_of(indices: Tensor, offsets: Tensor | None, include_last_offset: bool) -> tuple[int, int]:
    """B and N."""
    if offsets is None:
        return indices.shape[0], indices.numel()
    return max(offsets.numel() - include_last_offset, 0), indices.numel()


def bags_of(indices: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Bags:
    return Bags(*(None if t is None else t.contiguous() for t in (indices, offsets, weights)))


# ---- backward

ROWS = 8  # positions per tile of a backward program
WIDEST = 128  # maximum columns per tile
BLOCK = 64  # positions per tile of positions_kernel, which reads no rows
MOST_REGISTERS = 255  # per thread; without the limit, ptxas spills registers to raise the occupancy


class Call(NamedTuple):
    """The bags of one call, in the argument order of the backward ops."""

    indices: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    mode: int
    padding_idx: int = -1
    include_last_offset: bool = False
    mean_by: int = BY_COUNT

    @property
    def by_weight(self) -> bool:
        return self.mode == MEAN and self.mean_by == BY_WEIGHT and self.weights is not None

    def constants(self) -> dict[str, Any]:
        return dict(
            BY_WEIGHT=self.by_weight,
            HAS_PADDING=self.padding_idx >= 0,
            HAS_LAST_OFFSET=self.include_last_offset and self.offsets is not None,
        )


def table_gradient(
    grad: Tensor, arg: Tensor, E: int, call: Call, by_frequency: bool, sparse: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient [E, D] of the table, and None. With `sparse`, gradients [U, D] of the rows that occur, and rows [U]."""
    grad = grad.contiguous()
    D, device = grad.shape[1], grad.device
    B, N = number_of(call.indices, call.offsets, call.include_last_offset)
    acc = torch.float64 if grad.dtype == torch.float64 else torch.float32
    bags = bags_of(call.indices, call.offsets, call.weights)
    positions = Positions(
        torch.full((N,), E, dtype=torch.int64, device=device),
        torch.zeros(N, dtype=torch.int64, device=device),
        torch.zeros(N, dtype=torch.int32, device=device),
        torch.ones(B, dtype=acc, device=device) if call.mode == MEAN else None,
    )
    if B and N:
        L = call.indices.shape[1] if call.offsets is None else 0
        sizes = dict(E=E, N=N, B=B, L=L, padding=call.padding_idx)
        positions_kernel[(B,)](
            bags=bags, positions=positions, **sizes, **call.constants(), BR=BLOCK, num_warps=1, maxnreg=MOST_REGISTERS
        )
    row, position = torch.sort(positions.p_row, stable=True)
    end = torch.searchsorted(row, row, right=True)
    rows, output = None, None
    if sparse:
        is_first = (row < E) & (row != torch.nn.functional.pad(row[:-1], (1, 0), value=-1)[:N])
        rows, output = row[is_first], is_first.cumsum(0) - 1
    out = grad.new_zeros(E if rows is None else rows.numel(), D)
    if N and D and out.numel():
        BD = min(max(triton.next_power_of_2(D), COLUMNS[0]), WIDEST)
        table_gradient_kernel[(N, triton.cdiv(D, BD))](
            p_grad=grad,
            p_arg=arg.contiguous() if call.mode in (MAX, MIN) else None,
            p_weights=bags.p_weights,
            positions=positions,
            occurrences=Occurrences(row, position, end, output),
            p_out=out,
            E=E,
            N=N,
            D=D,
            BY_FREQUENCY=by_frequency,
            FLOAT64=grad.dtype == torch.float64,
            BK=ROWS,
            BD=BD,
            num_warps=1,
            maxnreg=MOST_REGISTERS,
        )
    return out, rows


def weights_gradient(grad: Tensor, arg: Tensor, weight: Tensor, call: Call) -> Tensor:
    """Gradient of the per-sample weights, shaped like them."""
    assert call.weights is not None
    grad, (E, D) = grad.contiguous(), weight.shape
    B, N = number_of(call.indices, call.offsets, call.include_last_offset)
    out = torch.zeros(call.weights.shape, dtype=call.weights.dtype, device=grad.device)
    if B and N:
        weights_gradient_kernel[(B,)](
            p_grad=grad,
            p_arg=arg.contiguous() if call.mode in (MAX, MIN) else None,
            table=Table(weight, *weight.stride()),
            bags=bags_of(call.indices, call.offsets, call.weights),
            p_out=out,
            E=E,
            N=N,
            B=B,
            L=call.indices.shape[1] if call.offsets is None else 0,
            padding=call.padding_idx,
            D=D,
            MODE=call.mode,
            **call.constants(),
            FLOAT64=weight.dtype == torch.float64,
            BR=ROWS,
            BD=min(max(triton.next_power_of_2(D), COLUMNS[0]), WIDEST),
            num_warps=1,
            maxnreg=MOST_REGISTERS,
        )
    return out
