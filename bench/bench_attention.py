"""Attention against torch's scaled_dot_product_attention and flex_attention under torch.compile.

The bars are the claims of the project; the table reports PASS or MISS for each. Forward rows run without autograd;
"forward+backward" rows include gradients of query, key, value and, if present, of the bias.

Work counts useful operations: 4 D for each pair of a query and a key that it attends to (forward), 14 D with backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Contender, Results, compiled, of_tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import seqkernels
from seqkernels.functional import scaled_dot_product_attention, varlen_attention

TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 2e-2
FORWARD, BOTH = "forward", "forward+backward"
passes = pytest.mark.parametrize("which", [FORWARD, BOTH])
OURS, TORCH = scaled_dot_product_attention, F.scaled_dot_product_attention


class Shape(NamedTuple):
    B: int
    H: int
    L: int
    D: int

    def __str__(self) -> str:
        return f"B={self.B} H={self.H} L={self.L} D={self.D}"

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key."""
        return self.B * self.H * self.L * self.L

    @property
    def causal_pairs(self) -> int:
        return self.B * self.H * self.L * (self.L + 1) // 2


MIDDLE, SHORT, LONG = Shape(4, 8, 512, 64), Shape(8, 8, 128, 64), Shape(2, 8, 2048, 64)


def shape_id(value: object) -> str | None:
    return f"B{value.B}-H{value.H}-L{value.L}-D{value.D}" if isinstance(value, Shape) else None


def drawn(shape: Shape, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = shape.B, shape.H, shape.L, shape.D
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def contender(name: str, function: Callable[..., Tensor], tensors: Sequence[Tensor], which: str) -> Contender:
    return of_tensors(name, function, tensors, which == BOTH)


def row(
    bench: Any,
    group: str,
    label: str,
    which: str,
    pairs: float,
    D: int,
    contenders: list[Contender],
    bar: float | None,
    **more: Any,
) -> None:
    bars = {} if bar is None else {contenders[1].name: bar}
    work = (4.0 if which == FORWARD else 14.0) * D * pairs
    more.setdefault("tolerance", TOLERANCE)
    bench.time(f"Attention {which}, {group}", label, contenders, bars=bars, work=work, **more)


def flex(shape: Shape, tensors: Sequence[Tensor], which: str, mask: Callable | None) -> Contender:
    """Compiled flex_attention, which has no backward pass on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    name = "flex_attention, compiled"
    if which == BOTH:
        return Contender(name, refused="no backward pass on a CPU")
    L = shape.L
    block = None if mask is None else create_block_mask(mask, None, None, L, L, device="cpu")
    plain = [t.detach() for t in tensors]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=block)

    return compiled(name, call, lambda function: contender(name, function, plain, which))


# --- rows ---


@passes
@pytest.mark.parametrize(
    ("shape", "bars"), [(MIDDLE, (1.7, 1.6)), (SHORT, (1.4, 1.3)), (LONG, (1.25, 1.3))], ids=shape_id
)
def test_causal(bench: Any, shape: Shape, bars: tuple[float, float], which: str) -> None:
    tensors = drawn(shape)
    contenders = [
        contender("ours", lambda *t: OURS(*t, is_causal=True), tensors, which),
        contender("torch", lambda *t: TORCH(*t, is_causal=True), tensors, which),
        flex(shape, tensors, which, lambda b, h, i, j: i >= j),
    ]
    row(bench, "causal", str(shape), which, shape.causal_pairs, shape.D, contenders, bars[which == BOTH])


@passes
@pytest.mark.parametrize("shape", [MIDDLE, SHORT, LONG], ids=shape_id)
def test_dense(bench: Any, shape: Shape, which: str) -> None:
    tensors = drawn(shape)
    contenders = [contender("ours", OURS, tensors, which), contender("torch", TORCH, tensors, which)]
    contenders.append(flex(shape, tensors, which, None))
    row(bench, "dense", str(shape), which, shape.pairs, shape.D, contenders, 1.0)


@passes
def test_key_lengths(bench: Any, which: str) -> None:
    shape, lengths = MIDDLE, torch.tensor([512, 256, 128, 64])
    tensors, mask = drawn(shape), (torch.arange(shape.L) < lengths[:, None])[:, None, None]
    contenders = [
        contender("ours", lambda *t: OURS(*t, lengths=lengths), tensors, which),
        contender("torch, bool mask", lambda *t: TORCH(*t, attn_mask=mask), tensors, which),
        contender("(ours, bool mask)", lambda *t: OURS(*t, attn_mask=mask), tensors, which),
    ]
    pairs = shape.H * shape.L * int(lengths.sum())
    row(bench, "key lengths", f"512/256/128/64 of {shape}", which, pairs, shape.D, contenders, 2.0)


@passes
def test_dropout(bench: Any, which: str) -> None:
    """The dropout masks differ, so parity compares the output with the weights of seqkernels times the values."""
    tensors = drawn(MIDDLE)
    contenders = [
        contender("ours", lambda *t: OURS(*t, dropout_p=0.1), tensors, which),
        contender("torch", lambda *t: TORCH(*t, dropout_p=0.1), tensors, which),
    ]

    @torch.no_grad()
    def dropped(weights: bool) -> Results:
        torch.manual_seed(0)
        if not weights:
            return {"out": OURS(*tensors, dropout_p=0.1)}
        return {"out": OURS(*tensors, dropout_p=0.1, return_weights=True)[1] @ tensors[2]}

    contenders[0].result = lambda: dropped(False)
    parity = [(Contender("weights", result=lambda: dropped(True)), contenders[0])]
    row(bench, "dropout 0.1", str(MIDDLE), which, MIDDLE.pairs, MIDDLE.D, contenders, 4.0, parity=parity)


@passes
@pytest.mark.parametrize("batch", [1, MIDDLE.B])
def test_bias(bench: Any, batch: int, which: str) -> None:
    """A float mask with a gradient, shared by the sequences or one for each."""
    shape = MIDDLE
    bias = torch.randn(batch, shape.H, shape.L, shape.L, generator=torch.Generator().manual_seed(2)).requires_grad_()
    tensors = [*drawn(shape), bias]
    contenders = [
        contender("ours", lambda q, k, v, m: OURS(q, k, v, attn_mask=m), tensors, which),
        contender("torch", lambda q, k, v, m: TORCH(q, k, v, attn_mask=m), tensors, which),
    ]
    label = f"bias {'[1, H, L, L]' if batch == 1 else '[B, H, L, L]'}, {shape}"
    row(bench, "bias with gradient", label, which, shape.pairs, shape.D, contenders, 2.0 if batch == 1 else None)


@passes
def test_window(bench: Any, which: str) -> None:
    shape, window = LONG, 128
    at = torch.arange(shape.L)
    mask = (at[:, None] - at).abs() <= window
    tensors = drawn(shape)
    contenders = [
        contender("ours", lambda *t: OURS(*t, window=window), tensors, which),
        contender("torch, bool mask", lambda *t: TORCH(*t, attn_mask=mask), tensors, which),
        flex(shape, tensors, which, lambda b, h, i, j: (i - j).abs() <= window),
    ]
    pairs = shape.B * shape.H * int(mask.sum())
    row(bench, f"window {window}", str(shape), which, pairs, shape.D, contenders, (5.0, 4.0)[which == BOTH])


@passes
def test_varlen(bench: Any, which: str) -> None:
    """Packed sequences against a padded batch with a mask."""
    B, H, longest, D = 16, 8, 512, 64
    lengths = torch.randint(32, longest + 1, (B,), generator=torch.Generator().manual_seed(3))
    cu = F.pad(lengths.cumsum(0), (1, 0))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(int(cu[-1]), H, D, generator=generator).requires_grad_() for _ in range(3)]
    real = torch.arange(longest) < lengths[:, None]
    mask = real[:, None, None]

    def pad(t: Tensor) -> Tensor:
        padded = t.new_zeros(B, longest, H, D)
        padded[real] = t.detach()
        return padded.transpose(1, 2).contiguous().requires_grad_()

    padded = [pad(t) for t in rows]
    ours = contender("ours", lambda *t: varlen_attention(*t, cu, max_seqlen_q=longest), rows, which)
    torchs = contender("torch, padded, bool mask", lambda *t: TORCH(*t, attn_mask=mask), padded, which)
    ours.result = lambda: {"out": varlen_attention(*rows, cu).detach()}
    torchs.result = lambda: {"out": TORCH(*padded, attn_mask=mask).detach().transpose(1, 2)[real]}
    pairs = H * int((lengths.double() ** 2).sum())
    label = f"lengths uniform in 32..{longest}, B={B} H={H} D={D}"
    row(bench, "packed", label, which, pairs, D, [ours, torchs], 2.0)


@passes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(bench: Any, dtype: torch.dtype, which: str) -> None:
    tensors = drawn(MIDDLE, dtype)
    contenders = [contender("ours", OURS, tensors, which), contender("torch", TORCH, tensors, which)]
    label, group = f"{str(dtype).removeprefix('torch.')}, {MIDDLE}", "half types"
    row(bench, group, label, which, MIDDLE.pairs, MIDDLE.D, contenders, None, tolerance=BFLOAT16_TOLERANCE)


@pytest.mark.parametrize(("B", "keys", "bar"), [(4, 512, None), (4, 4096, None), (1, 10, 0.95), (1, 100, 0.95)])
def test_decoding(bench: Any, B: int, keys: int, bar: float | None) -> None:
    H, D = 8, 64
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, n, D, generator=generator) for n in (1, keys, keys))
    contenders = [contender("ours", OURS, (q, k, v), FORWARD), contender("torch", TORCH, (q, k, v), FORWARD)]
    row(bench, "one query", f"B={B} H={H} Tk={keys} D={D}", FORWARD, B * H * keys, D, contenders, bar)


HEADS = [(8, 8), (32, 8)]


@pytest.mark.parametrize("keys", [512, 4096, 32768])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_query(bench: Any, dtype: torch.dtype, heads: tuple[int, int], D: int, keys: int) -> None:
    """The time is that of reading keys and values: 4 products for each of their numbers and query head."""
    Hq, H = heads
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, *size, D, generator=generator).to(dtype) for size in ((Hq, 1), (H, keys), (H, keys)))
    contenders = [
        contender("ours", lambda *t: OURS(*t, enable_gqa=True), (q, k, v), FORWARD),
        contender("torch", lambda *t: TORCH(*t, enable_gqa=True), (q, k, v), FORWARD),
    ]
    label = f"Hq={Hq} Hk={H} Tk={keys} D={D}"
    group = "one query" if dtype == torch.float32 else f"one query, {str(dtype).removeprefix('torch.')}"
    tolerance = TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE
    bar = 1.3 if dtype == torch.float32 else None
    row(bench, group, label, FORWARD, Hq * keys, D, contenders, bar, tolerance=tolerance)


# Largest difference from a cache of float32, relative to the largest value.
CACHE_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.int8: 3e-2}


@pytest.mark.parametrize("keys", [4096, 32768])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("page_size", [None, 16], ids=["contiguous", "pages"])
@pytest.mark.parametrize("dtype", CACHE_TOLERANCE, ids=str)
def test_cache(bench: Any, dtype: torch.dtype, page_size: int | None, heads: tuple[int, int], keys: int) -> None:
    """One float32 query and a KeyValueCache, against a contiguous one of float32."""
    (Hq, H), D = heads, 128
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, *size, D, generator=generator) for size in ((Hq, 1), (H, keys), (H, keys)))
    caches = [
        seqkernels.nn.KeyValueCache(1, keys, H, D, dtype=of, page_size=size)
        for of, size in ((dtype, page_size), (torch.float32, None))
    ]
    for cache in caches:
        cache.append(k, v)
    name = str(dtype).removeprefix("torch.")
    contenders = [contender(f"ours, {of}", cache.attend, (q,), FORWARD) for of, cache in zip((name, "float32"), caches)]
    label = f"{name}, Hq={Hq} Hk={H} Tk={keys} D={D}"
    bar = 1.7 if dtype == torch.bfloat16 and page_size is None and keys == 32768 else None
    group = "cache" if page_size is None else f"cache in pages of {page_size}"
    row(bench, group, label, FORWARD, Hq * keys, D, contenders, bar, tolerance=CACHE_TOLERANCE[dtype])


# ---- small shapes, where the time of a call is that of its checks, dispatch and allocation

SMALL = [Shape(1, 4, 10, 16), Shape(3, 4, 30, 16), Shape(8, 8, 64, 16)]
LAYERS = ["MultiheadAttention", "MultiheadAttention, weights", "TransformerEncoderLayer", "TransformerDecoderLayer"]


@passes
@pytest.mark.parametrize("kind", ["dense", "causal", "key mask"])
@pytest.mark.parametrize("shape", [*SMALL, Shape(1, 1, 4, 8)], ids=shape_id)
def test_small(bench: Any, shape: Shape, kind: str, which: str) -> None:
    tensors, options = drawn(shape), dict(is_causal=kind == "causal")
    mask = (torch.arange(shape.L) < shape.L - 2).view(1, 1, 1, -1) if kind == "key mask" else None
    contenders = [
        contender("ours", lambda *t: OURS(*t, attn_mask=mask, **options), tensors, which),
        contender("torch", lambda *t: TORCH(*t, attn_mask=mask, **options), tensors, which),
    ]
    pairs = {"dense": shape.pairs, "causal": shape.causal_pairs, "key mask": shape.pairs // shape.L * (shape.L - 2)}
    row(bench, f"small, {kind}", str(shape), which, pairs[kind], shape.D, contenders, 0.95)


@passes
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("shape", SMALL, ids=shape_id)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(bench: Any, layer: str, shape: Shape, padded: bool, which: str) -> None:
    """Modules of H D columns; torch's have a fused path without autograd. The gradients are those of all parameters."""
    E, (name, _, weights) = shape.H * shape.D, layer.partition(", ")
    options = dict(batch_first=True, dropout=0.0)
    more = () if name == "MultiheadAttention" else (2 * E,)
    torch.manual_seed(0)
    modules = [getattr(library, name)(E, shape.H, *more, **options) for library in (seqkernels.nn, torch.nn)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(shape.B, shape.L, E, generator=torch.Generator().manual_seed(1)).requires_grad_(which == BOTH)
    padding = None
    if padded:
        padding = torch.arange(shape.L).expand(shape.B, -1) >= torch.linspace(shape.L // 2, shape.L, shape.B).view(
            -1, 1
        )

    def calling(module: torch.nn.Module) -> Callable[..., Tensor]:
        if name == "MultiheadAttention":
            return lambda x, *_: module(x, x, x, key_padding_mask=padding, need_weights=bool(weights))[0]
        if name == "TransformerEncoderLayer":
            return lambda x, *_: module(x, src_key_padding_mask=padding)
        return lambda x, *_: module(x, x, tgt_key_padding_mask=padding, memory_key_padding_mask=padding)

    contenders = []
    for of, module in zip(("ours", "torch"), modules):
        module.train(which == BOTH)
        contenders.append(contender(of, calling(module), (x, *module.parameters()), which))
    products = sum(p.numel() for p in modules[0].parameters() if p.dim() == 2) * shape.B * shape.L
    bench.time(
        f"{layer} {which}{', padding mask' if padded else ''}",
        f"B={shape.B} T={shape.L} E={E} H={shape.H}",
        contenders,
        bars={"torch": 0.95},
        work=(2.0 if which == FORWARD else 6.0) * products,
        tolerance=TOLERANCE,
    )


# ---- on a GPU

GPU_PEERS = {
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# 16k rows and 2048 columns in total, as in the benchmarks of FlashAttention 3.
GPU_SHAPES = [Shape(B, 2048 // D, L, D) for D in (64, 128) for B, L in ((32, 512), (8, 2048), (2, 8192))]


@dataclass
class Kind:
    name: str
    causal: bool = False
    half: bool = False  # lengths up to L, half of it on average
    bias: bool = False  # [1, H, L, L], with gradient
    bar: float | None = None

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


GPU_KINDS = [
    Kind("dense", bar=0.7),
    Kind("causal", causal=True, bar=0.7),
    Kind("lengths at half fill", half=True, bar=1.3),
    Kind("bias with gradient", bias=True, bar=2.0),
]


# Excludes biases of gigabytes.
GPU_ROWS = [
    pytest.param(s, kind, marks=pytest.mark.cuda(turn=2 if (kind.half or kind.bias) and s.D == 128 else 5))
    for s in GPU_SHAPES
    for kind in GPU_KINDS
    if not (kind.bias and s.L > 2048)
]


def lengths_at_half_fill(shape: Shape) -> Tensor:
    return torch.linspace(shape.L / shape.B, shape.L * (1 - 1 / shape.B), shape.B).round().long().clamp(min=1)


def gpu_flop(shape: Shape, kind: Kind, training: bool) -> float:
    seen = float(shape.B * shape.L**2)
    if kind.half:
        seen = float((lengths_at_half_fill(shape) ** 2).sum())
    return 4.0 * shape.H * shape.D * seen * (0.5 if kind.causal else 1.0) * (3.5 if training else 1.0)


def gpu_contender(
    name: str, call: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor, training: bool, real: Tensor | None
) -> Contender:
    """`real`: mask of valid rows, [B, 1, L, 1]; padding is not compared."""

    def once() -> tuple[Tensor, ...]:
        if not training:
            with torch.no_grad():
                return (call(*leaves),)
        out = call(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    def result() -> Results:
        found = once()
        if real is not None:
            found = tuple(t.masked_fill(~real, 0) for t in found)
        return dict(zip(("out", "dq", "dk", "dv", "dbias"), (t.float() for t in found)))

    try:
        result()
    except (RuntimeError, NotImplementedError) as error:
        return Contender(name, refused=str(error).strip().splitlines()[0])
    return Contender(name, once, result, on_cuda=True)


def torch_with(backend: SDPBackend, **options: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        given = dict(options) if bias is None else dict(options, attn_mask=bias)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **given)

    return call


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")  # torch warns with the reasons why a backend does not run
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("shape", "kind"), GPU_ROWS, ids=str)
def test_on_a_gpu(bench: Any, shape: Shape, kind: Kind, training: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

    leaves = [drawn(shape.B, shape.H, shape.L, shape.D) for _ in range(3)]
    dout = drawn(shape.B, shape.H, shape.L, shape.D)
    if kind.bias:
        leaves.append(drawn(1, shape.H, shape.L, shape.L))
    for leaf in leaves:
        leaf.requires_grad_(training)
    ours, theirs = dict(is_causal=kind.causal), dict(is_causal=kind.causal)
    real = None
    if kind.half:
        lengths = lengths_at_half_fill(shape).cuda()
        here = torch.arange(shape.L, device="cuda") < lengths[:, None]
        ours["lengths"], theirs["attn_mask"] = (lengths, lengths), here[:, None, None, :]
        real = here[:, None, :, None]
        dout = dout.masked_fill(~real, 0)

    def own(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, backend="triton", **ours)

    contenders = [gpu_contender("ours", own, leaves, dout, training, real)]
    for name, backend in GPU_PEERS.items():
        contenders.append(gpu_contender(name, torch_with(backend, **theirs), leaves, dout, training, real))
    assert not contenders[0].refused, contenders[0].refused
    able = [c.name for c in contenders[1:] if not c.refused]
    if not able:
        contenders.append(
            gpu_contender("torch math", torch_with(SDPBackend.MATH, **theirs), leaves, dout, training, real)
        )
        able = ["torch math"]
    bench.time(
        f"attention on a GPU, bfloat16, {'forward and backward' if training else 'forward'}: {kind.name}",
        str(shape),
        contenders,
        bars={} if kind.bar is None or shape.D != 128 else dict.fromkeys(able, kind.bar),
        work=gpu_flop(shape, kind, training),
        tolerance=4e-2,
    )
