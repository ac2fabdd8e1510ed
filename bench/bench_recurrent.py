"""Recurrent layers and cells against torch (packed, padded + mask, dense), torch.compile and onnxruntime.

Variants are compared with the layers without options. The bars are the claims of the project; the table reports PASS or
MISS for each.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Contender, MemoryCase, Results, compiled, settle
from report import Bar
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels
from seqkernels import reference

TRAINING = 3  # matrix products: one in forward, two in backward, for the inputs and for the weights
STREAM_CALLS = 100
CELL_CALLS = 20
STATES = ("h_n", "c_n", "s_n")


class Shape(NamedTuple):
    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        sizes = f"I=H={self.H}" if self.I == self.H else f"I={self.I} H={self.H}"
        return f"B={self.B} {sizes} T={self.T}"


@dataclass(frozen=True)
class Kind:
    """A module of torch.nn and seqkernels.nn. `onnx`: positions of torch's gates in the order of the ONNX operator."""

    name: str
    onnx: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


LSTM = Kind("LSTM", (0, 3, 1, 2))
GRU = Kind("GRU", (1, 0, 2))
RNN = Kind("RNN", (0,))
KINDS = (LSTM, GRU, RNN)


def shape_id(value: object) -> str | None:
    if isinstance(value, Shape):
        return f"T{value.T}-B{value.B}-I{value.I}-H{value.H}"
    return str(value) if isinstance(value, (Kind, Variant)) else None


def flop(tokens: int, layer: nn.Module) -> float:
    """Floating-point operations of a forward pass with `tokens` valid steps: one product with each weight."""
    return 2.0 * tokens * sum(p.numel() for n, p in layer.named_parameters() if n.startswith("weight") and p.dim() == 2)


# --- inputs ---


def drawn_lengths(shape: Shape) -> list[int]:
    """Lengths between T/4 and T, with the same fractions of T for each T, so that rows are comparable."""
    fractions = 0.25 + 0.75 * torch.rand(shape.B, generator=torch.Generator().manual_seed(0))
    return [max(1, round(fraction * shape.T)) for fraction in fractions.tolist()]


def pair_of_layers(shape: Shape, kind: Kind = LSTM) -> tuple[nn.Module, nn.Module]:
    """Layers of seqkernels and torch with the same weights."""
    torch.manual_seed(1)
    theirs = getattr(nn, kind.name)(shape.I, shape.H)
    ours = our_layer(shape, kind.name)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def our_layer(shape: Shape, name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return getattr(seqkernels.nn, name)(shape.I, shape.H, **options)


class Batch:
    """A padded batch [longest, B, I] and the upstream gradient of the output, shared by all contenders."""

    def __init__(self, shape: Shape, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(2)
        longest = max(lengths)
        self.lengths = torch.tensor(lengths)
        self.tokens = sum(lengths)
        self.mask = (torch.arange(longest)[:, None] < self.lengths).unsqueeze(-1).float()  # [longest, B, 1]
        self.x = torch.randn(longest, shape.B, shape.I, generator=generator) * self.mask
        self.upstream = torch.randn(longest, shape.B, shape.H, generator=generator) * self.mask

    def pack(self, padded: Tensor) -> PackedSequence:
        return pack_padded_sequence(padded, self.lengths, enforce_sorted=False)

    def rows(self, padded: Tensor) -> Tensor:
        return self.pack(padded).data


# --- contenders: training ---

Forward = Callable[[Tensor], tuple[Any, ...]]  # output, states[, states of all steps]


def named_states(states: Tensor | tuple[Tensor, ...]) -> Results:
    return dict(zip(STATES, (states,) if isinstance(states, Tensor) else states))


def training(
    name: str,
    layer: nn.Module,
    forward: Forward,
    x: Tensor,
    upstream: Tensor,
    rows: Callable[[Tensor], Tensor],
    definition: bool = False,
) -> Contender:
    """A training step of `layer`. `rows` converts an output or dx to the layout of the parity test.

    definition: computes the gradients with seqkernels.reference, as under create_graph, with the same masks. It is the
    reference of variants that no other library has.
    """
    x = x.clone().requires_grad_()
    upstream = upstream[..., : getattr(layer, "proj_size", 0) or upstream.shape[-1]]

    def before() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None

    def step() -> None:
        output, *_ = forward(x)
        (output * upstream).sum().backward()

    def result() -> Results:
        torch.manual_seed(4)
        output, states, *_ = forward(x)
        wanted = {"dx": x} | {f"d{key}": p for key, p in layer.named_parameters()}
        loss = (output * upstream).sum()
        grads = torch.autograd.grad(loss, list(wanted.values()), create_graph=definition, allow_unused=True)
        results = {key: g for key, g in zip(wanted, grads) if g is not None} | {"output": output}
        results |= {"output": rows(output), "dx": rows(results["dx"])} | named_states(states)
        return {key: value.detach() for key, value in results.items()}

    return Contender(name, step, result, before)


def packed_training(
    name: str, layer: nn.Module, batch: Batch, *, definition: bool = False, **keywords: Any
) -> Contender:
    """Input and output are PackedSequences; the step excludes packing."""
    packed = batch.pack(batch.x)

    def forward(data: Tensor) -> tuple[Any, ...]:
        output, *states = layer(PackedSequence(data, *packed[1:]), **keywords)
        return output.data, *states

    return training(name, layer, forward, packed.data, batch.rows(batch.upstream), lambda rows: rows, definition)


def lengths_training(name: str, layer: nn.Module, batch: Batch) -> Contender:
    """A padded batch with lengths, which torch does not support."""

    def forward(x: Tensor) -> tuple[Any, ...]:
        return layer(x, lengths=batch.lengths)

    return training(name, layer, forward, batch.x, batch.upstream, batch.rows)


def masked_training(name: str, layer: nn.Module, batch: Batch) -> Contender:
    """A dense layer with a padded batch and masked output; h_n and c_n include padding and are not compared."""

    def forward(x: Tensor) -> tuple[Any, ...]:
        output, states = layer(x)
        return output * batch.mask, states

    contender = training(name, layer, forward, batch.x, batch.upstream, batch.rows)
    everything = contender.result
    assert everything is not None
    contender.result = lambda: {key: value for key, value in everything().items() if key not in STATES}
    return contender


def dense_training(
    name: str, layer: nn.Module, forward: Forward, batch: Batch, *, definition: bool = False
) -> Contender:
    return training(name, layer, forward, batch.x, batch.upstream, lambda padded: padded, definition)


def autocast(layer: nn.Module) -> Forward:
    def forward(x: Tensor) -> tuple[Any, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    return forward


# --- contenders: inference ---


def dense_inference(name: str, forward: Forward, batch: Batch) -> Contender:
    def step() -> tuple[Any, ...]:
        with torch.no_grad():
            return forward(batch.x)

    def result() -> Results:
        output, states = step()
        return {"output": output} | named_states(states)

    return Contender(name, step, result)


def streaming(name: str, layer: nn.Module, shape: Shape) -> Contender:
    """One step of a stream: T=1, with the state of the previous call."""
    x = torch.randn(STREAM_CALLS, 1, shape.B, shape.I, generator=torch.Generator().manual_seed(3)).unbind()

    @torch.no_grad()
    def step() -> tuple[list[Tensor], Any]:
        state = torch.zeros(1, shape.B, shape.H)
        if isinstance(layer, (nn.LSTM, seqkernels.nn.LSTM)):
            state = (state, state)
        outputs = []
        for x_t in x:
            output, state = layer(x_t, state)
            outputs.append(output)
        return outputs, state

    def result() -> Results:
        outputs, states = step()
        return {"output": torch.cat(outputs)} | named_states(states)

    return Contender(name, step, result, calls=STREAM_CALLS)


def onnxruntime_inference(
    name: str, layer: nn.Module, kind: Kind, shape: Shape, batch: Batch, threads: int
) -> Contender:
    """The ONNX operator with the same weights, with run or IO binding, whichever is faster."""
    try:
        import numpy as np
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        return Contender(name, refused=f"not installed: {error.name}")

    T, B, I, H = shape

    def ordered(key: str) -> Any:
        gates = layer.get_parameter(key).detach().chunk(len(kind.onnx))
        return torch.cat([gates[i] for i in kind.onnx]).numpy()

    weights = {
        "W": ordered("weight_ih_l0")[None],
        "R": ordered("weight_hh_l0")[None],
        "bias": np.concatenate([ordered("bias_ih_l0"), ordered("bias_hh_l0")])[None],
    }
    shapes = {"Y": [T, 1, B, H], "Y_h": [1, B, H]} | ({"Y_c": [1, B, H]} if kind is LSTM else {})
    options = {"linear_before_reset": 1} if kind is GRU else {}
    graph = helper.make_graph(
        [helper.make_node(kind.name, ["X", "W", "R", "bias"], list(shapes), hidden_size=H, **options)],
        kind.name,
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [T, B, I])],
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, size) for key, size in shapes.items()],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads, session_options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), session_options, providers=["CPUExecutionProvider"])

    x = batch.x.numpy()
    bound = {key: torch.empty(size) for key, size in shapes.items()}
    binding = session.io_binding()
    binding.bind_input("X", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    for key, value in bound.items():
        binding.bind_output(key, "cpu", 0, np.float32, tuple(value.shape), value.data_ptr())

    def plain_run() -> list[Any]:
        return session.run(None, {"X": x})

    def bound_run() -> list[Any]:
        session.run_with_iobinding(binding)
        return [value.numpy() for value in bound.values()]

    def seconds(run: Callable[[], object]) -> float:
        settle()
        run()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    run = min((plain_run, bound_run), key=seconds)

    def result() -> Results:
        y, *states = (torch.from_numpy(value).clone() for value in run())
        return {"output": y[:, 0]} | named_states(tuple(states))

    return Contender(name, run, result)


# --- contenders: cells ---


def cell_inputs(cell: nn.Module, shape: Shape) -> tuple[Tensor, Any]:
    """Input and state of the cell."""
    generator = torch.Generator().manual_seed(5)
    x, h, c = (torch.randn(shape.B, size, generator=generator) for size in (shape.I, shape.H, shape.H))
    return x, (h, c) if isinstance(cell, (nn.LSTMCell, seqkernels.nn.LSTMCell)) else h


def cell_inference(name: str, cell: nn.Module, shape: Shape) -> Contender:
    """A loop of calls, each with the state of the previous one."""
    x, first = cell_inputs(cell, shape)

    @torch.no_grad()
    def step() -> Any:
        state = first
        for _ in range(CELL_CALLS):
            state = cell(x, state)
        return state

    return Contender(name, step, lambda: named_states(step()), calls=CELL_CALLS)


def cell_training(name: str, cell: nn.Module, shape: Shape, *, definition: bool = False) -> Contender:
    """Forward and backward of one step, with a gradient for each state. `definition`: as in `training`."""
    x, state = cell_inputs(cell, shape)
    inputs = [x, *named_states(state).values()]
    wanted = [t.requires_grad_() for t in inputs] + list(cell.parameters())
    upstream = [torch.randn(shape.B, shape.H, generator=torch.Generator().manual_seed(6))] * (len(inputs) - 1)

    def step() -> tuple[Tensor, ...]:
        states = cell(x, state)
        outputs = [states] if isinstance(states, Tensor) else list(states)
        return torch.autograd.grad(outputs, wanted, upstream, create_graph=definition)

    def result() -> Results:
        torch.manual_seed(4)
        return {f"gradient {i}": g.detach() for i, g in enumerate(step())}

    return Contender(name, step, result)


# --- contenders: the layer-normalised LSTM in torch ops ---


class NormalisedLSTM(nn.Module):
    """The layer in torch ops. The input projection is computed outside of the loop, which favours it."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows, H = self.weight_hh_l0.shape
        from_x = F.layer_norm(x @ self.weight_ih_l0.T, (rows,), self.gain_ih_l0, self.bias_ih_l0)
        h = c = x.new_zeros(x.shape[1], H)
        outputs = []
        for of_x in from_x.unbind(0):
            gates = of_x + F.layer_norm(h @ self.weight_hh_l0.T, (rows,), self.gain_hh_l0, self.bias_hh_l0)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, (H,), self.gain_c_l0, self.bias_c_l0))
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


# --- rows ---

# Layer, shape and bar against torch packed.
DRAWN = [
    (LSTM, Shape(100, 8, 256, 256), 3.0),
    (LSTM, Shape(400, 8, 256, 256), 6.0),
    pytest.param(LSTM, Shape(1600, 8, 256, 256), 28.0, marks=pytest.mark.slow),
    (LSTM, Shape(400, 16, 256, 256), 4.0),
    (LSTM, Shape(50, 64, 64, 128), 2.2),
    (LSTM, Shape(50, 16, 64, 32), 6.0),
    (GRU, Shape(100, 8, 256, 256), 3.0),
    (GRU, Shape(400, 8, 256, 256), 5.5),
    pytest.param(GRU, Shape(1600, 8, 256, 256), 15.0, marks=pytest.mark.slow),
    (RNN, Shape(400, 16, 256, 256), 3.5),
]
MASKED_BAR = {LSTM: 1.35}

DENSE = [
    Shape(50, 16, 64, 32),
    Shape(50, 16, 64, 64),
    Shape(50, 64, 64, 128),
    Shape(100, 16, 256, 256),
    Shape(100, 32, 300, 256),
    Shape(400, 16, 256, 256),
    Shape(100, 64, 256, 256),
    Shape(50, 32, 512, 512),
    Shape(128, 64, 512, 512),
    Shape(30, 32, 1024, 1024),
    Shape(50, 128, 128, 128),
]
DENSE_BAR = {LSTM: 0.95, GRU: 1.2, RNN: 1.2}
DENSE_TRAINING = [(kind, shape, DENSE_BAR[kind]) for kind in KINDS for shape in DENSE]
DENSE_TRAINING.append((GRU, Shape(100, 1, 128, 128), 8.0))

ONNX = [
    Shape(50, 16, 64, 32),
    Shape(50, 64, 64, 128),
    Shape(100, 32, 300, 256),
    Shape(100, 1, 256, 256),
    Shape(128, 64, 512, 512),
]
ONNX_BAR = {
    LSTM: Bar(at_least=1.0, mean_at_least=1.15, mean_rows=len(ONNX)),
    GRU: Bar(at_least=1.0, mean_at_least=1.3, mean_rows=len(ONNX)),
}
DENSE_INFERENCE = [(LSTM, shape) for shape in dict.fromkeys(DENSE + ONNX)]
DENSE_INFERENCE += [(kind, shape) for kind in (GRU, RNN) for shape in ONNX]
INFERENCE_BAR = {LSTM: 0.95}  # against torch, over the shapes of DENSE

COMPILE_MAX_T = 64  # with allow_rnn, torch.compile unrolls the steps, which takes minutes for 50 steps

# Layer, hidden size and bar against torch.
STREAM = [(LSTM, 32, 3.0), (LSTM, 128, 4.0), (LSTM, 256, 12.0), (GRU, 128, None), (RNN, 128, None)]

TINY = [Shape(T, 1, H, H) for T in (1, 5) for H in (8, 32)]
TINY_BAR = 1.0

CELLS = ("LSTMCell", "GRUCell", "RNNCell")
CELL_SHAPES = [Shape(1, 1, 8, 8), Shape(1, 1, 32, 32), Shape(1, 64, 128, 128)]
CELL_BAR = 2.0
CELL_VARIANTS = [
    ("LSTMCell", {"peephole": True}),
    ("LSTMCell", {"coupled_gates": True}),
    ("LSTMCell", {"layer_norm": True}),
    ("LSTMCell", {"zoneout_h": 0.1, "zoneout_c": 0.1}),
    ("LSTMCell", {"recurrent_dropout": 0.2}),
    ("GRUCell", {"reset_after": False}),
    ("GRUCell", {"layer_norm": True}),
    ("GRUCell", {"num_heads": 4}),
]


@dataclass(frozen=True, eq=False)
class Variant:
    """A module of seqkernels.nn with options, against one without. `reset`: with a reset mask."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    plain: Kind = LSTM
    reset: bool = False

    def __str__(self) -> str:
        return " ".join(
            [self.name, *(f"{key}={value}" for key, value in self.options.items()), *["reset"] * self.reset]
        )


# Variant and bar against the layer without options.
VARIANTS = [
    (Variant("LSTM", {"peephole": True}), 0.85),
    (Variant("LSTM", {"coupled_gates": True}), 0.85),
    (Variant("GRU", {"reset_after": False}, GRU), 0.85),
    (Variant("LSTM", {"layer_norm": True}), None),
    (Variant("GRU", {"layer_norm": True}, GRU), None),
    (Variant("NestedLSTM"), None),
    (Variant("MGU", plain=GRU), None),
    (Variant("MGU", {"reset_after": True}, GRU), None),
    (Variant("GRU", {"proj_size": 128}, GRU), None),
    (Variant("LSTM", {"num_heads": 4}), None),
    (Variant("LSTM", {"zoneout_h": 0.1, "zoneout_c": 0.1}), None),
    (Variant("LSTM", {"recurrent_dropout": 0.2}), None),
    (Variant("LSTM", {"variational_dropout": 0.2}), None),
    (Variant("LSTM", {"cell_clip": 3.0, "gate_clip": 10.0}), None),
    (Variant("LSTM", {"learn_initial_state": True}), None),
    (Variant("LSTM", {"return_all_states": True}), None),
    (Variant("LSTM", reset=True), None),
]
RESET_EVERY = 20  # mean number of steps between resets

NORMALISED = [Shape(32, 1, 128, 128), Shape(32, 16, 128, 128)]  # torch.compile takes minutes for 50 steps
NORMALISED_BAR = 5.0
NORMALISED_TOLERANCE = 2e-4  # the norm amplifies rounding: errors of float32 are 7e-5 in any implementation
TOLERANCE = 2e-5

AUTOCAST_SHAPE = Shape(100, 16, 256, 256)
AUTOCAST_BAR = 1.0
AUTOCAST_TOLERANCE = 5e-2  # bfloat16 has 8 significant bits

MEMORY = [Shape(400, 8, 256, 256), Shape(400, 16, 256, 256), Shape(50, 64, 64, 128)]
MEMORY_BAR = 1.0
EFFICIENT_SHAPE = Shape(400, 16, 256, 256)
EFFICIENT_LAYERS = 2


def packed_row(bench: Any, kind: Kind, group: str, shape: Shape, lengths: list[int], bars: dict[str, float]) -> None:
    ours, theirs = pair_of_layers(shape, kind)
    batch = Batch(shape, lengths)
    contenders = [
        packed_training("ours, packed", ours, batch),
        packed_training("torch packed", theirs, batch),
        masked_training("torch padded + mask", theirs, batch),
        lengths_training("(ours, padded + lengths)", ours, batch),
    ]
    group = f"{kind} packed training, {group}"
    bench.time(group, str(shape), contenders, bars=bars, work=TRAINING * flop(batch.tokens, ours))


@pytest.mark.parametrize(("kind", "shape", "packed_bar"), DRAWN, ids=shape_id)
def test_packed_training(bench: Any, kind: Kind, shape: Shape, packed_bar: float) -> None:
    bars = {"torch packed": packed_bar}
    if kind in MASKED_BAR:
        bars["torch padded + mask"] = MASKED_BAR[kind]
    packed_row(bench, kind, "lengths drawn between T/4 and T", shape, drawn_lengths(shape), bars)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(1600, 8, 256, 256)], ids=shape_id)
def test_packed_training_one_step_shorter(bench: Any, shape: Shape) -> None:
    lengths = [shape.T] * (shape.B - 1) + [shape.T - 1]
    packed_row(bench, LSTM, "lengths T, T, .. T-1", shape, lengths, {"torch packed": 60.0})


def test_packed_training_grows_with_t(bench: Any) -> None:
    """Ratio of the times at T=1600 and T=400; linear cost gives 4."""
    contenders, parity = [], []
    for T in (400, 1600):
        shape = Shape(T, 8, 256, 256)
        ours, theirs = pair_of_layers(shape)
        batch = Batch(shape, drawn_lengths(shape))
        contenders.append(packed_training(f"ours, T={T}", ours, batch))
        parity.append((masked_training(f"torch padded + mask, T={T}", theirs, batch), contenders[-1]))
    bars = {"ours, T=1600": Bar(at_most=4.4)}
    group = "LSTM packed training, time at T=1600 over time at T=400"
    bench.time(group, "B=8 I=H=256", contenders, bars=bars, work=0, parity=parity)


@pytest.mark.parametrize(("kind", "shape", "bar"), DENSE_TRAINING, ids=shape_id)
def test_dense_training(bench: Any, kind: Kind, shape: Shape, bar: float) -> None:
    ours, theirs = pair_of_layers(shape, kind)
    batch = Batch(shape, [shape.T] * shape.B)
    contenders = [
        dense_training("ours", ours, ours, batch),
        dense_training("torch", theirs, theirs, batch),
        compiled_layer(bench, theirs, shape, lambda f: dense_training("torch.compile", theirs, f, batch)),
    ]
    work = TRAINING * flop(batch.tokens, ours)
    bench.time(f"{kind} dense training", str(shape), contenders, bars={"torch": bar}, work=work)


@pytest.mark.parametrize(("kind", "shape"), DENSE_INFERENCE, ids=shape_id)
def test_dense_inference(bench: Any, kind: Kind, shape: Shape) -> None:
    ours, theirs = (layer.eval() for layer in pair_of_layers(shape, kind))
    batch = Batch(shape, [shape.T] * shape.B)
    contenders = [
        dense_inference("ours", ours, batch),
        dense_inference("torch", theirs, batch),
        onnxruntime_inference("onnxruntime", theirs, kind, shape, batch, bench.run.threads),
        compiled_layer(bench, theirs, shape, lambda f: dense_inference("torch.compile", f, batch)),
    ]
    bars: dict[str, Bar] = {}
    if shape in DENSE and kind in INFERENCE_BAR:
        bars["torch"] = Bar(at_least=INFERENCE_BAR[kind])
    if shape in ONNX and kind in ONNX_BAR:
        bars["onnxruntime"] = ONNX_BAR[kind]
    bench.time(f"{kind} dense inference", str(shape), contenders, bars=bars, work=flop(batch.tokens, ours))


def compiled_layer(bench: Any, layer: nn.Module, shape: Shape, make: Callable[[Forward], Contender]) -> Contender:
    allow_rnn = bench.config.getoption("compile_rnn") and shape.T <= COMPILE_MAX_T
    return compiled("torch.compile", layer, make, allow_rnn=allow_rnn)


@pytest.mark.parametrize(("kind", "H", "bar"), STREAM, ids=shape_id)
def test_stream_step(bench: Any, kind: Kind, H: int, bar: float | None) -> None:
    shape = Shape(1, 1, H, H)
    ours, theirs = pair_of_layers(shape, kind)
    contenders = [streaming("ours", ours, shape), streaming("torch", theirs, shape)]
    group = f"{kind}, one step of a stream under no_grad"
    bench.time(group, str(shape), contenders, bars={} if bar is None else {"torch": bar}, work=flop(1, ours))


@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize("shape", TINY, ids=shape_id)
@pytest.mark.parametrize("kind", KINDS, ids=shape_id)
def test_tiny_layer(bench: Any, kind: Kind, shape: Shape, direction: str) -> None:
    """One short sequence, where the overhead of a call takes most of the time."""
    ours, theirs = pair_of_layers(shape, kind)
    batch, contenders, times = Batch(shape, [shape.T]), [], 1 if direction == "inference" else TRAINING
    for name, layer in (("ours", ours), ("torch", theirs)):
        if direction == "inference":
            contenders.append(dense_inference(name, layer.eval(), batch))
        else:
            contenders.append(dense_training(name, layer, layer, batch))
    work = times * flop(batch.tokens, ours)
    bench.time(f"{kind}, tiny, {direction}", str(shape), contenders, bars={"torch": TINY_BAR}, work=work)


@pytest.mark.parametrize("shape", CELL_SHAPES, ids=shape_id)
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("name", CELLS)
def test_cell(bench: Any, name: str, direction: str, shape: Shape) -> None:
    torch.manual_seed(1)
    theirs, ours = (getattr(module, name)(shape.I, shape.H) for module in (nn, seqkernels.nn))
    ours.load_state_dict(theirs.state_dict())
    make, times = (cell_inference, 1) if direction == "forward" else (cell_training, TRAINING)
    contenders = [make("ours", ours, shape), make("torch", theirs, shape)]
    label = str(shape).removesuffix(" T=1")
    work = times * flop(shape.B, ours)
    bench.time(f"{name}, {direction}", label, contenders, bars={"torch": CELL_BAR}, work=work)


@pytest.mark.parametrize(("name", "options"), CELL_VARIANTS, ids=str)
def test_cell_variant(bench: Any, name: str, options: dict[str, Any]) -> None:
    shape, cell = CELL_SHAPES[-1], getattr(seqkernels.nn, name)
    torch.manual_seed(1)
    layer, plain = cell(shape.I, shape.H, **options), cell(shape.I, shape.H)
    ours, peer = cell_training("ours", layer, shape), cell_training(f"ours, plain {name}", plain, shape)
    work, peer.work = (TRAINING * flop(shape.B, each) for each in (layer, plain))
    group = f"cell variants, forward and backward, {str(shape).removesuffix(' T=1')}"
    label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
    parity = [(cell_training("definition", layer, shape, definition=True), ours)]
    bench.time(group, label, [ours, peer], bars={}, work=work, parity=parity, tolerance=NORMALISED_TOLERANCE)


def variant_row(bench: Any, variant: Variant, shape: Shape, form: str, bar: float | None) -> None:
    """Parity with the definition; the peer is the layer without options."""
    layer, (plain, _) = our_layer(shape, variant.name, **variant.options), pair_of_layers(shape, variant.plain)
    batch = Batch(shape, drawn_lengths(shape) if form == "packed" else [shape.T] * shape.B)
    keywords = {}
    if variant.reset:
        draw = torch.rand(batch.x.shape[:2], generator=torch.Generator().manual_seed(7))
        keywords["reset"] = batch.rows(draw < 1 / RESET_EVERY)

    def contender(name: str, layer: nn.Module, **keywords: Any) -> Contender:
        if form == "packed":
            return packed_training(name, layer, batch, **keywords)
        return dense_training(name, layer, layer, batch, **keywords)

    ours, peer = contender("ours", layer, **keywords), contender(f"ours, plain {variant.plain}", plain)
    parity = [(contender("definition", layer, definition=True, **keywords), ours)]
    bars = {} if bar is None else {peer.name: bar}
    work, peer.work = (TRAINING * flop(batch.tokens, each) for each in (layer, plain))
    tolerance = NORMALISED_TOLERANCE if "layer_norm" in variant.options else TOLERANCE
    group = f"variants, {form} training, {shape}"
    bench.time(group, str(variant), [ours, peer], bars=bars, work=work, parity=parity, tolerance=tolerance)


@pytest.mark.parametrize(("variant", "bar"), VARIANTS, ids=shape_id)
def test_variant_packed_training(bench: Any, variant: Variant, bar: float | None) -> None:
    variant_row(bench, variant, Shape(100, 16, 256, 256), "packed", bar)


@pytest.mark.parametrize(("variant", "bar"), [(v, bar) for v, bar in VARIANTS if bar is not None], ids=shape_id)
def test_variant_dense_training(bench: Any, variant: Variant, bar: float) -> None:
    variant_row(bench, variant, Shape(400, 8, 256, 256), "dense", bar)


@pytest.mark.slow
@pytest.mark.parametrize("shape", NORMALISED, ids=shape_id)
def test_layer_normalised_training(bench: Any, shape: Shape) -> None:
    """Compiling the loop takes a minute or more, which is not timed."""
    ours, batch = our_layer(shape, "LSTM", layer_norm=True), Batch(shape, [shape.T] * shape.B)
    theirs = NormalisedLSTM(dict(ours.named_parameters()))
    contenders = [
        dense_training("ours", ours, ours, batch),
        dense_training("torch ops", theirs, theirs, batch),
        compiled("torch.compile", theirs, lambda f: dense_training("torch.compile", theirs, f, batch), allow_rnn=False),
    ]
    work, bars = TRAINING * flop(batch.tokens, ours), {"torch.compile": NORMALISED_BAR}
    group = "layer-normalised LSTM, dense training"
    bench.time(group, str(shape), contenders, bars=bars, work=work, tolerance=NORMALISED_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS, ids=shape_id)
def test_autocast_training(bench: Any, kind: Kind) -> None:
    shape = AUTOCAST_SHAPE
    ours, theirs = pair_of_layers(shape, kind)
    batch = Batch(shape, [shape.T] * shape.B)
    contenders = [
        dense_training("ours, bfloat16 by autocast", ours, autocast(ours), batch),
        dense_training("ours, float32", ours, ours, batch),
        dense_training("torch, bfloat16 by autocast", theirs, autocast(theirs), batch),
    ]
    try:
        contenders[2].step()
    except RuntimeError as error:
        contenders[2] = Contender(contenders[2].name, refused=str(error).partition(".")[0])
    bench.time(
        "CPU autocast, dense training",
        f"{kind}, {shape}",
        contenders,
        bars={"ours, float32": AUTOCAST_BAR},
        work=TRAINING * flop(batch.tokens, ours),
        parity=[(contenders[1], contenders[0])],
        tolerance=AUTOCAST_TOLERANCE,
    )


# --- rows: memory ---


def memory_layer(which: str, shape: Shape, num_layers: int) -> nn.Module:
    options = {"num_layers": num_layers} | ({"memory_efficient": True} if which == "memory_efficient" else {})
    torch.manual_seed(1)
    if which == "torch":
        return nn.LSTM(shape.I, shape.H, **options)
    return seqkernels.nn.LSTM(shape.I, shape.H, **options)


def memory_contender(which: str, shape: Shape, num_layers: int = 1) -> Contender:
    layer = memory_layer(which, shape, num_layers)
    return dense_training(which, layer, layer, Batch(shape, [shape.T] * shape.B))


def memory_case(which: str, shape: list[int], num_layers: int = 1) -> MemoryCase:
    """A dense training step in a separate process."""
    full = Shape(*shape)
    warm, measured = memory_contender(which, full._replace(T=2), num_layers), memory_contender(which, full, num_layers)

    def step() -> None:
        assert measured.before is not None
        measured.before()
        measured.step()

    return MemoryCase(warm.step, step)


@pytest.mark.parametrize("shape", MEMORY, ids=shape_id)
def test_training_memory(bench: Any, shape: Shape) -> None:
    parity = [(memory_contender("torch", shape), memory_contender("ours", shape))]
    contenders = {which: {"which": which, "shape": list(shape)} for which in ("ours", "torch")}
    group = "LSTM peak memory of a dense training step"
    bars = {"torch": MEMORY_BAR}
    bench.memory(group, str(shape), "bench_recurrent:memory_case", contenders, bars=bars, parity=parity)


EFFICIENT = ("memory_efficient", "plain")
EFFICIENT_LABEL = f"{EFFICIENT_LAYERS} layers, {EFFICIENT_SHAPE}"


def test_memory_efficient_time(bench: Any) -> None:
    shape = EFFICIENT_SHAPE
    ours, plain = (memory_contender(which, shape, EFFICIENT_LAYERS) for which in EFFICIENT)
    work = TRAINING * flop(shape.T * shape.B, memory_layer("plain", shape, EFFICIENT_LAYERS))
    bench.time("LSTM memory_efficient, dense training", EFFICIENT_LABEL, [ours, plain], bars={}, work=work)


def test_memory_efficient_peak(bench: Any) -> None:
    shape = EFFICIENT_SHAPE
    arguments = {"shape": list(shape), "num_layers": EFFICIENT_LAYERS}
    bench.memory(
        "LSTM memory_efficient, peak memory of a dense training step",
        EFFICIENT_LABEL,
        "bench_recurrent:memory_case",
        {which: {"which": which} | arguments for which in EFFICIENT},
        bars={},
        parity=[tuple(memory_contender(which, shape, EFFICIENT_LAYERS) for which in reversed(EFFICIENT))],
    )


def test_memory_efficient_saved(bench: Any) -> None:
    shape = EFFICIENT_SHAPE
    layers = {which: memory_layer(which, shape, EFFICIENT_LAYERS) for which in EFFICIENT}
    x = Batch(shape, [shape.T] * shape.B).x
    bench.saved_memory(
        "LSTM memory_efficient, kept for backward",
        EFFICIENT_LABEL,
        {which: (functools.partial(layer, x), [x, *layer.parameters()]) for which, layer in layers.items()},
    )


# --- rows: on a GPU ---
# The peer is cuDNN through torch.nn with the same dtype, unless a row says float16. "step" is a training step.

HALF = torch.bfloat16
HALF_TOLERANCE = 5e-2  # both round states and gradients of gates to 8 bits at each step
LONG, PACKED = Shape(1024, 16, 768, 768), "packed"
LONG_BAR, EACH_BAR, MEAN_BAR, FILL_BAR = 1.3, 1.0, 2.0, 1.6
ON_CUDA = {
    "GRU": (GRU, {}),
    "LSTM, bidirectional": (LSTM, {"bidirectional": True}),
    "LSTM, 2 layers": (LSTM, {"num_layers": 2}),
    "LSTM, packed": (LSTM, {}),
    "GRU, packed": (GRU, {}),
}
ON_CUDA_SIZES = [(B, H) for H in (128, 256, 512, 1024) for B in (1, 16, 64)]
ON_CUDA_ROWS = [  # wide layers, the widest in the grid tier, then packed layers
    pytest.param(name, B, H, marks=pytest.mark.cuda(turn=1 if (B, H) == (64, 1024) else 3 if PACKED in name else 5))
    for name in ON_CUDA
    for B, H in ON_CUDA_SIZES
]
STEP_S = 1e-6  # target per step of a forward pass at H=256
COMPILED = Shape(32, 16, 256, 256)
FLASHRNN = [(LSTM, LONG, "cuda_fused"), (GRU, LONG, "cuda")]  # FlashRNN has no fused GRU kernels
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def layers_on_cuda(
    shape: Shape, kind: Kind, *, ours: torch.dtype, theirs: torch.dtype, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Layers of seqkernels and torch with the same weights, each in its dtype."""
    torch.manual_seed(1)
    peer = getattr(nn, kind.name)(shape.I, shape.H, **options)
    mine = getattr(seqkernels.nn, kind.name)(shape.I, shape.H, **options)
    mine.load_state_dict(peer.state_dict())
    return mine.to("cuda", ours), peer.to("cuda", theirs)


def on_cuda(
    name: str,
    layer: nn.Module,
    shape: Shape,
    lengths: list[int] | None,
    *,
    step: bool,
    call: Callable[..., tuple[Any, Any]] | None = None,
) -> Contender:
    """A training step of a layer, dense or packed, or inference, in which peers save nothing for backward either.

    call: runs the layer instead of the module.
    """
    layer.train(step)
    call = layer if call is None else call
    generator = torch.Generator().manual_seed(2)
    weight = next(layer.parameters())
    x = torch.randn(shape.T, shape.B, shape.I, generator=generator).to("cuda", weight.dtype)
    packed = None if lengths is None else pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    data = (x if packed is None else packed.data).requires_grad_(step)

    def forward() -> tuple[Tensor, Any]:
        with torch.set_grad_enabled(step):
            if packed is None:
                return call(data)
            output, state = call(PackedSequence(data, *packed[1:]))
            return output.data, state

    directions = 2 if getattr(layer, "bidirectional", False) else 1
    upstream = torch.randn(*data.shape[:-1], directions * shape.H, generator=generator).to("cuda", weight.dtype)
    wanted = [data, *layer.parameters()]

    def training() -> None:
        output, _ = forward()
        torch.autograd.grad(output, wanted, upstream)

    def result() -> Results:
        output, states = forward()
        found = {"output": output} | named_states(states)
        if step:
            names = ["dx", *(f"d{key}" for key, _ in layer.named_parameters())]
            found |= dict(zip(names, torch.autograd.grad(output, wanted, upstream)))
        return {key: value.detach().double() for key, value in found.items()}

    return Contender(name, training if step else forward, result, on_cuda=True)


STEPS = pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])


def time_on_cuda(
    bench: Any, what: str, label: str, contenders: list[Contender], tokens: int, layer: nn.Module, step: bool, **of: Any
) -> None:
    """A row of `what`, a training step or forward: parity in half precision, and no bars, unless `of` names others."""
    work = (TRAINING if step else 1) * flop(tokens, layer)
    group = f"{what}, {'training step' if step else 'forward'}, on CUDA"
    bench.time(group, label, contenders, work=work, **{"bars": {}, "tolerance": HALF_TOLERANCE, **of})


@pytest.mark.cuda(turn=1)
@STEPS
def test_long_on_cuda(bench: Any, step: bool) -> None:
    """cuDNN has a persistent float16 kernel for this shape."""
    ours, half = layers_on_cuda(LONG, LSTM, ours=HALF, theirs=torch.float16)
    _, same = layers_on_cuda(LONG, LSTM, ours=HALF, theirs=HALF)
    contenders = [
        on_cuda("ours", ours, LONG, None, step=step),
        on_cuda("cuDNN, float16", half, LONG, None, step=step),
        on_cuda("cuDNN, bfloat16", same, LONG, None, step=step),
    ]
    bars = {"cuDNN, float16": LONG_BAR}
    time_on_cuda(bench, "LSTM bfloat16", str(LONG), contenders, LONG.T * LONG.B, ours, step, bars=bars)


@pytest.mark.cuda
@STEPS
@pytest.mark.parametrize(("name", "B", "H"), ON_CUDA_ROWS)
def test_layers_on_cuda(bench: Any, name: str, B: int, H: int, step: bool) -> None:
    kind, options = ON_CUDA[name]
    shape = Shape(256, B, H, H)
    ours, theirs = layers_on_cuda(shape, kind, ours=HALF, theirs=HALF, **options)
    lengths = drawn_lengths(shape) if PACKED in name else None
    contenders = [on_cuda(name, m, shape, lengths, step=step) for name, m in (("ours", ours), ("cuDNN", theirs))]
    tokens = shape.T * shape.B if lengths is None else sum(lengths)
    bars = {"cuDNN": Bar(at_least=EACH_BAR, mean_at_least=MEAN_BAR, mean_rows=len(ON_CUDA) * len(ON_CUDA_SIZES))}
    time_on_cuda(bench, "bfloat16", f"{name}, {shape}", contenders, tokens, ours, step, bars=bars)


@pytest.mark.cuda(turn=3)
@pytest.mark.parametrize("B", [1, 16, 32])
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=str)
def test_steps_on_cuda(bench: Any, kind: Kind, B: int) -> None:
    """1024 steps, including the input projection."""
    shape = Shape(1024, B, 256, 256)
    ours, theirs = layers_on_cuda(shape, kind, ours=HALF, theirs=HALF)
    contenders = [on_cuda(name, m, shape, None, step=False) for name, m in (("ours", ours), ("cuDNN", theirs))]
    group = "bfloat16, forward of 1024 steps, on CUDA"
    work = flop(shape.T * shape.B, ours)
    goals = {"1 µs a step": shape.T * STEP_S}
    bench.time(group, f"{kind}, {shape}", contenders, bars={}, work=work, tolerance=HALF_TOLERANCE, goals=goals)


@pytest.mark.cuda(turn=1)
@STEPS
@pytest.mark.parametrize(("B", "H"), [(16, 256), (64, 512)])
def test_half_fill_on_cuda(bench: Any, B: int, H: int, step: bool) -> None:
    """Packed sequences of 0 to T steps against a padded batch, half of which is padding."""
    shape = Shape(512, B, H, H)
    ours, _ = layers_on_cuda(shape, LSTM, ours=HALF, theirs=HALF)
    lengths = [max(1, round(shape.T * (b + 0.5) / B)) for b in range(B)]
    packed = on_cuda("ours, packed", ours, shape, lengths, step=step)
    padded = on_cuda("ours, padded", ours, shape, None, step=step)
    of = {"bars": {"ours, padded": FILL_BAR}, "parity": []}
    time_on_cuda(bench, "LSTM bfloat16 at half fill", str(shape), [packed, padded], sum(lengths), ours, step, **of)


@pytest.mark.cuda(turn=1)
@STEPS
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float32_on_cuda(bench: Any, kind: Kind, step: bool) -> None:
    """Both with the default setting of torch.backends.cudnn, which allows TF32."""
    shape = Shape(256, 16, 256, 256)
    ours, theirs = layers_on_cuda(shape, kind, ours=torch.float32, theirs=torch.float32)
    contenders = [on_cuda(name, m, shape, None, step=step) for name, m in (("ours", ours), ("cuDNN", theirs))]
    time_on_cuda(bench, "float32 (TF32)", f"{kind}, {shape}", contenders, shape.T * shape.B, ours, step)


# Layers with options, on a GPU: no library has them, so the peer is the plain layer with the same products.
OPTIONS_ON_CUDA = [
    (LSTM, {"peephole": True}),
    (LSTM, {"coupled_gates": True}),
    (LSTM, {"zoneout_h": 0.1, "zoneout_c": 0.1, "recurrent_dropout": 0.1}),
    (GRU, {"reset_after": False}),
    (GRU, {"zoneout_h": 0.1}),
]


@pytest.mark.cuda(turn=3)
@STEPS
@pytest.mark.parametrize(("kind", "options"), OPTIONS_ON_CUDA, ids=str)
def test_options_on_cuda(bench: Any, kind: Kind, options: dict[str, Any], step: bool) -> None:
    shape = Shape(256, 64, 512, 512)
    plain, theirs = layers_on_cuda(shape, kind, ours=HALF, theirs=HALF)
    layer = our_layer(shape, str(kind), **options).to("cuda", HALF)
    contenders = [
        on_cuda("ours", layer, shape, None, step=step),
        on_cuda("ours, plain", plain, shape, None, step=step),
        on_cuda("cuDNN, plain", theirs, shape, None, step=step),
    ]
    label, parity = f"{kind} {', '.join(options)}, {shape}", [(contenders[2], contenders[1])]
    time_on_cuda(bench, "bfloat16 with options", label, contenders, shape.T * shape.B, plain, step, parity=parity)


@pytest.mark.cuda(turn=4)
@STEPS
@pytest.mark.parametrize(("B", "H"), [(16, 256), (64, 512)])
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=str)
def test_triton_on_cuda(bench: Any, kind: Kind, B: int, H: int, step: bool) -> None:
    """The Triton kernels, which run where the CUDA kernels are not built."""
    shape = Shape(256, B, H, H)
    ours, theirs = layers_on_cuda(shape, kind, ours=HALF, theirs=HALF)
    function = getattr(seqkernels.functional, str(kind).lower())

    def in_triton(x: Tensor) -> tuple[Any, Any]:
        return function(x, None, list(ours.parameters()), backend="triton")

    contenders = [
        on_cuda("ours", ours, shape, None, step=step),
        on_cuda("Triton", ours, shape, None, step=step, call=in_triton),
        on_cuda("cuDNN", theirs, shape, None, step=step),
    ]
    parity = [(contenders[2], c) for c in contenders[:2]]
    time_on_cuda(
        bench, "bfloat16 against Triton", f"{kind}, {shape}", contenders, shape.T * shape.B, ours, step, parity=parity
    )


# --- rows: peers that compile for minutes, on a GPU ---


class Loop(nn.Module):
    """A loop over the reference cell with the weights of a layer; the input projection is outside of the loop."""

    def __init__(self, kind: Kind, layer: nn.Module) -> None:
        super().__init__()
        self.kind = reference.recurrent.KINDS[kind.name.lower()]
        for name, value in layer.named_parameters():
            self.register_parameter(name, value)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        weights = {"w_hh": self.weight_hh_l0, "b_hh": self.bias_hh_l0}
        states = (x.new_zeros(x.shape[1], self.weight_hh_l0.shape[1]),) * self.kind.states
        outputs = []
        for of_x in F.linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(0):
            states = self.kind.cell(reference.recurrent.Step(of_x, states[0], states, weights, self.kind))
            outputs.append(states[0])
        last = tuple(state[None] for state in states)
        return torch.stack(outputs), last[0] if len(last) == 1 else last


@pytest.mark.slow
@pytest.mark.cuda(turn=8)
@STEPS
@pytest.mark.parametrize("kind", [LSTM, GRU], ids=str)
def test_compiled_loop_on_cuda(bench: Any, kind: Kind, step: bool) -> None:
    """torch.compile unrolls the steps, which takes a minute and is not timed."""
    shape = COMPILED
    ours, theirs = layers_on_cuda(shape, kind, ours=HALF, theirs=HALF)
    loop = Loop(kind, theirs)
    contenders = [
        on_cuda("ours", ours, shape, None, step=step),
        on_cuda("cuDNN", theirs, shape, None, step=step),
        compiled(
            "torch.compile",
            loop,
            lambda f: on_cuda("torch.compile", loop, shape, None, step=step, call=f),
            allow_rnn=False,
        ),
    ]
    time_on_cuda(
        bench, "bfloat16 against a compiled loop", f"{kind}, {shape}", contenders, shape.T * shape.B, ours, step
    )


def flashrnn(name: str, kind: Kind, layer: nn.Module, shape: Shape, *, step: bool, backend: str) -> Contender:
    """FlashRNN of NX-AI, https://pypi.org/project/flashrnn, called as in its README, with one head.

    Its input is the input projection in the layout [B, T, ..], which the contender computes. Its gates have torch's
    order, except for the recurrent projection of a GRU, where n is first, and the biases of a GRU: recurrent bias of n,
    biases of r and z, input bias of n.
    """
    try:
        from flashrnn import flashrnn as run
    except Exception as error:  # the import searches for a compiler and may raise any exception
        return Contender(name, refused=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in layer.parameters())
    gates, H = len(kind.onnx), shape.H
    shares, biases = list(w_hh.chunk(gates)), list((b_ih + b_hh).chunk(gates))
    if kind is GRU:
        r, z, n = shares
        shares, biases = [n, r, z], [b_hh.chunk(3)[2], *biases[:2], b_ih.chunk(3)[2]]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape.T, shape.B, shape.I, generator=generator).to(w_ih)
    upstream = torch.randn(shape.T, shape.B, H, generator=generator).to(w_ih).transpose(0, 1)
    leaves = [x.transpose(0, 1).contiguous(), w_ih, torch.stack(shares)[:, None], torch.stack(biases)[:, None]]
    leaves = [leaf.clone().requires_grad_(step) for leaf in leaves]

    def forward() -> Tensor:
        x, w_ih, R, b = leaves
        with torch.set_grad_enabled(step):
            of_x = F.linear(x, w_ih).view(shape.B, shape.T, gates, 1, H)
            states, _ = run(of_x, R, b, function=kind.name.lower(), backend=backend, dtype=DTYPE_NAMES[w_ih.dtype])
            return states[0, :, :, 0]

    def training() -> tuple[Tensor, ...]:
        output = forward()
        return output, *torch.autograd.grad(output, leaves, upstream)

    def result() -> Results:
        output, *gradients = training() if step else [forward()]
        found = {"output": output.transpose(0, 1)}
        if step:
            found |= {"dx": gradients[0].transpose(0, 1), "dweight_ih_l0": gradients[1]}
        return {key: value.detach().double() for key, value in found.items()}

    try:
        result()
    except Exception as error:  # the first call compiles
        return Contender(name, refused=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return Contender(name, training if step else forward, result, on_cuda=True)


@pytest.mark.slow
@pytest.mark.cuda(turn=9)
@STEPS
@pytest.mark.parametrize(("kind", "shape", "backend"), FLASHRNN, ids=shape_id)
def test_flashrnn_on_cuda(bench: Any, kind: Kind, shape: Shape, backend: str, step: bool) -> None:
    """The first call for a shape compiles its kernels, which takes minutes and is not timed."""
    ours, theirs = layers_on_cuda(shape, kind, ours=HALF, theirs=HALF)
    contenders = [
        on_cuda("ours", ours, shape, None, step=step),
        on_cuda("cuDNN", theirs, shape, None, step=step),
        flashrnn("FlashRNN", kind, theirs, shape, step=step, backend=backend),
    ]
    time_on_cuda(bench, "bfloat16 against FlashRNN", f"{kind}, {shape}", contenders, shape.T * shape.B, ours, step)
