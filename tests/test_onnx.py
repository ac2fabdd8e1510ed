"""Exports to ONNX, run by ONNX Runtime and by the reference evaluator of the onnx package, against the modules.

A model is exported with the sizes of its first example, and runs with the sizes of all examples: a size that the export
froze fails. The reference evaluator ignores sequence_lens, clip and all activations of RNN except Tanh; these exports
run in ONNX Runtime alone.

Dimensions: B batch, T time, D input, H hidden, E table rows.
"""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence

import seqkernels.functional as F
from seqkernels import nn
from support.cases import assert_near

onnx = pytest.importorskip("onnx", reason="onnx is not installed; it evaluates the exports")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; it runs the exports")
pytest.importorskip("onnxscript", reason="onnxscript is not installed; torch.onnx.export requires it")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from seqkernels.integrations.onnx import export, translation_table  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Exporting a model while it is in training mode"
)

ROOT = Path(__file__).parents[1]
D, H = 4, 6
ANY = Dim.DYNAMIC
Example = tuple[Any, ...]


@pytest.fixture(scope="module", autouse=True)
def one_registry():
    """Builds torch's registry of translations once. It takes longer than the export of a small model."""
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry
    built: dict[int, Any] = {}
    build = registry.from_torchlib

    def from_torchlib(cls: type, opset_version: int = 18) -> Any:
        if opset_version not in built:
            built[opset_version] = build(opset_version=opset_version)
        one = copy.copy(built[opset_version])
        one.functions = {name: list(metas) for name, metas in one.functions.items()}
        return one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "from_torchlib", classmethod(from_torchlib))
        yield


# ---- the check


class Call(torch.nn.Module):
    """A function or a module with constant keyword arguments, and names of its last tensors.

    module: the parameters of a function.
    """

    def __init__(self, function: Any, *names: str, module: torch.nn.Module | None = None, **constants: Any) -> None:
        super().__init__()
        self.function, self.names, self.module, self.constants = function, names, module, constants

    def forward(self, *tensors: Any) -> Any:
        first = len(tensors) - len(self.names)
        return self.function(*tensors[:first], **dict(zip(self.names, tensors[first:])), **self.constants)


class Several(torch.nn.Module):
    """Modules with the same inputs, in one export."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.all = torch.nn.ModuleList(modules)

    def forward(self, *tensors: Any) -> Any:
        return tuple(module(*tensors) for module in self.all)


def tensors_of(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values or () for t in tensors_of(value)]


def random_parameters(module: torch.nn.Module) -> torch.nn.Module:
    """Draws all parameters, also those that start as constants."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return module.eval()


def axes(example: Example, other: Example) -> tuple[Any, ...]:
    """The dynamic shapes of two examples: the sizes that differ."""

    def of(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            return {i: ANY for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n}
        return None if a is None else tuple(map(of, a, b))

    return tuple(map(of, example, other))


def ops_of(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {spec.name: t.numpy() for spec, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(a)) for a in session.run(None, feeds)]


@np.errstate(all="ignore")
def evaluate(model: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Runs a model with the reference evaluator.

    It takes an output without a name for the inputs without a name of later nodes, so that all outputs get names.
    """
    model = copy.deepcopy(model)
    for i, node in enumerate(model.graph.node):
        for k, name in enumerate(node.output):
            node.output[k] = name or f"unused_{i}_{k}"
    evaluator = ReferenceEvaluator(model)
    feeds = {name: t.numpy() for name, t in zip(evaluator.input_names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(a)) for a in evaluator.run(None, feeds)]


def check(
    module: torch.nn.Module,
    *examples: Example,
    sides: Sequence[Callable[..., list[Tensor]]] = (run, evaluate),
    opset_version: int = 23,
) -> Any:
    """Exports the module with the first example and compares the results of all examples. Returns the model."""
    module.eval()
    shapes = axes(*examples[:2])
    if isinstance(module, (Call, Several)):  # one argument, *tensors
        shapes = (shapes,)
    program = export(module, examples[0], dynamic_shapes=shapes, verbose=False, opset_version=opset_version)
    model = program.model_proto
    onnx.checker.check_model(model)
    for example in examples:
        with torch.no_grad():
            want = tensors_of(module(*example))
        for side in sides:
            got = side(model, tensors_of(example))
            assert [t.shape for t in got] == [t.shape for t in want]
            for i, (a, b) in enumerate(zip(got, want)):
                assert not b.is_floating_point() or not b.isnan().any()
                assert_near({f"{side.__name__} {i}": a}, {f"{side.__name__} {i}": b}, b.dtype)
    return model


def sequences(T: int, B: int) -> Tensor:
    return torch.randn(T, B, D)


def padded(T: int, *lengths: int) -> tuple[Tensor, Tensor]:
    """A batch whose padding is NaN, and its lengths."""
    x = sequences(T, len(lengths))
    for b, n in enumerate(lengths):
        x[n:, b] = torch.nan
    return x, torch.tensor(lengths)


# ---- recurrent layers: LSTM, GRU and RNN nodes

NODES = [
    (nn.LSTM, {}, "LSTM"),
    (nn.LSTM, dict(peephole=True), "LSTM"),
    (nn.LSTM, dict(coupled_gates=True), "LSTM"),
    (nn.LSTM, dict(peephole=True, coupled_gates=True), "LSTM"),
    (nn.LSTM, dict(num_heads=2), "LSTM"),
    (nn.GRU, {}, "GRU"),
    (nn.GRU, dict(reset_after=False), "GRU"),
    (nn.GRU, dict(num_heads=3), "GRU"),
    (nn.RNN, {}, "RNN"),
    (nn.RNN, dict(nonlinearity="relu"), "RNN"),
]
ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])


def layers(bidirectional: bool, ops: Sequence[str] = ("LSTM", "GRU", "RNN")) -> list[torch.nn.Module]:
    return [
        random_parameters(make(D, H, bidirectional=bidirectional, **options))
        for make, options, op in NODES
        if op in ops
    ]


@ways
def test_layers_are_one_node(bidirectional: bool) -> None:
    *others, relu = layers(bidirectional)
    examples = (sequences(5, 3),), (sequences(2, 7),), (sequences(1, 1),)
    ops = ops_of(check(Several(others), *examples))
    assert "Scan" not in ops and [ops.count(op) for op in ("LSTM", "GRU", "RNN")] == [5, 3, 1]
    assert ops_of(check(relu, *examples, sides=(run,))).count("RNN") == 1


@ways
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_lengths_become_sequence_lens(op: str, bidirectional: bool) -> None:
    """The reverse direction starts at the end of each sequence; padding is not read; a length of zero keeps hx."""

    def example(T: int, *lengths: int) -> Example:
        x, lengths_ = padded(T, *lengths)
        states = [torch.randn(1 + bidirectional, len(lengths), H) for _ in range(2 if op == "LSTM" else 1)]
        return x, tuple(states) if op == "LSTM" else states[0], lengths_

    module = Several([Call(layer, "lengths") for layer in layers(bidirectional, [op])])
    model = check(module, example(5, 1, 5, 3), example(4, 0, 1, 4, 2), sides=(run,))
    found = [node for node in model.graph.node if node.op_type == op]
    assert len(found) == len(module.all) and all(node.input[4] for node in found)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lengths_of_another_dtype(dtype: torch.dtype) -> None:
    x, lengths = padded(5, 1, 5, 3)
    y, more = padded(4, 0, 4, 1, 2)
    check(Call(nn.GRU(D, H), "lengths"), (x, lengths.to(dtype)), (y, more.to(dtype)), sides=(run,))


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
def test_stacked_layers(make: Any, batch_first: bool) -> None:
    layer = make(D, H, num_layers=3, bidirectional=True, batch_first=batch_first, dropout=0.5)
    model = check(layer, (sequences(5, 3),), (sequences(2, 7),))
    assert ops_of(model).count(make.__name__) == 3


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_without_biases_and_unbatched(make: Any) -> None:
    check(random_parameters(make(D, H, bias=False)), (sequences(5, 3),), (sequences(2, 7),))
    check(make(D, H, bidirectional=True), (torch.randn(5, D),), (torch.randn(3, D),))


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_initial_states(make: Any) -> None:
    def example(T: int, B: int) -> Example:
        states = tuple(torch.randn(4, B, H) for _ in range(2))
        return sequences(T, B), states if make is nn.LSTM else states[0]

    check(make(D, H, num_layers=2, bidirectional=True), example(5, 3), example(2, 7))
    check(random_parameters(make(D, H, learn_initial_state=True)), (sequences(5, 3),), (sequences(2, 7),))


@pytest.mark.parametrize("make, op", [(nn.LSTM, "LSTM"), (nn.GRU, "GRU"), (nn.RNN, "RNN")])
def test_gate_clip_becomes_clip(make: Any, op: str) -> None:
    layer = random_parameters(make(D, H, gate_clip=0.4, bidirectional=True))
    model = check(layer, (sequences(5, 3),), (sequences(2, 7),), sides=(run,))
    (node,) = (node for node in model.graph.node if node.op_type == op)
    assert {a.name: a for a in node.attribute}["clip"].f == pytest.approx(0.4)


def test_gates_are_in_the_order_of_onnx() -> None:
    """The initializers of the node, against the parameters."""
    layer = random_parameters(nn.LSTM(D, H, peephole=True))
    model = check(layer, (sequences(5, 3),), (sequences(2, 7),))
    (node,) = (node for node in model.graph.node if node.op_type == "LSTM")
    initializers = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    W, R, B, P = (initializers[node.input[i]][0] for i in (1, 2, 3, 7))
    i, f, g, o = layer.weight_ih_l0.chunk(4)
    assert torch.equal(W, torch.cat([i, o, f, g]))
    i, f, g, o = layer.weight_hh_l0.chunk(4)
    assert torch.equal(R, torch.cat([i, o, f, g]))
    biases = [torch.cat([b.chunk(4)[k] for k in (0, 3, 1, 2)]) for b in (layer.bias_ih_l0, layer.bias_hh_l0)]
    assert torch.equal(B, torch.cat(biases))
    i, f, o = layer.weight_ph_l0.chunk(3)
    assert torch.equal(P, torch.cat([i, o, f]))


def test_coupled_gates_hold_for_either_reading_of_input_forget() -> None:
    """The weights of f are those of i, negated: sigmoid(-i) is 1 - sigmoid(i). The evaluator ignores input_forget."""
    layer = random_parameters(nn.LSTM(D, H, coupled_gates=True, peephole=True))
    model = check(layer, (sequences(5, 3),), (sequences(2, 7),))
    (node,) = (node for node in model.graph.node if node.op_type == "LSTM")
    attributes = {a.name: a.i for a in node.attribute}
    assert attributes["input_forget"] == 1


def test_weights_are_initializers_of_their_size() -> None:
    layer = nn.LSTM(64, 64, num_layers=2, bidirectional=True)
    program = export(layer.eval(), (torch.randn(5, 3, 64),), dynamic_shapes=({0: ANY, 1: ANY},), verbose=False)
    model = program.model_proto
    sizes = sum(onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    assert sizes <= sum(p.numel() for p in layer.parameters()) * 4 + 100
    assert ops_of(model).count("LSTM") == 2 and not {"Slice", "Unsqueeze"} & set(ops_of(model))


@pytest.mark.parametrize("opset_version", [18, 20, 22, 24])
def test_other_opsets(opset_version: int) -> None:
    examples = (sequences(5, 3),), (sequences(2, 7),)
    for layer in (nn.LSTM(D, H, bidirectional=True), nn.LSTM(D, H, proj_size=2)):
        model = check(layer, *examples, opset_version=opset_version)
        assert [i.version for i in model.opset_import if not i.domain] == [opset_version]


def test_reset_after_is_linear_before_reset() -> None:
    """torch writes GRU with linear_before_reset=0 in some versions, pytorch#189225."""
    model = check(random_parameters(nn.GRU(D, H)), (sequences(5, 3),), (sequences(2, 7),))
    (node,) = (node for node in model.graph.node if node.op_type == "GRU")
    assert {a.name: a.i for a in node.attribute}["linear_before_reset"] == 1


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_number_of_steps_is_not_frozen(make: Any) -> None:
    """Bidirectional graphs of torch hold the T of the example, pytorch#191855 and pytorch#193192."""
    layer = make(D, H, bidirectional=True, batch_first=True)
    check(layer, (torch.randn(2, 5, D),), (torch.randn(3, 9, D),), (torch.randn(2, 31, D),), (torch.randn(1, 1, D),))


# ---- recurrent layers: Scan

SCANS = [
    (nn.LSTM, dict(proj_size=3)),
    (nn.LSTM, dict(layer_norm=True, cell_clip=0.5, gate_clip=0.8)),
    (nn.LSTM, dict(peephole=True, coupled_gates=True, cell_clip=0.3, num_heads=2, zoneout_c=0.1, zoneout_h=0.2)),
    (nn.LSTM, dict(zoneout_h=0.3, bias=False, recurrent_dropout=0.5, variational_dropout=0.5)),
    (nn.NestedLSTM, {}),
    (nn.NestedLSTM, dict(bias=False)),
    (nn.SLSTM, {}),
    (nn.SLSTM, dict(forget_gate="exp")),
    (nn.GRU, dict(proj_size=2)),
    (nn.GRU, dict(layer_norm=True, norm_eps=1e-2)),
    (nn.GRU, dict(reset_after=False, zoneout_h=0.1)),
    (nn.DreamerGRU, dict(num_heads=3)),
    (nn.MGU, dict(gate_clip=0.5)),
    (nn.MGU, dict(reset_after=True)),
    (nn.RNN, dict(zoneout_h=0.3)),
    (nn.RNN, dict(zoneout_h=0.3, nonlinearity="relu", gate_clip=0.5)),
]
scans = pytest.mark.parametrize("group", range(4))


def scanned(group: int) -> list[torch.nn.Module]:
    return [random_parameters(make(D, H, bidirectional=True, **options)) for make, options in SCANS[group::4]]


@scans
def test_other_layers_are_scans(group: int) -> None:
    module = Several(scanned(group))
    model = check(module, (sequences(5, 3),), (sequences(2, 7),), (sequences(1, 1),))
    assert ops_of(model).count("Scan") == 2 * len(module.all)


@scans
def test_scans_with_lengths_and_resets(group: int) -> None:
    def example(T: int, *lengths: int) -> Example:
        return *padded(T, *lengths), torch.rand(T, len(lengths)) < 0.3

    module = Several([Call(layer, "lengths", "reset") for layer in scanned(group)])
    check(module, example(5, 1, 5, 3), example(4, 0, 1, 4, 2))


def test_resets() -> None:
    def example(T: int, B: int) -> Example:
        return sequences(T, B), torch.rand(T, B) < 0.3

    module = Several([Call(make(D, H, bidirectional=True), "reset") for make in (nn.LSTM, nn.GRU, nn.RNN)])
    check(module, example(5, 3), example(9, 2))


def test_states_of_all_steps() -> None:
    makes = nn.LSTM, nn.GRU, nn.RNN, nn.SLSTM, nn.DreamerGRU
    module = Several([random_parameters(make(D, H, 2, bidirectional=True, return_all_states=True)) for make in makes])
    check(module, (sequences(5, 3),), (sequences(2, 7),))


def test_float64_is_a_scan() -> None:
    """ONNX Runtime has no float64 kernels of LSTM, GRU and RNN."""
    module = Several([random_parameters(make(D, H, bidirectional=True)) for make in (nn.LSTM, nn.GRU, nn.RNN)])
    model = check(module.double(), (sequences(5, 3).double(),), (sequences(2, 7).double(),))
    assert ops_of(model).count("Scan") == 6


def packed(*lengths: int) -> Example:
    """Rows and batch_sizes of sequences of decreasing lengths."""
    batch_sizes = [sum(n > t for n in lengths) for t in range(lengths[0])]
    return torch.randn(sum(lengths), D), torch.tensor(batch_sizes)


def test_packed_sequences() -> None:
    makes = (nn.LSTM, {}), (nn.GRU, dict(layer_norm=True)), (nn.RNN, {})
    both = Several([random_parameters(make(D, H, bidirectional=True, **options)) for make, options in makes])

    def function(data: Tensor, batch_sizes: Tensor) -> Any:
        return [(output.data, states) for output, states in both(PackedSequence(data, batch_sizes))]

    check(Call(function, module=both), packed(5, 3, 2), packed(4, 4, 1), packed(2), sides=(run,))


# ---- cells

CELLS = [
    (nn.LSTMCell, {}),
    (nn.LSTMCell, dict(peephole=True)),
    (nn.LSTMCell, dict(layer_norm=True)),
    (nn.GRUCell, {}),
    (nn.GRUCell, dict(reset_after=False)),
    (nn.RNNCell, {}),
    (nn.RNNCell, dict(bias=False)),
    (nn.DreamerGRUCell, {}),
]


@pytest.mark.parametrize("with_states", [False, True])
def test_cells(with_states: bool) -> None:
    cells = [random_parameters(make(D, H, **options)) for make, options in CELLS]

    def function(x: Tensor, *states: Tensor) -> Any:
        given = [(states if cell in cells[:3] else states[0]) if states else None for cell in cells]
        return [cell(x, hx) for cell, hx in zip(cells, given)]

    def example(*B: int) -> Example:
        return torch.randn(*B, D), *(torch.randn(*B, H) for _ in range(2 * with_states))

    module = Call(function, module=torch.nn.ModuleList(cells))
    ops = ops_of(check(module, example(3), example(7)))
    assert [ops.count(op) for op in ("LSTM", "GRU", "RNN", "Scan")] == [2, 2, 2, 2]
    check(module, example(), example())


# ---- oracles: the NumPy definitions of the onnx package


def numpy_cases(op: str) -> list[Any]:
    """Test cases of one node: inputs, attributes and the results of the definition in NumPy."""
    import onnx.backend.test.case.node as node
    from onnx.backend.test.case.node import attention, gru, lstm, rnn

    assert attention and gru and lstm and rnn  # imported for their cases
    cases = (case for case in node._NodeTestCases if len(case.model.graph.node) == 1)
    return [case for case in cases if case.model.graph.node[0].op_type == op]


def given_and_wanted(case: Any) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Attributes, inputs and outputs of a case by their names."""
    node, (inputs, outputs) = case.model.graph.node[0], case.data_sets[0]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}

    def named(names: Any, arrays: Any) -> dict[str, Tensor]:
        present = [name for name in names if name]
        return {name: torch.from_numpy(np.array(a)) for name, a in zip(present, arrays, strict=True)}

    return attributes, named(node.input, inputs), named(node.output, outputs)


RECURRENT = {
    "LSTM": (nn.LSTM, (0, 2, 3, 1), {}),
    "GRU": (nn.GRU, (1, 0, 2), dict(reset_after=False)),
    "RNN": (nn.RNN, (0,), {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", RECURRENT)
def test_layers_match_the_definitions_of_onnx(op: str) -> None:
    make, order, options = RECURRENT[op]
    checked = 0
    for case in numpy_cases(op):
        attributes, given, want = given_and_wanted(case)
        direction = attributes.get("direction", b"forward").decode()
        D_, H_ = given["W"].shape[2], attributes["hidden_size"]
        layer = (
            make(D_, H_, bidirectional=direction == "bidirectional", peephole="P" in given, **options)
            if (op == "LSTM")
            else make(D_, H_, bidirectional=direction == "bidirectional", **options)
        )

        def ours(w: Tensor, order: Sequence[int]) -> Tensor:
            return torch.cat([w.chunk(len(order))[k] for k in order])

        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
            for d, suffix in enumerate(("_l0", "_l0_reverse")[: 1 + layer.bidirectional]):
                getattr(layer, "weight_ih" + suffix).copy_(ours(given["W"][d], order))
                getattr(layer, "weight_hh" + suffix).copy_(ours(given["R"][d], order))
                if "B" in given:
                    for name, b in zip(("bias_ih", "bias_hh"), given["B"][d].chunk(2)):
                        getattr(layer, name + suffix).copy_(ours(b, order))
                if "P" in given:
                    getattr(layer, "weight_ph" + suffix).copy_(ours(given["P"][d], (0, 2, 1)))
            x = given["X"].transpose(0, 1) if attributes.get("layout") else given["X"]
            x = x.flip(0) if direction == "reverse" else x
            hx = [given[name] for name in ("initial_h", "initial_c") if name in given]
            lengths = given.get("sequence_lens")
            y, states = layer(x, (tuple(hx) if op == "LSTM" else hx[0]) if hx else None, lengths=lengths)
        y = (y.flip(0) if direction == "reverse" else y).unflatten(2, (1 + layer.bidirectional, H_)).transpose(1, 2)
        got = dict(zip(("Y", "Y_h", "Y_c"), (y, *tensors_of(states))))
        if attributes.get("layout"):
            got = {"Y": got["Y"].permute(2, 0, 1, 3), "Y_h": got["Y_h"].transpose(0, 1)}
        assert_near({name: got[name] for name in want}, want, torch.float32)
        checked += 1
    assert checked >= 6


@pytest.mark.filterwarnings("ignore")
def test_attention_matches_the_definition_of_onnx() -> None:
    checked = 0
    for case in numpy_cases("Attention"):
        if any(a.dtype.name == "bfloat16" for a in case.data_sets[0][0]):
            continue  # NumPy converts them to no torch tensor
        attributes, given, want = given_and_wanted(case)
        known = {"scale", "softcap", "is_causal", "left_window_size", "right_window_size"}
        q, k, v, mask = (given.get(name) for name in ("Q", "K", "V", "attn_mask"))
        if set(given) - {"Q", "K", "V", "attn_mask"} or set(attributes) - known or set(want) != {"Y"} or q.dim() != 4:
            continue  # caches, other outputs and other layouts
        if q.dtype not in (torch.float32, torch.float16) or (mask is not None and mask.dim() < 2):
            continue
        window = attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)
        got = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=bool(attributes.get("is_causal", 0)), scale=attributes.get("scale"),
            enable_gqa=True, softcap=attributes.get("softcap", 0.0), window=window,
        )  # fmt: skip
        assert_near({case.name: got}, {case.name: want["Y"]}, q.dtype)
        checked += 1
    assert checked >= 25


# ---- attention

opsets = pytest.mark.parametrize("opset_version", [23, 20], ids=["Attention", "Softmax"])


def qkv(B: int, Tq: int, Tk: int, Hk: int = 4) -> Example:
    return torch.randn(B, 4, Tq, 8), torch.randn(B, Hk, Tk, 8), torch.randn(B, Hk, Tk, 6)


def bool_mask(*shape: int) -> Tensor:
    """A mask whose first query attends to no key."""
    mask = torch.rand(*shape) < 0.5
    mask[:, :, 0] = False
    return mask


def float_mask(*shape: int) -> Tensor:
    return torch.randn(*shape).masked_fill(~bool_mask(*shape), -torch.inf)


def with_nan(q: Tensor, k: Tensor, v: Tensor, *lengths: int) -> Example:
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = torch.nan
    return q, k, v, torch.tensor(lengths)


SIZES = (2, 5, 7), (3, 6, 4)
PLAIN = [qkv(*sizes) for sizes in SIZES]
# name -> options of a call, names of its further tensors, and two examples.
ATTENTION: dict[str, tuple[dict[str, Any], tuple[str, ...], list[Example]]] = {
    "plain": ({}, (), PLAIN),
    "scale": (dict(scale=0.1), (), PLAIN),
    "causal": (dict(is_causal=True), (), PLAIN),
    "lower right": (dict(is_causal=True, causal_alignment="lower_right"), (), PLAIN),
    "window": (dict(window=(2, 1)), (), PLAIN),
    "causal window": (dict(is_causal=True, window=(1, -1)), (), PLAIN),
    "softcap": (dict(softcap=2.0), (), PLAIN),
    "softcap, causal": (dict(softcap=2.0, is_causal=True), (), PLAIN),
    "grouped heads": (dict(enable_gqa=True), (), [qkv(*sizes, Hk=2) for sizes in SIZES]),
    "one key head": ({}, (), [qkv(*sizes, Hk=1) for sizes in SIZES]),
    "lse and weights": (dict(return_lse=True, return_weights=True, is_causal=True), (), PLAIN),
    "bool mask": ({}, ("attn_mask",), [(*qkv(B, Tq, Tk), bool_mask(B, 4, Tq, Tk)) for B, Tq, Tk in SIZES]),
    "broadcast mask": ({}, ("attn_mask",), [(*qkv(B, Tq, Tk), bool_mask(B, 1, 1, Tk)) for B, Tq, Tk in SIZES]),
    "2-D mask": ({}, ("attn_mask",), [(*qkv(B, Tq, Tk), bool_mask(1, 1, Tq, Tk)[0, 0]) for B, Tq, Tk in SIZES]),
    "bool mask, causal": (
        dict(is_causal=True, return_weights=True),
        ("attn_mask",),
        [(*qkv(B, Tq, Tk), bool_mask(B, 1, Tq, Tk)) for B, Tq, Tk in SIZES],
    ),
    "float mask": ({}, ("attn_mask",), [(*qkv(B, Tq, Tk), float_mask(B, 4, Tq, Tk)) for B, Tq, Tk in SIZES]),
    "float mask, window": (
        dict(window=2),
        ("attn_mask",),
        [(*qkv(B, Tq, Tk), float_mask(B, 1, Tq, Tk)) for B, Tq, Tk in SIZES],
    ),
    "bool mask, softcap": (
        dict(softcap=1.0),
        ("attn_mask",),
        [(*qkv(B, Tq, Tk), bool_mask(B, 4, Tq, Tk)) for B, Tq, Tk in SIZES],
    ),
    "lengths": ({}, ("lengths",), [with_nan(*qkv(2, 5, 7), 3, 7), with_nan(*qkv(3, 6, 4), 0, 1, 4)]),
    "lengths, causal": (
        dict(is_causal=True, enable_gqa=True),
        ("lengths",),
        [with_nan(*qkv(2, 5, 7, 2), 3, 7), with_nan(*qkv(3, 6, 4, 2), 0, 1, 4)],
    ),
    "lengths of both, lower right": (
        dict(is_causal=True, causal_alignment="lower_right"),
        ("lengths",),
        [
            (*qkv(2, 5, 7), (torch.tensor([3, 2]), torch.tensor([4, 7]))),
            (*qkv(3, 6, 4), (torch.tensor([3, 0, 6]), torch.tensor([4, 2, 1]))),
        ],
    ),
    "alibi": (dict(is_causal=True), ("alibi_slopes",), [(*qkv(*sizes), torch.rand(4)) for sizes in SIZES]),
}
BY_SOFTMAX = ("softcap, causal", "bool mask, softcap", "alibi")


@opsets
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, opset_version: int) -> None:
    options, names, examples = ATTENTION[name]
    call = Call(F.scaled_dot_product_attention, *names, **options)
    ops = ops_of(check(call, *examples, opset_version=opset_version))
    assert ("Attention" in ops) == (opset_version >= 23 and name not in BY_SOFTMAX)
    guarded = {"lower right", "window", "lengths"}  # queries may attend to no key, for which releases give NaN
    assert "Where" in ops or not ("mask" in name or guarded & set(name.split(", ")))
    assert ("Softmax" in ops) == ("Attention" not in ops or options.get("return_weights", False))


@opsets
def test_attention_of_half_types(opset_version: int) -> None:
    examples = [tuple(t.half() for t in qkv(*sizes)) for sizes in SIZES]
    check(Call(F.scaled_dot_product_attention, is_causal=True), *examples, opset_version=opset_version)


def batches(B: int, T: int) -> Tensor:
    return torch.randn(B, T, 8)


@pytest.mark.parametrize("need_weights, opset_version", [(True, 23), (False, 20)])
def test_multihead_attention(need_weights: bool, opset_version: int) -> None:
    def examples(*masks: Callable[[int, int, int], Tensor]) -> list[Example]:
        return [(batches(B, Tq), *[batches(B, Tk)] * 2, *(mask(B, Tq, Tk) for mask in masks)) for B, Tq, Tk in SIZES]

    def call(*names: str, **options: Any) -> Call:
        layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True, **options)
        return Call(random_parameters(layer), *names, need_weights=need_weights)

    def padding(B: int, Tq: int, Tk: int) -> Tensor:
        mask = torch.arange(Tk) >= torch.randint(1, Tk, (B, 1))
        mask[0] = True  # no key
        return mask

    def both(q: Tensor, k: Tensor, *rest: Tensor) -> Example:  # key and value are one tensor
        return q, k, k, *rest

    for names, masks in (((), ()), (("key_padding_mask",), (padding,))):
        given = [both(q, k, *rest) for q, k, _, *rest in examples(*masks)]
        check(call(*names), *given, opset_version=opset_version)
    given = [both(q, k, *rest) for q, k, _, *rest in examples(lambda B, Tq, Tk: torch.rand(Tq, Tk) < 0.4)]
    check(call("attn_mask"), *given, opset_version=opset_version)
    check(call(add_bias_kv=True, add_zero_attn=True), *examples(), opset_version=opset_version)


@opsets
def test_transformer_layers(opset_version: int) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    check(encoder, (batches(2, 5),), (batches(3, 4),), opset_version=opset_version)
    decoder = Call(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval(), tgt_is_causal=True)
    examples = [(batches(2, 5), batches(2, 7)), (batches(3, 4), batches(3, 6))]
    check(decoder, *examples, opset_version=opset_version)


@pytest.mark.parametrize("kept", [False, True], ids=["keys", "kept keys"])
def test_additive_attention(kept: bool) -> None:
    layer = nn.AdditiveAttention(query_dim=8, key_dim=8)

    def function(query: Tensor, key: Tensor, lengths: Tensor) -> Any:
        return layer(query, layer.project(key) if kept else key, lengths=lengths, need_weights=True)

    def example(T: int, *lengths: int) -> Example:
        key = batches(len(lengths), T)
        return torch.randn(len(lengths), 8), key, torch.tensor(lengths)

    check(Call(function, module=layer), example(5, 5, 2), example(4, 0, 4, 1))


@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_luong_attention(method: Any) -> None:
    layer = nn.LuongAttention(8, 8, method)
    check(layer, (torch.randn(2, 8), batches(2, 5)), (torch.randn(3, 8), batches(3, 4)))


class Tagger(torch.nn.Module):
    """Tokens -> BiLSTM with lengths -> attention over the valid steps -> scores."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, D, padding_idx=0)
        self.lstm = nn.LSTM(D, 4, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        y, _ = self.lstm(self.tokens(tokens), lengths=lengths)
        y, _ = self.attention(y, y, y, need_weights=False, lengths=lengths)
        return self.head(y).log_softmax(2)


def test_a_model() -> None:
    def example(T: int, *lengths: int) -> Example:
        return torch.randint(1, 10, (len(lengths), T)), torch.tensor(lengths)

    ops = ops_of(check(Tagger(), example(5, 1, 5, 3), example(7, 7, 2), example(4, 4, 3, 2, 1), sides=(run,)))
    assert ops.count("LSTM") == 2 and ops.count("Attention") == 1


# ---- bags

norms = pytest.mark.parametrize("weight_norm", [None, "count", "weight"], ids=["plain", "count", "weight"])
modes = pytest.mark.parametrize("mode", ["sum", "mean", "max", "min"])


def table(mode: str, padding_idx: int | None = None, weight_norm: str = "count", **options: Any) -> nn.EmbeddingBag:
    return nn.EmbeddingBag(10, 4, mode=mode, padding_idx=padding_idx, weight_norm=weight_norm, **options)


def tables(weight_norm: str | None, **options: Any) -> Several:
    """All modes, with padding and without. weight_norm: None without weights."""
    names = [] if weight_norm is None else ["per_sample_weights"]
    every = itertools.product(("sum", "mean", "max", "min"), (None, 3))
    return Several([Call(table(*mode, weight_norm or "count", **options), *names) for mode in every])


@norms
@pytest.mark.parametrize("last", [False, True], ids=["", "last"])
def test_bags_with_offsets(weight_norm: str | None, last: bool) -> None:
    """Empty bags, bags of padding, and with include_last_offset indices beyond the last bag."""

    def example(indices: Sequence[int], *offsets: int) -> Example:
        given = torch.tensor(indices), torch.tensor(offsets)
        return given if weight_norm is None else (*given, torch.randn(len(indices)))

    examples = [example((1, 2, 3, 3, 0, 9, 2), 0, 0, 3, 7), example((3, 3, 5), 0, 1), example((3, 5, 5, 1), 0, 1, 3)]
    model = check(tables(weight_norm, include_last_offset=last), *examples)
    assert "ScatterElements" in ops_of(model) and "ScatterND" not in ops_of(model)


@norms
def test_bags_of_equal_length(weight_norm: str | None) -> None:
    def example(indices: Tensor) -> Example:
        return (indices,) if weight_norm is None else (indices, torch.randn(indices.shape))

    examples = [example(torch.tensor([[1, 2, 3], [3, 3, 3]])), example(torch.randint(0, 10, (4, 2)))]
    check(tables(weight_norm), *examples)


def test_bags_of_other_dtypes() -> None:
    indices, offsets = torch.tensor([1, 2, 3, 3, 0]), torch.tensor([0, 0, 3])
    others = torch.tensor([3, 5]), torch.tensor([0, 1])
    ints = [(i.int(), o.int()) for i, o in ((indices, offsets), others)]
    check(table("mean", 3), *ints)
    check(table("sum").double(), (indices, offsets), others)
    check(table("sum").half(), (indices, offsets), others)


def test_embedding_is_a_gather() -> None:
    model = check(nn.Embedding(10, 4, padding_idx=2), (torch.randint(0, 10, (4, 2)),), (torch.randint(0, 10, (3, 5)),))
    assert ops_of(model).count("Gather") == 1


@modes
def test_bags_of_several_tables(mode: str) -> None:
    tables = torch.nn.ParameterList([torch.randn(10, 4), torch.randn(7, 3)])

    def function(indices: Tensor, offsets: Tensor) -> Tensor:
        return F.embedding_bags(indices, list(tables), offsets, [2, 1], mode)

    module = Call(function, module=tables)
    indices = torch.tensor([1, 2, 3, 3, 0, 6, 2])
    check(module, (indices, torch.tensor([0, 1, 3, 3, 4, 5, 7])), (indices[:6], torch.tensor([0, 1, 3, 5])))


# ---- the interface


def test_a_file_is_written(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    x = sequences(5, 3)
    layer = nn.LSTM(D, H).eval()
    program = export(
        layer, (x,), path, input_names=["x"], output_names=["y", "h", "c"], verbose=False,
        dynamic_shapes=({0: "T", 1: "B"},),
    )  # fmt: skip
    assert isinstance(program, torch.onnx.ONNXProgram)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x"] and session.get_inputs()[0].shape == ["T", "B", D]
    assert [o.name for o in session.get_outputs()] == ["y", "h", "c"]


def test_keyword_arguments() -> None:
    x, lengths = padded(5, 1, 5, 3)
    program = export(
        nn.GRU(D, H).eval(), (x,), kwargs=dict(lengths=lengths), verbose=False,
        dynamic_shapes=dict(input={0: ANY, 1: ANY}, lengths={0: ANY}),
    )  # fmt: skip
    assert len(program.model_proto.graph.input) == 2


@pytest.mark.parametrize("optimize", [True, False])
def test_the_table_of_translations(optimize: bool) -> None:
    """torch.onnx.export with gradients records the ops that save values for backward."""
    layer = random_parameters(nn.LSTM(D, H, bidirectional=True, return_all_states=True))
    program = torch.onnx.export(
        layer, (sequences(5, 3),), dynamo=True, custom_translation_table=translation_table(), optimize=optimize,
        dynamic_shapes=({0: ANY, 1: ANY},), verbose=False,
    )  # fmt: skip
    x = sequences(2, 7)
    got, want = run(program.model_proto, [x]), tensors_of(layer(x))
    for a, b in zip(got, want, strict=True):
        assert_near({"": a}, {"": b.detach()}, torch.float32)


def test_an_exported_program() -> None:
    layer, x = nn.GRU(D, H).eval(), sequences(5, 3)
    program = export(torch.export.export(layer, (x,), dynamic_shapes=({0: ANY, 1: ANY},)), verbose=False)
    x = sequences(2, 7)
    assert_near({"": run(program.model_proto, [x])[0]}, {"": layer(x)[0].detach()}, torch.float32)


def test_a_translation_can_be_replaced() -> None:
    def gru(*arguments: Any) -> Any:
        raise NotImplementedError("of the caller")

    table = {torch.ops.seqkernels.gru.default: gru}
    with pytest.raises(NotImplementedError, match="of the caller"):
        export(nn.GRU(D, H).eval(), (sequences(5, 3),), custom_translation_table=table, verbose=False)


def test_code_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert {i.name for i in names["program"].model_proto.graph.input} == {"x", "lengths"}
    assert (tmp_path / "lstm.onnx").exists()


# ---- refusals


@pytest.mark.parametrize("option", ["zoneout_h", "zoneout_c", "recurrent_dropout", "variational_dropout"])
def test_masks_of_training_are_refused(option: str) -> None:
    layer = nn.LSTM(D, H, **{option: 0.5}).train()
    with pytest.raises(NotImplementedError, match=f"lstm: {option} must draw no mask in ONNX.*call model.eval"):
        export(layer, (sequences(5, 3),), verbose=False)


def test_dropout_of_attention_is_refused() -> None:
    layer = nn.MultiheadAttention(8, 2, dropout=0.5).train()
    with pytest.raises(
        NotImplementedError, match=r"attention: dropout_p must be 0 in ONNX, got 0\.5; call model\.eval"
    ):
        export(layer, (batches(2, 5),) * 3, verbose=False)


def test_packed_attention_is_refused() -> None:
    rows = torch.randn(7, 2, 8)
    call = Call(F.varlen_attention, max_seqlen_q=5)
    with pytest.raises(NotImplementedError, match=r"varlen_attention: sequences must be padded in ONNX.*with lengths"):
        export(call, (rows, rows, rows, torch.tensor([0, 5, 7])), verbose=False)


def test_tables_of_bytes_and_max_norm_are_refused() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    quantized = nn.QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(5, 4))
    with pytest.raises(NotImplementedError, match="QuantizedEmbeddingBag: tables of bytes have no ONNX form"):
        export(quantized.eval(), (ids,), verbose=False)
    with pytest.raises(NotImplementedError, match="embedding_bag: max_norm must be None in ONNX"):
        export(nn.EmbeddingBag(5, 4, max_norm=1.0).eval(), (ids,), verbose=False)


def test_losses_and_decoding_are_refused() -> None:
    crf, emissions = nn.CRF(5).eval(), torch.randn(4, 3, 5)
    with pytest.raises(NotImplementedError, match="CRF: the log likelihood has no ONNX form; export the emissions"):
        export(crf, (emissions, torch.randint(5, (4, 3))), verbose=False)
    loss = nn.CTCLoss()
    given = torch.randn(6, 2, 5).log_softmax(2), torch.randint(1, 5, (2, 3)), torch.tensor([6, 6]), torch.tensor([3, 3])
    with pytest.raises(NotImplementedError, match="CTCLoss: the loss has no ONNX form; export the log probabilities"):
        export(loss, given, verbose=False)


def test_other_errors_are_those_of_torch() -> None:
    class Wrong(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x)

    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        export(Wrong().eval(), (torch.randn(3, 3),), verbose=False)


def test_onnx_is_optional() -> None:
    """The library does not import onnx; the integration names what is missing."""
    script = """
import sys
import seqkernels
assert not {"onnx", "onnxscript", "onnx_ir"} & set(sys.modules)
sys.modules["onnxscript"] = None
try:
    import seqkernels.integrations.onnx
except ImportError as error:
    assert "requires onnx and onnxscript: pip install onnx onnxscript; got" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
