"""Optimisers whose step is a part of backward: no gradient of the table is made, only rows that occur move.

What they do to a table is what torch.optim does with the coalesced sparse gradient of the same call. The step is made
once for each call that is sent back, when it is: two calls of one module are two steps.

Dimensions: E table rows, D columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqkernels.functional import _embedding_bag_ops as O
from seqkernels.functional._embedding_bag_ops import Bags


@dataclass
class FusedOptimizer:
    """What the optimisers share. Their numbers can be set at any time, lr by a schedule, and hold from the next
    backward on; modules that were given the same object share them.
    """

    lr: float

    number: ClassVar[int]  # as ops take it
    states: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False  # whether a step depends on how many there were

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
        """As ops take them, for the step of that count, from 1 on."""
        return [self.lr]

    def shape(self, state: str, weight: Tensor) -> tuple[int, ...]:
        return tuple(weight.shape)

    def start(self, state: str) -> float:
        return 0.0


@dataclass
class FusedSGD(FusedOptimizer):
    """w -= lr g. Equivalent to: torch.optim.SGD without momentum and weight decay.

    Args: lr: learning rate.
    """

    lr: float = 1e-3

    number = 0


@dataclass
class FusedAdagrad(FusedOptimizer):
    """sum += g^2; w -= lr / (1 + (step - 1) lr_decay) g / (sqrt(sum) + eps). Equivalent to: torch.optim.Adagrad.

    Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods", 2011.

    Args: lr: learning rate. lr_decay: see above. initial_accumulator_value: what sums begin with. eps: see above.
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

    Args: lr: learning rate. initial_accumulator_value: what sums begin with. eps: see above.
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
    """Adam whose moments decay where a row occurs. Equivalent to: torch.optim.SparseAdam.

    Source: Kingma and Ba, "Adam", arXiv 1412.6980.

    Args: lr: learning rate. betas: decay of the moments. eps: added to the root of the second.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    number, states, counts = 3, ("exp_avg", "exp_avg_sq"), True

    def numbers(self, step: int) -> list[float]:
        return [self.lr, *self.betas, self.eps, float(step)]


KINDS = (FusedSGD, FusedAdagrad, FusedRowwiseAdagrad, FusedAdam)


def check_optimizer(who: str, optimizer: Any, sparse: bool) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, KINDS):
        names = ", ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"{who}: fused_optimizer must be one of {names}, got {optimizer!r}")
    if sparse:
        raise ValueError(f"{who}: sparse must be False with fused_optimizer, which makes no gradient, got True")


class FusedState(nn.Module):
    """What an optimiser keeps of one table, as buffers, in float32 or wider whatever the table's dtype is."""

    step: Tensor  # int64: how many there were; on the CPU

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

    def counted(self) -> int:
        """The number of the step that begins."""
        if "step" not in self._buffers:
            return 1
        return int(self.step.add_(1))

    @property
    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        """As ops take them."""
        first, second, *_ = *(self._buffers[name] for name in self._starts), None, None
        return first, second


def step_one(
    optimizer: FusedOptimizer, state: FusedState, table: Tensor, grad: Tensor, arg: Tensor, bags: Bags, frequent: bool
) -> None:
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
    """All tables make the step of one count, that of the first."""
    count, *_ = [state.counted() for state in states]
    first, second = ([t for t in of_all if t is not None] for of_all in zip(*(state.pair for state in states)))
    O.ops.embedding_bags_update_(
        list(tables), first, second, optimizer.number, optimizer.numbers(count), grad, arg, features, *bags, frequent
    )
    torch.autograd.graph.increment_version(tables)
