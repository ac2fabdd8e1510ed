"""Attention on a GPU: our Triton kernels against torch's scaled_dot_product_attention with each of its backends.

pytest bench/bench_attention_cuda.py -m cuda --benchmark-only

Rates count useful work alone: 4 multiply-adds' flop per score that is seen and column, 3.5 times that with backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import harness
import pytest
import report
import torch
import torch.nn.functional as F
from harness import Contender, Results
from report import Roof
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqkernels.functional import scaled_dot_product_attention

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PEERS = {
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CALLS = 10  # in a row, before the wait for the device: what a call costs the host is hidden
UNIT = "flop of the GPU"


def best_gpu_matmul(size: int = 8192, rounds: int = 10) -> Roof:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        best = max(best, 2.0 * size**3 / (start.elapsed_time(end) / 1e3))
    return Roof(best, f"bfloat16 {size}x{size}x{size} on {torch.cuda.get_device_name()}, best of the run")


if torch.cuda.is_available():
    harness.ROOFS[UNIT] = best_gpu_matmul
report.WORK_RATES[UNIT] = "GFLOP/s"


class Shape(NamedTuple):
    B: int
    H: int
    T: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B} H{self.H} T{self.T} D{self.D}"


# 16k rows and 2048 columns in all, as in the charts of FlashAttention 3.
SHAPES = [Shape(B, 2048 // D, T, D) for D in (64, 128) for B, T in ((32, 512), (8, 2048), (2, 8192))]


@dataclass
class Kind:
    name: str
    causal: bool = False
    half: bool = False  # lengths from 1 to T, half filled on average
    bias: bool = False  # [1, H, T, T], with gradient
    bar: float | None = None


KINDS = [
    Kind("dense", bar=0.7),
    Kind("causal", causal=True, bar=0.7),
    Kind("lengths at half fill", half=True, bar=1.3),
    Kind("bias with gradient", bias=True, bar=2.0),
]


def lengths_of(shape: Shape) -> Tensor:
    return torch.linspace(shape.T / shape.B, shape.T * (1 - 1 / shape.B), shape.B).round().long().clamp(min=1)


def flop(shape: Shape, kind: Kind, training: bool) -> float:
    seen = float(shape.B * shape.T**2)
    if kind.half:
        seen = float((lengths_of(shape) ** 2).sum())
    return 4.0 * shape.H * shape.D * seen * (0.5 if kind.causal else 1.0) * (3.5 if training else 1.0)


def contender(
    name: str, call: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor, training: bool, real: Tensor | None
) -> Contender:
    """`real`: rows that count, [B, 1, T, 1]; what padding holds is nobody's business."""

    def once() -> tuple[Tensor, ...]:
        if not training:
            with torch.no_grad():
                return (call(*leaves),)
        out = call(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    def step() -> None:
        for _ in range(CALLS):
            once()
        torch.cuda.synchronize()

    def result() -> Results:
        found = once()
        if real is not None:
            found = tuple(t.masked_fill(~real, 0) for t in found)
        return dict(zip(("out", "dq", "dk", "dv", "dbias"), (t.float() for t in found)))

    try:
        result()
    except (RuntimeError, NotImplementedError) as error:
        return Contender(name, refused=str(error).strip().splitlines()[0])
    return Contender(name, step, result, calls=CALLS)


def torch_with(backend: SDPBackend, **options: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        given = dict(options) if bias is None else dict(options, attn_mask=bias)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **given)

    return call


@pytest.mark.filterwarnings("ignore")  # torch says why a backend does not run as warnings
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "-"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(bench: Any, shape: Shape, kind: Kind, training: bool) -> None:
    if kind.bias and shape.T > 2048:
        pytest.skip("a bias of gigabytes")
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    leaves = [drawn(shape.B, shape.H, shape.T, shape.D) for _ in range(3)]
    dout = drawn(shape.B, shape.H, shape.T, shape.D)
    if kind.bias:
        leaves.append(drawn(1, shape.H, shape.T, shape.T))
    for leaf in leaves:
        leaf.requires_grad_(training)
    ours, theirs = dict(is_causal=kind.causal), dict(is_causal=kind.causal)
    real = None
    if kind.half:
        lengths = lengths_of(shape).cuda()
        here = torch.arange(shape.T, device="cuda") < lengths[:, None]
        ours["lengths"], theirs["attn_mask"] = (lengths, lengths), here[:, None, None, :]
        real = here[:, None, :, None]
        dout = dout.masked_fill(~real, 0)

    def own(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, backend="triton", **ours)

    contenders = [contender("ours", own, leaves, dout, training, real)]
    for name, backend in PEERS.items():
        contenders.append(contender(name, torch_with(backend, **theirs), leaves, dout, training, real))
    assert not contenders[0].refused, contenders[0].refused
    able = [c.name for c in contenders[1:] if not c.refused]
    if not able:
        contenders.append(contender("torch math", torch_with(SDPBackend.MATH, **theirs), leaves, dout, training, real))
        able = ["torch math"]
    bench.time(
        f"attention on a GPU, bfloat16, {'forward and backward' if training else 'forward'}: {kind.name}",
        str(shape),
        contenders,
        bars={} if kind.bar is None or shape.D != 128 else dict.fromkeys(able, kind.bar),
        work=flop(shape, kind, training),
        work_unit=UNIT,
        tolerance=4e-2,
    )
