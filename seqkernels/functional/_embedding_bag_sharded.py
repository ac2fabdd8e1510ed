"""Lookups in a table that is a DTensor, sharded by rows or by columns over the processes of a device mesh.

Each process looks up its block of the table with the ordinary kernels:

| table | lookup of a process | placement of the output | gradient of the table |
|---|---|---|---|
| Shard(0), rows | indices of its block, bag by bag | Partial; for max and min Replicate | Shard(0) |
| Shard(1), columns | all indices, its columns | Shard(-1) | Shard(1) |
| Replicate | all indices, or its part of the batch | that of the indices | Partial if the batch is sharded |

Indices, offsets and weights are replicated first, except over mesh dimensions that replicate the table, where the batch
may be sharded. Several mesh dimensions combine. The gradient of per_sample_weights is Partial if the table is sharded.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag, W processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.embedding_bag import Bags, bags_of
from ._checks import IndexRuntimeError, ValueRuntimeError

Local = Callable[..., Any]  # a lookup in the block of this process
Renorm = Callable[[Tensor, Tensor], None]  # applies max_norm to rows of a block: (block, indices)


def is_sharded(t: Any) -> bool:
    """Whether t is a DTensor. Only a caller that has imported torch.distributed.tensor can pass one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def replicated(t: Tensor, like: Any) -> Tensor:
    """t, equal in all processes, as a DTensor of the mesh of `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    found: Tensor = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return found


def rows_here(table: Any) -> tuple[int, int]:
    """First row and number of rows of the block of this process, of a table that is a DTensor."""
    mesh, first, rows = table.device_mesh, 0, int(table.shape[0])
    for m, placement in enumerate(table.placements):
        if placement.is_shard(0):
            block = -(-rows // mesh.size(m))
            skipped = min(mesh.get_local_rank(m) * block, rows)
            first, rows = first + skipped, min(block, rows - skipped)
    return first, rows


class Layout(NamedTuple):
    """Where the tensors of a lookup are, by mesh dimension."""

    mesh: Any
    table: tuple[Any, ...]  # placements
    input: tuple[Any, ...]
    first: int  # first row of this process
    rows: int  # number of rows of this process

    @property
    def by_rows(self) -> bool:
        return any(p.is_shard(0) for p in self.table)


def layout_of(caller: str, table: Any, input: Any, batch_dims: Sequence[int], whole: bool) -> Layout:
    """Layout of a lookup.

    Args:
        batch_dims: dimensions of input that may remain sharded.
        whole: whether each process needs all indices.
    """
    from torch.distributed.tensor import Replicate, Shard

    if not (is_sharded(table) and is_sharded(input)) or table.device_mesh != input.device_mesh:
        raise NotImplementedError(
            f"{caller}: input and weight must both be DTensors of one device mesh where one of them is a DTensor, got "
            f"{_shown(input)} and {_shown(table)}"
        )
    for p in table.placements:
        if type(p) not in (Replicate, Shard):
            raise NotImplementedError(f"{caller}: weight must be replicated or sharded, got the placement {p}")
    placements = []
    for of_table, of_input in zip(table.placements, input.placements):
        kept = of_table.is_replicate() and not whole and any(of_input.is_shard(d) for d in batch_dims)
        placements.append(of_input if kept else Replicate())
    return Layout(table.device_mesh, tuple(table.placements), tuple(placements), *rows_here(table))


def _shown(t: Any) -> str:
    return f"a DTensor of {t.device_mesh}" if is_sharded(t) else type(t).__name__


def local_table(layout: Layout, table: Any, indices: Tensor, renorm: Renorm | None, step: Any) -> Tensor:
    """The block of this process. Its gradient is that of the table, unless an optimiser step replaces it."""
    from torch.distributed.tensor import Partial

    if renorm is not None and len(indices):
        renorm(table.detach().to_local(), indices)
    if step is not None:  # a leaf, which remains without a gradient
        block: Tensor = table.detach().to_local().requires_grad_()
        return block
    batches = [p.is_shard() for p in layout.input]
    gradient = [Partial() if batch else p for p, batch in zip(layout.table, batches)]
    local: Tensor = table.to_local(grad_placements=gradient)
    return local


def local_weights(layout: Layout, weights: Any) -> Tensor | None:
    """per_sample_weights of this process. Each process has the part of their gradient that its block gives."""
    from torch.distributed.tensor import Partial

    if weights is None:
        return None
    gradient = [Partial() if p.is_shard() else q for p, q in zip(layout.table, layout.input)]
    found: Tensor = weights.redistribute(layout.mesh, layout.input).to_local(grad_placements=gradient)
    return found


def result(layout: Layout, local: Tensor, leading: Sequence[int], D: int, replicated: bool = False) -> Tensor:
    """The output, a DTensor of shape [*leading, D], from that of this process."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    shape = torch.Size((*leading, D))
    placements: list[Any] = []
    for of_table, of_input in zip(layout.table, layout.input):
        if of_table.is_shard(0):
            placements.append(Replicate() if replicated else Partial())
        else:
            placements.append(Shard(len(leading)) if of_table.is_shard() else of_input)
    stride = torch.empty(shape, device="meta").stride()
    output: Tensor = DTensor.from_local(local, layout.mesh, placements, run_check=False, shape=shape, stride=stride)
    return output


def check_options(caller: str, table: Any, sparse: bool, renorm: Renorm | None) -> None:
    if sparse:
        raise NotImplementedError(
            f"{caller}: sparse must be False where weight is a DTensor, whose gradient is dense; use fused_optimizer"
        )
    if renorm is not None and any(p.is_shard(1) for p in table.placements):
        raise NotImplementedError(f"{caller}: max_norm must be None where the columns of weight are sharded")


# ---- Embedding


def rows(
    caller: str,
    input: Any,
    table: Any,
    padding_idx: int | None,
    renorm: Renorm | None,
    scale_grad_by_freq: bool,
    sparse: bool,
    step: Any,
    lookup: Local,
) -> Tensor:
    """embedding. lookup(input, table, padding_idx): the lookup in a table of this process."""
    whole = renorm is not None or scale_grad_by_freq or step is not None
    layout = layout_of(caller, table, input, range(input.dim()), whole)
    check_options(caller, table, sparse, renorm)
    E, D = table.shape
    leading = input.shape
    indices = input.redistribute(layout.mesh, layout.input).to_local()
    if not layout.by_rows:
        block = local_table(layout, table, indices, renorm, step)
        return result(layout, lookup(indices, block, padding_idx), leading, D)
    flat = indices.reshape(-1)
    check_range(caller, flat, flat.new_ones(flat.shape, dtype=torch.bool), E)
    here = ((flat >= layout.first) & (flat < layout.first + layout.rows)).nonzero()[:, 0]
    padding = None
    if padding_idx is not None:
        padding = padding_idx + (E if padding_idx < 0 else 0) - layout.first
        padding = padding if 0 <= padding < layout.rows else None
    mine = flat[here] - layout.first
    found = lookup(mine, local_table(layout, table, mine, renorm, step), padding)
    output = found.new_zeros(flat.shape[0], found.shape[1]).index_copy(0, here, found)
    return result(layout, output.reshape(*indices.shape, found.shape[1]), leading, D)


# ---- EmbeddingBag


def bag(
    caller: str,
    input: Any,
    table: Any,
    offsets: Any,
    weights: Any,
    mode: str,
    weight_norm: str,
    include_last_offset: bool,
    padding_idx: int | None,
    renorm: Renorm | None,
    scale_grad_by_freq: bool,
    sparse: bool,
    step: Any,
    lookup: Local,
    lookup_with_arg: Local,
) -> Tensor:
    """embedding_bag.

    Args:
        lookup(input, table, offsets, weights): the lookup in a table of this process, with the options of the call.
        lookup_with_arg(input, table, offsets, weights, mode): output and `arg` of a lookup of bags [B + 1] in the block
            of this process, in mode sum, max or min, without padding.
    """
    whole = renorm is not None or scale_grad_by_freq or step is not None
    layout = layout_of(caller, table, input, (0,) if offsets is None else (), whole)
    for name, t in (("offsets", offsets), ("per_sample_weights", weights)):
        if t is not None and not is_sharded(t):
            raise NotImplementedError(f"{caller}: {name} must be a DTensor where weight is one, got {_shown(t)}")
    check_options(caller, table, sparse, renorm)
    E, D = table.shape
    B = input.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
    indices = input.redistribute(layout.mesh, layout.input).to_local()
    w = local_weights(layout, weights)
    ends = None if offsets is None else offsets.full_tensor()
    if not layout.by_rows:
        block = local_table(layout, table, indices, renorm, step)
        return result(layout, lookup(indices, block, ends, w), (B,), D)
    if ends is not None:
        check_offsets(caller, ends, indices.shape[0], include_last_offset)
    padding = None if padding_idx is None else padding_idx + (E if padding_idx < 0 else 0)
    bags = bags_of(indices, ends, w, include_last_offset, padding)
    check_range(caller, bags.rows, bags.counted, E)
    here = bags.counted & (bags.rows >= layout.first) & (bags.rows < layout.first + layout.rows)
    positions = here.nonzero()[:, 0]
    lengths = torch.bincount(bags.bag[positions], minlength=bags.B)
    begin = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    mine, extreme = bags.rows[positions] - layout.first, mode in ("max", "min")
    block = local_table(layout, table, mine, renorm, step)
    w = None if bags.weights is None else bags.weights[positions]
    values, arg = lookup_with_arg(mine, block, begin, w, mode if extreme else "sum")
    if extreme:
        return result(layout, _extreme(layout, mode, values, arg, begin, positions), (B,), D, replicated=True)
    if mode == "mean":
        wide = torch.promote_types(values.dtype, torch.float32)
        values = (values.to(wide) / _divisor(bags, weight_norm, wide).unsqueeze(1)).to(values.dtype)
    return result(layout, values, (B,), D)


def _divisor(bags: Bags, weight_norm: str, dtype: torch.dtype) -> Tensor:
    """[B] divisor of a mean."""
    count = bags.total(bags.counted.to(dtype))
    if bags.weights is None or weight_norm == "count":
        return count.clamp(min=1)
    return torch.where(count > 0, bags.total(torch.where(bags.counted, bags.weights.to(dtype), 0)), 1)


def _extreme(layout: Layout, mode: str, values: Tensor, arg: Tensor, begin: Tensor, positions: Tensor) -> Tensor:
    """Reduces the extremes of all blocks. Selects a NaN if present, and the first position of equal values.

    Args:
        values, arg: [B, D] extremes of the block of this process and their positions in the bag, -1 if none.
        begin: [B + 1] start of each bag in `positions`, the positions in input.
    """
    last = torch.iinfo(torch.int64).max
    with torch.no_grad():
        at = begin[:-1].unsqueeze(1) + arg
        if positions.numel():
            at = positions[at.clamp(0, positions.numel() - 1)]
        at = torch.where(arg.reshape(values.shape) >= 0, at, last) if arg.numel() else at.new_full(values.shape, last)
    parts, every = _gathered(layout, values), _gathered(layout, at)
    with torch.no_grad():
        best, first, winner = parts[0], every[0], torch.zeros_like(every[0])
        for i in range(1, len(parts)):
            value = parts[i]
            beyond = value > best if mode == "max" else value < best
            equal = (value == best) | (value.isnan() & best.isnan())
            better = beyond | (value.isnan() & ~best.isnan()) | (equal & (every[i] < first))
            better = (every[i] != last) & ((first == last) | better)
            best, first = torch.where(better, value, best), torch.where(better, every[i], first)
            winner = torch.where(better, i, winner)
    output = parts.gather(0, winner.unsqueeze(0)).squeeze(0)
    return torch.where(first != last, output, 0)


def _gathered(layout: Layout, t: Tensor) -> Tensor:
    """[W, *t.shape], the tensors of the W processes that share the rows of the table, in the order of their rows.

    Each process uses its own copy of the result, and all copies are equal: the gradient is not summed.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    by_rows = [p.is_shard(0) for p in layout.table]
    sharded = [Shard(0) if of_rows else Replicate() for of_rows in by_rows]
    whole = DTensor.from_local(t.unsqueeze(0), layout.mesh, sharded, run_check=False)
    found: Tensor = whole.redistribute(layout.mesh, [Replicate()] * len(by_rows)).to_local()
    return found


def check_range(caller: str, indices: Tensor, counted: Tensor, E: int) -> None:
    """Checks the indices against the whole table; a block would ignore wrong ones."""
    wrong = counted & ((indices < 0) | (indices >= E))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise IndexRuntimeError(
            f"{caller}: input must hold indices in [0, {E}), got {int(indices[at])} at position {at}"
        )


def check_offsets(caller: str, offsets: Tensor, N: int, include_last_offset: bool) -> None:
    if not offsets.numel():
        if include_last_offset:
            raise ValueError(f"{caller}: offsets must have at least 1 element with include_last_offset, got none")
        return
    ends = torch.cat([offsets.long(), offsets.new_full((1,), N).long()])
    wrong = ends.diff() < 0
    wrong[0] |= ends[0] != 0
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueRuntimeError(
            f"{caller}: offsets must begin with 0 and neither decrease nor exceed the length of input, {N}, got "
            f"{ends[at : at + 2].tolist()} at position {at}"
        )
