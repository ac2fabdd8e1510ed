"""Kinds and options of the recurrent layers, inputs of their ops, and calls of ops and definitions.

Dimensions: B batch, T time, N packed rows, D input, H hidden, P size of h (the projection size, or H), G gates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqkernels.reference import recurrent as definition
from support.cases import batch_sizes_of, one_thread

ops = torch.ops.seqkernels


HALF = (torch.bfloat16, torch.float16)


MASKS = ("reset", "zoneout_h", "zoneout_c", "candidate", "variational")


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A module with constructor arguments. proj_size=True: a projection whose size is that of the case."""

    module: str
    options: dict

    def __str__(self) -> str:
        return "-".join([self.module, *(k if v is True else f"{k}={v}" for k, v in self.options.items())])

    def option(self, name: str, default=0.0):
        return self.options.get(name, default)

    @property
    def projected(self) -> bool:
        return self.option("proj_size", False)

    @property
    def kind(self) -> str:
        """Name of the op."""
        after = "" if self.option("reset_after", self.module == "GRU") else "_before"
        if self.module == "LSTM":
            return (
                "lstm" + "_coupled" * self.option("coupled_gates", False) + "_norm" * self.option("layer_norm", False)
            )
        if self.module == "GRU":
            return "gru" + after + "_norm" * self.option("layer_norm", False) + "_projected" * self.projected
        if self.module == "DreamerGRU":
            return "dreamer_gru"
        if self.module == "SLSTM":
            return "slstm" + "_exp" * (self.option("forget_gate") == "exp")
        names = {"NestedLSTM": "nested_lstm", "MGU": "mgu" + "_after" * self.option("reset_after", False)}
        return names.get(self.module) or "rnn_" + self.options["nonlinearity"]

    @property
    def states(self) -> str:
        kinds = {"nested_lstm": "hcs", "slstm": "hcnm", "slstm_exp": "hcnm", "gru_projected": "hc"}
        return kinds.get(self.kind, "hc" if "lstm" in self.kind else "h")

    @property
    def gates(self) -> int:
        return definition.KINDS[self.kind].gates

    @property
    def kinked(self) -> bool:
        """Whether the derivative is discontinuous, so that rounding of half types may change the gradient."""
        return (
            self.kind in ("rnn_relu", "slstm", "slstm_exp")
            or "cell_clip" in self.options
            or "gate_clip" in self.options
        )

    @property
    def numbers(self) -> list[float]:
        clips = [self.option(name, math.inf) for name in ("cell_clip", "gate_clip")]
        numbers = clips + [self.option(name) for name in ("zoneout_h", "zoneout_c", "recurrent_dropout")]
        numbers.append(self.option("norm_eps", 1e-3 if self.module == "DreamerGRU" else 1e-5))
        return [] if numbers == [math.inf, math.inf, 0.0, 0.0, 0.0, 1e-5] else numbers

    @property
    def random(self) -> bool:
        return any(re.search("zoneout|dropout", name) for name in self.options)

    def without_masks(self) -> Variant:
        """The variant without dropout; zoneout uses its constant."""
        options = {k: v for k, v in self.options.items() if "dropout" not in k}
        return Variant(self.module, options)

    def weights(self, D: int, H: int, P: int) -> dict[str, tuple[int, ...]]:
        """Names in the module and shapes of the weights of one direction, in the order of the op."""
        G, h_size = self.gates, P if self.projected else H
        rows, bias = (G * H,), self.option("bias", True)
        shapes = {"weight_ih": (G * H, D), "weight_hh": (G * H, h_size // self.option("num_heads", 1))}
        shapes |= {"bias_ih": rows, "bias_hh": rows} if bias else {}
        shapes |= {"weight_hr": (P, H)} if self.projected else {}
        shapes |= {"weight_ph": ((G - 1) * H,)} if self.option("peephole", False) else {}
        if self.option("layer_norm", False):
            shapes |= {"gain_ih": rows, "gain_hh": rows}
            shapes |= {"gain_c": (H,), "bias_c": (H,)} if self.module == "LSTM" else {}
        if self.module == "DreamerGRU":
            shapes |= {"norm_weight": rows, "norm_bias": rows}
        if self.module == "NestedLSTM":
            shapes |= {"weight_inner_ih": (4 * H, H), "weight_inner_hh": (4 * H, H)}
            shapes |= {"bias_inner_ih": (4 * H,), "bias_inner_hh": (4 * H,)} if bias else {}
        return shapes


def v(module: str, **options) -> Variant:
    return Variant(module, options)


LSTM_DROPS = dict(zoneout_h=0.3, zoneout_c=0.2, recurrent_dropout=0.4, variational_dropout=0.5)


DROPS = dict(zoneout_h=0.3, recurrent_dropout=0.4, variational_dropout=0.5)


VARIANTS = [
    v("LSTM"),
    v("LSTM", peephole=True),
    v("LSTM", peephole=True, proj_size=True),
    v("LSTM", peephole=True, bias=False),
    v("LSTM", coupled_gates=True),
    v("LSTM", coupled_gates=True, peephole=True),
    v("LSTM", coupled_gates=True, peephole=True, proj_size=True, bias=False),
    v("LSTM", layer_norm=True),
    v("LSTM", layer_norm=True, bias=False),
    v("LSTM", cell_clip=0.4),
    v("LSTM", gate_clip=0.6),
    v("LSTM", zoneout_h=0.3),
    v("LSTM", zoneout_c=0.2),
    v("LSTM", recurrent_dropout=0.4),
    v("LSTM", variational_dropout=0.5),
    v("LSTM", num_heads=2),
    v("LSTM", num_heads=3, peephole=True, cell_clip=0.4, **LSTM_DROPS),
    v("LSTM", peephole=True, cell_clip=0.4, gate_clip=0.6, **LSTM_DROPS),
    v("LSTM", coupled_gates=True, peephole=True, cell_clip=0.4, gate_clip=0.6, **LSTM_DROPS),
    v("LSTM", coupled_gates=True, num_heads=2, zoneout_c=0.2),
    v("LSTM", layer_norm=True, cell_clip=0.4, gate_clip=0.6, **LSTM_DROPS),
    v("LSTM", proj_size=True, cell_clip=0.4, zoneout_c=0.2, recurrent_dropout=0.4, variational_dropout=0.5),
    v("NestedLSTM"),
    v("NestedLSTM", bias=False),
    v("NestedLSTM", **DROPS),
    v("SLSTM"),
    v("SLSTM", bias=False, num_heads=3),
    v("SLSTM", forget_gate="exp"),
    v("SLSTM", num_heads=2, **DROPS),
    v("SLSTM", forget_gate="exp", num_heads=2, **DROPS),
    v("GRU"),
    v("GRU", bias=False, gate_clip=0.6),
    v("GRU", zoneout_h=0.3),
    v("GRU", recurrent_dropout=0.4),
    v("GRU", variational_dropout=0.5),
    v("GRU", num_heads=3),
    v("GRU", num_heads=2, gate_clip=0.6, **DROPS),
    v("GRU", reset_after=False),
    v("GRU", reset_after=False, bias=False),
    v("GRU", reset_after=False, zoneout_h=0.3, variational_dropout=0.5),
    v("GRU", reset_after=False, num_heads=3),
    v("GRU", reset_after=False, num_heads=2, gate_clip=0.6, **DROPS),
    v("GRU", layer_norm=True),
    v("GRU", layer_norm=True, bias=False),
    v("GRU", layer_norm=True, gate_clip=0.6, **DROPS),
    v("GRU", layer_norm=True, norm_eps=0.01),
    v("LSTM", layer_norm=True, norm_eps=0.01),
    v("DreamerGRU"),
    v("DreamerGRU", bias=False, num_heads=3),
    v("DreamerGRU", norm_eps=1e-5, num_heads=2),
    v("DreamerGRU", num_heads=2, norm_eps=0.02, gate_clip=0.6, **DROPS),
    v("GRU", proj_size=True),
    v("GRU", proj_size=True, bias=False, gate_clip=0.6, recurrent_dropout=0.4, variational_dropout=0.5),
    v("MGU", reset_after=True),
    v("MGU", reset_after=True, num_heads=2, gate_clip=0.6, **DROPS),
    v("MGU"),
    v("MGU", bias=False, num_heads=3),
    v("MGU", num_heads=2, gate_clip=0.6, **DROPS),
    v("RNN", nonlinearity="tanh"),
    v("RNN", nonlinearity="tanh", zoneout_h=0.3),
    v("RNN", nonlinearity="tanh", num_heads=3),
    v("RNN", nonlinearity="tanh", num_heads=2, gate_clip=0.6, zoneout_h=0.3, variational_dropout=0.5),
    v("RNN", nonlinearity="relu", gate_clip=0.6, zoneout_h=0.3, variational_dropout=0.5),
    v("RNN", nonlinearity="relu", num_heads=2, bias=False),
]  # fmt: skip


# For each kind, the variant with the most options.
FULLEST = {variant.kind: variant for variant in sorted(VARIANTS, key=lambda variant: len(variant.options))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a layer. H is a multiple of 2 and 3, for the heads. drawn: random masks, otherwise zoneout constants."""

    B: int
    T: int
    D: int
    H: int
    P: int
    why: str
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    bidirectional: bool = True
    drawn: bool = True
    reset: bool = True
    state: bool = True

    def __str__(self) -> str:
        form = "packed" if self.packed else "dense" if self.lengths is None else "lengths"
        flags = ["bi"] * self.bidirectional + ["constant"] * (not self.drawn) + ["reset"] * self.reset
        return "-".join([f"B{self.B}", f"T{self.T}", f"D{self.D}", f"H{self.H}", *flags, form])

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def valid(self) -> Tensor:
        """[T, B] True for valid steps."""
        lengths = torch.tensor(self.lengths if self.lengths is not None else [self.T] * self.B, dtype=torch.int64)
        return torch.arange(self.T).unsqueeze(1) < lengths


CASES = [
    Case(B=3, T=7, D=5, H=18, P=5, why="a tail in each dimension"),
    Case(
        B=7, T=4, D=9, H=66, P=35, lengths=(0, 4, 2, 4, 1, 3, 4), bidirectional=False, drawn=False,
        why="two panels, the second a partial vector; more rows than a register tile",
    ),
    Case(B=5, T=5, D=16, H=96, P=32, lengths=(5, 5, 4, 2, 1), packed=True, reset=False, why="full vectors"),
    Case(B=1, T=4, D=24, H=198, P=70, state=False, why="units of one sequence split over two threads"),
]  # fmt: skip


EMPTY = [
    Case(B=0, T=3, D=5, H=18, P=5, why="an empty batch"),
    Case(B=2, T=0, D=5, H=18, P=5, why="no steps"),
    Case(B=0, T=0, D=5, H=18, P=5, lengths=(), packed=True, why="empty, packed"),
    Case(B=3, T=3, D=5, H=18, P=5, lengths=(0, 0, 0), why="only zero lengths"),
]


TINY = [
    Case(B=2, T=3, D=2, H=6, P=2, bidirectional=False, why="dense"),
    Case(B=2, T=2, D=1, H=6, P=2, lengths=(2, 1), packed=True, drawn=False, why="packed, both directions"),
]


RAGGED = Case(B=6, T=7, D=9, H=66, P=35, lengths=(3, 7, 1, 7, 5, 2), why="unsorted lengths")


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one layer, and upstream gradients of all outputs."""

    variant: Variant
    x: Tensor  # [T, B, D] or [N, D]
    states0: tuple[Tensor | None, ...]  # [directions, B, P] h0, then [directions, B, H]
    weights: tuple[Tensor, ...]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    bidirectional: bool
    masks: dict[str, Tensor]
    numbers: list[float]
    upstream: dict[str, Tensor]  # for y, h_n, ..., then for the cell states of all steps

    def options(self) -> dict:
        heads, peephole = self.variant.option("num_heads", 1), self.variant.option("peephole", False)
        return dict(**self.weight_flags(), peephole=peephole, heads=heads, numbers=self.numbers, **self.masks)

    def weight_flags(self) -> dict[str, bool]:
        return dict(bias=self.variant.option("bias", True), projected=bool(self.variant.projected))

    def map(self, f: Callable[[Tensor], Tensor]) -> Call:
        """Applies f to all floating-point tensors except upstream gradients."""
        masks = {name: f(m) if m.is_floating_point() else m for name, m in self.masks.items()}
        return dataclasses.replace(
            self,
            x=f(self.x),
            states0=tuple(None if s is None else f(s) for s in self.states0),
            weights=tuple(map(f, self.weights)),
            masks=masks,
        )

    def by_row(self, f: Callable[[Tensor], Tensor], by_sequence: Callable[[Tensor], Tensor], **others) -> Call:
        """Applies f to tensors with a row per step, and by_sequence to tensors [directions, B, ..]."""
        rows = {name: (by_sequence if name == "variational" else f)(m) for name, m in self.masks.items()}
        upstream = {n: (by_sequence if n.endswith("_n") else f)(g) for n, g in self.upstream.items()}
        states0 = tuple(None if s is None else by_sequence(s) for s in self.states0)
        return dataclasses.replace(self, x=f(self.x), states0=states0, masks=rows, upstream=upstream, **others)


# Outputs and gradients by sequence.
OF_SEQUENCE = ("y", "dx", *(f"{s}_n" for s in "hcsnm"), *(f"{s}_steps" for s in "csnm"), *(f"d{s}0" for s in "hcsnm"))


@functools.cache
def make_call(variant: Variant, case: Case, dtype: torch.dtype, seed: int = 0) -> Call:
    """Random arguments; padding is NaN."""
    g = torch.Generator().manual_seed(seed)
    directions, T, B, H = case.directions, case.T, case.B, case.H
    P = case.P if variant.projected else H

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    def ones(rate: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=g) < rate).to(torch.uint8)

    weights = []
    for _ in range(directions):
        for name, shape in variant.weights(case.D, H, P).items():
            scale = 1.0 if name in ("weight_ph", "bias_c") or "bias" in name else 2 / math.sqrt(shape[-1])
            weights.append((1 if "gain" in name or name == "norm_weight" else 0) + 0.5 * normal(*shape) * scale)
    widths = [P if s == "h" else H for s in variant.states]
    states0 = tuple(normal(directions, B, width) if case.state else None for width in widths)
    if case.state:  # a normaliser is positive
        states0 = tuple(t.abs() + 0.5 if s == "n" else t for s, t in zip(variant.states, states0))
    x = normal(T, B, case.D)
    masks = {}
    if case.reset:
        masks["reset"] = ones(0.3, T, B).bool()
    if case.drawn:
        for name in ("zoneout_h", "zoneout_c"):
            if variant.option(name):
                masks[name] = ones(variant.option(name), T, B, directions * H)
        if variant.option("recurrent_dropout"):
            masks["candidate"] = ones(1 - variant.option("recurrent_dropout"), T, B, directions * H)
        if variant.option("variational_dropout"):
            keep = 1 - variant.option("variational_dropout")
            masks["variational"] = ones(keep, directions, B, P).to(dtype) / keep
    upstream = {"y": normal(T, B, directions * P)}
    upstream |= {f"{s}_n": normal(directions, B, width) for s, width in zip(variant.states, widths)}
    upstream |= {f"{s}_steps": normal(T, B, directions * H) for s in variant.states[1:]}
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    call = Call(
        variant, x, states0, tuple(weights), None, lengths, case.bidirectional, masks, variant.numbers, upstream
    )
    if lengths is not None and not case.packed:
        padding = ~case.valid()

        def spoiled(t: Tensor) -> Tensor:
            t[padding] = math.nan if t.is_floating_point() else 1
            return t

        call = call.by_row(spoiled, lambda t: t)
    return packed(call, case) if case.packed else call


def packed(call: Call, case: Case) -> Call:
    """Converts a padded call to packed rows."""
    lengths = torch.tensor(case.lengths)
    order = torch.argsort(lengths, descending=True, stable=True)
    valid = case.valid()[:, order]
    batch_sizes = batch_sizes_of(lengths.tolist())
    return call.by_row(lambda t: t[:, order][valid], lambda t: t[:, order], batch_sizes=batch_sizes, lengths=None)


def by_definition(call: Call) -> dict[str, Tensor]:
    outputs = definition.layer(
        *(call.variant.kind, call.x, call.states0, call.weights, call.batch_sizes, call.lengths, call.bidirectional),
        **call.options(),
    )
    return dict(zip(call.upstream, outputs, strict=True))


def arguments(call: Call) -> tuple:
    """Arguments of the ops <kind> and <kind>_forward."""
    options = call.options()
    masks = [options.get(name) for name in MASKS]
    return (
        *(call.x, *call.states0, list(call.weights), call.batch_sizes, call.lengths, call.bidirectional),
        *(options[name] for name in ("bias", "projected", "peephole", "heads")),
        *(*masks, options["numbers"]),
    )


def op(call: Call, suffix: str = "") -> Callable:
    return getattr(ops, call.variant.kind + suffix).default


def by_op(call: Call, recompute: bool = False) -> dict[str, Tensor]:
    """Results of <kind>_forward, whose autograd formula calls <kind>_backward."""
    outputs = list(op(call, "_forward")(*arguments(call), recompute))
    saved = outputs.pop(1 + len(call.states0))
    assert saved.shape[-1] == 0 or not recompute
    return dict(zip(call.upstream, outputs, strict=True))


def run(
    call: Call, function: Callable[[Call], dict[str, Tensor]] = by_op, upstream: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Outputs and all gradients by name. upstream: names of the outputs with upstream gradients."""
    call = call.map(lambda t: t.detach().requires_grad_(t is not call.masks.get("variational")))
    outputs = function(call)
    used = [n for n in (upstream or outputs) if outputs[n].requires_grad]
    names = [f"d{s}0" for s, state in zip(call.variant.states, call.states0) if state is not None]
    names = ["dx", *names, *(f"d{w}" for w in named_weights(call))]
    wanted = [call.x, *(s for s in call.states0 if s is not None), *call.weights]
    upstream_grads = [call.upstream[n].to(outputs[n].dtype) for n in used]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if used:
        grads = torch.autograd.grad([outputs[n] for n in used], wanted, upstream_grads, allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True)]
    return {n: o.detach() for n, o in outputs.items()} | dict(zip(names, grads, strict=True))


def named_weights(call: Call) -> list[str]:
    names = list(call.variant.weights(1, 6, 2))
    return [n + suffix for suffix in ("", "_reverse")[: 1 + call.bidirectional] for n in names]


@functools.cache
def expected(variant: Variant, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of the definition in float64, for inputs rounded to dtype."""
    with one_thread():
        return run(make_call(variant, case, dtype).map(Tensor.double), by_definition)


def outputs_alone(call: Call, result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: result[name] for name in call.upstream}


def without_stabiliser(states: str, result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces the states of an sLSTM by c / n and log n + m, which rounding of m in half types does not affect."""
    if "m" not in states:
        return result
    result = dict(result)
    for name in ("n", "steps"):
        c, n, m = (result[f"{state}_{name}"].double() for state in "cnm")
        there = n != 0
        dtype, n = result[f"m_{name}"].dtype, torch.where(there, n, 1.0)
        result[f"c_{name}"] = torch.where(there, c / n, 0.0).to(dtype)
        result[f"n_{name}"] = torch.where(there, n.log() + m, 0.0).to(dtype)
    return result
