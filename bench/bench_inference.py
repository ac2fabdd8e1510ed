"""Prepared recurrent layers on a CPU against torch, torch's dynamic int8, onnxruntime and openvino.

The label of a row has the largest error of each contender against float64, as a share of the largest output.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Contender, Results
from report import Bar
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels
from seqkernels import inference

STREAM_CALLS = 50


@dataclass(frozen=True)
class Shape:
    kind: str
    T: int
    B: int
    D: int
    H: int
    bidirectional: bool = False

    def __str__(self) -> str:
        sizes = f"D=H={self.H}" if self.D == self.H else f"D={self.D} H={self.H}"
        return f"{self.kind} T={self.T} B={self.B} {sizes}" + ", both directions" * self.bidirectional

    def layer(self) -> nn.Module:
        torch.manual_seed(1)
        return getattr(nn, self.kind)(self.D, self.H, bidirectional=self.bidirectional).eval()

    def input(self) -> Tensor:
        return torch.randn(self.T, self.B, self.D, generator=torch.Generator().manual_seed(2))

    @property
    def work(self) -> float:
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[self.kind]
        return 2.0 * self.T * self.B * gates * self.H * (self.D + self.H) * (1 + self.bidirectional)


INT8 = [
    Shape(kind, T, B, H, H) for kind in ("LSTM", "GRU") for H in (256, 512, 1024) for T in (1, 100) for B in (1, 4, 32)
]
STEPS = [Shape(kind, 1, 1, H, H) for kind in ("LSTM", "GRU") for H in (128, 256, 512, 1024)]
STEP_BAR = {("LSTM", 128): 6.0, ("LSTM", 256): 6.0, ("LSTM", 512): 8.0, ("LSTM", 1024): 6.0}
FLOAT = [
    Shape("LSTM", 50, 16, 64, 32),
    Shape("LSTM", 50, 64, 64, 128),
    Shape("LSTM", 100, 32, 300, 256),
    Shape("LSTM", 100, 1, 256, 256),
    Shape("LSTM", 128, 64, 512, 512),
    Shape("LSTM", 80, 6, 100, 160),
]
KOKORO = [Shape("LSTM", T, 1, 512, 256, bidirectional=True) for T in (50, 150, 500)]


def prepared(layer: nn.Module, weights: str) -> nn.Module:
    return inference.prepare(layer, weights)[0]


def torch_int8(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        holder = nn.ModuleList([copy.deepcopy(layer)])
        return torch.ao.quantization.quantize_dynamic(holder, {type(layer)}, dtype=torch.qint8)[0]


def onnx_model(shape: Shape, layer: nn.Module) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (shape.input(),), file, input_names=["x"], output_names=["y"], dynamo=False)
    return file.getvalue()


def of_module(name: str, module: Callable[[Tensor], Any], x: Tensor) -> Contender:
    def step() -> Tensor:
        with torch.inference_mode():
            output: Tensor = module(x)[0]
            return output

    return Contender(name, step, lambda: {"output": step().clone()})


def onnxruntime(name: str, shape: Shape, layer: nn.Module, threads: int, int8: bool = False) -> Contender:
    try:
        import onnxruntime as ort
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        return Contender(name, refused=f"not installed: {error.name}")
    model = onnx_model(shape, layer)
    if int8:
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder, "given.onnx"), Path(folder, "made.onnx")
            given.write_bytes(model)
            quantize_dynamic(given, made, op_types_to_quantize=["LSTM"], weight_type=QuantType.QInt8, per_channel=True)
            model = made.read_bytes()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": shape.input().numpy()}
    return Contender(
        name, lambda: session.run(["y"], feed), lambda: {"output": torch.from_numpy(session.run(["y"], feed)[0])}
    )


def openvino(name: str, shape: Shape, layer: nn.Module, threads: int, precision: str) -> Contender:
    try:
        import openvino as ov
    except ImportError as error:
        return Contender(name, refused=f"not installed: {error.name}")
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(onnx_model(shape, layer)), "CPU", settings)
    request, feed = compiled.create_infer_request(), {0: shape.input().numpy()}
    return Contender(
        name, lambda: request.infer(feed), lambda: {"output": torch.from_numpy(request.infer(feed)[0].copy())}
    )


def errors(contenders: list[Contender], exact: Tensor) -> str:
    found = []
    for c in contenders:
        if c.result is not None and not c.refused:
            error = (c.result()["output"].double() - exact).abs().max() / exact.abs().max()
            found.append(f"{c.name} {error.item():.0e}")
    return "; error " + ", ".join(found)


def row(bench: Any, group: str, shape: Shape, contenders: list[Contender], layer: nn.Module, **keywords: Any) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(shape.input().double())[0]
    label = str(shape) + errors(contenders, exact)
    # The int8 products of onnxruntime saturate on processors without VNNI; the label has its error.
    parity = [(contenders[1], c) for c in contenders if not c.refused and c.name not in ("torch", "onnxruntime int8")]
    tolerance = keywords.pop("tolerance", 0.1)
    bench.time(group, label, contenders, work=shape.work, parity=parity, tolerance=tolerance, **keywords)


@pytest.mark.parametrize("shape", INT8, ids=str)
def test_int8(bench: Any, shape: Shape) -> None:
    layer, x, threads = shape.layer(), shape.input(), bench.run.threads
    contenders = [
        of_module("ours int8", prepared(layer, "int8"), x),
        of_module("torch", layer, x),
        of_module("torch int8", torch_int8(layer), x),
        of_module("ours float32", prepared(layer, "float32"), x),
    ]
    bars = {"torch int8": Bar(at_least=1.3, mean_at_least=2.0, mean_rows=len(INT8))}
    if shape.kind == "LSTM":
        contenders.append(onnxruntime("onnxruntime int8", shape, layer, threads, int8=True))
        bars["onnxruntime int8"] = Bar(mean_at_least=1.2, mean_rows=len(INT8) // 2)
    if shape.T == 100 and shape.B == 1 and shape.H >= 512:
        bars["ours float32"] = Bar(at_least=3.0)
    row(bench, "int8 weights", shape, contenders, layer, bars=bars)


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [s for s in INT8 if s.B == 1], ids=str)
def test_half_weights(bench: Any, shape: Shape, weights: str) -> None:
    layer, x, threads = shape.layer(), shape.input(), bench.run.threads
    contenders = [
        of_module(f"ours {weights}", prepared(layer, weights), x),
        of_module("torch", layer, x),
        of_module("ours float32", prepared(layer, "float32"), x),
        openvino("openvino bfloat16", shape, layer, threads, "bf16"),
    ]
    bars = {"ours float32": 1.7} if weights == "bfloat16" and shape.H >= 512 else {}
    row(bench, f"{weights} weights", shape, contenders, layer, bars=bars)


@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_step(bench: Any, shape: Shape) -> None:
    """A stream: one step with the state of the previous one, updated in place where the contender can."""
    layer = shape.layer()
    x = [shape.input() for _ in range(STREAM_CALLS)]
    lstm = shape.kind == "LSTM"

    def stream(name: str, module: Any, in_place: bool) -> Contender:
        def step() -> Results:
            with torch.inference_mode():
                h = torch.zeros(1, 1, shape.H)
                state: Any = (h, torch.zeros(1, 1, shape.H)) if lstm else h
                for x_t in x:
                    output, state = module(x_t, state, out_state=state) if in_place else module(x_t, state)
                return {"output": output, "h": (state[0] if lstm else state).clone()}

        return Contender(name, step, step, calls=STREAM_CALLS)

    contenders = [
        stream("ours float32", prepared(layer, "float32"), True),
        stream("torch", layer, False),
        stream("torch int8", torch_int8(layer), False),
        stream("ours int8", prepared(layer, "int8"), True),
        stream("ours bfloat16", prepared(layer, "bfloat16"), True),
        stream("seqkernels.nn", our_layer(layer), False),
    ]
    bar = STEP_BAR.get((shape.kind, shape.H))
    bars = {} if bar is None else {"torch": bar}
    bench.time("one step of a stream", str(shape), contenders, bars=bars, work=shape.work, tolerance=0.1)


def our_layer(layer: Any) -> nn.Module:
    made = getattr(seqkernels.nn, type(layer).__name__)(
        layer.input_size, layer.hidden_size, bidirectional=layer.bidirectional
    )
    made.load_state_dict(layer.state_dict())
    return made.eval()


@pytest.mark.parametrize("shape", FLOAT, ids=str)
def test_float32(bench: Any, shape: Shape) -> None:
    layer, x, threads = shape.layer(), shape.input(), bench.run.threads
    contenders = [
        of_module("ours float32", prepared(layer, "float32"), x),
        of_module("torch", layer, x),
        onnxruntime("onnxruntime", shape, layer, threads),
        openvino("openvino", shape, layer, threads, "f32"),
        of_module("seqkernels.nn", our_layer(layer), x),
    ]
    bar = Bar(at_least=1.0, mean_at_least=1.2, mean_rows=len(FLOAT))
    row(bench, "float32 weights", shape, contenders, layer, bars={"onnxruntime": bar, "openvino": bar}, tolerance=2e-5)


@pytest.mark.parametrize("shape", KOKORO, ids=str)
def test_text_to_speech_layer(bench: Any, shape: Shape) -> None:
    """The layer of Kokoro's text encoder and predictors: packed, one sequence."""
    layer, x, threads = shape.layer(), shape.input(), bench.run.threads
    packed = pack_padded_sequence(x, [shape.T])

    def of_packed(name: str, module: nn.Module) -> Contender:
        def step() -> Tensor:
            with torch.inference_mode():
                output: PackedSequence = module(packed)[0]
                return output.data

        return Contender(name, step, lambda: {"output": step().clone().unsqueeze(1)})

    contenders = [
        of_packed("ours int8", prepared(layer, "int8")),
        of_packed("torch", layer),
        of_packed("torch int8", torch_int8(layer)),
        of_packed("ours float32", prepared(layer, "float32")),
        onnxruntime("onnxruntime", shape, layer, threads),
        onnxruntime("onnxruntime int8", shape, layer, threads, int8=True),
    ]
    row(bench, "layer of a text to speech model", shape, contenders, layer, bars={})


@pytest.mark.parametrize("H", [512, 1024])
def test_slstm_step(bench: Any, H: int) -> None:
    """Blocks of 4 heads, as in xLSTM and TiRex; no other library runs them on a CPU."""
    torch.manual_seed(1)
    layer = seqkernels.nn.SLSTM(H, H, num_heads=4).eval()
    x = torch.randn(32, 1, H)
    contenders = [
        of_module("ours int8", prepared(layer, "int8"), x),
        of_module("seqkernels.nn", layer, x),
        of_module("ours float32", prepared(layer, "float32"), x),
    ]
    work = 2.0 * 32 * 4 * H * (H + H / 4)
    bench.time("sLSTM with 4 heads, T=32 B=1", f"D=H={H}", contenders, bars={}, work=work, tolerance=0.1)
