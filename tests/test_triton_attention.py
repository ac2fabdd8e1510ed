"""Attention's Triton kernels against a definition of the whole score matrix, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_on_cpu import DEVICE, load

attention = load("attention")
SEED = torch.tensor([0x1234_5678_9ABC_DEF1])


# ---- the definition


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32 with 7 rounds, http://www.thesalmons.org/john/random123/papers/random123sc11.pdf; uint32 in int64."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, torch.zeros_like(c0))
    for _ in range(7):
        # A product of 64 bits from two of 48: the sign of int64 leaves no room.
        (h0, l0), (h1, l1) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def kept(seed: int, p: float, i_bh: int, Tq: int, Tk: int) -> Tensor:
    i, j = torch.arange(Tq)[:, None], torch.arange(Tk)[None, :]
    words = philox(seed, j // 4, i + 0 * j, torch.full((Tq, Tk), i_bh))
    return torch.stack(words).gather(0, (j % 4).expand(Tq, Tk)[None])[0] >= round(p * 2**32)


def defined_one(
    q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, slope: Tensor | None, i_bh: int, o: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, Dv], lse [Tq] and weights [Tq, Tk] of one head of one sequence."""
    Tq, Tk = q.shape[0], k.shape[0]
    offset = Tk - Tq if o.causal == 2 else 0
    i, j = torch.arange(Tq)[:, None] + offset, torch.arange(Tk)[None, :]
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    if o.causal:
        seen &= j <= i
    if o.window_left >= 0:
        seen &= j >= i - o.window_left
    if o.window_right >= 0:
        seen &= j <= i + o.window_right
    if mask is not None:
        seen &= mask if mask.dtype == torch.bool else mask != -math.inf
    # Each row sums over what it sees, so that nothing else can reach it.
    s = o.scale * (q[:, None] * torch.where(seen[:, :, None], k[None], 0)).sum(-1)
    if o.softcap:
        s = o.softcap * (s / o.softcap).tanh()
    if slope is not None:
        s = s - slope * (i - j).abs()
    if mask is not None and mask.dtype != torch.bool:
        s = s + torch.where(seen, mask, 0)
    s = torch.where(seen, s, -math.inf)
    lse = torch.where(seen.any(1), torch.where(seen, s, -1e300).logsumexp(1), -math.inf)
    w = torch.where(seen, (s - torch.where(seen.any(1), lse, 0)[:, None]).where(seen, -1e300).exp(), 0)
    if o.dropout_p:
        w = torch.where(kept(int(SEED), o.dropout_p, i_bh, Tq, Tk), w / (1 - o.dropout_p), 0)
    out = torch.zeros(Tq, 0) if v is None else (w[:, :, None] * torch.where(seen[:, :, None], v[None], 0)).sum(1)
    return out, lse, w


@dataclasses.dataclass(frozen=True)
class Options:
    why: str
    B: int = 2
    H: int = 2
    G: int = 1
    Tq: int = 40
    Tk: int = 72
    D: int = 16
    Dv: int = 16
    q_lengths: tuple[int, ...] | None = None
    k_lengths: tuple[int, ...] | None = None
    q_rows: tuple[int, ...] | None = None  # packed: rows of each sequence
    k_rows: tuple[int, ...] | None = None
    mask: str = ""  # bool, float: which dimensions are full follows, as in "float bhqk"
    slopes: str = ""  # h or bh
    scale: float = 0.3
    causal: int = 0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    @property
    def sequences(self) -> int:
        return self.B if self.q_rows is None else len(self.q_rows)

    @property
    def most(self) -> tuple[int, int]:
        if self.q_rows is None:
            return self.Tq, self.Tk
        return max(self.q_rows, default=0), max(self.k_rows or (), default=0)


CASES = [
    Options("plain"),
    Options("one row", Tq=1, Tk=5, D=8, Dv=8),
    Options("a tail in every direction", B=3, Tq=131, Tk=137, D=20, Dv=9, H=1),
    Options("several blocks", B=1, H=1, Tq=260, Tk=270),
    Options("grouped heads", H=6, G=3),
    Options("causal", Tq=150, Tk=150, causal=1, B=1),
    Options("causal, fewer rows than keys", causal=1),
    Options("causal, more rows than keys", Tq=72, Tk=40, causal=1),
    Options("lower right, fewer rows", causal=2),
    Options("lower right, more rows: some see nothing", Tq=150, Tk=40, causal=2),
    Options("window", Tq=200, Tk=200, B=1, window_left=70, window_right=3),
    Options("window on the left alone", Tq=150, Tk=170, B=1, H=1, window_left=10),
    Options("causal window, lower right", Tq=140, Tk=200, B=1, H=1, causal=2, window_left=33),
    Options("causal and a window on the right", Tq=80, Tk=80, B=1, causal=1, window_right=7, window_left=0),
    Options("window far to the left", Tq=150, Tk=20, B=1, window_left=3),
    Options("lengths", B=4, q_lengths=(40, 0, 17, 3), k_lengths=(72, 5, 0, 40)),
    Options("lengths, lower right", B=3, q_lengths=(40, 30, 8), k_lengths=(72, 5, 40), causal=2, G=2),
    Options("lengths of keys", B=3, k_lengths=(72, 1, 64), D=32),
    Options("packed", q_rows=(3, 0, 70, 9), k_rows=(5, 4, 66, 0), D=24),
    Options("packed, causal, grouped", q_rows=(90, 1, 33), k_rows=(90, 1, 33), causal=1, H=4, G=2),
    Options("packed, lower right, window", q_rows=(9, 70), k_rows=(80, 71), causal=2, window_left=20),
    Options("bool mask", mask="bool bhqk"),
    Options("bool mask of keys", mask="bool bk", B=3),
    Options("float mask", mask="float bhqk", Tq=131, B=1),
    Options("float mask of all samples", mask="float hqk", B=3),
    Options("float mask of all heads", mask="float bqk"),
    Options("float mask of keys", mask="float bk", Tq=70),
    Options("float mask of rows", mask="float hq", causal=1),
    Options("float mask of one number", mask="float "),
    Options("float mask, causal, lengths", mask="float qk", causal=1, k_lengths=(70, 9), Tq=72),
    Options("packed with a mask", mask="float hqk", q_rows=(40, 3), k_rows=(20, 33)),
    Options("softcap", softcap=0.7),
    Options("softcap with a mask", softcap=5.0, mask="float qk", scale=3.0),
    Options("alibi", slopes="h", causal=1),
    Options("alibi of every sample", slopes="bh", causal=2, G=2),
    Options("dropout", dropout_p=0.3),
    Options("dropout of most", dropout_p=0.9, Tq=70, causal=1, B=1),
    Options("dropout, packed, grouped", dropout_p=0.2, q_rows=(40, 3), k_rows=(20, 33), G=2),
    Options("all at once", B=2, Tq=70, Tk=75, mask="float hqk", slopes="h", softcap=2.0, dropout_p=0.25, causal=2),
    Options("negative scale", scale=-0.4, causal=1),
    Options("scale 0", scale=0.0, causal=1),
    Options("no keys", Tk=0),
    Options("no rows", Tq=0),
    Options("wide values", D=16, Dv=70),
    Options("wide keys", D=70, Dv=16, Tq=20, Tk=33, H=1),
]


@dataclasses.dataclass
class Given:
    """Inputs of the ops, and the places of each sequence's rows in them."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    slopes: Tensor | None
    q_lengths: Tensor | None
    k_lengths: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    options: Options

    @property
    def rest(self) -> tuple[Any, ...]:
        """What follows q, k and v."""
        o, device = self.options, self.q.device
        tensors = (self.mask, self.slopes, self.q_lengths, self.k_lengths, self.cu_q, self.cu_k)
        numbers = (*o.most, o.scale, o.causal, o.window_left, o.window_right, o.softcap, o.dropout_p)
        return *tensors, *numbers, SEED.to(device) if o.dropout_p else None

    def sequences(self):
        """(b of the tensors, rows, keys) of each sequence."""
        o = self.options
        for s in range(o.sequences):
            if o.q_rows is None or o.k_rows is None:
                n = o.Tq if o.q_lengths is None else o.q_lengths[s]
                m = o.Tk if o.k_lengths is None else o.k_lengths[s]
                yield s, slice(0, n), slice(0, m)
            else:
                a, b = sum(o.q_rows[:s]), sum(o.k_rows[:s])
                yield 0, slice(a, a + o.q_rows[s]), slice(b, b + o.k_rows[s])


def make(o: Options, dtype: torch.dtype, device: str = DEVICE) -> Given:
    def integers(x: tuple[int, ...] | None, starts: bool = False) -> Tensor | None:
        if x is None:
            return None
        x = (0, *(sum(x[: i + 1]) for i in range(len(x)))) if starts else x
        return torch.tensor(x, dtype=torch.int32 if starts else torch.int64, device=device)

    B, Tq, Tk = o.B, o.Tq, o.Tk
    if o.q_rows is not None and o.k_rows is not None:
        B, Tq, Tk = 1, sum(o.q_rows) + 3, sum(o.k_rows) + 2  # a few rows are of no sequence
    q, k, v = (torch.randn(B, n, T, D) for n, T, D in ((o.H, Tq, o.D), (o.H // o.G, Tk, o.D), (o.H // o.G, Tk, o.Dv)))
    mask = None
    if o.mask:
        kind, _, full = o.mask.partition(" ")
        sizes = (o.sequences, o.H, *o.most)
        mask = torch.randn([n if name in full else 1 for name, n in zip("bhqk", sizes)])
        if kind == "bool":
            mask = mask > 0.3
        else:
            mask = torch.where(mask < -1, -math.inf, mask).to(dtype).to(device)
    slopes = None
    if o.slopes:
        slopes = (torch.rand((o.sequences, o.H) if "b" in o.slopes else (o.H,)) / 8).to(device)
    return Given(
        *(t.to(dtype).to(device) for t in (q, k, v)),
        None if mask is None else mask.to(device),
        slopes,
        integers(o.q_lengths),
        integers(o.k_lengths),
        integers(o.q_rows, True),
        integers(o.k_rows, True),
        o,
    )


def defined(given: Given, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and weights from float64 leaves on the CPU."""
    o = given.options
    q, k, v, mask = (leaves.get(name) for name in ("q", "k", "v", "mask"))
    if mask is None and given.mask is not None:
        mask = given.mask.cpu()
    out = torch.zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(q.shape[:3], -math.inf)
    weights = torch.zeros(o.sequences, o.H, *o.most)
    for s, (b, rows, keys) in enumerate(given.sequences()):
        for h in range(o.H):
            m = slope = None
            if mask is not None:
                m = mask.expand(o.sequences, o.H, *o.most)[s, h, : rows.stop - rows.start, : keys.stop - keys.start]
            if given.slopes is not None:
                slope = given.slopes.cpu().double().expand(o.sequences, o.H)[s, h]
            one = (q[b, h, rows], k[b, h // o.G, keys], v[b, h // o.G, keys], m, slope, s * o.H + h, o)
            x, y, w = defined_one(*one)
            out[b, h, rows], lse[b, h, rows] = x, y
            weights[s, h, : w.shape[0], : w.shape[1]] = w
    return out, lse, weights


def wide(given: Given) -> dict[str, Tensor]:
    leaves = {name: getattr(given, name) for name in ("q", "k", "v")}
    if given.mask is not None and given.mask.dtype != torch.bool:
        leaves["mask"] = given.mask
    return {name: t.detach().cpu().double().requires_grad_() for name, t in leaves.items()}


def near(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    """Sums of up to 300 terms, and scores of magnitude up to 10 under an exponential."""
    slack = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    got, want = got.cpu().double(), want.double()
    assert got.shape == want.shape, what
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    torch.testing.assert_close(got, want, rtol=slack, atol=slack * (scale + 0.01), msg=lambda m: f"{what}: {m}")


def check(o: Options, dtype: torch.dtype) -> None:
    given = make(o, dtype)
    leaves = wide(given)
    with torch.device("cpu"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            out, lse, weights = defined(given, leaves)
        finally:
            torch.set_default_dtype(default)
    got_out, got_lse = attention.attention_forward(given.q, given.k, given.v, *given.rest)
    assert got_out.dtype == dtype and got_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near(got_out, out, dtype, "out")
    near(got_lse, lse, dtype, "lse")

    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape).to(got_lse.dtype)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    loss = (out * dout.double()).sum() + (finite * dlse.double()).sum()
    names = list(leaves)
    want = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    arguments = (dout.to(DEVICE), dlse.to(DEVICE), given.q, given.k, given.v, *given.rest, got_out, got_lse)
    got = attention.attention_backward(*arguments, "mask" in leaves)
    for name, x, y in zip(names, got, want):
        assert x.dtype == dtype
        near(x, y, dtype, f"d{name}")
    if "mask" not in leaves:
        assert got[3].numel() == 0
    again = attention.attention_backward(*arguments, "mask" in leaves)
    assert all(torch.equal(x, y) for x, y in zip(got, again))

    w = attention.attention_weights(given.q, given.k, *given.rest, got_lse)
    near(w, weights, dtype, "weights")
    # As a function of q, k, the mask and lse.
    free = lse.detach().requires_grad_()
    shift = torch.zeros_like(weights)
    for s, (b, rows, _) in enumerate(given.sequences()):
        n = rows.stop - rows.start
        difference = torch.where(lse[b, :, rows].isfinite(), lse[b, :, rows] - free[b, :, rows], 0)
        shift = shift + torch.nn.functional.pad(
            difference.unsqueeze(-1).expand(-1, n, o.most[1]).unsqueeze(0),
            (0, 0, 0, o.most[0] - n, 0, 0, s, o.sequences - 1 - s),
        )
    dw = torch.randn(weights.shape).to(dtype)
    loss = (weights * shift.exp() * dw.double()).sum()
    names = [name for name in names if name != "v"]
    *want, dfree = torch.autograd.grad(loss, [*(leaves[name] for name in names), free], materialize_grads=True)
    got = attention.attention_weights_backward(dw.to(DEVICE), given.q, given.k, *given.rest, got_lse, "mask" in leaves)
    near(got[2][: dfree.shape[0]], dfree, dtype, "dlse of weights")
    for name, x, y in zip(names, (got[0], got[1], got[3]), want):
        near(x, y, dtype, f"d{name} of weights")


@pytest.mark.parametrize("o", CASES, ids=str)
def test_cases(o: Options):
    check(o, torch.float32)
