"""Recurrent layers in ONNX: LSTM, GRU and RNN where these nodes compute the layer, otherwise a Scan of the cell.

Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P size of h (the projection size, or H), G gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...functional._recurrent_extras import Extras
from ...functional._recurrent_kinds import KINDS, Kind
from ._graph import DOUBLE, FLOAT, INT32, INT64, Graph, Value
from ._scan import Layer, scan

# Masks, which training draws -> the option that draws them.
_DRAWN = {
    "zoneout_h": "zoneout_h",
    "zoneout_c": "zoneout_c",
    "candidate": "recurrent_dropout",
    "variational": "variational_dropout",
}


@dataclass(frozen=True)
class Node:
    """An operator of ONNX that computes a kind.

    gates: gates in the order of the operator. peepholes: the same for its peepholes. A capital letter is the negated
    gate: the coupled forget gate 1 - sigmoid(i) is sigmoid(-i).
    """

    op_type: str
    gates: str
    peepholes: str = ""
    attributes: tuple[tuple[str, int], ...] = ()
    activation: str = ""  # of RNN


NODES = {
    "lstm": Node("LSTM", "iofg", "iof"),
    "lstm_coupled": Node("LSTM", "ioIg", "ioI", (("input_forget", 1),)),
    "gru": Node("GRU", "zrn", attributes=(("linear_before_reset", 1),)),
    "gru_before": Node("GRU", "zrn", attributes=(("linear_before_reset", 0),)),
    "rnn_tanh": Node("RNN", "n", activation="Tanh"),
    "rnn_relu": Node("RNN", "n", activation="Relu"),
}


def translate(kind_name: str, recorded: bool, graph: Graph, arguments: dict[str, Any]) -> tuple[Value, ...]:
    """Outputs of the op `<kind>`, or of `<kind>_forward` if `recorded`."""
    kind, batch_sizes = KINDS[kind_name], arguments["batch_sizes"]
    layer = _layer(graph, kind, arguments)
    index = None
    if batch_sizes is not None:
        layer, index = _padded(graph, layer, batch_sizes)
    several = recorded and len(kind.states) > 1
    if _is_node(layer):
        y, states = node(graph, layer)
        # LSTM has no output for c at all steps. If the layer does not return it, the optimizer removes this Scan.
        every = scan(graph, layer)[2] if several else []
    else:
        y, states, every = scan(graph, layer)
        every = every if several else []
    if index is not None:
        y, *every = (graph.GatherND(t, index) for t in (y, *every))
    if not recorded:
        return y, *states
    saved = graph.constant(0.0, FLOAT)  # only the backward ops read it
    return y, *states, saved, *every


def _layer(graph: Graph, kind: Kind, arguments: dict[str, Any]) -> Layer:
    extras = Extras(*(arguments[name] for name in Extras._fields))
    for mask, option in _DRAWN.items():
        if arguments[mask] is not None:
            raise NotImplementedError(
                f"{kind.name}: {option} must draw no mask in ONNX, got one of training; call model.eval()"
            )
    bidirectional, given = arguments["bidirectional"], arguments["weights"]
    names = [w.name for w in kind.weights(extras.bias, extras.projected, extras.peephole, extras.heads > 1)]
    weights = [dict(zip(names, given[i : i + len(names)], strict=True)) for i in range(0, len(given), len(names))]
    w_hh = weights[0]["weight_hh"]
    H, P = w_hh.shape[0] // len(kind.gates), w_hh.shape[1] * extras.heads
    if extras.heads > 1:
        for of_direction in weights:
            of_direction["weight_hh"] = _dense(graph, of_direction["weight_hh"], len(kind.gates), extras.heads, H)
    layer = Layer(
        kind, arguments["x"], [arguments[name] for name in kind.initial_states], weights, arguments["lengths"],
        extras.reset, bidirectional, H, P, arguments["x"].dtype,
    )  # fmt: skip
    if extras.numbers:
        cell_clip, gate_clip, zoneout_h, zoneout_c, _, norm_eps = map(float, extras.numbers)
        layer.cell_clip, layer.gate_clip, layer.norm_eps = cell_clip, gate_clip, norm_eps
        layer.zoneout_h, layer.zoneout_c = zoneout_h, zoneout_c
    return layer


def _dense(graph: Graph, w: Value, gates: int, heads: int, H: int) -> Value:
    """[G * H, H] of the block-diagonal w [G * H, H / heads]."""
    group = H // heads
    eye = [[[[[float(i == j)] for j in range(heads)]] for i in range(heads)]]  # [1, heads, 1, heads, 1]
    blocks = graph.Reshape(w, graph.ints(gates, heads, group, 1, group))
    return graph.Reshape(graph.Mul(blocks, graph.constant(eye, w.dtype)), graph.ints(gates * H, H))


def _padded(graph: Graph, layer: Layer, batch_sizes: Value) -> tuple[Layer, Value]:
    """A packed layer as one with lengths, and [N, 2] the step and the sequence of each row.

    The rows of a packed input are the valid steps of a padded one in row-major order.
    """
    T, B = graph.Shape(batch_sizes), graph.part(batch_sizes, 0, 1)
    valid = graph.Less(graph.range(B), graph.Unsqueeze(batch_sizes, graph.ints(1)))  # [T, B]
    index = graph.Transpose(graph.NonZero(valid), perm=[1, 0])

    def padded(rows: Value, *width: int) -> Value:
        # Without a reduction: no position occurs twice.
        return graph.ScatterND(graph.full(0, rows.dtype, T, B, *width), index, rows)

    layer.x = padded(layer.x, layer.x.shape[1])
    if layer.reset is not None:
        layer.reset = padded(layer.reset)
    layer.lengths = graph.ReduceSum(graph.Cast(valid, to=INT64), graph.ints(0), keepdims=0)
    return layer, index


# ---- LSTM, GRU and RNN


def _is_node(layer: Layer) -> bool:
    """Whether an operator of ONNX computes the layer.

    ONNX Runtime has no float64 kernels of these operators.
    """
    return (
        layer.kind.name in NODES
        and layer.reset is None
        and layer.cell_clip == math.inf
        and layer.zoneout_h == layer.zoneout_c == 0
        and "weight_hr" not in layer.weights[0]
        and layer.dtype != DOUBLE
    )


def node(graph: Graph, layer: Layer) -> tuple[Value, list[Value]]:
    """y [T, B, directions * H] and the last states, by one node for both directions.

    The padding of y is zero. Where a length is zero, ONNX does not define the last states; they are the initial ones.
    """
    of, kind, directions = NODES[layer.kind.name], layer.kind, layer.directions

    def ordered(w: Value, order: str, gates: str) -> list[Value]:
        parts = []
        for letter in order:
            k = gates.index(letter.lower())
            rows = w if len(gates) == 1 else graph.part(w, k * layer.H, (k + 1) * layer.H)
            parts.append(graph.Neg(rows) if letter.isupper() else rows)
        return parts

    def together(names: Sequence[str], order: str, gates: str) -> Value:
        """[directions, ..] weights, one below the other, in the order of ONNX."""
        rows = []
        for weights in layer.weights:
            parts = [part for name in names for part in ordered(weights[name], order, gates)]
            rows.append(graph.Unsqueeze(parts[0] if len(parts) == 1 else graph.Concat(*parts, axis=0), graph.ints(0)))
        return rows[0] if len(rows) == 1 else graph.Concat(*rows, axis=0)

    own = layer.weights[0]
    inputs = [
        layer.x,
        together(["weight_ih"], of.gates, kind.gates),
        together(["weight_hh"], of.gates, kind.gates),
        together(["bias_ih", "bias_hh"], of.gates, kind.gates) if "bias_ih" in own else None,
        None if layer.lengths is None else graph.Cast(layer.lengths, to=INT32),
        *layer.states0,
    ]
    if "weight_ph" in own:
        inputs.append(together(["weight_ph"], of.peepholes, "ifo" if "f" in kind.gates else "io"))
    attributes: dict[str, Any] = dict(of.attributes)
    attributes |= dict(hidden_size=layer.H, direction="bidirectional" if layer.bidirectional else "forward")
    if of.activation:
        attributes["activations"] = [of.activation] * directions
    if layer.gate_clip != math.inf:
        attributes["clip"] = layer.gate_clip
    y, *states = getattr(graph, of.op_type)(*inputs, outputs=1 + len(layer.states0), **attributes)
    if layer.bidirectional:  # [T, directions, B, H]
        y = graph.Reshape(graph.Transpose(y, perm=[0, 2, 1, 3]), graph.ints(0, 0, directions * layer.H))
    else:
        y = graph.Squeeze(y, graph.ints(1))
    if layer.lengths is not None:
        empty = graph.Equal(graph.Reshape(layer.lengths, graph.ints(1, -1, 1)), graph.constant(0, layer.lengths.dtype))
        states = [s if s0 is None else graph.Where(empty, s0, s) for s, s0 in zip(states, layer.states0)]
    return y, states
