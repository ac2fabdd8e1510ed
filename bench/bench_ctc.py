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


def training(
    name: str, function: Callable[..., Tensor], shape: Shape, lengths: bool, dtype: torch.dtype = torch.float32
) -> Contender:
    B, T, V, L = shape
    g = torch.Generator().manual_seed(0)
    log_probs = torch.randn(T, B, V, generator=g).log_softmax(2).to(dtype).requires_grad_()
    targets = torch.randint(1, V, (B, L), generator=g)
    steps = torch.linspace(T // 2, T, B).long() if lengths else torch.full((B,), T)
    labels = torch.linspace(1, L, B).long() if lengths else torch.full((B,), L)

    def step() -> tuple[Tensor, Tensor]:
        loss = function(log_probs, targets, steps, labels)
        return loss.detach(), torch.autograd.grad(loss, log_probs)[0]

    def result() -> Results:
        loss, gradient = step()
        return {"loss": loss, "gradient": gradient}

    return Contender(name, step, result)


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
