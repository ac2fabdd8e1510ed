"""EmbeddingBag whose rows are sharded over processes, each of which has bags of its own.

The table is a DTensor. Each process gets the bags of all processes, looks up the rows that it stores, and the partial
results are reduced and scattered; see seqkernels.functional._embedding_bag_sharded.

Dimensions: W processes, E table rows, D columns, N indices and B bags of this process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..functional._checks import ValueAssertionError
from ..functional._embedding_bag_sharded import check_offsets, check_range, replicated, rows_here
from ..functional.embedding_bag import bag, check, of_nested
from ..reference.embedding_bag import bags_of
from .embedding_bag import Device, EmbeddingBag
from .fused_optimizer import FusedOptimizer

Group = Any  # a torch.distributed.ProcessGroup, or None for all processes


class RowShardedEmbeddingBag(EmbeddingBag):
    """EmbeddingBag sharded by rows: each process stores a block of ceil(E / W) rows; the last blocks may be smaller.

    Args: as seqkernels.nn.EmbeddingBag. num_embeddings is the number of rows of the whole table. _weight is the whole
        table; its rows of this process are copied.
    Keyword-only options: weight_norm, fused_optimizer: as in EmbeddingBag.
        process_group: the processes that share the table; all processes by default.
    Attributes: weight, a DTensor [E, D] with the placement Shard(0).
    Inputs: as EmbeddingBag, plain tensors with the bags of this process. All processes must call forward and backward
        the same number of times and in the same order, if necessary without indices.
    Outputs: [B, D], a plain tensor, the bags of this process.
    Raises: as EmbeddingBag, before indices are exchanged; RuntimeError in the other processes. NotImplementedError for
        sparse=True.
    Equivalent to: one EmbeddingBag with the bags of all processes and the sum of their losses. Gradients are summed,
        not averaged, over processes, and scale_grad_by_freq counts the indices of all processes. max, min and bags
        within one block have the same bits; a sum over several blocks is rounded once per block.
    Deterministic: yes, for a given number of processes.

    torch.distributed.checkpoint saves and loads the parameter and the state of a fused optimiser, also for another
    number of processes or as the table of an EmbeddingBag. Exclude the module from DistributedDataParallel.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight_norm: str = "count",
        fused_optimizer: FusedOptimizer | None = None,
        process_group: Group = None,
    ) -> None:
        caller = type(self).__name__
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(f"{caller}: torch.distributed must be initialised, call init_process_group first")
        if sparse:
            raise NotImplementedError(f"{caller}: sparse must be False, the gradient is dense; use fused_optimizer")
        self._group = process_group  # set first, because the constructor of EmbeddingBag calls _empty
        if _weight is not None:
            if list(_weight.shape) != [num_embeddings, embedding_dim]:
                wanted = f"[num_embeddings, embedding_dim] = [{num_embeddings}, {embedding_dim}]"
                raise ValueAssertionError(f"{caller}: _weight must have shape {wanted}, got {list(_weight.shape)}")
            self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
            whole, _weight = _weight.detach(), self._empty(_weight.device, _weight.dtype)
            self._copy_block(whole, _weight)
        super().__init__(
            num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, _weight,
            include_last_offset, padding_idx, device, dtype, weight_norm=weight_norm, fused_optimizer=fused_optimizer,
        )  # fmt: skip

    def _empty(self, device: Any, dtype: torch.dtype | None) -> Tensor:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        device = torch.get_default_device() if device is None else torch.device(device)
        group: Any = self._group or dist.group.WORLD
        mesh = DeviceMesh.from_group(group, device.type)
        E, D = self.num_embeddings, self.embedding_dim
        block = -(-E // mesh.size())
        rows = min(block, max(E - mesh.get_local_rank() * block, 0))
        local = torch.empty(rows, D, device=device, dtype=dtype)
        table: Tensor = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size((E, D)), stride=(D, 1)
        )
        return table

    @staticmethod
    def _copy_block(whole: Tensor, table: Any) -> None:
        first, rows = rows_here(table)
        table.to_local().copy_(whole[first : first + rows])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes with normal values.

        Each process draws all blocks and keeps its own, so that generators with the same seed remain in the same state.
        """
        table: Any = self.weight
        mesh, block = table.device_mesh, table.to_local()
        size = -(-self.num_embeddings // mesh.size())
        for rank in range(mesh.size()):
            rows = min(size, max(self.num_embeddings - rank * size, 0))
            drawn = torch.randn(rows, self.embedding_dim, device=block.device, dtype=block.dtype)
            if rank == mesh.get_local_rank():
                block.copy_(drawn)
        self._fill_padding_idx_with_zero()
        if self.fused_optimizer is not None:
            self.fused_state.follow(type(self).__name__, table)
            self.fused_state.reset()

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        table: Any = self._table()
        mesh, W = table.device_mesh, table.device_mesh.size()
        error: Exception | None = None
        weights, lengths = per_sample_weights, torch.zeros(0, dtype=torch.int64, device=table.device)
        try:
            last = self.include_last_offset
            if isinstance(input, Tensor) and input.is_nested:
                input, offsets, weights = of_nested(type(self).__name__, input, offsets, weights)
                last = True
            lengths = self._lengths(input, offsets, weights, last)
        except (RuntimeError, TypeError, ValueError) as found:
            error = found
        N = 0 if error is not None else int(lengths.sum())
        sizes = self._sizes(lengths.shape[0], N, error)
        most_bags, most = (max(of_all) for of_all in zip(*sizes))
        within = torch.arange(most, device=table.device) < torch.tensor([[n] for _, n in sizes], device=table.device)
        every = torch.cat(_gathered(_padded(lengths, most_bags), mesh))
        indices = torch.stack(_gathered(_padded(input.reshape(-1)[:N].long(), most), mesh))[within]
        ends = torch.cat([every.new_zeros(1), every.cumsum(0)])
        if weights is not None:
            mine = DTensor.from_local(_padded(weights.reshape(-1)[:N], most), mesh, [Shard(0)], run_check=False)
            together = mine.redistribute(mesh, [Replicate()]).to_local()
            weights = replicated(together.reshape(W, most)[within], table)
        output: Any = bag(
            replicated(indices, table), table, replicated(ends, table), self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.mode, False, weights, True, self.padding_idx, self.weight_norm,
            self._step(table),
        )  # fmt: skip
        mine = output.redistribute(mesh, [Shard(0)]).to_local()
        result: Tensor = mine[: lengths.shape[0]]
        return result

    def _lengths(self, input: Any, offsets: Any, weights: Any, last: bool) -> Tensor:
        """Checks the arguments as embedding_bag does, and returns the length of each bag, [B]."""
        caller = type(self).__name__
        check(caller, input, self._table(), offsets, weights, self.mode, None, self.weight_norm, self.max_norm)
        last = last and offsets is not None
        if offsets is not None:
            check_offsets(caller, offsets, input.numel(), last)
        bags = bags_of(input, offsets, None, last, self.padding_idx)
        check_range(caller, bags.rows, bags.counted, self.num_embeddings)
        if offsets is None:
            return torch.full(input.shape[:1], input.shape[1], dtype=torch.int64, device=input.device)
        ends = offsets.long()
        return (ends if last else torch.cat([ends, ends.new_full((1,), input.numel())])).diff()

    def _sizes(self, B: int, N: int, error: Exception | None) -> list[tuple[int, int]]:
        """Numbers of bags and indices of each process. An error in one process raises in all processes."""
        table: Any = self._table()
        about = torch.tensor([B, N, error is not None], device=table.device)
        sizes = [t.tolist() for t in _gathered(about, table.device_mesh)]
        if error is not None:
            raise error
        failed = [str(rank) for rank, (*_, wrong) in enumerate(sizes) if wrong]
        if failed:
            raise RuntimeError(
                f"{type(self).__name__}: the arguments must fit in every process, got an error in process "
                f"{', '.join(failed)}"
            )
        return [(bags, indices) for bags, indices, _ in sizes]

    def extra_repr(self) -> str:
        first, rows = rows_here(self.weight)
        return f"{super().extra_repr()}, rows {first} to {first + rows} here"


def _padded(t: Tensor, length: int) -> Tensor:
    """t [n] with zeros up to `length`."""
    return torch.nn.functional.pad(t, (0, length - t.shape[0]))


def _gathered(t: Tensor, mesh: Any) -> list[Tensor]:
    """The tensors of all processes, which have equal shapes."""
    every = [torch.empty_like(t) for _ in range(mesh.size())]
    dist.all_gather(every, t.contiguous(), group=mesh.get_group())
    return every
