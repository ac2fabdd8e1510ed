"""Layers and their definition against LSTM, GRU and RNN of ONNX Runtime, which is independent of torch.

The clip of ONNX limits the arguments of all activations except tanh(c), like gate_clip. With input_forget, the forget
gate is 1 - i and the weights of f are not read, like coupled_gates.

Dimensions: B batch, T time, D input, H hidden, G gates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import reference
from support.cases import assert_near, tuple_of

onnx = pytest.importorskip("onnx", reason="onnx is not installed; it builds the models")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it computes the expected results")

B, T, D, H = 4, 7, 5, 17
LENGTHS = (3, 7, 1, 5)

clips = pytest.mark.parametrize("clip", [None, 0.7], ids=["unclipped", "clip"])
forms = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "lengths"])
ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
sides = pytest.mark.parametrize("side", ["definition", "module"])


@dataclasses.dataclass
class Layer:
    """Random inputs and weights of one layer, with the names and the gate order of seqkernels."""

    gates: int
    x: Tensor
    hx: tuple[Tensor, ...]
    parameters: dict[str, Tensor]
    bidirectional: bool

    @property
    def suffixes(self) -> list[str]:
        return ["_l0", "_l0_reverse"][: 1 + self.bidirectional]

    def onnx(self, name: str, order: Sequence[int | None], gates: int | None = None) -> Tensor:
        """[directions, ...] a parameter in the gate order of ONNX. None: a gate that ONNX ignores, filled with 9."""
        rows = []
        for suffix in self.suffixes:
            parts = self.parameters[name + suffix].chunk(gates or self.gates)
            rows.append(torch.cat([torch.full_like(parts[0], 9.0) if k is None else parts[k] for k in order]))
        return torch.stack(rows)


def layer(gates: int, states: int, bidirectional: bool, peepholes: int = 0) -> Layer:
    """A layer whose weights are large enough for a clip at 0.7 to limit most pre-activations."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    directions, parameters = 1 + bidirectional, {}
    for suffix in ["_l0", "_l0_reverse"][:directions]:
        parameters["weight_ih" + suffix], parameters["weight_hh" + suffix] = normal(gates * H, D), normal(gates * H, H)
        parameters["bias_ih" + suffix], parameters["bias_hh" + suffix] = normal(gates * H), normal(gates * H)
        if peepholes:
            parameters["weight_ph" + suffix] = normal(peepholes * H)
    hx = tuple(normal(directions, B, H) for _ in range(states))
    return Layer(gates, normal(T, B, D), hx, parameters, bidirectional)


def of_runtime(op: str, layer: Layer, inputs: dict[str, Tensor | None], **attributes) -> dict[str, Tensor]:
    """Runs one node with ONNX Runtime on the CPU."""
    inputs = {"X": layer.x} | inputs
    arrays = {name: t.numpy() for name, t in inputs.items() if t is not None}
    outputs = ["y", "h_n", "c_n"][: 1 + len(layer.hx)]
    types = {np.dtype("float32"): onnx.TensorProto.FLOAT, np.dtype("int32"): onnx.TensorProto.INT32}
    attributes |= dict(hidden_size=H, direction="bidirectional" if layer.bidirectional else "forward")
    node = onnx.helper.make_node(op, [name if name in arrays else "" for name in inputs], outputs, **attributes)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        op,
        [info(name, types[a.dtype], a.shape) for name, a in arrays.items()],
        [info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y, *states = (torch.from_numpy(a) for a in session.run(None, arrays))
    y = y.transpose(1, 2).flatten(2)  # ONNX: [T, directions, B, H]
    return dict(zip(outputs, (y, *states), strict=True))


def of_ours(side: str, name: str, layer: Layer, lengths: Sequence[int] | None, **options) -> dict[str, Tensor]:
    """Results of the definition in float64, or of the module."""
    lengths = None if lengths is None else torch.tensor(lengths)
    hx = layer.hx if len(layer.hx) > 1 else layer.hx[0]
    if side == "definition":
        function = {"LSTM": reference.lstm, "GRU": reference.gru}.get(name)
        if function is None:
            function = getattr(reference, "rnn_" + options.pop("nonlinearity"))
        x, *states = (t.double() for t in (layer.x, *layer.hx))
        weights = [w.double() for w in layer.parameters.values()]
        hx = tuple(states) if len(states) > 1 else states[0]
        y, states = function(x, hx, weights, lengths=lengths, bidirectional=layer.bidirectional, **options)
    else:
        module = getattr(seqkernels.nn, name)(D, H, bidirectional=layer.bidirectional, **options)
        module.load_state_dict(layer.parameters)
        with torch.no_grad():
            y, states = module(layer.x, hx, lengths=lengths)
    outputs = ["y", "h_n", "c_n"][: 1 + len(layer.hx)]
    return {name: t.float() for name, t in zip(outputs, (y, *tuple_of(states)), strict=True)}


def weights_for_runtime(layer: Layer, order: Sequence[int | None], lengths: Sequence[int] | None) -> dict:
    """Inputs shared by the three ops."""
    biases = [layer.onnx(name, order) for name in ("bias_ih", "bias_hh")]
    return {
        "W": layer.onnx("weight_ih", order),
        "R": layer.onnx("weight_hh", order),
        "B": torch.cat(biases, dim=1),
        "sequence_lens": None if lengths is None else torch.tensor(lengths, dtype=torch.int32),
        "initial_h": layer.hx[0],
    }


def limit(clip: float | None) -> dict[str, float]:
    return {} if clip is None else {"clip": clip}


@sides
@ways
@forms
@clips
@pytest.mark.parametrize("coupled", [False, True], ids=["four", "coupled"])
@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
def test_lstm(peephole: bool, coupled: bool, clip: float | None, lengths, bidirectional: bool, side: str) -> None:
    """The gates of ONNX are i, o, f, c, and its peepholes i, o, f."""
    gates, peepholes = (3, 2) if coupled else (4, 3)
    drawn = layer(gates, 2, bidirectional, peepholes if peephole else 0)
    inputs = weights_for_runtime(drawn, (0, 2, None, 1) if coupled else (0, 3, 1, 2), lengths)
    inputs["initial_c"] = drawn.hx[1]
    if peephole:
        inputs["P"] = drawn.onnx("weight_ph", (0, 1, None) if coupled else (0, 2, 1), peepholes)
    want = of_runtime("LSTM", drawn, inputs, input_forget=int(coupled), **limit(clip))
    got = of_ours(side, "LSTM", drawn, lengths, peephole=peephole, coupled_gates=coupled, gate_clip=clip)
    assert_near(got, want, torch.float32)


@sides
@ways
@forms
@clips
@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
def test_gru(reset_after: bool, clip: float | None, lengths, bidirectional: bool, side: str) -> None:
    """The gates of ONNX are z, r, h."""
    drawn = layer(3, 1, bidirectional)
    inputs = weights_for_runtime(drawn, (1, 0, 2), lengths)
    want = of_runtime("GRU", drawn, inputs, linear_before_reset=int(reset_after), **limit(clip))
    got = of_ours(side, "GRU", drawn, lengths, reset_after=reset_after, gate_clip=clip)
    assert_near(got, want, torch.float32)


@sides
@ways
@forms
@clips
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn(nonlinearity: str, clip: float | None, lengths, bidirectional: bool, side: str) -> None:
    drawn = layer(1, 1, bidirectional)
    activations = [nonlinearity.capitalize()] * (1 + bidirectional)
    want = of_runtime("RNN", drawn, weights_for_runtime(drawn, (0,), lengths), activations=activations, **limit(clip))
    got = of_ours(side, "RNN", drawn, lengths, nonlinearity=nonlinearity, gate_clip=clip)
    assert_near(got, want, torch.float32)


@sides
def test_output_of_a_sequence_of_length_zero(side: str) -> None:
    """The output is zero. The last states are not compared: ONNX Runtime returns zeros, seqkernels the initial states,
    and ONNX does not specify them."""
    drawn, lengths = layer(4, 2, True), (0, 7, 2, 0)
    want = of_runtime("LSTM", drawn, weights_for_runtime(drawn, (0, 3, 1, 2), lengths) | {"initial_c": drawn.hx[1]})
    got = of_ours(side, "LSTM", drawn, lengths)
    assert_near({"y": got["y"]}, {"y": want["y"]}, torch.float32)
    assert not want["h_n"][:, 0].any() and torch.equal(got["h_n"][:, 0], drawn.hx[0][:, 0])
    assert not want["c_n"][:, 0].any() and torch.equal(got["c_n"][:, 0], drawn.hx[1][:, 0])
