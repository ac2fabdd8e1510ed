"""Cases for tests, fuzzing and benchmarks, their inputs, and the tolerances.

Dimensions: B batch, T time, N packed rows, D input, H hidden, P size of h (the projection size, or H), L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Maximum error relative to the maximum of the tensor. Half types round h once per step.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# Maximum ratio of the RMS errors of seqkernels and torch.nn.LSTM against float64, for the same dtype and packed input.
ERROR_RATIO = {torch.float32: 1.0, torch.bfloat16: 2.0, torch.float16: 2.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An input: dense, padded with `lengths`, or `packed` with sequences of `lengths`."""

    B: int
    T: int
    D: int
    H: int
    why: str
    P: int = 0
    L: int = 1
    bias: bool = True
    bidirectional: bool = False
    batch_first: bool = False
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    state: bool = True
    gates: int = 4  # 4: LSTM, with two states; other kinds have one state and no projection

    def __post_init__(self) -> None:
        if self.lengths is not None:
            assert len(self.lengths) == self.B and all(0 <= n <= self.T for n in self.lengths)
        if self.packed:
            assert self.lengths is not None and list(self.lengths) == sorted(self.lengths, reverse=True)
            assert self.lengths[0] == self.T and self.lengths[-1] > 0 and not self.batch_first
        assert self.gates == 4 or not self.P

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def h_size(self) -> int:
        return self.P or self.H

    @property
    def form(self) -> str:
        return "packed" if self.packed else "dense" if self.lengths is None else "lengths"

    def __str__(self) -> str:
        flags = [f"P{self.P}"] * bool(self.P) + [f"L{self.L}"] * (self.L > 1) + ["bi"] * self.bidirectional
        flags += ["nobias"] * (not self.bias) + ["bf"] * self.batch_first + ["nostate"] * (not self.state)
        return "-".join([f"B{self.B}", f"T{self.T}", f"D{self.D}", f"H{self.H}", *flags, self.form])

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Shapes in torch's order: for each layer and direction w_ih, w_hh[, b_ih, b_hh][, w_hr]."""
        shapes: list[tuple[int, ...]] = []
        for layer in range(self.L):
            for _ in range(self.directions):
                D = self.h_size * self.directions if layer else self.D
                shapes += [(self.gates * self.H, D), (self.gates * self.H, self.h_size)]
                shapes += [(self.gates * self.H,)] * (2 * self.bias) + [(self.P, self.H)] * bool(self.P)
        return shapes

    def module_arguments(self) -> dict:
        return dict(
            input_size=self.D,
            hidden_size=self.H,
            num_layers=self.L,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            **({"proj_size": self.P} if self.gates == 4 else {}),
        )


def ragged(B: int, T: int, *, zeros: bool = False, ordered: bool = False) -> tuple[int, ...]:
    """B random lengths up to T, at least one of them T; `zeros`: some are 0; `ordered`: longest first."""
    draw = random.Random(1000 * B + T)
    lengths = [draw.randint(0 if zeros else 1, T) for _ in range(B)]
    lengths[draw.randrange(B)] = T
    if zeros and B > 1:
        lengths[lengths.index(T) - 1] = 0
    return tuple(sorted(lengths, reverse=True)) if ordered else tuple(lengths)


CASES = [
    Case(B=3, T=7, D=5, H=17, why="a tail in each dimension"),
    Case(B=1, T=1, D=1, H=1, why="minimal sizes"),
    Case(B=4, T=5, D=3, H=1, why="one hidden unit"),
    Case(B=4, T=5, D=1, H=6, why="one input feature"),
    Case(B=5, T=1, D=8, H=16, why="one step"),
    Case(B=1, T=9, D=16, H=32, why="one sequence, full vectors"),
    Case(B=1, T=1, D=32, H=32, state=False, why="one step of a stream, without initial state"),
    Case(B=0, T=4, D=3, H=5, why="an empty batch"),
    Case(B=3, T=0, D=3, H=5, why="no steps"),
    Case(B=0, T=0, D=3, H=5, why="an empty batch without steps"),
    Case(B=0, T=3, D=3, H=5, P=2, L=2, bidirectional=True, lengths=(), why="an empty batch with lengths, stacked"),
    Case(B=2, T=0, D=3, H=5, P=2, L=2, bidirectional=True, lengths=(0, 0), why="no steps with lengths, stacked"),
    Case(B=16, T=4, D=16, H=16, why="each dimension one AVX-512 vector"),
    Case(B=2, T=5, D=15, H=15, why="one below 16"),
    Case(B=6, T=3, D=33, H=33, why="one above two vectors; six rows fill a register tile"),
    Case(B=7, T=3, D=63, H=65, why="around 64; one row above a register tile"),
    Case(B=5, T=3, D=129, H=127, why="around 128"),
    Case(B=2, T=3, D=257, H=255, why="around 256: a K block and a tail"),
    Case(B=3, T=2, D=300, H=256, why="a typical embedding, exactly one K block"),
    Case(B=9, T=20, D=24, H=96, why="enough work for two threads, uneven rows"),
    Case(B=1, T=12, D=40, H=200, why="two threads on one sequence"),
    Case(B=40, T=6, D=40, H=40, why="many rows, uneven partition"),
    Case(B=130, T=3, D=10, H=8, why="more rows than a block of 128"),
    Case(B=2, T=150, D=4, H=8, why="a long loop"),
    Case(B=3, T=6, D=5, H=9, bias=False, why="no bias"),
    Case(B=3, T=6, D=5, H=9, bidirectional=True, why="both directions"),
    Case(B=3, T=6, D=5, H=9, L=3, why="stacked"),
    Case(B=3, T=6, D=5, H=17, P=4, why="projection"),
    Case(B=2, T=4, D=5, H=70, P=33, bias=False, why="projection without bias"),
    Case(B=3, T=5, D=6, H=10, P=1, L=2, bidirectional=True, why="projection to one column, all options"),
    Case(B=4, T=5, D=7, H=20, L=2, bidirectional=True, bias=False, batch_first=True, why="batch first, no bias"),
    Case(B=4, T=6, D=5, H=12, batch_first=True, lengths=(2, 6, 0, 3), why="batch first with lengths"),
    Case(B=5, T=8, D=5, H=17, lengths=(3, 8, 1, 8, 5), why="unsorted lengths"),
    Case(B=5, T=8, D=5, H=17, lengths=(0, 4, 0, 7, 0), state=False, why="zero lengths, the longest below T"),
    Case(B=3, T=4, D=5, H=6, lengths=(0, 0, 0), why="only zero lengths"),
    Case(B=3, T=4, D=5, H=6, lengths=(4, 4, 4), why="lengths equal to T"),
    Case(B=6, T=9, D=8, H=24, P=5, L=2, bidirectional=True, lengths=ragged(6, 9, zeros=True), why="full, lengths"),
    Case(B=33, T=10, D=20, H=48, bidirectional=True, lengths=ragged(33, 10, zeros=True), why="many rows with lengths"),
    Case(B=5, T=8, D=5, H=17, lengths=(8, 8, 5, 3, 1), packed=True, why="packed"),
    Case(B=4, T=4, D=3, H=8, lengths=(4, 3, 2, 1), packed=True, why="the batch shrinks at every step"),
    Case(B=3, T=5, D=3, H=8, lengths=(5, 5, 5), packed=True, why="packed, equal lengths"),
    Case(B=1, T=6, D=3, H=8, lengths=(6,), packed=True, state=False, why="packed, one sequence"),
    Case(B=8, T=30, D=6, H=16, lengths=(30, 2, 2, 1, 1, 1, 1, 1), packed=True, why="one long, the others short"),
    Case(
        B=6, T=9, D=8, H=24, P=5, L=2, bidirectional=True, lengths=ragged(6, 9, ordered=True), packed=True,
        why="all options, packed",
    ),
    Case(
        B=33, T=10, D=20, H=48, bidirectional=True, lengths=ragged(33, 10, ordered=True), packed=True,
        why="many rows, packed, both directions",
    ),
    Case(B=9, T=20, D=24, H=96, L=2, bias=False, lengths=ragged(9, 20, ordered=True), packed=True, why="two threads"),
]  # fmt: skip

# Small sizes for numerical differentiation.
TINY = [
    Case(B=2, T=3, D=2, H=3, why="dense"),
    Case(B=1, T=2, D=1, H=1, why="minimal sizes with a recurrence"),
    Case(B=2, T=2, D=2, H=2, bias=False, why="no bias"),
    Case(B=2, T=2, D=2, H=2, state=False, why="no initial state"),
    Case(B=2, T=3, D=2, H=2, bidirectional=True, why="both directions"),
    Case(B=2, T=3, D=2, H=3, P=2, why="projection"),
    Case(B=3, T=3, D=2, H=2, lengths=(2, 0, 3), why="lengths"),
    Case(B=3, T=3, D=2, H=2, lengths=(3, 2, 1), packed=True, why="packed"),
    Case(B=2, T=2, D=2, H=2, L=2, why="stacked"),
    Case(B=2, T=2, D=2, H=3, P=2, L=2, bidirectional=True, lengths=(2, 1), packed=True, why="all options, packed"),
    Case(B=2, T=2, D=2, H=2, bidirectional=True, batch_first=True, lengths=(1, 2), why="batch first, lengths"),
]

# Typical sizes for training, to compare rounding errors with torch.
REALISTIC = [
    Case(B=8, T=100, D=64, H=128, lengths=ragged(8, 100, ordered=True), packed=True, why="a small text model"),
    Case(B=4, T=60, D=128, H=256, lengths=ragged(4, 60, ordered=True), packed=True, why="wide"),
    Case(B=4, T=200, D=32, H=64, lengths=ragged(4, 200, ordered=True), packed=True, why="long"),
    Case(B=16, T=50, D=64, H=64, lengths=ragged(16, 50, ordered=True), packed=True, why="short, many"),
    Case(
        B=6, T=50, D=64, H=64, bidirectional=True, lengths=ragged(6, 50, ordered=True), packed=True,
        why="both directions",
    ),
    Case(B=6, T=50, D=64, H=96, P=48, lengths=ragged(6, 50, ordered=True), packed=True, why="projection"),
]  # fmt: skip

# Batches of different lengths, to compare packed, padded and single sequences bit for bit.
RAGGED = [
    Case(B=5, T=8, D=5, H=17, lengths=(3, 8, 1, 8, 5), why="tails"),
    Case(B=1, T=6, D=3, H=33, lengths=(6,), why="a single sequence"),
    Case(B=9, T=12, D=20, H=96, lengths=ragged(9, 12), why="enough work for two threads"),
    Case(B=40, T=5, D=16, H=40, lengths=ragged(40, 5), why="many rows"),
    Case(B=4, T=6, D=65, H=129, lengths=(6, 2, 5, 6), why="more than a block of 64 and 128"),
    Case(B=3, T=3, D=300, H=257, lengths=(2, 3, 1), why="more than the K block of 256"),
    Case(B=6, T=7, D=8, H=24, P=5, L=2, bidirectional=True, lengths=ragged(6, 7), why="all options"),
    Case(B=6, T=7, D=8, H=16, bias=False, bidirectional=True, lengths=ragged(6, 7), why="no bias"),
    Case(B=70, T=4, D=4, H=8, lengths=ragged(70, 4), why="more rows than a block of 64"),
    Case(B=1, T=4, D=24, H=260, lengths=(4,), why="one row of weights larger than a private cache"),
]


@dataclasses.dataclass
class Inputs:
    """Arguments of `lstm`, or of a kind with one state, and upstream gradients of all outputs."""

    case: Case
    x: Tensor  # [T, B, D], [B, T, D] if batch_first, or packed rows [N, D]
    hx: tuple[Tensor, ...] | None  # h [L * directions, B, P] and, for an LSTM, c [L * directions, B, H]
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    dy: Tensor
    dh_n: Tensor
    dc_n: Tensor

    def keywords(self) -> dict:
        c = self.case
        return dict(
            batch_sizes=self.batch_sizes,
            lengths=self.lengths,
            num_layers=c.L,
            bidirectional=c.bidirectional,
            batch_first=c.batch_first,
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """Applies f to all floating-point tensors."""
        return dataclasses.replace(
            self,
            x=f(self.x),
            hx=None if self.hx is None else tuple(map(f, self.hx)),
            weights=[f(w) for w in self.weights],
            dy=f(self.dy),
            dh_n=f(self.dh_n),
            dc_n=f(self.dc_n),
        )

    def state_argument(self) -> tuple[Tensor, ...] | Tensor | None:
        """hx as an argument of the public functions."""
        return self.hx[0] if self.hx is not None and len(self.hx) == 1 else self.hx

    def differentiable(self) -> list[Tensor]:
        return [self.x, *(self.hx or ()), *self.weights]


def batch_sizes_of(lengths: Sequence[int]) -> Tensor:
    T = max(lengths, default=0)
    return torch.tensor([sum(n > t for n in lengths) for t in range(T)], dtype=torch.int64)


def make_inputs(case: Case, dtype: torch.dtype, *, seed: int = 0, padding: float = math.nan) -> Inputs:
    """Random inputs, with the weight initialization of torch. `padding`: value of the padding."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    bound = 1 / math.sqrt(case.H)
    weights = [
        ((torch.rand(s, generator=g, dtype=torch.float64) * 2 - 1) * bound).to(dtype) for s in case.weight_shapes()
    ]
    rows, states = case.directions * case.h_size, case.L * case.directions
    hx = (normal(states, case.B, case.h_size) * 0.5, normal(states, case.B, case.H) * 0.5)
    batch_sizes = lengths = None
    if case.packed:
        N = sum(case.lengths)
        x, dy = normal(N, case.D), normal(N, rows)
        batch_sizes = batch_sizes_of(case.lengths)
    else:
        x, dy = normal(case.T, case.B, case.D), normal(case.T, case.B, rows)
        if case.lengths is not None:
            lengths = torch.tensor(case.lengths, dtype=torch.int64)
            x[torch.arange(case.T).unsqueeze(1) >= lengths] = padding
        if case.batch_first:
            x, dy = x.transpose(0, 1).contiguous(), dy.transpose(0, 1).contiguous()
    dh_n, dc_n = normal(*hx[0].shape), normal(*hx[1].shape)
    hx = hx if case.gates == 4 else hx[:1]
    return Inputs(case, x, hx if case.state else None, weights, batch_sizes, lengths, dy, dh_n, dc_n)


def run(lstm: Callable, inputs: Inputs, upstream: Sequence[str] = ("dy", "dh_n", "dc_n")) -> dict[str, Tensor]:
    """Outputs and all gradients by name. `upstream`: names of the upstream gradients."""
    inputs = inputs.map(lambda t: t.detach().requires_grad_())
    y, states = lstm(inputs.x, inputs.state_argument(), inputs.weights, **inputs.keywords())
    outputs = dict(zip(("dy", "dh_n", "dc_n"), (y, *tuple_of(states)), strict=False))
    pairs = [(outputs[u], getattr(inputs, u).detach()) for u in upstream if u in outputs]
    pairs = [(output, g) for output, g in pairs if output.requires_grad]  # false for some outputs if T = 0
    wanted = inputs.differentiable()
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs:
        grads = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]
    names = ["dx", *["dh0", "dc0"][: len(inputs.hx or ())], *weight_names(inputs.case)]
    result = {name.removeprefix("d"): output.detach() for name, output in outputs.items()}
    return result | dict(zip(names, grads, strict=True))


def tuple_of(states: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


@contextlib.contextmanager
def one_thread():
    """Runs on one thread. Small parallel loops may stall for milliseconds beside another busy process."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


def defined(
    inputs: Inputs, upstream: Sequence[str] = ("dy", "dh_n", "dc_n"), definition: Callable = reference.lstm
) -> dict[str, Tensor]:
    """Results of the definition in float64, for the rounded inputs."""
    with one_thread():
        return run(definition, inputs.map(Tensor.double), upstream)


def weight_names(case: Case) -> list[str]:
    names = ["w_ih", "w_hh"] + ["b_ih", "b_hh"] * case.bias + ["w_hr"] * bool(case.P)
    return [f"d{n}_l{layer}{'_reverse' * d}" for layer in range(case.L) for d in range(case.directions) for n in names]


def module_of(cls: type[torch.nn.Module], inputs: Inputs, **arguments) -> torch.nn.Module:
    """A module of class cls for the case, with the weights of the inputs."""
    module = cls(**inputs.case.module_arguments() | arguments, dtype=inputs.x.dtype)
    with torch.no_grad():
        for p, w in zip(module.parameters(), inputs.weights, strict=True):
            p.copy_(w)
    return module


def run_module(module: torch.nn.Module, inputs: Inputs, **keywords) -> dict[str, Tensor]:
    """`run` for a module, with a PackedSequence or a dense tensor."""
    x, *hx = (t.detach().requires_grad_() for t in (inputs.x, *(inputs.hx or ())))
    argument = x if inputs.batch_sizes is None else PackedSequence(x, inputs.batch_sizes)
    state = tuple(hx) if len(hx) == 2 else hx[0] if hx else None
    y, states = module(argument, state, **keywords)
    y = y.data if isinstance(y, PackedSequence) else y
    wanted = [x, *hx, *module.parameters()]
    outputs = dict(zip(("y", "h_n", "c_n"), (y, *tuple_of(states)), strict=False))
    upstream = [inputs.dy, inputs.dh_n, inputs.dc_n][: len(outputs)]
    grads = torch.autograd.grad(list(outputs.values()), wanted, upstream)
    names = ["dx", *["dh0", "dc0"][: len(hx)], *weight_names(inputs.case)]
    result = {name: output.detach() for name, output in outputs.items()}
    return result | dict(zip(names, grads, strict=True))


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Asserts an error of at most TOLERANCE[dtype] relative to the maximum; zero tensors are exact."""
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        assert g.dtype == dtype, f"{name} is {g.dtype}"
        assert g.shape == w.shape, f"{name} has shape {tuple(g.shape)}, not {tuple(w.shape)}"
        assert g.isfinite().all(), f"{name} is not finite"
        if w.numel():
            error, scale = (g.double() - w.double()).abs().max().item(), w.abs().max().item()
            allowed = TOLERANCE[dtype] * scale
            assert error <= allowed, (
                f"{name} is off by {error:.3g}, {error / max(scale, 1e-300):.3g} of its largest value"
            )


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor], names: Sequence[str] | None = None) -> None:
    for name in want if names is None else names:
        g, w = got[name], want[name]
        assert g.shape == w.shape and g.dtype == w.dtype, f"{name}: {g.dtype} {g.shape} and {w.dtype} {w.shape}"
        assert torch.equal(g, w), f"{name} differs in {(g != w).sum()} of {g.numel()} values, by {(g - w).abs().max()}"


# ---- embedding bags
# Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag.

BAG_MODES = ("sum", "mean", "max", "min")

# Maximum error of a result computed in float32 or wider and rounded once to the type of the table: half a unit in the
# last place of each value (BAG_ROUNDING), and the error of the wider type relative to the maximum (BAG_SLACK).
BAG_ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
BAG_SLACK = {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BagCase:
    """Bags of the given lengths, with offsets, or [B, L] without.

    weights: "": none; "same": of the table's dtype; "wide": float32. trailing: indices beyond the last offset.
    rows: "any": all rows; "few": three rows, which repeat; "one": a single row; "distinct": each row at most once.
    """

    E: int
    D: int
    lengths: tuple[int, ...]
    why: str
    form: str = "offsets"  # "last": with include_last_offset; "2-D": without offsets
    trailing: int = 0
    padding_idx: int | None = None
    weights: str = ""
    weight_norm: str = "count"
    scale_grad_by_freq: bool = False
    rows: str = "any"
    index: torch.dtype = torch.int64
    offset: torch.dtype = torch.int64

    def __post_init__(self) -> None:
        assert self.form in ("offsets", "last", "2-D") and self.weights in ("", "same", "wide")
        assert self.form != "2-D" or len(set(self.lengths)) <= 1
        assert not self.trailing or self.form == "last"
        assert self.rows != "distinct" or self.N <= self.E

    @property
    def B(self) -> int:
        return len(self.lengths)

    @property
    def N(self) -> int:
        return sum(self.lengths) + self.trailing

    def __str__(self) -> str:
        flags = [self.form] * (self.form != "offsets") + [f"trailing{self.trailing}"] * bool(self.trailing)
        flags += [f"pad{self.padding_idx}"] * (self.padding_idx is not None) + [self.weights] * bool(self.weights)
        flags += [f"by_{self.weight_norm}"] * (self.weight_norm != "count") + ["freq"] * self.scale_grad_by_freq
        flags += [self.rows] * (self.rows != "any") + ["i32"] * (self.index == torch.int32)
        flags += ["o32"] * (self.offset == torch.int32)
        return "-".join([f"E{self.E}", f"D{self.D}", f"B{self.B}", f"N{self.N}", *flags])


def bag_lengths(B: int, longest: int) -> tuple[int, ...]:
    """B random lengths from 0 to `longest`, beginning with 0 and `longest`."""
    draw = random.Random(1000 * B + longest)
    return tuple(([0, longest] + [draw.randint(0, longest) for _ in range(B)])[:B])


BAG_CASES = [
    BagCase(E=7, D=5, lengths=(2, 0, 3, 1), why="a tail in each dimension, one bag empty"),
    BagCase(E=1, D=1, lengths=(1,), why="minimal sizes"),
    BagCase(E=1, D=8, lengths=(3, 5), why="one row"),
    BagCase(E=9, D=1, lengths=(4, 0, 3), weights="same", why="one column"),
    BagCase(E=9, D=1, lengths=bag_lengths(40, 9), padding_idx=3, why="one column, many bags"),
    BagCase(E=5, D=0, lengths=(2, 1), weights="same", why="no columns"),
    BagCase(E=5, D=4, lengths=(), why="no bags"),
    BagCase(E=5, D=4, lengths=(), form="last", why="no bags, but a last offset"),
    BagCase(E=5, D=4, lengths=(), form="2-D", why="no bags, 2-D"),
    BagCase(E=5, D=4, lengths=(0, 0, 0), weights="same", why="only empty bags"),
    BagCase(E=5, D=4, lengths=(0, 0), form="2-D", why="only empty bags, 2-D"),
    BagCase(E=0, D=4, lengths=(0, 0), why="a table without rows"),
    BagCase(E=6, D=3, lengths=(0, 0, 4, 0), why="empty bags around one with indices"),
    BagCase(E=11, D=8, lengths=(3,) * 5, form="2-D", why="2-D, a full vector"),
    BagCase(E=11, D=6, lengths=(1,) * 9, form="2-D", why="one row per bag"),
    BagCase(E=11, D=6, lengths=(4, 1, 0, 2), form="last", why="the last offset"),
    BagCase(E=11, D=6, lengths=(4, 1, 0, 2), form="last", trailing=3, weights="same", why="trailing indices"),
    BagCase(E=11, D=6, lengths=(), form="last", trailing=3, why="only indices beyond the last offset"),
    BagCase(E=11, D=7, lengths=(4, 1, 0, 2), index=torch.int32, offset=torch.int32, why="int32"),
    BagCase(E=11, D=7, lengths=(4, 1, 0, 2), index=torch.int32, why="int32 indices, int64 offsets"),
    BagCase(E=11, D=7, lengths=(4, 1, 0, 2), offset=torch.int32, form="last", why="int64 indices, int32 offsets"),
    BagCase(E=12, D=15, lengths=bag_lengths(6, 7), weights="same", why="one below 16"),
    BagCase(E=12, D=16, lengths=bag_lengths(6, 7), weights="wide", why="one AVX-512 vector, float32 weights"),
    BagCase(E=12, D=17, lengths=bag_lengths(6, 7), padding_idx=0, why="one above 16"),
    BagCase(E=12, D=33, lengths=bag_lengths(6, 7), why="one above two vectors"),
    BagCase(E=30, D=64, lengths=bag_lengths(9, 20), weights="same", padding_idx=29, why="a typical row"),
    BagCase(E=30, D=127, lengths=bag_lengths(5, 20), why="one below 128"),
    BagCase(E=30, D=130, lengths=bag_lengths(5, 20), weights="same", why="more than 128"),
    BagCase(E=30, D=300, lengths=bag_lengths(5, 20), weights="wide", padding_idx=4, why="a typical embedding"),
    BagCase(E=20, D=513, lengths=bag_lengths(4, 9), why="more columns than accumulators"),
    BagCase(E=4, D=5, lengths=(3, 3), rows="one", padding_idx=0, why="possibly only padding"),
    BagCase(E=4, D=5, lengths=(6, 2, 5), padding_idx=2, rows="few", weights="same", why="frequent padding"),
    BagCase(E=40, D=9, lengths=(5, 0, 7, 3), rows="distinct", why="no row twice"),
    BagCase(E=40, D=9, lengths=bag_lengths(30, 9), rows="few", why="unequal counts"),
    BagCase(E=40, D=9, lengths=bag_lengths(30, 9), rows="few", scale_grad_by_freq=True, why="divided by counts"),
    BagCase(
        E=9, D=9, lengths=bag_lengths(9, 6), scale_grad_by_freq=True, padding_idx=2, weights="same", form="last",
        trailing=4, why="counts exclude padding and indices beyond the last offset",
    ),
    BagCase(E=9, D=6, lengths=bag_lengths(9, 6), weights="same", weight_norm="weight", why="a mean divided by weights"),
    BagCase(
        E=9, D=20, lengths=bag_lengths(9, 6), weights="wide", weight_norm="weight", padding_idx=1,
        why="a mean divided by float32 weights, padding",
    ),
    BagCase(E=50, D=12, lengths=(300, 1, 0, 2), weights="same", why="a long bag among short ones"),
    BagCase(E=3, D=20, lengths=(700,), padding_idx=1, why="one long bag of few rows"),
    BagCase(E=300, D=16, lengths=bag_lengths(150, 12), weights="same", why="enough work for two threads"),
    BagCase(E=1500, D=20, lengths=(10,) * 80, form="2-D", index=torch.int32, why="most rows occur at most once"),
    BagCase(E=70000, D=2, lengths=bag_lengths(50, 9), why="more rows than 16-bit numbers"),
]  # fmt: skip

# Small sizes for numerical differentiation.
BAG_TINY = [
    BagCase(E=4, D=3, lengths=(2, 0, 3), why="offsets"),
    BagCase(E=4, D=2, lengths=(2, 2), form="2-D", weights="same", why="2-D with weights"),
    BagCase(E=4, D=2, lengths=(3, 1), form="last", trailing=2, weights="same", padding_idx=1, why="all options"),
    BagCase(E=4, D=2, lengths=(3, 2), weights="same", weight_norm="weight", why="divided by weights"),
    BagCase(E=3, D=2, lengths=(4, 3), rows="few", padding_idx=0, why="padding, repeats"),
]

# Typical sizes for training, to compare rounding errors with torch, and results for many threads.
BAG_REALISTIC = [
    BagCase(E=2000, D=64, lengths=(20,) * 300, why="a feature of a recommender"),
    BagCase(E=500, D=128, lengths=bag_lengths(100, 60), why="a text classifier"),
    BagCase(E=100, D=32, lengths=bag_lengths(400, 20), why="few rows, each many times"),
]


@dataclasses.dataclass
class BagInputs:
    case: BagCase
    mode: str
    weight: Tensor  # [E, D]
    indices: Tensor  # [N] or [B, L]
    offsets: Tensor | None
    weights: Tensor | None  # shaped like indices
    dout: Tensor  # [B, D]

    def keywords(self) -> dict:
        c = self.case
        return dict(
            offsets=self.offsets,
            mode=self.mode,
            include_last_offset=c.form == "last",
            padding_idx=c.padding_idx,
            weight_norm=c.weight_norm,
            **({"scale_grad_by_freq": True} if c.scale_grad_by_freq else {}),
        )

    def op_arguments(self) -> tuple:
        """The arguments of the ops that describe the bags."""
        c = self.case
        padding = -1 if c.padding_idx is None else c.padding_idx
        mode, by = BAG_MODES.index(self.mode), int(c.weight_norm == "weight")
        return self.indices, self.offsets, self.weights, mode, padding, c.form == "last", by

    def map(self, f: Callable[[Tensor], Tensor]) -> BagInputs:
        """Applies f to all floating-point tensors."""
        weights = None if self.weights is None else f(self.weights)
        return dataclasses.replace(self, weight=f(self.weight), weights=weights, dout=f(self.dout))

    def bounds(self) -> list[tuple[int, int]]:
        """[begin, end) of each bag in the flattened indices."""
        ends = list(itertools.accumulate(self.case.lengths))
        return list(zip([0, *ends], ends))


def make_bag_inputs(case: BagCase, dtype: torch.dtype, mode: str = "sum", *, seed: int = 0) -> BagInputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    weight, dout = normal(case.E, case.D), normal(case.B, case.D)
    if case.rows == "distinct":
        indices = torch.randperm(case.E, generator=g)[: case.N]
    else:
        highest = {"any": case.E, "few": min(3, case.E), "one": 1}[case.rows]
        indices = torch.randint(0, max(highest, 1), (case.N,), generator=g)
    weights = None
    if case.weights:
        drawn = torch.randn(case.N, generator=g, dtype=torch.float64)
        drawn = drawn.abs() + 0.2 if case.weight_norm == "weight" else drawn  # avoids weights whose sum is zero
        weights = drawn.to(torch.promote_types(dtype, torch.float32) if case.weights == "wide" else dtype)
    offsets = None
    if case.form == "2-D":
        shape = case.B, case.lengths[0] if case.lengths else 3
        indices, weights = indices.view(shape), None if weights is None else weights.view(shape)
    else:
        starts = list(itertools.accumulate(case.lengths, initial=0))
        offsets = torch.tensor(starts if case.form == "last" else starts[:-1], dtype=case.offset)
    return BagInputs(case, mode, weight, indices.to(case.index), offsets, weights, dout)


def run_bag(embedding_bag: Callable, inputs: BagInputs, **more) -> dict[str, Tensor]:
    """Output and gradients by name. A sparse gradient of the table remains sparse."""
    inputs = dataclasses.replace(inputs.map(lambda t: t.detach().requires_grad_()), dout=inputs.dout)
    wanted = {"dweight": inputs.weight} | ({} if inputs.weights is None else {"dweights": inputs.weights})
    arguments = inputs.keywords() | more
    output = embedding_bag(inputs.indices, inputs.weight, per_sample_weights=inputs.weights, **arguments)
    grads = torch.autograd.grad(output, list(wanted.values()), inputs.dout)
    return {"output": output.detach()} | dict(zip(wanted, grads, strict=True))


def bag_definition(inputs: BagInputs, **more) -> dict[str, Tensor]:
    """Results of the reference in float64, for the rounded inputs."""
    return run_bag(reference.embedding_bag, inputs.map(Tensor.double), **more)


def assert_bag_near(got: dict[str, Tensor], want: dict[str, Tensor], inputs: BagInputs, slack: float = 1.0) -> None:
    """Asserts that each value differs from `want` by at most one rounding; long sums have more slack."""
    assert got.keys() == want.keys()
    where = f"{inputs.case}, {inputs.mode}, {inputs.weight.dtype}"
    if inputs.case.N:
        hottest = torch.bincount(inputs.indices.flatten()).max()
        slack *= max(1.0, max(hottest.item(), *inputs.case.lengths, 0) / 100)
    table, dout, weights = (
        (t.abs().max().item() if t is not None and t.numel() else 1.0)
        for t in (inputs.weight, inputs.dout, inputs.weights)
    )
    terms = {"output": table * weights, "dweight": dout * weights, "dweights": dout * table}  # they may cancel
    for name, w in want.items():
        dtype = inputs.weights.dtype if name == "dweights" else inputs.weight.dtype
        g = got[name].to_dense() if got[name].is_sparse else got[name]
        assert g.dtype == dtype, f"{where}: {name} is {g.dtype}"
        assert g.shape == w.shape, f"{where}: {name} has shape {tuple(g.shape)}, not {tuple(w.shape)}"
        if w.numel():
            # Products of two values of a half type are exact in float32.
            largest = max(w.abs().max().item(), terms[name])
            allowed = (w.abs() * BAG_ROUNDING[dtype]).add_(slack * BAG_SLACK[dtype] * largest)
            right = (g.double() - w).abs() <= allowed
            if not right.all():  # also detects NaN
                worst = int((g.double() - w).abs().sub(allowed).argmax())
                raise AssertionError(
                    f"{where}: {name} is {g.flatten()[worst]:.6g} at {worst}, expected {w.flatten()[worst]:.6g}, "
                    f"maximum {largest:.3g}; {int((~right).sum())} of {w.numel()} values differ"
                )


# ---- attention
# Dimensions: B sequences, Hq query heads, Hk key heads, Tq queries, Tk keys, D and Dv columns.

# Maximum ratio of the RMS errors of seqkernels and torch against float64, for the same dtype, over several inputs.
ATTENTION_ERROR_RATIO = {torch.float32: 1.0, torch.bfloat16: 2.0, torch.float16: 2.0}
ATTENTION_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """A call, dense or `packed`, with sequences of `q_lengths` and `k_lengths`.

    mask: bool or float. mask_of: the dimensions b, h, i, j in which the mask is not broadcast.
    """

    why: str
    B: int = 2
    Hq: int = 2
    Hk: int = 2
    Tq: int = 7
    Tk: int = 9
    D: int = 8
    Dv: int = 8
    mask: str = ""
    mask_of: str = "bhij"
    q_lengths: tuple[int, ...] | None = None
    k_lengths: tuple[int, ...] | None = None
    packed: bool = False
    causal: int = 0
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    slopes: str = ""  # dimensions: h or bh
    dropout_p: float = 0.0
    scale: float | None = None

    def __str__(self) -> str:
        heads = f"H{self.Hq}" if self.Hq == self.Hk else f"H{self.Hq}over{self.Hk}"
        flags = [f"{self.mask}{self.mask_of}"] * bool(self.mask) + ["lengths"] * (self.k_lengths is not None)
        flags += ["packed"] * self.packed + ["causal", "lowerright"][self.causal - 1 : self.causal] * bool(self.causal)
        flags += [f"window{self.window[0]}_{self.window[1]}"] * (self.window != (-1, -1))
        flags += ["softcap"] * bool(self.softcap) + [f"alibi{self.slopes}"] * bool(self.slopes)
        flags += ["dropout"] * bool(self.dropout_p)
        return "-".join([f"B{self.B}", heads, f"Tq{self.Tq}", f"Tk{self.Tk}", f"D{self.D}", f"Dv{self.Dv}", *flags])


ATTENTION_CASES = [
    AttentionCase(why="smaller than a block"),
    AttentionCase(Hq=4, Hk=2, Tq=70, Tk=100, D=17, Dv=33, why="a tail in each dimension; grouped heads"),
    AttentionCase(Hq=6, Hk=2, Tq=5, Tk=70, D=20, Dv=5, causal=2, why="several heads in a block, Tq < Tk"),
    AttentionCase(B=1, Tq=130, Tk=130, D=64, Dv=64, causal=1, why="blocks above, on and below the diagonal"),
    AttentionCase(Hk=1, Tq=100, Tk=130, D=16, Dv=16, causal=2, window=(20, -1), why="a window from the last key"),
    AttentionCase(Tq=100, Tk=30, causal=2, why="the first queries attend to no key"),
    AttentionCase(Tq=30, Tk=100, causal=1, why="keys that no query attends to"),
    AttentionCase(B=1, Tq=60, Tk=700, window=(20, 600), why="a window over more than one chunk"),
    AttentionCase(B=1, Tq=1, Tk=1200, D=16, Dv=16, Hq=4, Hk=2, why="decoding: three chunks of keys"),
    AttentionCase(Tq=60, Tk=70, D=1, Dv=1, softcap=2.0, why="softcap; one column"),
    AttentionCase(Tq=60, Tk=70, slopes="h", causal=1, why="ALiBi of heads, causal"),
    AttentionCase(Tq=20, Tk=70, slopes="bh", causal=2, softcap=3.0, why="ALiBi of sequences, after softcap"),
    AttentionCase(Tq=60, Tk=70, dropout_p=0.3, why="dropout"),
    AttentionCase(B=1, Hq=4, Hk=2, Tq=3, Tk=600, dropout_p=0.5, causal=2, why="dropout over chunks and grouped heads"),
    AttentionCase(Tq=60, Tk=70, mask="bool", mask_of="bij", why="a bool mask shared by heads"),
    AttentionCase(Tq=60, Tk=140, mask="bool", mask_of="bj", causal=1, why="key padding, causal"),
    AttentionCase(Tq=60, Tk=70, mask="float", why="a full float mask, including -inf"),
    AttentionCase(Tq=60, Tk=70, mask="float", mask_of="hij", softcap=3.0, why="a bias shared by sequences"),
    AttentionCase(Tq=60, Tk=70, Hq=4, mask="float", mask_of="ij", dropout_p=0.2, why="a bias shared by heads"),
    AttentionCase(Tq=60, Tk=130, mask="float", mask_of="j", why="a bias of keys"),
    AttentionCase(Tq=60, Tk=70, mask="float", mask_of="hi", why="a bias of queries, which only changes lse"),
    AttentionCase(Tq=60, Tk=70, mask="float", mask_of="", why="a mask of one value"),
    AttentionCase(B=3, Tq=60, Tk=70, q_lengths=(60, 10, 0), k_lengths=(0, 65, 70), why="lengths, including 0"),
    AttentionCase(B=3, Tq=60, Tk=70, k_lengths=(64, 1, 70), causal=2, mask="float", mask_of="bi", why="lengths, bias"),
    AttentionCase(B=1, Tq=3, Tk=0, why="no keys"),
    AttentionCase(B=1, Tq=0, Tk=5, why="no queries"),
    AttentionCase(B=0, why="no sequences"),
    AttentionCase(D=0, scale=1.0, why="no columns: equal scores"),
    AttentionCase(Tq=60, Tk=70, D=200, Dv=3, scale=-0.1, why="two accumulation chains; a negative scale"),
    AttentionCase(B=4, q_lengths=(60, 0, 1, 49), k_lengths=(70, 3, 0, 64), packed=True, why="packed, lengths differ"),
    AttentionCase(
        B=3, Hq=4, q_lengths=(50, 3, 17), k_lengths=(50, 3, 17), packed=True, causal=1, dropout_p=0.1, slopes="bh",
        why="packed, causal, dropped, ALiBi",
    ),
]  # fmt: skip


@dataclasses.dataclass
class AttentionInputs:
    case: AttentionCase
    tensors: dict[str, Tensor]  # differentiable inputs: q, k, v and a float mask
    more: tuple[Tensor | None, ...]  # slopes, lengths and cu_seqlens, in the order of the ops
    bool_mask: Tensor | None
    scalars: tuple  # scalar arguments of the ops, without the seed
    dropout_seed: Tensor

    @property
    def mask(self) -> Tensor | None:
        return self.tensors.get("mask", self.bool_mask)

    def arguments(self) -> tuple:
        """Arguments of the ops after q, k and v."""
        return self.mask, *self.more, *self.scalars, self.dropout_seed

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        return dataclasses.replace(self, tensors={n: t.detach().to(dtype) for n, t in self.tensors.items()})


def make_attention_inputs(case: AttentionCase, dtype: torch.dtype, *, seed: int = 0) -> AttentionInputs:
    """Random inputs; padding is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = (sum(case.q_lengths), sum(case.k_lengths)) if case.packed else (case.Tq, case.Tk)  # type: ignore[arg-type]
    B = 1 if case.packed else case.B
    q, k = normal(B, case.Hq, rows[0], case.D), normal(B, case.Hk, rows[1], case.D)
    v = normal(B, case.Hk, rows[1], case.Dv)
    lengths: list[Tensor | None] = [None, None, None, None]
    longest = (0, 0)
    for place, (given, kind) in enumerate(((case.q_lengths, torch.int64), (case.k_lengths, torch.int32))):
        if given is None:
            continue
        if case.packed:
            lengths[2 + place] = torch.tensor([sum(given[:i]) for i in range(case.B + 1)], dtype=kind)
            continue
        lengths[place] = torch.tensor(given, dtype=kind)
        for b, n in enumerate(given):
            for t in (q,) if place == 0 else (k, v):
                t[b, :, n:] = math.nan
    if case.packed:
        longest = (max(case.q_lengths), max(case.k_lengths))  # type: ignore[arg-type]
    slopes = None
    if case.slopes:
        shape = (case.Hq,) if case.slopes == "h" else (case.B, case.Hq)
        slopes = torch.rand(shape, generator=generator)
    tensors, bool_mask = {"q": q, "k": k, "v": v}, None
    if case.mask:
        full = dict(b=case.B, h=case.Hq, i=case.Tq, j=case.Tk)
        shape = tuple(n if name in case.mask_of else 1 for name, n in full.items())
        hidden = torch.rand(shape, generator=generator) < 0.3
        if case.mask == "bool":
            bool_mask = ~hidden
        else:
            tensors["mask"] = normal(*shape)
            if set("ij") <= set(case.mask_of):
                tensors["mask"] = tensors["mask"].masked_fill(hidden, -math.inf)
    scale = case.D**-0.5 if case.scale is None else case.scale
    scalars = (*longest, scale, case.causal, *case.window, case.softcap, case.dropout_p)
    dropout_seed = torch.tensor([-(2**61) - 12345 - seed])
    return AttentionInputs(case, tensors, (slopes, *lengths), bool_mask, scalars, dropout_seed)


def attention_upstream(results: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Random upstream gradients, the same for all dtypes except for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]


def attention_definition(
    inputs: AttentionInputs, weights: bool = True, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Results and gradients of the reference, computed in dtype."""
    case = inputs.case
    wide = inputs.to(dtype)
    for t in wide.tensors.values():
        t.requires_grad_()
    q, k, v = (wide.tensors[name] for name in "qkv")
    results = list(reference.attention(q, k, v, *wide.arguments()))
    if weights and not case.packed:
        results.append(reference.attention_weights(q, k, *wide.arguments(), results[1]))
    upstream = [g.to(dtype) for g in attention_upstream([*_as_given(results, inputs)])]
    finite = [torch.where(r.isfinite(), r, 0) for r in results]
    grads = torch.autograd.grad(finite, list(wide.tensors.values()), upstream)
    return dict(zip(("out", "lse", "weights"), (r.detach() for r in results))) | {
        f"d{name}": g for name, g in zip(wide.tensors, grads)
    }


def _as_given(results: Sequence[Tensor], inputs: AttentionInputs) -> list[Tensor]:
    """Converts results to the dtypes that the ops return, to round upstream gradients equally."""
    dtype = inputs.tensors["q"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [r.detach().to(wide if place == 1 else dtype) for place, r in enumerate(results)]


def run_attention(inputs: AttentionInputs, weights: bool = True) -> dict[str, Tensor]:
    """Results of the ops, and gradients of all results together."""
    ops = torch.ops.seqkernels
    tensors = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    here = dataclasses.replace(inputs, tensors=tensors)
    q, k, v = (tensors[name] for name in "qkv")
    results = list(ops.attention_forward(q, k, v, *here.arguments(), True))[:2]
    if weights and not inputs.case.packed:
        results.append(ops.attention_weights(q, k, *here.arguments(), results[1]))
    grads = torch.autograd.grad(results, list(tensors.values()), attention_upstream(results))
    return dict(zip(("out", "lse", "weights"), (r.detach() for r in results))) | {
        f"d{name}": g for name, g in zip(tensors, grads)
    }


def assert_attention_near(
    got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype, least: float = 1e-2
) -> None:
    """Asserts an error of at most ATTENTION_TOLERANCE relative to the maximum, or to `least`, because terms may cancel.

    Infinities and results of queries without keys must be exact.
    """
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert g.dtype == (wide if name == "lse" else dtype), f"{name} is {g.dtype}"
        assert g.shape == w.shape, f"{name} has shape {tuple(g.shape)}, not {tuple(w.shape)}"
        assert not g.isnan().any(), f"{name} has NaN"
        finite = w.isfinite()
        assert torch.equal(finite, g.isfinite()), f"{name} has infinities at other positions"
        assert torch.equal(g[~finite].double(), w[~finite]), name
        if finite.any():
            error = (g.double() - w)[finite].abs().max().item()
            scale = max(w[finite].abs().max().item(), least)
            assert error <= ATTENTION_TOLERANCE[dtype] * scale, (
                f"{name} is off by {error / scale:.3g} of its largest value"
            )
