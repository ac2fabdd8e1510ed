"""Cases of additive attention, their inputs, and comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqkernels import reference
from seqkernels.functional import additive_attention

close = torch.testing.assert_close
f64 = torch.float64
# Largest error relative to the largest element of a result or gradient.
TOLERANCE = {f64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("query", "key", "value", "v")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """mask: shape of the mask in letters of its dimensions, such as "BQK"."""

    why: str
    B: int = 3
    Tq: int = 5
    Tk: int = 7
    H: int = 13
    Dv: int = 11
    lengths: tuple[int, ...] | None = None
    mask: str = ""
    scale: float = 1.0
    large: float = 0.0  # value of single elements of queries and keys

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


CASES = [
    Case(why="tails in every direction"),
    Case(why="one of everything", B=1, Tq=1, Tk=1, H=1, Dv=1),
    Case(why="whole vectors", B=2, Tq=8, Tk=16, H=64, Dv=32),
    Case(why="more units than a slice", B=2, Tq=3, Tk=9, H=150, Dv=5),
    Case(why="one query", Tq=1, Tk=33, H=40),
    Case(why="many queries", B=1, Tq=70, Tk=9, H=20),
    Case(why="many keys", B=2, Tq=3, Tk=300, H=17),
    Case(why="no query", Tq=0),
    Case(why="no key", Tk=0),
    Case(why="no sequence", B=0),
    Case(why="no value", Dv=0),
    Case(why="lengths", B=4, lengths=(7, 1, 0, 5)),
    Case(why="a mask", mask="BQK"),
    Case(why="a mask of keys", mask="BK"),
    Case(why="a mask for all sequences", mask="1QK"),
    Case(why="lengths and a mask", B=4, lengths=(7, 3, 0, 5), mask="B1K"),
    Case(why="large inputs", scale=6.0),
    Case(why="beyond the bound", large=30.0, B=2, H=40, lengths=(7, 4)),
    Case(why="far beyond the bound", large=1e4, mask="BQK"),
]


def make(case: Case, dtype: torch.dtype = f64, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def rows(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=g, dtype=f64)

    query, key = (rows(case.B, T, case.H, scale=case.scale) for T in (case.Tq, case.Tk))
    if case.large:
        query[:, 1, 3], query[:, 2, 0], key[:, 2, 3], key[:, 3, 4] = case.large, -case.large, 0.5 - case.large, -25.0
    size = {"B": case.B, "Q": case.Tq, "K": case.Tk, "1": 1}
    mask = torch.rand([size[c] for c in case.mask], generator=g) < 0.7 if case.mask else None
    given = dict(query=query, key=key, value=rows(case.B, case.Tk, case.Dv), v=rows(case.H))
    given = {name: t.to(dtype) for name, t in given.items()}
    lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int64)
    return given | dict(lengths=lengths, mask=mask)


def ours(query: Tensor, key: Tensor, value: Tensor, v: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    return additive_attention(query, key, value, v, return_weights=True, **more)


def run(function: Callable, given: dict[str, Any]) -> dict[str, Tensor]:
    """Results, and gradients of their weighted sum."""
    leaves = {n: given[n].detach().requires_grad_() for n in NAMES}
    more = dict(given)
    if function is reference.additive_attention and more["mask"] is not None and more["mask"].dim() == 2:
        more["mask"] = more["mask"].unsqueeze(1)
    results = function(**(more | leaves))
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(r.shape, generator=g, dtype=f64).to(r.dtype) for r in results]
    grads = torch.autograd.grad(results, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return {f"result {i}": r.detach() for i, r in enumerate(results)} | {f"d{n}": g for n, g in zip(leaves, grads)}


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, w in want.items():
        assert got[name].shape == w.shape, name
        largest = w.abs().max().item() if w.numel() else 0.0
        close(
            got[name].double(), w.double(), rtol=0, atol=tolerance * max(largest, 1.0),
            msg=lambda m, name=name: f"{name}: {m}",
        )  # fmt: skip
