"""Launchers: selection of the kernels of a layer, and its forward and backward.

Dimensions: B sequences, T steps, N rows of x and y (T * B, or the number of packed rows), D input, H hidden, G gates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...reference import recurrent as definition
from . import layer, step
from .layer_backward import (
    gru_backward_kernel,
    lstm_backward_kernel,
    mgu_backward_kernel,
    rnn_backward_kernel,
)
from .layer_forward import (
    gru_forward_kernel,
    lstm_forward_kernel,
    mgu_forward_kernel,
    rnn_forward_kernel,
)
from .step_backward import (
    gru_step_backward_kernel,
    lstm_step_backward_kernel,
    mgu_step_backward_kernel,
    reset_before_backward_kernel,
    reset_before_gates_backward_kernel,
    rnn_step_backward_kernel,
)
from .step_forward import (
    gru_step_forward_kernel,
    lstm_step_forward_kernel,
    mgu_step_forward_kernel,
    reset_before_forward_kernel,
    reset_before_gates_kernel,
    rnn_step_forward_kernel,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUPPORTED = ("lstm", "lstm_coupled", "gru", "gru_before", "mgu_after", "mgu", "rnn_tanh", "rnn_relu")
RESET_AFTER = ("gru", "mgu_after")  # the reset gate multiplies the recurrent projection of n, including its bias
RESET_BEFORE = ("gru_before", "mgu")  # the reset gate multiplies h before the recurrent projection of n

# ---- configurations

MOST_REGISTERS = 255  # per thread; without the limit, ptxas spills registers to raise the occupancy


class Config(NamedTuple):
    """Launch configuration of a kernel that runs all steps."""

    BB: int  # sequences per program
    BH: int  # units per program, a power of two
    num_warps: int
    maxnreg: int = MOST_REGISTERS


GATES = {
    "lstm": 4,
    "gru": 3,
    "mgu_after": 2,
    "rnn_tanh": 1,
    "rnn_relu": 1,
}  # kinds with kernels that run all steps
LARGEST = 128  # maximum BH
SMALLEST = 16  # minimum BH, the smallest dimension of tl.dot
BU = 128  # units per program of a kernel that runs one step: 4 per lane of one warp
PRECISION = "tf32x3"  # float32 products as three tf32 products, with the precision of float32


def config(kind: str, dtype: torch.dtype, H: int, shared: int) -> Config | None:
    """Configuration of the kernel that runs all steps, or None if one launch per step is required.

    That is the case if the kind has no such kernel, or W_hh does not fit in `shared` bytes of shared memory.
    """
    BH = max(triton.next_power_of_2(H), SMALLEST)
    if kind not in GATES or BH > LARGEST or needed(kind, dtype, BH) > shared:
        return None
    return Config(16, BH, 4 if BH <= 32 else 8)


def tier(
    kind: str, dtype: torch.dtype, H: int, options: Sequence[str], shared: int
) -> tuple[str, list[str], Config | None]:
    """The tier of a layer: "layer", all steps in one launch, or "steps", one launch per step.

    Also returns the reasons against "layer" and, for "layer", its configuration.
    """
    of_cell = [name for name in options if name not in ("reset", "memory_efficient", "return_all_states")]
    reasons = []
    if of_cell:
        reasons.append(f"the kernels for all steps do not support {', '.join(of_cell)}")
    if kind not in GATES:
        reasons.append(f"{kind} has no kernel for all steps")
    elif not reasons:
        chosen = config(kind, dtype, H, shared)
        if chosen is not None:
            return "layer", [], chosen
        BH = max(triton.next_power_of_2(H), SMALLEST)
        if dtype == torch.float64 and not shared:
            reasons.append("Triton cannot compile chains of float64 products")
        elif BH > LARGEST:
            reasons.append(f"H must be at most {LARGEST}, got {H}")
        else:
            reasons.append(f"W_hh needs {needed(kind, dtype, BH)} bytes of shared memory, a program has {shared}")
    return "steps", reasons, None


def needed(kind: str, dtype: torch.dtype, BH: int) -> int:
    """Upper bound of the shared memory in bytes: W_hh, in two parts for tf32x3, and the tiles of h and of the gates."""
    parts, gates = 2 if dtype == torch.float32 else 1, GATES[kind]
    return (gates * BH * parts + SMALLEST * (gates + 1)) * BH * dtype.itemsize + (4 << 10)


@functools.cache
def shared_memory(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of shared memory that a program may use for products of dtype."""
    if interpreted():
        return 1 << 20
    if dtype == torch.float64:
        return 0  # Triton 3.6 cannot compile chains of float64 products
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were imported, so that they run on the CPU in numpy."""
    return not isinstance(lstm_forward_kernel, triton.JITFunction)


# ---- one call of a layer


class LayerArgs(NamedTuple):
    """Arguments of the ops for one layer, both directions."""

    x: Tensor  # [T, B, D], or [N, D] with batch_sizes
    states0: Sequence[Tensor | None]  # [directions, B, H] each
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None  # [T] on the CPU
    lengths: Tensor | None  # [B]
    bidirectional: bool
    bias: bool
    projected: bool
    peephole: bool
    reset: Tensor | None
    zoneout_h: Tensor | None
    zoneout_c: Tensor | None
    candidate: Tensor | None
    variational: Tensor | None
    numbers: Sequence[float]


class Layer:
    """Arguments of a layer, prepared for the launchers."""

    def __init__(self, kind: str, args: LayerArgs) -> None:
        x = args.x
        self.kind, self.x = kind, x
        self.batch_sizes, self.lengths = args.batch_sizes, args.lengths
        self.directions = 2 if args.bidirectional else 1
        each = len(args.weights) // self.directions
        self.names = definition.weight_names(definition.KINDS[kind], args.bias, args.projected, args.peephole)
        self.weights = [
            dict(zip(self.names, (w.contiguous() for w in args.weights[d * each : (d + 1) * each]), strict=True))
            for d in range(self.directions)
        ]
        self.G = definition.KINDS[kind].gates
        self.D, self.H = x.shape[-1], self.weights[0]["w_hh"].shape[1]
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.batch_sizes is None:
            self.T, self.B = x.shape[:2]
            self.sizes, self.starts = [self.B] * self.T, [t * self.B for t in range(self.T)]
            if self.lengths is not None:
                self.lengths = self.lengths.to(x.device, torch.int64)
        else:
            self.sizes = self.batch_sizes.tolist()
            self.T, self.B = len(self.sizes), self.sizes[0] if self.sizes else 0
            self.starts = [0, *torch.tensor(self.sizes, dtype=torch.int64).cumsum(0).tolist()][: self.T]
        self.N = sum(self.sizes)
        self.rows_of_x = x.reshape(self.N, self.D)
        self.states0 = [None if s is None else s.contiguous() for s in args.states0]
        self.reset = _bytes(args.reset)
        self.variational = None if args.variational is None else args.variational.contiguous()
        zoneout_h, zoneout_c, candidate = map(_bytes, (args.zoneout_h, args.zoneout_c, args.candidate))
        drawn = any(m is not None for m in (zoneout_h, zoneout_c, candidate))
        self.options = drawn or args.peephole or len(args.numbers) > 0
        self.numbers = None
        if self.options:
            cell_clip, gate_clip, old_h, old_c, p, _ = args.numbers or (math.inf, math.inf, 0.0, 0.0, 0.0, 1e-5)
            self.numbers = torch.empty(5, dtype=self.acc, device=x.device)
            for i, value in enumerate((gate_clip, cell_clip, old_h, old_c, 1 / (1 - p) if p < 1 else 0.0)):
                self.numbers[i].fill_(value)
        self.masks = step.Masks(None, zoneout_h, zoneout_c, candidate, self.numbers)
        self.sequences = step.Sequences(self.lengths, self.reset)

    @property
    def config(self) -> Config | None:
        """Configuration of the kernel that runs all steps, or None. Those kernels support no options."""
        if self.options or self.variational is not None:
            return None
        return config(self.kind, self.x.dtype, self.H, shared_memory(self.x.device, self.x.dtype))

    # -- shapes

    @property
    def saved_width(self) -> int:
        """Width of a row of `saved`.

        LSTM: i, f, g, o. GRU: r, z, n, h_n, where h_n is the recurrent projection of n. MGU: f, n, h_n. Kinds in
        RESET_BEFORE save no h_n. RNN: nothing, because y determines the derivative, except with options.
        """
        if self.kind.startswith("rnn"):
            return self.H * self.options
        return self.H * (self.G + (self.kind in RESET_AFTER))

    @property
    def has_c(self) -> bool:
        return definition.KINDS[self.kind].states == 2

    @property
    def minimal(self) -> bool:
        return self.kind.startswith("mgu")

    def new_rows(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """New tensor [.., N, width]; zeros with lengths, because the kernels do not write the rows of padding."""
        *front, width = sizes
        new = self.x.new_zeros if self.lengths is not None else self.x.new_empty
        return new(*front, self.N, width, dtype=dtype or self.x.dtype)

    def initial_state(self, i: int, dtype: torch.dtype) -> Tensor:
        """Copy of an initial state, [directions, B, H]."""
        given = self.states0[i]
        if given is None:
            return self.x.new_zeros(self.directions, self.B, self.H, dtype=dtype)
        return given.to(dtype, copy=True)

    # -- products

    def input_projection(self) -> Tensor:
        """[directions, N, G * H] input projection, including all biases except `late_bias`."""
        out = self.x.new_empty(self.directions, self.N, self.G * self.H, dtype=self.acc)
        for d, w in enumerate(self.weights):
            out[d] = self.product(self.rows_of_x, w["w_ih"].T)
            if "b_ih" in w:
                out[d] += w["b_ih"]
                early = self.G - (self.kind in RESET_AFTER)
                out[d, :, : early * self.H] += w["b_hh"][: early * self.H]
        return out

    def late_bias(self) -> Tensor | None:
        """[directions, H] b_hn of a GRU or MGU, which the reset gate multiplies, or None."""
        if self.kind not in RESET_AFTER or "b_hh" not in self.weights[0]:
            return None
        return torch.stack([w["b_hh"][(self.G - 1) * self.H :] for w in self.weights])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Matrix product in the type of the computation; half types are accumulated in float32."""
        if a.dtype == self.acc:
            return a @ b
        if a.device.type == "cuda":
            return torch.mm(a, b, out_dtype=self.acc)
        return a.to(self.acc) @ b.to(self.acc)

    # -- all steps in one launch

    def layer_inputs(self) -> layer.Inputs:
        lengths, starts = self.lengths, None
        if self.batch_sizes is not None:
            sizes = torch.tensor(self.sizes)
            lengths = (sizes.unsqueeze(1) > torch.arange(self.B)).sum(0).to(self.x.device)
            starts = torch.tensor(self.starts).to(self.x.device)
        return layer.Inputs(
            p_w_hh=torch.stack([w["w_hh"] for w in self.weights]),
            p_bias=self.late_bias(),
            p_h0=self.states0[0],
            p_c0=self.states0[1] if self.has_c else None,
            p_lengths=lengths,
            p_starts=starts,
            p_reset=self.reset,
        )

    def layer_sizes(self, chosen: Config) -> dict[str, Any]:
        relu = {"RELU": self.kind == "rnn_relu"} if self.kind.startswith("rnn") else {}
        sizes = dict(T=self.T, B=self.B, N=self.N, H=self.H)
        return {**sizes, **relu, "PRECISION": PRECISION, **chosen._asdict(), "num_stages": 1}

    def layer_kernel(self, chosen: Config, kernels: dict[str, Any]) -> Any:
        return kernels[self.kind.partition("_")[0]][triton.cdiv(self.B, chosen.BB), self.directions]

    # -- one launch per step

    def order(self, d: int) -> Sequence[int]:
        return range(self.T) if d == 0 else range(self.T - 1, -1, -1)

    def at(self, t: int) -> tuple[int, int, int]:
        """t, its first row and its number of sequences; 0 sequences for a step outside of [0, T)."""
        return (t, self.starts[t], self.sizes[t]) if 0 <= t < self.T else (t, 0, 0)

    def step_numbers(self, t: int, d: int) -> dict[str, int]:
        """Kernel arguments of step t and of the step whose reset zeroes its input states."""
        t_, row, _ = self.at(t)
        t_reset, row_reset, n_reset = self.at(t + d)
        return dict(t=t_, row=row, t_reset=t_reset, row_reset=row_reset, n_reset=n_reset)

    def neighbours(self, t: int, d: int) -> dict[str, int]:
        """Kernel arguments of the steps before and after t in the order of forward.

        The first computes the input states of t; the reset of the second zeroes the states of t for the next step.
        """
        t_before, row_before, n_before = self.at(t + 2 * d - 1)
        t_after, row_after, n_after = self.at(t + 1 - d)
        before = dict(t_before=t_before, row_before=row_before, n_before=n_before)
        return before | dict(t_after=t_after, row_after=row_after, n_after=n_after)

    def step_constants(self) -> dict[str, Any]:
        constants: dict[str, Any] = dict(H=self.H, BU=BU, num_warps=1, maxnreg=MOST_REGISTERS)
        if self.kind in RESET_BEFORE:
            constants["MINIMAL"] = self.minimal
        elif self.has_c:
            constants["COUPLED"] = self.kind == "lstm_coupled"
        elif self.kind.startswith("rnn"):
            constants["RELU"] = self.kind == "rnn_relu"
        return constants

    def masks_of(self, d: int) -> step.Masks:
        return self.masks._replace(p_peephole=self.weights[d].get("w_ph"))

    def grid(self, t: int) -> tuple[int, int]:
        return self.sizes[t], triton.cdiv(self.H, BU)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


# ---- forward

_LAYER_FORWARD = {
    "lstm": lstm_forward_kernel,
    "gru": gru_forward_kernel,
    "mgu": mgu_forward_kernel,
    "rnn": rnn_forward_kernel,
}
_STEP_FORWARD = {"gru": gru_step_forward_kernel, "mgu_after": mgu_step_forward_kernel}


def forward(l: Layer, save: bool) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """Returns y, the last states, `saved` for backward, and c at every step."""
    y = l.new_rows(l.directions * l.H)
    cells = [l.new_rows(l.directions * l.H)] if l.has_c else []
    width = l.saved_width if save else 0
    saved = l.x.new_empty(l.directions, l.N, width)
    chosen, p_x = l.config, l.input_projection()
    states = [l.initial_state(i, l.x.dtype) for i in range(1 + l.has_c)]
    if l.N and chosen is not None:
        h_n, c_n, p_cells = states[0], states[1] if l.has_c else None, cells[0] if cells else None
        outputs = layer.Outputs(y, p_cells, h_n, c_n, saved if width else None)
        kernel = l.layer_kernel(chosen, _LAYER_FORWARD)
        kernel(p_x=p_x, inputs=l.layer_inputs(), outputs=outputs, **l.layer_sizes(chosen))
    elif l.N:
        for d in range(l.directions):
            of_direction = states[0][d], states[1][d] if l.has_c else None
            _forward_steps(l, d, p_x[d], y, cells, *of_direction, saved[d] if width else None)
    shape = *l.x.shape[:-1], l.directions * l.H
    return y.view(shape), states, saved, [c.view(shape) for c in cells]


def _forward_steps(
    l: Layer, d: int, p_x: Tensor, y: Tensor, cells: list[Tensor], h: Tensor, c: Tensor | None, saved: Tensor | None
) -> None:
    """Runs one direction with a matrix product and a launch per step. Updates h and c in place."""
    w_hh, H, masks = l.weights[d]["w_hh"], l.H, l.masks_of(d)
    rows = step.Rows(y, cells[0] if cells else None, l.directions * H, d * H)
    bias = l.late_bias()
    variational = None if l.variational is None else l.variational[d]
    common = dict(p_x=p_x, p_h=h, sequences=l.sequences, **l.step_constants())
    if l.kind in RESET_BEFORE:
        gates = (l.G - 1) * H
        kept = saved if saved is not None else l.x.new_empty(l.B, l.G * H)
        reset_h = torch.empty_like(h)
        for t in l.order(d):
            n, grid = l.sizes[t], l.grid(t)
            seen = h[:n] if variational is None else h[:n] * variational[:n]
            at = l.step_numbers(t, d) | dict(row_saved=l.starts[t] if saved is not None else 0)
            reset_before_gates_kernel[grid](
                p_product=l.product(seen, w_hh[:gates].T),
                p_reset_h=reset_h,
                p_saved=kept,
                p_variational=variational,
                p_gate_clip=l.numbers,
                **common,
                **at,
            )
            product = l.product(reset_h[:n], w_hh[gates:].T)
            reset_before_forward_kernel[grid](p_product=product, p_saved=kept, rows=rows, masks=masks, **common, **at)
        return
    kernel: Any
    if l.has_c:
        kernel, common["p_c"] = lstm_step_forward_kernel, c
    elif l.kind in _STEP_FORWARD:
        kernel, common["p_bias"] = _STEP_FORWARD[l.kind], None if bias is None else bias[d]
    else:
        kernel = rnn_step_forward_kernel
    for t in l.order(d):
        n = l.sizes[t]
        seen = h[:n] if variational is None else h[:n] * variational[:n]
        product = l.product(seen, w_hh.T)
        at = l.step_numbers(t, d) | dict(row_saved=l.starts[t])
        kernel[l.grid(t)](p_product=product, p_saved=saved, rows=rows, masks=masks, **common, **at)


# ---- backward

_LAYER_BACKWARD = {
    "lstm": lstm_backward_kernel,
    "gru": gru_backward_kernel,
    "mgu": mgu_backward_kernel,
    "rnn": rnn_backward_kernel,
}
_STEP_BACKWARD = {"gru": gru_step_backward_kernel, "mgu_after": mgu_step_backward_kernel}


@dataclasses.dataclass
class Gradients:
    """Outputs of the backward kernels for the weight gradients, for both directions."""

    d_x: Tensor  # [directions, N, G * H] gradients of the input projection
    h: Tensor  # [directions, N, H] input of the recurrent projection at each step
    d_h_of_n: Tensor | None  # [directions, N, H] gradients of the recurrent projection of n; RESET_AFTER
    reset_h: Tensor | None  # [directions, N, H] r * h; RESET_BEFORE
    d_peephole: Tensor | None  # [directions, N, (G - 1) * H]

    @staticmethod
    def of(l: Layer) -> Gradients:
        directions, H = l.directions, l.H
        return Gradients(
            l.new_rows(directions, l.G * H),
            l.new_rows(directions, H),
            l.new_rows(directions, H) if l.kind in RESET_AFTER else None,
            l.new_rows(directions, H) if l.kind in RESET_BEFORE else None,
            l.new_rows(directions, (l.G - 1) * H, dtype=l.acc) if "w_ph" in l.names else None,
        )


def backward(
    l: Layer,
    dy: Tensor | None,
    d_last: Sequence[Tensor | None],
    y: Tensor,
    saved: Tensor,
    cells: Sequence[Tensor],
    dcells: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns dx and the gradients of the initial states and the weights."""
    d_last = [None if g is None else g.contiguous() for g in d_last]
    dy, dcells = (None if g is None else g.contiguous() for g in (dy, dcells))
    found = Gradients.of(l)
    chosen = None if dcells is not None else l.config
    kept = saved if l.saved_width else None
    if not l.N:
        dstates = [l.x.new_zeros(l.directions, l.B, l.H) if g is None else g.clone() for g in d_last]
    elif chosen is not None:
        dstates = [l.x.new_empty(l.directions, l.B, l.H) for _ in d_last]
        gradients = layer.Gradients(
            p_dy=dy,
            p_dh_n=d_last[0],
            p_dc_n=d_last[1] if l.has_c else None,
            p_dx=found.d_x,
            p_dh_of_n=found.d_h_of_n,
            p_h=found.h,
            p_dh0=dstates[0],
            p_dc0=dstates[1] if l.has_c else None,
        )
        outputs = layer.Outputs(y, cells[0] if l.has_c else None, None, None, kept)
        kernel = l.layer_kernel(chosen, _LAYER_BACKWARD)
        kernel(inputs=l.layer_inputs(), outputs=outputs, gradients=gradients, **l.layer_sizes(chosen))
    else:
        carried = [
            l.x.new_zeros(l.directions, l.B, l.H, dtype=l.acc) if g is None else g.to(l.acc, copy=True) for g in d_last
        ]
        for d in range(l.directions):
            dc = carried[1][d] if l.has_c else None
            _backward_steps(l, d, dy, dcells, y, cells, kept, carried[0][d], dc, found)
        dstates = [g.to(l.x.dtype) for g in carried]
    dx = l.x.new_empty(0)
    if need_dx:
        total = l.x.new_zeros(l.N, l.D, dtype=l.acc)
        for d, w in enumerate(l.weights):
            total += l.product(found.d_x[d], w["w_ih"])
        dx = total.to(l.x.dtype).view(l.x.shape)
    dw = []
    if need_dw:
        if l.lengths is not None:  # padding may hold NaN, and NaN * 0 is NaN
            valid = torch.arange(l.T, device=l.x.device).unsqueeze(1) < l.lengths
            l.rows_of_x = torch.where(valid.view(-1, 1), l.rows_of_x, 0)
        for d in range(l.directions):
            dw += _weight_gradients(l, d, found)
    return dx, dstates, dw


def _backward_steps(
    l: Layer,
    d: int,
    dy: Tensor | None,
    dcells: Tensor | None,
    y: Tensor,
    cells: Sequence[Tensor],
    saved: Tensor | None,
    direct: Tensor,
    dc: Tensor | None,
    found: Gradients,
) -> None:
    """Runs one direction. Replaces the gradients of the last states, direct and dc, by those of the initial states."""
    H, w_hh = l.H, l.weights[d]["w_hh"]
    product = torch.zeros_like(direct)
    variational = None if l.variational is None else l.variational[d]
    kept = None if saved is None else saved[d]
    d_x = found.d_x[d]
    d_h_of_n, reset_h, d_peephole = (
        None if t is None else t[d] for t in (found.d_h_of_n, found.reset_h, found.d_peephole)
    )
    h0, c0 = (None if s is None else s[d] for s in (*l.states0, None)[:2])
    common = dict(
        p_saved=kept,
        initial=step.Initial(h0, c0),
        rows=step.Rows(y, cells[0] if l.has_c else None, l.directions * H, d * H),
        sequences=l.sequences,
        masks=l.masks_of(d),
        upstream=step.Upstream(dy, dcells, product, direct, dc, variational),
        written=step.Written(d_x, d_h_of_n, found.h[d], d_peephole),
        **l.step_constants(),
    )
    reset_before = l.kind in RESET_BEFORE
    d_gate = torch.empty_like(direct) if reset_before and l.minimal else None
    gates = (l.G - 1) * H if reset_before or d_h_of_n is not None else l.G * H
    kernel: Any
    if l.has_c:
        kernel = lstm_step_backward_kernel
    elif reset_before:
        kernel, common["p_dgate"] = reset_before_backward_kernel, d_gate
    else:
        kernel = _STEP_BACKWARD.get(l.kind, rnn_step_backward_kernel)
    for t in reversed(l.order(d)):
        n, start, grid = l.sizes[t], l.starts[t], l.grid(t)
        here = slice(start, start + n)
        kernel[grid](**common, **l.step_numbers(t, d), **l.neighbours(t, d))
        if reset_before:
            reset_before_gates_backward_kernel[grid](
                p_saved=kept,
                p_dreset_h=l.product(d_x[here, gates:], w_hh[gates:]),
                p_dgate=d_gate,
                p_direct=direct,
                p_variational=variational,
                p_gate_clip=l.numbers,
                p_h=found.h[d],
                p_dx=d_x,
                p_reset_h=reset_h,
                sequences=l.sequences,
                **l.step_constants(),
                **l.step_numbers(t, d),
            )
        product[:n] = l.product(d_x[here, :gates], w_hh[:gates])
        if d_h_of_n is not None:
            product[:n] += l.product(d_h_of_n[here], w_hh[gates:])
    if variational is not None:
        product *= variational
    if l.reset is not None and d == 0:  # a reset at the first step excludes the initial states
        first = l.reset.view(-1)[: l.sizes[0]].bool()
        if l.lengths is not None:
            first &= l.lengths > 0
        product[: l.sizes[0]].masked_fill_(first.unsqueeze(1), 0)
    direct += product


def _weight_gradients(l: Layer, d: int, found: Gradients) -> list[Tensor]:
    """Weight gradients of one direction, as matrix products over all rows."""
    gates = (l.G - 1) * l.H
    d_x, h = found.d_x[d], found.h[d]
    d_h = d_x if found.d_h_of_n is None else torch.cat((d_x[:, :gates], found.d_h_of_n[d]), 1)
    if found.reset_h is None:
        d_w_hh = l.product(d_h.T, h)
    else:
        d_w_hh = torch.cat((l.product(d_x[:, :gates].T, h), l.product(d_x[:, gates:].T, found.reset_h[d])))
    gradients = {"w_ih": l.product(d_x.T, l.rows_of_x), "w_hh": d_w_hh}
    if "b_ih" in l.names:
        gradients["b_ih"], gradients["b_hh"] = (g.sum(0, dtype=l.acc) for g in (d_x, d_h))
    if found.d_peephole is not None:
        gradients["w_ph"] = found.d_peephole[d].sum(0)
    return [gradients[name].to(l.x.dtype) for name in l.names]
