"""ctc_loss against torch's, forward and backward.

The bar is the claim of the project; the table reports PASS or MISS. Work counts, for each state of each step, three
additions forward and three backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Contender, Results
from torch import Tensor

from seqkernels.functional import ctc_loss


class Shape(NamedTuple):
    B: int
    T: int
    V: int
    L: int

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} V={self.V} L={self.L}"


BARS = {Shape(32, 400, 64, 60): 1.5, Shape(8, 1000, 1000, 100): None, Shape(1, 100, 30, 20): None}
SMALL = [Shape(1, 50, 30, 10), Shape(1, 10, 8, 3), Shape(4, 50, 30, 10)]
SMALL_BAR = 0.95


def inputs(shape: Shape, lengths: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_probs, targets, input lengths and target lengths."""
    B, T, V, L = shape
    g = torch.Generator().manual_seed(0)
    log_probs = torch.randn(T, B, V, generator=g).log_softmax(2).to(dtype)
    targets = torch.randint(1, V, (B, L), generator=g)
    steps = torch.linspace(T // 2, T, B).long() if lengths else torch.full((B,), T)
    labels = torch.linspace(1, L, B).long() if lengths else torch.full((B,), L)
    return log_probs, targets, steps, labels


def training(
    name: str, function: Callable[..., Tensor], shape: Shape, lengths: bool, dtype: torch.dtype = torch.float32
) -> Contender:
    log_probs, targets, steps, labels = inputs(shape, lengths, dtype)
    log_probs.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = function(log_probs, targets, steps, labels)
        return loss.detach(), torch.autograd.grad(loss, log_probs)[0]

    def result() -> Results:
        loss, gradient = step()
        return {"loss": loss, "gradient": gradient}

    return Contender(name, step, result)


def inference(
    name: str, function: Callable[..., Tensor], shape: Shape, lengths: bool, dtype: torch.dtype = torch.float32
) -> Contender:
    log_probs, targets, steps, labels = inputs(shape, lengths, dtype)
    return Contender(
        name,
        lambda: function(log_probs, targets, steps, labels),
        lambda: {"loss": function(log_probs, targets, steps, labels)},
    )


@pytest.mark.parametrize("lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("shape", BARS, ids=str)
def test_ctc_loss(bench: Any, shape: Shape, lengths: bool) -> None:
    contenders = [training("ours", ctc_loss, shape, lengths), training("torch", F.ctc_loss, shape, lengths)]
    bars = {} if BARS[shape] is None or lengths else {"torch": BARS[shape]}
    label = f"{shape}, lengths T / 2 to T and 1 to L" if lengths else str(shape)
    work = 6.0 * shape.B * shape.T * (2 * shape.L + 1)
    wide = training("float64", F.ctc_loss, shape, lengths, torch.float64)  # torch's float32 has errors above 1e-3
    parity = [(wide, contenders[0])]
    bench.time("ctc_loss forward+backward", label, contenders, bars=bars, work=work, parity=parity, tolerance=1e-4)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small_ctc_loss(bench: Any, shape: Shape, direction: str) -> None:
    """Calls whose overhead takes most of the time."""
    make, times = (inference, 3.0) if direction == "forward" else (training, 6.0)
    contenders = [make("ours", ctc_loss, shape, False), make("torch", F.ctc_loss, shape, False)]
    parity = [(make("float64", F.ctc_loss, shape, False, torch.float64), contenders[0])]
    work, bars = times * shape.B * shape.T * (2 * shape.L + 1), {"torch": SMALL_BAR}
    group = f"ctc_loss {direction}, small"
    bench.time(group, str(shape), contenders, bars=bars, work=work, parity=parity, tolerance=1e-4)
