"""Optimisers whose step is part of backward. Backward updates the rows that occur and computes no gradient tensor.

The result is that of torch.optim with the coalesced sparse gradient of the same call. The backward pass of each call
makes one step, so two calls of a module in one loss make two steps.

Dimensions: E table rows, D columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import _embedding_bag_ops as O
from ..functional._embedding_bag_ops import Bags
from ..functional._embedding_bag_sharded import is_sharded


@dataclass
class FusedOptimizer:
    """Base class of the fused optimisers.

    The hyperparameters can be set at any time, for example lr by a schedule, and apply from the next backward pass on.
    Modules with the same object share them.
    """

    lr: float

    number: ClassVar[int]  # identifies the optimiser in the ops
    states: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False  # whether a step depends on the step count

    def __setattr__(self, name: str, value: Any) -> None:
        self._check(name, value)
        super().__setattr__(name, value)

    def _check(self, name: str, value: Any) -> None:
        values = value if name == "betas" else (value,)
        if name == "betas" and not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise ValueError(f"{type(self).__name__}: betas must be two numbers, got {value!r}")
        for v in values:
            if isinstance(v, bool) or not isinstance(v, (int, float)):
                raise TypeError(f"{type(self).__name__}: {name} must be a number, got {v!r}")
            most = 1.0 if name == "betas" else math.inf
            if not 0 <= v < most:
                raise ValueError(f"{type(self).__name__}: {name} must lie in [0, {most:g}), got {v}")

    def numbers(self, step: int) -> list[float]:
        """Hyperparameters for the ops; `step` counts from 1."""
        return [self.lr]

    def shape(self, state: str, weight: Tensor) -> tuple[int, ...]:
        """Shape of the named state."""
        return tuple(weight.shape)

    def start(self, state: str) -> float:
        """Initial value of the named state."""
        return 0.0


@dataclass
class FusedSGD(FusedOptimizer):
    """w -= lr g. Equivalent to: torch.optim.SGD without momentum and weight decay.

    Args: lr: learning rate.
    Deterministic: yes; the same bits for any number of threads.
    """

    lr: float = 1e-3

    number = 0


@dataclass
class FusedAdagrad(FusedOptimizer):
    """sum += g^2; w -= lr / (1 + (step - 1) lr_decay) g / (sqrt(sum) + eps). Equivalent to: torch.optim.Adagrad.

    Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods", 2011.

    Args: lr: learning rate. lr_decay: see above. initial_accumulator_value: initial value of sum. eps: see above.
    Deterministic: yes; the same bits for any number of threads.
    """

    lr: float = 1e-2
    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    number, states, counts = 1, ("sum",), True

    def numbers(self, step: int) -> list[float]:
        return [self.lr / (1 + (step - 1) * self.lr_decay), self.eps]

    def start(self, state: str) -> float:
        return self.initial_accumulator_value


@dataclass
class FusedRowwiseAdagrad(FusedOptimizer):
    """Adagrad with one sum per row: sum += mean of g^2 over the row; w -= lr g / (sqrt(sum) + eps).

    Args: lr: learning rate. initial_accumulator_value: initial value of sum. eps: see above.
    Deterministic: yes; the same bits for any number of threads.
    """

    lr: float = 1e-2
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    number, states = 2, ("sum",)

    def numbers(self, step: int) -> list[float]:
        return [self.lr, self.eps]

    def shape(self, state: str, weight: Tensor) -> tuple[int, ...]:
        return tuple(weight.shape[:1])

    def start(self, state: str) -> float:
        return self.initial_accumulator_value


@dataclass
class FusedAdam(FusedOptimizer):
    """Adam in which only the moments of rows that occur decay. Equivalent to: torch.optim.SparseAdam.

    Source: Kingma and Ba, "Adam", arXiv 1412.6980.

    Args: lr: learning rate. betas: decay rates of the moments. eps: added to the square root of the second moment.
    Deterministic: yes; the same bits for any number of threads.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    number, states, counts = 3, ("exp_avg", "exp_avg_sq"), True

    def numbers(self, step: int) -> list[float]:
        return [self.lr, *self.betas, self.eps, float(step)]


KINDS = (FusedSGD, FusedAdagrad, FusedRowwiseAdagrad, FusedAdam)


def check_optimizer(caller: str, optimizer: Any, sparse: bool) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, KINDS):
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"{caller}: fused_optimizer must be one of {names}, got {optimizer!r}")
    if sparse:
        raise ValueError(f"{caller}: sparse must be False with fused_optimizer, which computes no gradient, got True")


def check_data_parallel(caller: str, table: Tensor) -> None:
    """Raises in the forward pass of a DistributedDataParallel that contains the table, of which it gets no gradient."""
    active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if active is not None and any(p is table for p in getattr(active, "_module_parameters", ())):
        raise NotImplementedError(
            f"{caller}: fused_optimizer must be None in DistributedDataParallel, which averages gradients; here each "
            "process would update a copy of the table. Use RowShardedEmbeddingBag, outside of DistributedDataParallel"
        )


class FusedState(nn.Module):
    """State of an optimiser for one table, as buffers, in float32 or wider for each dtype of the table."""

    step: Tensor  # int64 number of steps made, on the CPU

    def __init__(self, optimizer: FusedOptimizer, weight: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self._starts = {name: optimizer.start(name) for name in optimizer.states}
        for name in optimizer.states:
            self.register_buffer(name, weight.new_empty(optimizer.shape(name, weight), dtype=dtype))
        if optimizer.counts:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        for name, start in self._starts.items():
            getattr(self, name).fill_(start)
        if "step" in self._buffers:
            self.step.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedState:
        for name in self._starts:
            state = getattr(self, name)
            moved = fn(state)
            wanted = torch.promote_types(moved.dtype, torch.float32)
            self._buffers[name] = moved if moved.dtype == wanted else state.to(moved.device, wanted)
        return self

    def follow(self, caller: str, table: Any) -> None:
        """Distributes the states as `table`, if that is a DTensor. All processes must call it."""
        if not is_sharded(table):
            return
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = table.device_mesh, table.placements
        for name in self._starts:
            state: Any = self._buffers[name]
            if state.dim() == 1 and any(p.is_shard(1) for p in placements):
                raise NotImplementedError(
                    f"{caller}: FusedRowwiseAdagrad must have whole rows, got columns sharded over processes"
                )
            if not is_sharded(state):
                self._buffers[name] = distribute_tensor(state, mesh, placements)
            elif state.placements != placements:
                self._buffers[name] = state.redistribute(mesh, placements)

    def counted(self) -> int:
        """Increments and returns the step count."""
        if "step" not in self._buffers:
            return 1
        return int(_local(self.step).add_(1))

    @property
    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        """The two state arguments of the ops."""
        first, second, *_ = *(_local(self._buffers[name]) for name in self._starts), None, None
        return first, second


def _local(state: Any) -> Any:
    """The part of this process of a state that may be a DTensor."""
    return state.to_local() if is_sharded(state) else state


def step_one(
    optimizer: FusedOptimizer, state: FusedState, table: Tensor, grad: Tensor, arg: Tensor, bags: Bags, frequent: bool
) -> None:
    """Makes one step of a table."""
    numbers = optimizer.numbers(state.counted())
    O.ops.embedding_bag_update_(table, *state.pair, optimizer.number, numbers, grad, arg, *bags, frequent)
    torch.autograd.graph.increment_version(table)


def step_several(
    optimizer: FusedOptimizer,
    states: Sequence[FusedState],
    features: Sequence[int],
    tables: Sequence[Tensor],
    grad: Tensor,
    arg: Tensor,
    bags: Bags,
    frequent: bool,
) -> None:
    """Makes one step of all tables, with the step count of the first."""
    count, *_ = [state.counted() for state in states]
    first, second = ([t for t in of_all if t is not None] for of_all in zip(*(state.pair for state in states)))
    O.ops.embedding_bags_update_(
        list(tables), first, second, optimizer.number, optimizer.numbers(count), grad, arg, features, *bags, frequent
    )
    torch.autograd.graph.increment_version(tables)
