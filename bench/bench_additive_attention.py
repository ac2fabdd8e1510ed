"""Additive attention against torch, eager and compiled, where queries and keys are already projected.

torch computes softmax(tanh(query + key) @ v) @ value of broadcast queries and keys. The bars are the claims of the
project; the table reports PASS or MISS for each. Forward rows run without autograd; "forward+backward" rows include the
gradients of query, key, value and v.

Work counts one addition, one tanh and one multiply-add for each hidden unit of each pair of a query and a key, forward;
twice as many with backward; and the products with the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from harness import Contender, MemoryCase, compiled, of_tensors
from report import Bar
from torch import Tensor

from seqkernels.functional import AdditiveKeys, additive_attention

FORWARD, BOTH = "forward", "forward+backward"
COMPILED = "torch.compile"


class Shape(NamedTuple):
    B: int
    Tq: int
    Tk: int
    H: int

    def __str__(self) -> str:
        return f"B={self.B} Tq={self.Tq} Tk={self.Tk} H={self.H}"

    @property
    def work(self) -> float:
        return self.B * self.Tq * self.Tk * self.H * (4.0 + 2.0)


LARGE = Shape(8, 200, 200, 256)
BARS = {Shape(16, 50, 50, 512): 12.0, LARGE: 12.0, Shape(32, 20, 50, 256): 5.0}  # forward and backward, against eager
STEP, OF_COMPILED, OF_STEP = Shape(64, 1, 50, 512), 6.0, 5.0


def eager(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v
    return scores.softmax(-1) @ value


def drawn(shape: Shape) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = (shape.B, shape.Tq, shape.H), (shape.B, shape.Tk, shape.H), (shape.B, shape.Tk, shape.H), (shape.H,)
    return [torch.randn(size, generator=g).requires_grad_() for size in sizes]


def contender(name: str, function: Callable[..., Tensor], tensors: Sequence[Tensor], which: str) -> Contender:
    return of_tensors(name, function, tensors, which == BOTH)


@pytest.mark.parametrize("which", [FORWARD, BOTH])
@pytest.mark.parametrize("shape", BARS, ids=str)
def test_additive_attention(bench: Any, shape: Shape, which: str) -> None:
    tensors = drawn(shape)
    contenders = [
        contender("ours", additive_attention, tensors, which),
        contender("torch", eager, tensors, which),
        compiled(COMPILED, eager, lambda function: contender(COMPILED, function, tensors, which)),
    ]
    bars = {"torch": BARS[shape], COMPILED: OF_COMPILED} if which == BOTH else {}
    work = shape.work * (1 if which == FORWARD else 2)
    bench.time(f"Additive attention {which}", str(shape), contenders, bars=bars, work=work, tolerance=1e-4)


def test_decoder_step(bench: Any) -> None:
    """One step of a decoder: the keys are projected before, and ours keeps their exponentials."""
    tensors = drawn(STEP)
    keys = AdditiveKeys(tensors[1].detach(), tensors[2].detach())

    def ours(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> Tensor:
        return additive_attention(query, keys, None, v)

    contenders = [
        contender("ours", ours, tensors, FORWARD),
        contender("torch", eager, tensors, FORWARD),
        compiled(COMPILED, eager, lambda function: contender(COMPILED, function, tensors, FORWARD)),
        contender("(ours, keys not kept)", additive_attention, tensors, FORWARD),
    ]
    bars = {"torch": OF_STEP}
    bench.time("Additive attention, decoder step", str(STEP), contenders, bars=bars, work=STEP.work, tolerance=1e-4)


def memory_case(name: str, shape: Sequence[int]) -> MemoryCase:
    function = additive_attention if name == "ours" else eager
    small, large = (contender(name, function, drawn(s), BOTH) for s in (Shape(2, 3, 4, 8), Shape(*shape)))
    return MemoryCase(small.step, large.step)


def test_memory_of_training(bench: Any) -> None:
    tensors = drawn(LARGE)
    parity = [tuple(contender(n, f, tensors, BOTH) for n, f in (("torch", eager), ("ours", additive_attention)))]
    names: dict[str, dict[str, object]] = {n: {"name": n, "shape": list(LARGE)} for n in ("ours", "torch")}
    bench.memory(
        "Additive attention, memory of training", str(LARGE), "bench_additive_attention:memory_case", names,
        bars={"torch": Bar(at_least=10.0)}, parity=parity, tolerance=1e-4,
    )  # fmt: skip
