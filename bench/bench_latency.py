"""Latency of calls as models in use make them: after a pause, beside busy processes, with more threads than processors,
and beside the workers of a DataLoader.

Each contender runs in a process of its own (this file as a script), which sleeps while another one is measured. A round
measures every contender once. Rows report the median and, where many calls are made, high quantiles.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

KINDS = ("LSTM", "GRU")
PAUSES = (0, 1, 5, 20, 100)  # ms


@dataclass(frozen=True)
class Call:
    kind: str
    T: int
    B: int
    D: int
    H: int

    def __str__(self) -> str:
        return f"{self.kind} T={self.T} B={self.B} D={self.D} H={self.H}"


STEPS = [Call(kind, 1, 1, H, H) for kind in KINDS for H in (128, 256, 512)]
LAYERS = [Call("LSTM", 80, 6, 100, 160), Call("LSTM", 50, 64, 64, 128), Call("LSTM", 100, 1, 256, 256)]
PEERS = ("torch", "onnxruntime", "openvino")


# --- the process of a contender ---


def _onnx(call: Call) -> bytes:
    import io

    model, x = getattr(torch.nn, call.kind)(call.D, call.H), torch.zeros(call.T, call.B, call.D)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, input_names=["x"], output_names=["y"], dynamo=False)
    return file.getvalue()


def _prepare(contender: str, call: Call, threads: int) -> Callable[[], object]:
    x = torch.randn(call.T, call.B, call.D, generator=torch.Generator().manual_seed(0))
    if contender == "onnxruntime":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(_onnx(call), options, providers=["CPUExecutionProvider"])
        feed = {"x": x.numpy()}
        return lambda: session.run(["y"], feed)
    if contender == "openvino":
        import openvino

        core = openvino.Core()
        model = core.compile_model(core.read_model(_onnx(call)), "CPU", {"INFERENCE_NUM_THREADS": threads})
        request, feed = model.create_infer_request(), {0: x.numpy()}
        return lambda: request.infer(feed)
    if contender == "torch":
        module: Any = torch.nn
    else:
        import seqkernels.nn as module
    layer = getattr(module, call.kind)(call.D, call.H)

    def step() -> None:
        with torch.inference_mode():
            layer(x)

    return step


def _latencies(step: Callable[[], object], pause: float, count: int) -> list[float]:
    found = []
    for _ in range(count):
        if pause > 0:
            time.sleep(pause)
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


class Sentences(torch.utils.data.Dataset):
    """Random sentences; an item costs what tokenisation in Python costs."""

    def __len__(self) -> int:
        return 1600

    def __getitem__(self, i: int) -> tuple[list[int], int]:
        words = [str((i * 7919 + k) % 1000) for k in range(10 + i % 70)]
        return [hash(w) % 1000 for w in words for _ in range(20)][::20], i % 2


def _collate(batch: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([len(s) for s, _ in batch])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s, _ in batch], batch_first=True)
    return tokens, lengths, torch.tensor([label for _, label in batch])


def _epoch(contender: str, workers: int) -> float:
    """Seconds of an epoch of packed training."""
    torch.manual_seed(0)
    if contender == "torch":
        module: Any = torch.nn
    else:
        import seqkernels.nn as module
    embedding, layer, head = module.Embedding(1000, 64), module.LSTM(64, 128, batch_first=True), torch.nn.Linear(128, 2)
    parameters = [*embedding.parameters(), *layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters)
    loader = torch.utils.data.DataLoader(Sentences(), 32, collate_fn=_collate, num_workers=workers)
    start = time.perf_counter()
    for tokens, lengths, labels in loader:
        packed = torch.nn.utils.rnn.pack_padded_sequence(embedding(tokens), lengths, True, enforce_sorted=False)
        loss = torch.nn.functional.cross_entropy(head(layer(packed)[1][0][-1]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def _serve() -> None:
    """Answers requests, one JSON object per line."""
    steps: dict[tuple, Callable[[], object]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        contender, threads = request["contender"], request["threads"]
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            if "workers" in request:
                answer: Any = [_epoch(contender, request["workers"])]
            else:
                call = Call(**request["call"])
                key = (call, threads)
                if key not in steps:
                    steps[key] = _prepare(contender, call, threads or torch.get_num_threads())
                    _latencies(steps[key], 0, 5)
                answer = _latencies(steps[key], request["pause"], request["count"])
        except ImportError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


# --- the benchmark ---


@dataclass(frozen=True)
class Contender:
    name: str  # ours, torch, onnxruntime or openvino
    threads: int | None = 2  # None: the default of the environment
    environment: tuple[tuple[str, str], ...] = ()


class Process:
    """A contender in a process of its own."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(contender.environment),
        )

    def ask(self, **request: object) -> list[float] | str:
        pipes = self.process.stdin, self.process.stdout
        to, back = (p for p in pipes if p is not None)
        who = {"contender": self.contender.name, "threads": self.contender.threads}
        print(json.dumps(who | request), file=to, flush=True)
        return json.loads(back.readline())


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[Contender, Process]]:
    """The processes of all contenders so far."""
    started: dict[Contender, Process] = {}
    yield started
    for process in started.values():
        process.process.kill()
        process.process.wait()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that use a processor each."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    time.sleep(0.3 if started else 0)
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def _measure(
    bench: Any,
    processes: dict[Contender, Process],
    group: str,
    label: str,
    contenders: dict[str, Contender],
    request: dict[str, object],
    quantiles: dict[str, float],
    bars: dict[str, dict[str, float]],
    hogs: int = 0,
    rounds: int = 3,
) -> None:
    """Adds one row per quantile. With busy processes, a contender "quiet median" is the first one without them."""
    values: dict[str, list[list[float]]] = {}
    refused: dict[str, str] = {}
    for contender in contenders.values():
        if contender not in processes:
            processes[contender] = Process(contender)

    def ask(name: str, contender: Contender) -> None:
        answer = processes[contender].ask(**request)
        if isinstance(answer, str):
            refused[name] = answer
        else:
            values.setdefault(name, []).append(answer)

    def one_round() -> None:
        quiet = {"quiet median": next(iter(contenders.values()))} if hogs else {}
        for name, contender in quiet.items():
            ask(name, contender)
        with busy(hogs):
            for name, contender in contenders.items():
                if name not in refused:
                    ask(name, contender)

    bench.benchmark.pedantic(one_round, rounds=1 if bench.run.quick else rounds)
    for what, q in quantiles.items():
        found = {name: [quantile(of, q) for of in values[name]] for name in contenders if name in values}
        if "quiet median" in values:
            found["quiet median"] = [quantile(of, 0.5) for of in values["quiet median"]]
        bench.compare(group, f"{label}, {what}", found, bars=bars.get(what, {}), refused=refused)


OURS = {"ours": Contender("ours")}
TORCH = {"torch": Contender("torch")}


@pytest.mark.parametrize("call", [*STEPS, *LAYERS], ids=str)
@pytest.mark.parametrize("pause", PAUSES, ids=lambda ms: f"{ms} ms")
def test_after_a_pause(bench: Any, processes: dict[Contender, Process], call: Call, pause: int) -> None:
    if call.T > 1 and pause in (1, 5):
        pytest.skip("layers are measured after 0, 20 and 100 ms")
    contenders = OURS | {"ours, one thread": Contender("ours", 1)} | {peer: Contender(peer) for peer in PEERS}
    count = 200 if pause < 20 else 40 if pause == 20 else 20
    bars = {"median": {"ours, one thread": 1 / 1.3}} if call.T == 1 and pause == 20 else {}
    label = f"{call}, after {pause} ms" if pause else f"{call}, hot"
    request = {"call": call.__dict__, "pause": pause / 1000, "count": count}
    quantiles = {"median": 0.5, "95 %": 0.95}
    _measure(bench, processes, "latency after a pause", label, contenders, request, quantiles, bars)


@pytest.mark.parametrize("call", [STEPS[1], *LAYERS], ids=str)
@pytest.mark.parametrize("hogs", [1, 2])
def test_beside_busy_processes(bench: Any, processes: dict[Contender, Process], call: Call, hogs: int) -> None:
    bars = {"median": {"quiet median": 1 / 2.5}, "99.9 %": {"quiet median": 1 / 12}} if hogs == 1 and call.T > 1 else {}
    quantiles = {"median": 0.5, "95 %": 0.95, "99.9 %": 0.999}
    request = {"call": call.__dict__, "pause": 0.0, "count": 2000 if hogs == 1 else 500}
    label = f"{call}, {hogs} busy process{'es' if hogs > 1 else ''}"
    group = "latency beside busy processes"
    _measure(bench, processes, group, label, OURS | TORCH, request, quantiles, bars, hogs, rounds=1)


@pytest.mark.parametrize("call", [STEPS[1], *LAYERS], ids=str)
def test_more_threads_than_processors(bench: Any, processes: dict[Contender, Process], call: Call) -> None:
    eight = (("OMP_NUM_THREADS", "8"),)
    contenders = {name: Contender(name, None, eight) for name in ("ours", "torch")}
    contenders |= {"ours, two threads": Contender("ours")}
    request = {"call": call.__dict__, "pause": 0.0, "count": 300}
    quantiles = {"median": 0.5, "95 %": 0.95}
    _measure(bench, processes, "latency with OMP_NUM_THREADS=8", str(call), contenders, request, quantiles, {})


@pytest.mark.parametrize("workers", [0, 2])
def test_training_beside_a_data_loader(bench: Any, processes: dict[Contender, Process], workers: int) -> None:
    """An epoch of packed training; the ratio with two workers should not be below the ratio without workers."""
    label = f"LSTM D=64 H=128 B=32, {workers or 'no'} workers"
    group, request = "epoch of packed training", {"workers": workers}
    _measure(bench, processes, group, label, OURS | TORCH, request, {"epoch": 0.5}, {}, rounds=5)


if __name__ == "__main__":
    _serve()
