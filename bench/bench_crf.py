"""Conditional random fields against pytorch-crf, whose loops over steps call torch for each.

The bars are the claims of the project; the table reports PASS or MISS for each. Work counts the additions and
multiplications of the K * K pairs of tags of each step: forward 2, forward and backward 6, Viterbi 2.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from harness import Contender, Results, compiled
from torch import Tensor

from seqkernels import nn


class Shape(NamedTuple):
    B: int
    T: int
    K: int

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} K={self.K}"

    @property
    def pairs(self) -> int:
        return self.B * (self.T - 1) * self.K * self.K


SHAPES = [Shape(32, 50, 9), Shape(32, 100, 20), Shape(16, 500, 50)]
BARS = {SHAPES[1]: (30.0, 15.0), SHAPES[2]: (30.0, 15.0)}  # likelihood forward+backward, Viterbi
PEER = "pytorch-crf"


def models(shape: Shape, device: str) -> tuple[Any, Any]:
    """Ours and that of pytorch-crf, with the same parameters."""
    warnings.filterwarnings("ignore", message="where received a uint8 condition")
    torchcrf = pytest.importorskip("torchcrf", reason="pytorch-crf is not installed")
    torch.manual_seed(0)
    ours, theirs = nn.CRF(shape.K, device=device), torchcrf.CRF(shape.K).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(shape: Shape, lengths: bool, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    emissions = torch.randn(shape.T, shape.B, shape.K, generator=g).to(device)
    tags = torch.randint(shape.K, (shape.T, shape.B), generator=g).to(device)
    if not lengths:
        return emissions, tags, None
    steps = torch.linspace(1, shape.T, shape.B).long()
    return emissions, tags, (torch.arange(shape.T)[:, None] < steps).to(device)


def training(name: str, model: Any, shape: Shape, lengths: bool, device: str, of_parameters: Any = None) -> Contender:
    emissions, tags, mask = inputs(shape, lengths, device)
    emissions.requires_grad_()
    wanted = [emissions, *model.parameters()]

    def step() -> tuple[Tensor, ...]:
        likelihood = model(emissions, tags, mask, "mean")
        return likelihood.detach(), *torch.autograd.grad(likelihood, wanted)

    def result() -> Results:
        return {f"{i}": t for i, t in enumerate(step())}

    return Contender(name, step, result, on_cuda=device == "cuda")


def decoding(name: str, model: Any, shape: Shape, lengths: bool, device: str) -> Contender:
    emissions, _, mask = inputs(shape, lengths, device)

    def step() -> list[list[int]]:
        with torch.no_grad():
            return model.decode(emissions, mask)

    def result() -> Results:
        # With near ties, the scores of the paths are equal, not the tags.
        wide = nn.CRF(shape.K, device=device, dtype=torch.float64)
        wide.load_state_dict(model.state_dict())
        tags = torch.nn.utils.rnn.pad_sequence([torch.tensor(path) for path in step()]).to(device)
        with torch.no_grad():
            return {"log likelihood of the paths": wide(emissions.double(), tags, mask, "none")}

    return Contender(name, step, result, on_cuda=device == "cuda")


@pytest.mark.parametrize("lengths", [False, True], ids=["full", "lengths"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("what", ["log likelihood, forward+backward", "Viterbi"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_crf(bench: Any, what: str, shape: Shape, lengths: bool, device: str) -> None:
    ours, theirs = models(shape, device)
    make = decoding if what == "Viterbi" else training
    contenders = [make(name, model, shape, lengths, device) for name, model in (("seqkernels", ours), (PEER, theirs))]
    if what != "Viterbi" and shape == SHAPES[0]:  # compilation unrolls the steps
        name = f"{PEER}, torch.compile"
        contenders.append(compiled(name, theirs, lambda model: training(name, model, shape, lengths, device)))
    bar = BARS.get(shape, (None, None))[what == "Viterbi"]
    bars = {} if bar is None or lengths or device == "cuda" else {PEER: bar}
    fill = 0.5 if lengths else 1.0
    work = (2.0 if what == "Viterbi" else 6.0) * shape.pairs * fill
    label = f"{shape}, lengths 1 to T" if lengths else str(shape)
    bench.time(f"CRF {what}", label, contenders, bars=bars, work=work, tolerance=1e-3)
