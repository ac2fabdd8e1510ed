"""LSTM against torch's eager LSTM (packed, padded + mask, dense), torch.compile and onnxruntime.

The bars are the claims of the project; the table says PASS or MISS for each.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness import Contender, MemoryCase, Results, settle
from report import Bar
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels

LSTM_GATES = 4
TRAINING = 3  # forward, and in backward one product for the inputs and one for the weights
STREAM_CALLS = 100


class Shape(NamedTuple):
    T: int
    B: int
    I: int
    H: int

    def __str__(self) -> str:
        sizes = f"I=H={self.H}" if self.I == self.H else f"I={self.I} H={self.H}"
        return f"B={self.B} {sizes} T={self.T}"


def shape_id(value: object) -> str | None:
    return f"T{value.T}-B{value.B}-I{value.I}-H{value.H}" if isinstance(value, Shape) else None


def lstm_flop(tokens: int, shape: Shape) -> float:
    """Floating point operations of a forward pass over `tokens` real tokens: the two products."""
    return 2.0 * tokens * LSTM_GATES * shape.H * (shape.I + shape.H)


# --- inputs ---


def drawn_lengths(shape: Shape) -> list[int]:
    """Between T/4 and T; the same fractions of T for every T, so that rows of different T compare."""
    fractions = 0.25 + 0.75 * torch.rand(shape.B, generator=torch.Generator().manual_seed(0))
    return [max(1, round(fraction * shape.T)) for fraction in fractions.tolist()]


def pair_of_layers(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """(ours, torch's) with the same weights."""
    torch.manual_seed(1)
    theirs = nn.LSTM(shape.I, shape.H)
    ours = seqkernels.nn.LSTM(shape.I, shape.H)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


class Batch:
    """A padded batch [longest, B, I] and the gradient that training puts on the output; every contender gets these."""

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

Forward = Callable[[Tensor], tuple[Tensor, tuple[Tensor, Tensor]]]


def training(
    name: str, layer: nn.Module, forward: Forward, x: Tensor, upstream: Tensor, rows: Callable[[Tensor], Tensor]
) -> Contender:
    """A training step of `layer`; `rows` brings an output or dx to the layout in which parity compares."""
    x = x.clone().requires_grad_()

    def before() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None

    def step() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = forward(x)
        (output * upstream).sum().backward()
        return output, state

    def result() -> Results:
        before()
        output, (h_n, c_n) = step()
        results = {f"d{key}": p.grad.clone() for key, p in layer.named_parameters() if p.grad is not None}
        assert x.grad is not None
        results |= {"output": rows(output), "h_n": h_n, "c_n": c_n, "dx": rows(x.grad)}
        return {key: value.detach() for key, value in results.items()}

    return Contender(name, step, result, before)


def packed_training(name: str, layer: nn.Module, batch: Batch) -> Contender:
    """Input and output are PackedSequences; packing is not part of the step."""
    packed = batch.pack(batch.x)

    def forward(data: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = layer(PackedSequence(data, *packed[1:]))
        return output.data, state

    return training(name, layer, forward, packed.data, batch.rows(batch.upstream), lambda rows: rows)


def lengths_training(name: str, layer: nn.Module, batch: Batch) -> Contender:
    """Padded in, padded out, with lengths: what torch does not have."""

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return layer(x, lengths=batch.lengths)

    return training(name, layer, forward, batch.x, batch.upstream, batch.rows)


def masked_training(name: str, layer: nn.Module, batch: Batch) -> Contender:
    """A dense layer over the padded batch, output masked; its h_n and c_n are those of the padding, so not compared."""

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, state = layer(x)
        return output * batch.mask, state

    contender = training(name, layer, forward, batch.x, batch.upstream, batch.rows)
    everything = contender.result
    assert everything is not None
    contender.result = lambda: {key: value for key, value in everything().items() if key not in ("h_n", "c_n")}
    return contender


def dense_training(name: str, layer: nn.Module, forward: Forward, batch: Batch) -> Contender:
    return training(name, layer, forward, batch.x, batch.upstream, lambda padded: padded)


# --- contenders: inference ---


def dense_inference(name: str, forward: Forward, batch: Batch) -> Contender:
    def step() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        with torch.no_grad():
            return forward(batch.x)

    def result() -> Results:
        output, (h_n, c_n) = step()
        return {"output": output, "h_n": h_n, "c_n": c_n}

    return Contender(name, step, result)


def streaming(name: str, layer: nn.Module, shape: Shape) -> Contender:
    """One step of a stream: T=1, the state carried from call to call."""
    x = torch.randn(STREAM_CALLS, 1, shape.B, shape.I, generator=torch.Generator().manual_seed(3)).unbind()

    @torch.no_grad()
    def step() -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        state = (torch.zeros(1, shape.B, shape.H), torch.zeros(1, shape.B, shape.H))
        outputs = []
        for x_t in x:
            output, state = layer(x_t, state)
            outputs.append(output)
        return outputs, state

    def result() -> Results:
        outputs, (h_n, c_n) = step()
        return {"output": torch.cat(outputs), "h_n": h_n, "c_n": c_n}

    return Contender(name, step, result, calls=STREAM_CALLS)


def compiled(name: str, layer: nn.Module, allow_rnn: bool, make: Callable[[Forward], Contender]) -> Contender:
    """torch.compile of the whole layer as one graph; compiled here, outside every timing."""
    import torch._dynamo

    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(allow_rnn=allow_rnn), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function = torch.compile(layer, fullgraph=True)
            contender = make(function)
            contender.step()
            contender.step()
    except Exception as error:  # whatever the compiler says is the reason that the table gives
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("Explanation:")), lines[0] if lines else repr(error))
        return Contender(name, refused=reason.removeprefix("Explanation: "))
    return contender


def onnxruntime_inference(name: str, layer: nn.Module, shape: Shape, batch: Batch, threads: int) -> Contender:
    """ONNX's LSTM operator with the same weights; plain run or IO binding, whichever is faster here."""
    try:
        import numpy as np
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        return Contender(name, refused=f"not installed: {error.name}")

    T, B, I, H = shape

    def iofc(key: str) -> Any:
        """torch's gates i, f, g, o in ONNX's order i, o, f, c."""
        i, f, g, o = layer.get_parameter(key).detach().chunk(LSTM_GATES)
        return torch.cat([i, o, f, g]).numpy()

    weights = {
        "W": iofc("weight_ih_l0")[None],
        "R": iofc("weight_hh_l0")[None],
        "bias": np.concatenate([iofc("bias_ih_l0"), iofc("bias_hh_l0")])[None],
    }
    shapes = {"Y": [T, 1, B, H], "Y_h": [1, B, H], "Y_c": [1, B, H]}
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["X", "W", "R", "bias"], list(shapes), hidden_size=H)],
        "lstm",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [T, B, I])],
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, size) for key, size in shapes.items()],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

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
        y, y_h, y_c = (torch.from_numpy(value).clone() for value in run())
        return {"output": y[:, 0], "h_n": y_h, "c_n": y_c}

    return Contender(name, run, result)


# --- rows ---

# Shape and its bar against torch packed.
DRAWN = [
    (Shape(100, 8, 256, 256), 3.0),
    (Shape(400, 8, 256, 256), 6.0),
    pytest.param(Shape(1600, 8, 256, 256), 28.0, marks=pytest.mark.slow),
    (Shape(400, 16, 256, 256), 4.0),
    (Shape(50, 64, 64, 128), 2.2),
    (Shape(50, 16, 64, 32), 6.0),
]
MASKED_BAR = 1.35

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
DENSE_BAR = 0.95

ONNX = [
    Shape(50, 16, 64, 32),
    Shape(50, 64, 64, 128),
    Shape(100, 32, 300, 256),
    Shape(100, 1, 256, 256),
    Shape(128, 64, 512, 512),
]
ONNX_BAR = Bar(at_least=1.0, mean_at_least=1.15, mean_rows=len(ONNX))

COMPILE_MAX_T = 64  # with allow_rnn the compiler unrolls time: minutes already at 50 steps


def packed_row(bench: Any, group: str, shape: Shape, lengths: list[int], bars: dict[str, float]) -> None:
    ours, theirs = pair_of_layers(shape)
    batch = Batch(shape, lengths)
    contenders = [
        packed_training("ours, packed", ours, batch),
        packed_training("torch packed", theirs, batch),
        masked_training("torch padded + mask", theirs, batch),
        lengths_training("(ours, padded + lengths)", ours, batch),
    ]
    bench.time(group, str(shape), contenders, bars=bars, work=TRAINING * lstm_flop(batch.tokens, shape))


@pytest.mark.parametrize(("shape", "packed_bar"), DRAWN, ids=shape_id)
def test_packed_training(bench: Any, shape: Shape, packed_bar: float) -> None:
    bars = {"torch packed": packed_bar, "torch padded + mask": MASKED_BAR}
    packed_row(bench, "LSTM packed training, lengths drawn between T/4 and T", shape, drawn_lengths(shape), bars)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [Shape(1600, 8, 256, 256)], ids=shape_id)
def test_packed_training_one_step_shorter(bench: Any, shape: Shape) -> None:
    lengths = [shape.T] * (shape.B - 1) + [shape.T - 1]
    packed_row(bench, "LSTM packed training, lengths T, T, .. T-1", shape, lengths, {"torch packed": 60.0})


def test_packed_training_grows_with_t(bench: Any) -> None:
    """Time at T=1600 over time at T=400: linear is 4."""
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


@pytest.mark.parametrize("shape", DENSE, ids=shape_id)
def test_dense_training(bench: Any, shape: Shape) -> None:
    ours, theirs = pair_of_layers(shape)
    batch = Batch(shape, [shape.T] * shape.B)
    contenders = [
        dense_training("ours", ours, ours, batch),
        dense_training("torch", theirs, theirs, batch),
        compiled_lstm(bench, theirs, shape, lambda f: dense_training("torch.compile", theirs, f, batch)),
    ]
    work = TRAINING * lstm_flop(batch.tokens, shape)
    bench.time("LSTM dense training", str(shape), contenders, bars={"torch": DENSE_BAR}, work=work)


@pytest.mark.parametrize("shape", list(dict.fromkeys(DENSE + ONNX)), ids=shape_id)
def test_dense_inference(bench: Any, shape: Shape) -> None:
    ours, theirs = (layer.eval() for layer in pair_of_layers(shape))
    batch = Batch(shape, [shape.T] * shape.B)
    contenders = [
        dense_inference("ours", ours, batch),
        dense_inference("torch", theirs, batch),
        onnxruntime_inference("onnxruntime", theirs, shape, batch, bench.run.threads),
        compiled_lstm(bench, theirs, shape, lambda f: dense_inference("torch.compile", f, batch)),
    ]
    bars: dict[str, Bar] = {}
    if shape in DENSE:
        bars["torch"] = Bar(at_least=DENSE_BAR)
    if shape in ONNX:
        bars["onnxruntime"] = ONNX_BAR
    bench.time("LSTM dense inference", str(shape), contenders, bars=bars, work=lstm_flop(batch.tokens, shape))


def compiled_lstm(bench: Any, layer: nn.Module, shape: Shape, make: Callable[[Forward], Contender]) -> Contender:
    allow_rnn = bench.config.getoption("compile_rnn") and shape.T <= COMPILE_MAX_T
    return compiled("torch.compile", layer, allow_rnn, make)


@pytest.mark.parametrize(("H", "bar"), [(32, 3.0), (128, 4.0), (256, 12.0)])
def test_stream_step(bench: Any, H: int, bar: float) -> None:
    shape = Shape(1, 1, H, H)
    ours, theirs = pair_of_layers(shape)
    contenders = [streaming("ours", ours, shape), streaming("torch", theirs, shape)]
    group = "LSTM, one step of a stream under no_grad"
    bench.time(group, str(shape), contenders, bars={"torch": bar}, work=lstm_flop(1, shape))


def memory_case(which: str, shape: list[int]) -> MemoryCase:
    """A dense training step of ours or torch's, for a process of its own."""

    def dense(shape: Shape) -> Contender:
        layer = pair_of_layers(shape)[0 if which == "ours" else 1]
        return dense_training(which, layer, layer, Batch(shape, [shape.T] * shape.B))

    full = Shape(*shape)
    warm, measured = dense(full._replace(T=2)), dense(full)

    def step() -> None:
        assert measured.before is not None
        measured.before()
        measured.step()

    return MemoryCase(warm.step, step)


@pytest.mark.parametrize(
    "shape", [Shape(400, 8, 256, 256), Shape(400, 16, 256, 256), Shape(50, 64, 64, 128)], ids=shape_id
)
def test_training_memory(bench: Any, shape: Shape) -> None:
    ours, theirs = pair_of_layers(shape)
    batch = Batch(shape, [shape.T] * shape.B)
    parity = [(dense_training("torch", theirs, theirs, batch), dense_training("ours", ours, ours, batch))]
    contenders = {which: {"which": which, "shape": list(shape)} for which in ("ours", "torch")}
    group = "LSTM peak memory of a dense training step"
    bench.memory(group, str(shape), "bench_recurrent:memory_case", contenders, bars={"torch": 1.0}, parity=parity)
