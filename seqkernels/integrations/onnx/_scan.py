"""Recurrent layers as a Scan of their cell over the steps, for all kinds and options.

The cells follow seqkernels.reference, with the operators of ONNX.

Dimensions: B sequences, T steps, D input, H hidden, P size of h (the projection size, or H), G gates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...functional._recurrent_kinds import Kind, size_of_state
from ...reference import recurrent as reference
from ._graph import BOOL, LAST, Body, Graph, Nodes, Value

Weights = dict[str, Value]  # weights of one direction, by the names of parameters


@dataclass
class Layer:
    """One layer, dense or padded: the arguments of an op."""

    kind: Kind
    x: Value  # [T, B, D]
    states0: list[Value | None]  # each [directions, B, P or H]
    weights: list[Weights]  # of each direction
    lengths: Value | None  # [B]
    reset: Value | None  # bool [T, B]
    bidirectional: bool
    H: int
    P: int
    dtype: Any
    cell_clip: float = math.inf
    gate_clip: float = math.inf
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    norm_eps: float = 1e-5

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def gates(self) -> int:
        return len(self.kind.gates)


# ---- cells


@dataclass
class Step:
    """Inputs of a cell: B sequences at one step. Methods add nodes to the body."""

    body: Body
    x: Value  # [B, G * H] input projection with bias
    states: list[Value]  # states before the step
    weights: Weights  # of the graph around the body; products are transposed
    layer: Layer

    @property
    def gates(self) -> list[Value]:
        """Pre-activations of all gates, of kinds that add both projections."""
        return self.body.split(self.body.Add(self.x, self.recurrent(self.states[0])), self.layer.gates)

    def recurrent(self, h: Value, of: str = "") -> Value:
        """Recurrent projection with bias. of: "_first" or "_last" gates, for kinds that project twice."""
        v = _normal(self.body, self.body.MatMul(h, self.weights["weight_hh" + of]), self.weights, "hh", self.layer)
        bias = self.weights.get("bias_hh" + of)
        return v if bias is None else self.body.Add(v, bias)

    def clipped(self, v: Value, limit: str = "gate_clip") -> Value:
        if limit not in self.weights:
            return v
        return self.body.Clip(v, self.weights["minus_" + limit], self.weights[limit])

    def sigmoid(self, v: Value) -> Value:
        return self.body.Sigmoid(self.clipped(v))

    def tanh(self, v: Value) -> Value:
        return self.body.Tanh(self.clipped(v))

    def peephole(self, v: Value, at: int, c: Value) -> Value:
        weight = self.weights.get(f"weight_ph_{at}")
        return v if weight is None else self.body.Add(v, self.body.Mul(weight, c))

    def sum(self, a: Value, x: Value, b: Value, y: Value) -> Value:
        """a x + b y."""
        return self.body.Add(self.body.Mul(a, x), self.body.Mul(b, y))

    def mixed(self, gate: Value, x: Value, y: Value) -> Value:
        """gate x + (1 - gate) y."""
        return self.sum(gate, x, self.body.Sub(self.weights["one"], gate), y)


Cell = Callable[[Step], list[Value]]  # the new states; h before the projection


def _lstm(s: Step) -> list[Value]:
    (i, f, g, o), c = s.gates, s.states[1]
    i, f = s.sigmoid(s.peephole(i, 0, c)), s.sigmoid(s.peephole(f, 1, c))
    c = s.clipped(s.sum(f, c, i, s.tanh(g)), "cell_clip")
    return [s.body.Mul(s.sigmoid(s.peephole(o, 2, c)), s.body.Tanh(c)), c]


def _lstm_coupled(s: Step) -> list[Value]:
    (i, g, o), c = s.gates, s.states[1]
    c = s.clipped(s.mixed(s.sigmoid(s.peephole(i, 0, c)), s.tanh(g), c), "cell_clip")
    return [s.body.Mul(s.sigmoid(s.peephole(o, 1, c)), s.body.Tanh(c)), c]


def _lstm_norm(s: Step) -> list[Value]:
    i, f, g, o = s.gates
    c = s.clipped(s.sum(s.sigmoid(f), s.states[1], s.sigmoid(i), s.tanh(g)), "cell_clip")
    normal = s.body.LayerNormalization(c, s.weights["gain_c"], s.weights["bias_c"], epsilon=s.layer.norm_eps)
    return [s.body.Mul(s.sigmoid(o), s.body.Tanh(normal)), c]


def _nested_lstm(s: Step) -> list[Value]:
    (i, f, g, o), (_, c, inner), body = s.gates, s.states, s.body

    def projected(v: Value, of: str) -> Value:
        v, bias = body.MatMul(v, s.weights[f"weight_inner_{of}"]), s.weights.get(f"bias_inner_{of}")
        return v if bias is None else body.Add(v, bias)

    new = projected(body.Mul(s.sigmoid(i), s.tanh(g)), "ih")
    old = projected(body.Mul(s.sigmoid(f), c), "hh")
    inner_i, inner_f, inner_g, inner_o = body.split(body.Add(new, old), 4)
    inner = s.sum(body.Sigmoid(inner_f), inner, body.Sigmoid(inner_i), body.Tanh(inner_g))
    c = body.Mul(body.Sigmoid(inner_o), body.Tanh(inner))
    return [body.Mul(s.sigmoid(o), body.Tanh(c)), c, inner]


def _slstm(s: Step) -> list[Value]:
    i, f, z, o = s.gates
    return _slstm_of(s, i, s.body.Neg(s.body.Softplus(s.body.Neg(f))), z, o)


def _slstm_exp(s: Step) -> list[Value]:
    return _slstm_of(s, *s.gates)


def _slstm_of(s: Step, i: Value, log_f: Value, z: Value, o: Value) -> list[Value]:
    (_, c, n, m), body, zero = s.states, s.body, s.weights["zero"]
    decayed = body.Add(log_f, m)
    first = body.Equal(n, zero)
    m = body.Where(body.Or(first, body.GreaterOrEqual(i, decayed)), i, decayed)
    change = body.Sub(decayed, m)
    f = body.Exp(body.Where(first, body.Min(change, zero), change))
    i = body.Exp(body.Sub(i, m))
    c, n = s.sum(f, c, i, body.Tanh(z)), body.Add(body.Mul(f, n), i)
    return [body.Mul(body.Sigmoid(o), body.Div(c, n)), c, n, m]


def _gru(s: Step) -> list[Value]:
    (x_r, x_z, x_n), body = s.body.split(s.x, 3), s.body
    h_r, h_z, h_n = body.split(s.recurrent(s.states[0]), 3)
    r, z = s.sigmoid(body.Add(x_r, h_r)), s.sigmoid(body.Add(x_z, h_z))
    return [s.mixed(z, s.states[-1], s.tanh(body.Add(x_n, body.Mul(r, h_n))))]


def _gru_before(s: Step) -> list[Value]:
    (x_r, x_z, x_n), body, h = s.body.split(s.x, 3), s.body, s.states[0]
    h_r, h_z = body.split(s.recurrent(h, "_first"), 2)
    r, z = s.sigmoid(body.Add(x_r, h_r)), s.sigmoid(body.Add(x_z, h_z))
    return [s.mixed(z, h, s.tanh(body.Add(x_n, s.recurrent(body.Mul(r, h), "_last"))))]


def _gru_projected(s: Step) -> list[Value]:
    (c,) = _gru(s)
    return [c, c]


def _dreamer_gru(s: Step) -> list[Value]:
    body, w = s.body, s.weights
    v = body.Add(s.x, s.recurrent(s.states[0]))
    v = body.LayerNormalization(v, w["norm_weight"], w["norm_bias"], epsilon=s.layer.norm_eps)
    r, n, u = body.split(v, 3)
    n, u = s.tanh(body.Mul(s.sigmoid(r), n)), s.sigmoid(body.Sub(u, w["one"]))
    return [s.mixed(u, n, s.states[0])]


def _mgu_after(s: Step) -> list[Value]:
    (x_f, x_n), body, h = s.body.split(s.x, 2), s.body, s.states[0]
    h_f, h_n = body.split(s.recurrent(h), 2)
    f = s.sigmoid(body.Add(x_f, h_f))
    return [s.mixed(f, s.tanh(body.Add(x_n, body.Mul(f, h_n))), h)]


def _mgu(s: Step) -> list[Value]:
    (x_f, x_n), body, h = s.body.split(s.x, 2), s.body, s.states[0]
    f = s.sigmoid(body.Add(x_f, s.recurrent(h, "_first")))
    return [s.mixed(f, s.tanh(body.Add(x_n, s.recurrent(body.Mul(f, h), "_last"))), h)]


def _rnn_tanh(s: Step) -> list[Value]:
    return [s.tanh(*s.gates)]


def _rnn_relu(s: Step) -> list[Value]:
    return [s.body.Relu(s.clipped(*s.gates))]


CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "lstm_coupled": _lstm_coupled,
    "lstm_norm": _lstm_norm,
    "nested_lstm": _nested_lstm,
    "slstm": _slstm,
    "slstm_exp": _slstm_exp,
    "gru": _gru,
    "gru_before": _gru_before,
    "gru_norm": _gru,
    "gru_projected": _gru_projected,
    "dreamer_gru": _dreamer_gru,
    "mgu": _mgu,
    "mgu_after": _mgu_after,
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
}
_TWICE = {"gru_before": 2, "mgu": 1}  # kinds that project twice -> number of gates of the first projection


def _normal(nodes: Nodes, v: Value, weights: Weights, of: str, layer: Layer) -> Value:
    """Normalises a product [.., G * H] with weight_ih or weight_hh, for kinds with layer normalisation."""
    groups = reference.KINDS[layer.kind.name].norms
    if not groups:
        return v
    parts = [v] if len(groups) == 1 else nodes.Split(v, weights["groups"], axis=-1, outputs=len(groups))
    normal = [
        nodes.LayerNormalization(part, weights[f"gain_{of}_{i}"], epsilon=layer.norm_eps)
        for i, part in enumerate(parts)
    ]
    return normal[0] if len(normal) == 1 else nodes.Concat(*normal, axis=-1)


# ---- a layer


def scan(graph: Graph, layer: Layer) -> tuple[Value, list[Value], list[Value]]:
    """y [T, B, directions * P], the last states, and the states except h at all steps, by a Scan for each direction."""
    T_B = [graph.size(layer.x, i) for i in range(2)]
    alive = None
    if layer.lengths is not None:
        alive = graph.before(graph.Unsqueeze(graph.range(T_B[0]), graph.ints(1, 2)), layer.lengths, 1, -1, 1)
    steps, last = zip(*(_direction(graph, layer, d, T_B[1], alive) for d in range(layer.directions)))

    def together(parts: Sequence[Value], axis: int) -> Value:
        return parts[0] if len(parts) == 1 else graph.Concat(*parts, axis=axis)

    y, *every = (together(of_state, -1) for of_state in zip(*steps))
    return y, [together([graph.Unsqueeze(s, graph.ints(0)) for s in of_state], 0) for of_state in zip(*last)], every


def _direction(graph: Graph, layer: Layer, d: int, B: Value, alive: Value | None) -> tuple[list[Value], list[Value]]:
    """All states at all steps [T, B, P or H], zero beyond each length, and the last states [B, P or H]."""
    kind, dtype, H = layer.kind, layer.dtype, layer.H
    weights = _prepared(graph, layer, layer.weights[d])
    widths = [layer.P if size_of_state(state) == "P" else H for state in kind.states]
    states0 = [
        graph.full(0.0, dtype, B, width) if s is None else graph.Squeeze(graph.part(s, d, d + 1), graph.ints(0))
        for s, width in zip(layer.states0, widths)
    ]
    x = _normal(graph, graph.MatMul(layer.x, weights["weight_ih"]), weights, "ih", layer)
    x = graph.Add(x, weights["bias_ih"]) if "bias_ih" in weights else x
    before = layer.reset
    if before is not None and alive is not None:  # a reset of padding has no effect
        before = graph.And(before, graph.Squeeze(alive, graph.ints(2)))
    if before is not None and d:  # in the reverse direction, a sequence ends before the first step of the next one
        none = graph.full(0, BOOL, 1, B)
        before = graph.Concat(graph.Slice(before, graph.ints(1), graph.ints(LAST), graph.ints(0)), none, axis=0)
    before = None if before is None else graph.Unsqueeze(before, graph.ints(2))
    scanned = [t if t is None or d == 0 else graph.flipped(t) for t in (x, alive, before)]

    of = layer.weights[d]["weight_ih"].name  # with x a name of this direction of this call
    body = Body(graph, f"{of}_{layer.x.name}_{kind.name}_{len(graph.nodes)}")
    old = [body.input(dtype, None, width) for width in widths]
    x_t = body.input(dtype, None, layer.gates * H)
    alive_t = None if alive is None else body.input(BOOL, None, 1)
    before_t = None if before is None else body.input(BOOL, None, 1)
    zero = weights["zero"]
    states = old if before_t is None else [body.Where(before_t, zero, s) for s in old]
    new = CELLS[kind.name](Step(body, x_t, states, weights, layer))
    if "weight_hr" in weights:
        new[0] = body.MatMul(new[0], weights["weight_hr"])
    for i, name in enumerate(("zoneout_h", "zoneout_c")[: len(new)]):
        if name in weights:
            new[i] = body.Add(new[i], body.Mul(weights[name], body.Sub(states[i], new[i])))
    steps, last = new, new
    if alive_t is not None:
        steps = [body.Where(alive_t, s, zero) for s in new]
        last = [body.Where(alive_t, s, kept) for s, kept in zip(new, states)]
    found = body.scan(states0, [t for t in scanned if t is not None], [*last, *steps])
    stacked = found[len(new) :]
    return [graph.flipped(s) for s in stacked] if d else stacked, found[: len(new)]


def _prepared(graph: Graph, layer: Layer, given: Weights) -> Weights:
    """Weights as the cells read them, and constants: matrices are transposed, peepholes and gains are split."""
    name, H, dtype = layer.kind.name, layer.H, layer.dtype
    made = dict(given)
    if (first := _TWICE.get(name)) is not None:
        for weight in [w for w in made if w in ("weight_hh", "bias_hh")]:
            whole = made.pop(weight)
            made[weight + "_first"] = graph.part(whole, 0, first * H)
            made[weight + "_last"] = graph.part(whole, first * H, layer.gates * H)
    for weight in [w for w in made if w.startswith("weight_") and w != "weight_ph"]:
        made[weight] = graph.Transpose(made[weight], perm=[1, 0])
    if "weight_ph" in made:
        for i in range(made["weight_ph"].shape[0] // H):
            made[f"weight_ph_{i}"] = graph.part(made["weight_ph"], i * H, (i + 1) * H)
    if groups := reference.KINDS[name].norms:
        bounds = [0, *itertools.accumulate(gates * H for gates in groups)]
        made["groups"] = graph.ints(*(gates * H for gates in groups))
        for of in ("gain_ih", "gain_hh"):
            for i, bound in enumerate(itertools.pairwise(bounds)):
                made[f"{of}_{i}"] = graph.part(made[of], *bound)
    made["zero"], made["one"] = graph.constant(0.0, dtype), graph.constant(1.0, dtype)
    for limit in ("cell_clip", "gate_clip"):
        if (value := getattr(layer, limit)) != math.inf:
            made[limit], made["minus_" + limit] = graph.constant(value, dtype), graph.constant(-value, dtype)
    for rate in ("zoneout_h", "zoneout_c"):
        if value := getattr(layer, rate):
            made[rate] = graph.constant(value, dtype)
    return made
