"""EmbeddingBag whose rows are sharded over the processes of torch.distributed.

Each process looks up its own bags. An all-to-all sends each index to the process that owns its row. That process
reduces the rows of each bag to a partial result (a sum, or an extreme and its position). A second all-to-all returns
the partial results, which are combined in the order of processes. Backward sends the gradients through the same
exchanges in reverse and sums them by row.

Dimensions: W processes, E table rows, D columns, N indices and B bags of this process, M indices received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from seqkernels.functional import _embedding_bag_ops as O
from seqkernels.functional._checks import IndexRuntimeError, ValueAssertionError, ValueRuntimeError
from seqkernels.functional._embedding_bag_ops import MODES, NO_PADDING, BagArgs
from seqkernels.functional.embedding_bag import check, of_nested, renorm
from seqkernels.nn.embedding_bag import Device, EmbeddingBag
from seqkernels.nn.fused_optimizer import FusedOptimizer
from seqkernels.reference.embedding_bag import bags_of

Group = Any  # a torch.distributed.ProcessGroup, or None for all processes


class RowShardedEmbeddingBag(EmbeddingBag):
    """EmbeddingBag sharded by rows: each process stores a block of ceil(E / W) rows; the last blocks may be smaller.

    Args: as seqkernels.nn.EmbeddingBag. num_embeddings is the number of rows of the whole table. _weight is the whole
        table; its rows of this process are copied.
    Keyword-only options: weight_norm, fused_optimizer: as in EmbeddingBag.
        process_group: the processes that share the table; all processes by default.
    Attributes: weight, [rows of this process, D]; first_row, the first row of this process.
    Inputs: as EmbeddingBag, the bags of this process. All processes must call forward and backward the same number of
        times and in the same order, if necessary without indices.
    Outputs: [B, D], the bags of this process.
    Raises: as EmbeddingBag, before indices are exchanged; RuntimeError in the other processes.
    Equivalent to: one EmbeddingBag with the bags of all processes and the sum of their losses. Gradients are summed,
        not averaged, over processes, and scale_grad_by_freq counts the indices of all processes. max, min and bags
        within one block have the same bits; a sum over several blocks is rounded once per block.
    Deterministic: yes, for a given number of processes.

    The state_dict has the rows of this process and their state of a fused optimiser; `full_table` and `load_full_table`
    convert to and from a whole table. Exclude the module from DistributedDataParallel.
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
        self._group = process_group  # set first, because the number of rows depends on it
        self._processes, self._rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        if _weight is not None:
            if list(_weight.shape) != [num_embeddings, embedding_dim]:
                wanted = f"[num_embeddings, embedding_dim] = [{num_embeddings}, {embedding_dim}]"
                raise ValueAssertionError(f"{caller}: _weight must have shape {wanted}, got {list(_weight.shape)}")
            first, count = self._block_of(self._rank, num_embeddings)
            _weight = _weight.detach()[first : first + count].clone()
        super().__init__(
            num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse, _weight,
            include_last_offset, padding_idx, device, dtype, weight_norm=weight_norm, fused_optimizer=fused_optimizer,
        )  # fmt: skip

    # ---- blocks of rows

    def _block_of(self, rank: int, E: int) -> tuple[int, int]:
        """First row and number of rows of a process."""
        block = -(-E // self._processes)
        first = min(rank * block, E)
        return first, min(block, E - first)

    @property
    def first_row(self) -> int:
        return self._block_of(self._rank, self.num_embeddings)[0]

    def _rows_here(self) -> int:
        return self._block_of(self._rank, self.num_embeddings)[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes with normal values.

        Each process draws all blocks and keeps its own, so that generators with the same seed remain in the same state.
        """
        for rank in range(self._processes):
            rows = self._block_of(rank, self.num_embeddings)[1]
            drawn = torch.randn(rows, self.embedding_dim, device=self.weight.device, dtype=self.weight.dtype)
            if rank == self._rank:
                self.weight.copy_(drawn)
        self._fill_padding_idx_with_zero()
        if self.fused_optimizer is not None:
            self.fused_state.reset()

    def _fill_padding_idx_with_zero(self) -> None:
        if self.padding_idx is not None and 0 <= self.padding_idx - self.first_row < self._rows_here():
            with torch.no_grad():
                self.weight[self.padding_idx - self.first_row].fill_(0)

    # ---- the whole table

    def full_table(self) -> Tensor:
        """Returns the whole table [E, D] in each process. All processes must call it."""
        return self._gathered(self.weight.detach())

    @torch.no_grad()
    def load_full_table(self, table: Tensor) -> None:
        """Copies the rows of this process from a whole table [E, D]."""
        self.weight.copy_(self._own(table))

    def full_state_dict(self) -> dict[str, Tensor]:
        """Returns the state_dict of an EmbeddingBag with the whole table. All processes must call it."""
        return {name: self._gathered(t) if t.dim() else t.clone() for name, t in self.state_dict().items()}

    def load_full_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads the rows of this process from the state_dict of an EmbeddingBag with the whole table."""
        self.load_state_dict({name: self._own(t) if t.dim() else t for name, t in state.items()})

    def _own(self, t: Tensor) -> Tensor:
        if t.shape[0] != self.num_embeddings:
            raise ValueError(
                f"{type(self).__name__}: table must have num_embeddings = {self.num_embeddings} rows, got {t.shape[0]}"
            )
        return t[self.first_row : self.first_row + self._rows_here()]

    def _gathered(self, rows: Tensor) -> Tensor:
        block = -(-self.num_embeddings // self._processes)
        padded = rows.new_zeros(block, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        blocks = [torch.empty_like(padded) for _ in range(self._processes)]
        dist.all_gather(blocks, padded, group=self._group)
        return torch.cat(blocks)[: self.num_embeddings]

    # ---- forward

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        error: Exception | None = None
        weights = per_sample_weights
        try:
            last = self.include_last_offset
            if isinstance(input, Tensor) and input.is_nested:
                input, offsets, weights = of_nested(type(self).__name__, input, offsets, weights)
                last = True
            bags = self._checked(input, offsets, weights, last and offsets is not None)
        except (RuntimeError, TypeError, ValueError) as found:
            error, bags = found, NO_BAGS
        route = self._route(bags, error)
        table, extreme = self._table(), self.mode in ("max", "min")
        if weights is not None:
            weights = weights.reshape(-1)[route.positions]
            weights = _exchanged(weights, route.sent, route.received, self._group)
        if self.max_norm is not None and len(route.indices):
            renorm(table, route.indices, self.max_norm, self.norm_type)
        args = BagArgs(
            MODES[self.mode] if extreme else MODES["sum"],
            NO_PADDING,
            include_last_offset=True,
            by_frequency=self.scale_grad_by_freq,
            sparse=self.sparse,
            return_arg=True,
        )
        values, arg = O.lookup_with_arg((table,), weights, route.indices, route.offsets, args, self._step(table))
        B, D, W = bags.B, self.embedding_dim, self._processes
        back = route.bags, [B] * W, self._group
        parts = _exchanged(values, *back).reshape(W, B, D)
        if extreme:
            return self._extreme(parts, _exchanged(arg, *back).reshape(W, B, D), route)
        output = parts.to(torch.promote_types(parts.dtype, torch.float32)).sum(0)
        if self.mode == "mean":
            output = output / self._divisor(bags, per_sample_weights, output).unsqueeze(1)
        return output.to(parts.dtype)

    def _checked(self, input: Any, offsets: Any, weights: Any, last: bool) -> Bags:
        """Checks the arguments as embedding_bag does, and returns the bags."""
        caller, E = type(self).__name__, self.num_embeddings
        check(caller, input, self._table(), offsets, weights, self.mode, None, self.weight_norm, self.max_norm)
        if offsets is not None and offsets.numel():
            ends = torch.cat([offsets.long(), torch.tensor([input.numel()], device=offsets.device)])
            wrong = (ends.diff() < 0) if int(offsets[0]) == 0 else torch.ones(1, dtype=torch.bool)
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                raise ValueRuntimeError(
                    f"{caller}: offsets must begin with 0 and neither decrease nor exceed the length of input, "
                    f"{input.numel()}, got {ends[at : at + 2].tolist()} at position {at}"
                )
        elif last:
            raise ValueError(f"{caller}: offsets must have at least 1 element with include_last_offset, got none")
        bags = bags_of(input, offsets, None, last, self.padding_idx)
        wrong = bags.counted & ((bags.rows < 0) | (bags.rows >= E))
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise IndexRuntimeError(
                f"{caller}: input must hold indices in [0, {E}), got {int(bags.rows[at])} at position {at}"
            )
        return Bags(bags.rows, bags.bag, bags.begin, bags.counted)

    def _route(self, bags: Bags, error: Exception | None) -> Route:
        """Exchanges the indices. An error in one process raises in all processes."""
        W, B, group = self._processes, bags.B, self._group
        positions = bags.counted.nonzero()[:, 0] if error is None else bags.rows
        block = max(-(-self.num_embeddings // W), 1)
        owner, order = (bags.rows[positions] // block).sort(stable=True)
        positions = positions[order]
        lengths = torch.bincount(owner * B + bags.bag[positions], minlength=W * B).reshape(W, B)
        about = torch.tensor([B, error is not None], device=positions.device)
        every = [torch.empty_like(about) for _ in range(W)]
        dist.all_gather(every, about, group=group)
        if error is not None:
            raise error
        sizes, failed = zip(*(t.tolist() for t in every))
        if any(failed):
            which = ", ".join(str(rank) for rank, wrong in enumerate(failed) if wrong)
            raise RuntimeError(
                f"{type(self).__name__}: the arguments must fit in every process, got an error in process {which}"
            )
        arriving = _exchanged(lengths.reshape(-1), [B] * W, sizes, group)
        sent = lengths.sum(1).tolist()
        received = [int(part.sum()) for part in arriving.split(sizes)]
        indices = _exchanged(bags.rows[positions], sent, received, group) - self.first_row
        offsets = torch.cat([arriving.new_zeros(1), arriving.cumsum(0)])
        starts = (lengths.reshape(-1).cumsum(0) - lengths.reshape(-1)).reshape(W, B)
        return Route(indices, offsets, positions, sent, received, sizes, starts)

    def _divisor(self, bags: Bags, weights: Tensor | None, like: Tensor) -> Tensor:
        """[B] divisor of a mean."""
        total = like.new_zeros(bags.B + 1)
        count = total.index_add(0, bags.bag, bags.counted.to(like.dtype))[: bags.B]
        if weights is None or self.weight_norm == "count":
            return count.clamp(min=1)
        if weights.is_nested:
            weights = weights.values()
        counted = torch.where(bags.counted, weights.reshape(-1).to(like.dtype), 0)
        return torch.where(count > 0, total.index_add(0, bags.bag, counted)[: bags.B], 1)

    def _extreme(self, parts: Tensor, arg: Tensor, route: Route) -> Tensor:
        """Reduces the extremes of all processes. Selects a NaN if present, and the first position of equal values."""
        if not (route.positions.numel() and parts.numel()):
            return parts.sum(0)
        with torch.no_grad():
            place = (route.starts.unsqueeze(2) + arg).clamp(0, route.positions.numel() - 1)
            position = route.positions[place]  # position in input
            best, winner = parts[0], torch.zeros_like(arg[0], dtype=torch.int64)
            at, found = position[0], arg[0] >= 0
            for w in range(1, len(parts)):
                value = parts[w]
                beyond = value > best if self.mode == "max" else value < best
                equal = (value == best) | (value.isnan() & best.isnan())
                better = beyond | (value.isnan() & ~best.isnan()) | (equal & (position[w] < at))
                better = (arg[w] >= 0) & (~found | better)
                best, at = torch.where(better, value, best), torch.where(better, position[w], at)
                winner, found = torch.where(better, w, winner), found | (arg[w] >= 0)
        output = parts.gather(0, winner.unsqueeze(0)).squeeze(0)
        return torch.where(found, output, 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows {self.first_row} to {self.first_row + self._rows_here()} here"


class Bags(NamedTuple):
    """The bags of this process, by index."""

    rows: Tensor  # [N]
    bag: Tensor  # [N]
    begin: Tensor  # [B]
    counted: Tensor  # [N]

    @property
    def B(self) -> int:
        return self.begin.shape[0]


NO_BAGS = Bags(*[torch.zeros(0, dtype=torch.int64)] * 4)


class Route(NamedTuple):
    """The indices sent and received by this process."""

    indices: Tensor  # [M] received indices, as rows of this block, ordered by process and bag
    offsets: Tensor  # [bags of all processes + 1] start of each bag in `indices`
    positions: Tensor  # positions in input of the sent indices, ordered by process and position
    sent: Sequence[int]  # [W] number of indices sent to each process
    received: Sequence[int]  # [W] number of indices received from each process
    bags: Sequence[int]  # [W] number of bags of each process
    starts: Tensor  # [W, B] start of each bag in the sent indices


class _Exchange(torch.autograd.Function):
    """All-to-all exchange of rows; backward exchanges the gradients in reverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
        ctx.back = received, sent, group
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad, *ctx.back), None, None, None


def _exchanged(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    result: Tensor = _Exchange.apply(rows, sent, received, group)
    return result
