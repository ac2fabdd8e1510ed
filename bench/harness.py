"""Measurements: alternating contenders in one process, parity, load of the machine, best matrix product and copy, peak
memory.

As a script, it makes one memory measurement in a separate process (see `peak_memory`).
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from report import Roof
from torch import Tensor

Results = dict[str, Tensor]


@dataclass
class Contender:
    """An implementation that computes a row.

    step: the timed function, which makes `calls` calls. before: runs before each step and is not timed.
    result: makes one step and returns the results for the parity test.
    refused: the reason why the contender does not support the row; it is then listed, but not timed.
    work: work of one call, if it differs from that of the row.
    on_cuda: whether the steps run on the current CUDA device and are timed by events.
    """

    name: str
    step: Callable[[], object] = lambda: None
    result: Callable[[], Results] | None = None
    before: Callable[[], None] | None = None
    refused: str = ""
    calls: int = 1
    work: float = 0.0
    on_cuda: bool = False


def compiled(name: str, function: Callable, make: Callable[[Callable], Contender], **options: object) -> Contender:
    """The contender make(torch.compile(function)) with one graph, which is compiled here and not timed.

    options: settings of torch._dynamo.config.
    """
    import torch._dynamo

    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(**options), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contender = make(torch.compile(function, fullgraph=True))
            for _ in range(2):
                if contender.before is not None:
                    contender.before()
                contender.step()
    except Exception as error:  # the table lists the error as the reason
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("Explanation:")), lines[0] if lines else repr(error))
        return Contender(name, refused=reason.removeprefix("Explanation: "))
    return contender


def of_tensors(name: str, function: Callable[..., Tensor], tensors: Sequence[Tensor], backward: bool) -> Contender:
    """A contender that calls a function of differentiable tensors, without autograd or with their gradients."""
    with torch.no_grad():
        shape = function(*tensors).shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    def both() -> tuple[Tensor, ...]:
        out = function(*tensors)
        return out.detach(), *torch.autograd.grad(out, tensors, upstream)

    def result() -> Results:
        found = both() if backward else (forward(),)
        return {f"{i}": t for i, t in enumerate(found)}

    return Contender(name, both if backward else forward, result)


# --- parity ---


def check_parity(pairs: Sequence[tuple[Contender, Contender]], tolerance: float) -> dict[str, float]:
    """For each pair (reference, contender), raise if a result differs by more than `tolerance` of its largest element.

    One of the two may have fewer results: a padded layer has no last state of each sequence, and onnxruntime has no
    gradients. Returns the seconds of each contender, by name.
    """
    seconds: dict[str, float] = {}

    def results_of(contender: Contender) -> Results:
        assert contender.result is not None
        start = time.perf_counter()
        results = contender.result()
        seconds[contender.name] = time.perf_counter() - start
        return results

    known: dict[int, Results] = {}  # a reference may take a minute and runs once
    for reference, contender in pairs:
        if id(reference) not in known:
            known[id(reference)] = results_of(reference)
        expected, results = known[id(reference)], results_of(contender)
        if not results or not (results.keys() <= expected.keys() or results.keys() >= expected.keys()):
            raise AssertionError(f"{contender.name}: results {sorted(results)} do not match {sorted(expected)}")
        for key in results.keys() & expected.keys():
            got, want = results[key], expected[key].double()
            if got.shape != want.shape:
                raise AssertionError(f"{contender.name}: {key} has shape {list(got.shape)}, not {list(want.shape)}")
            error = ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
            if not error <= tolerance:  # also fails for NaN
                raise AssertionError(
                    f"{contender.name}: {key} differs from {reference.name} by {error:.2e} of its largest element; "
                    f"the tolerance is {tolerance:.0e}"
                )
    return seconds


# --- timing ---


def settle(limit_s: float = 0.25) -> None:
    """Sleep until the worker threads of the last contender sleep.

    Workers of OpenMP and onnxruntime spin for milliseconds after a call and occupy processors of the next contender.
    """
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        cpu, wall = time.process_time(), time.perf_counter()
        time.sleep(0.002)
        if time.process_time() - cpu < 0.2 * (time.perf_counter() - wall):
            return


def sample(contender: Contender, number: int, warm: bool) -> float:
    """Seconds per call over `number` steps, after untimed steps if `warm`."""
    if contender.on_cuda:
        return sample_on_cuda(contender, number, warm)
    before, step, clock = contender.before, contender.step, time.perf_counter
    settle()
    ready = clock() + WARM_S
    while warm:
        if before is not None:
            before()
        step()
        warm = clock() < ready
    if before is None:
        start = clock()
        for _ in range(number):
            step()
        return (clock() - start) / (number * contender.calls)
    total = 0.0
    for _ in range(number):
        before()
        start = clock()
        step()
        total += clock() - start
    return total / (number * contender.calls)


def sample_on_cuda(contender: Contender, number: int, warm: bool) -> float:
    """Seconds per call measured by CUDA events; `before` is not timed.

    The device does not wait for the host, unless a step is shorter than its launches.
    """
    before, step = contender.before, contender.step
    ready = time.perf_counter() + WARM_ON_CUDA_S
    while warm:
        if before is not None:
            before()
        step()
        torch.cuda.synchronize()
        warm = time.perf_counter() < ready
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 if before is None else 2 * number)]
    if before is None:
        marks[0].record()
    for i in range(number):
        if before is not None:
            before()
            marks[2 * i].record()
        step()
        if before is not None:
            marks[2 * i + 1].record()
    if before is None:
        marks[1].record()
    torch.cuda.synchronize()
    milliseconds = sum(start.elapsed_time(end) for start, end in zip(marks[::2], marks[1::2]))
    return milliseconds / 1000 / (number * contender.calls)


@dataclass
class Plan:
    """Plan of a measurement: steps per sample for each contender, and number of rounds."""

    numbers: list[int]
    warm: list[bool]
    rounds: int


MIN_SAMPLE_S = 0.02  # minimum length of a sample, which limits the effect of the clock resolution and of interrupts
WARM_BELOW_S = 0.1  # shorter steps are affected by the caches that the previous contender filled
WARM_S = 0.05  # on a virtual machine, two idle processors may share a core for tens of milliseconds after waking up
WARM_ON_CUDA_S = 0.01
SLOW_S = 1.0  # longer steps are not estimated a second time
MIN_ROUNDS, MAX_ROUNDS = 3, 51


def plan(contenders: Sequence[Contender], budget_s: float, known: dict[str, float]) -> Plan:
    """Estimate the time of each contender and plan rounds that take about `budget_s` in total.

    known: seconds of a first step by name, which is sufficient for slow contenders.
    """
    rough = []
    for contender in contenders:
        if known.get(contender.name, 0.0) > SLOW_S:
            rough.append(known[contender.name])
            continue
        seconds = sample(contender, 1, warm=False)
        if seconds * contender.calls < WARM_BELOW_S:
            seconds = min(sample(contender, 3, warm=True) for _ in range(2))
        rough.append(seconds * contender.calls)
    # A slow peer allows few rounds; fast contenders then make several steps per sample.
    target = max(MIN_SAMPLE_S, max(rough) / 20)
    numbers = [max(1, math.ceil(target / seconds)) for seconds in rough]
    round_s = sum(number * seconds + WARM_S + 0.005 for number, seconds in zip(numbers, rough))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget_s / round_s)))
    return Plan(numbers, [seconds < WARM_BELOW_S for seconds in rough], rounds)


@contextmanager
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- the machine ---


class LoadMeter:
    """Number of processors used by other processes, and by the host as steal time, since the creation of the meter."""

    def __init__(self) -> None:
        self.wall = time.perf_counter()
        self.busy = self._busy()
        self.own = self._own()

    @staticmethod
    def _own() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    @staticmethod
    def _busy() -> float:
        """Busy seconds of the processors available to this process; NaN if /proc does not provide them."""
        try:
            mine = {f"cpu{i}" for i in os.sched_getaffinity(0)}
            lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
            ticks = 0
            for line in lines:
                name, *fields = line.split()
                if name in mine:
                    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                    ticks += user + nice + system + irq + softirq + steal
            return ticks / os.sysconf("SC_CLK_TCK")
        except (AttributeError, OSError, ValueError):
            return math.nan

    def others(self) -> float:
        wall = time.perf_counter() - self.wall
        return max(0.0, (self._busy() - self.busy) - (self._own() - self.own)) / wall if wall > 0 else math.nan


def other_load(window_s: float = 1.0) -> float:
    """Processors used by others in a window in which this process sleeps."""
    settle()
    meter = LoadMeter()
    time.sleep(window_s)
    return meter.others()


def wait_until_quiet(limit_s: float, quiet_below: float) -> float:
    """Measure the load of others until it is low or `limit_s` is over, and return the last measurement."""
    deadline = time.perf_counter() + limit_s
    load = other_load()
    while load > quiet_below and time.perf_counter() < deadline:
        time.sleep(2.0)
        load = other_load()
    return load


def best_matmul(seconds_each: float = 0.15) -> Roof:
    """The best float32 matrix product over several sizes and both CPU libraries of torch.

    torch.mm uses MKL, which is often slower than oneDNN on processors of other vendors.
    """

    def onednn(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    best = Roof(0.0, "none")
    for name, product in (("torch.mm", torch.mm), ("oneDNN linear", onednn)):
        for size in (256, 512, 768, 1024, 1536, 2048):
            a, b = torch.randn(size, size), torch.randn(size, size)
            try:
                product(a, b)
            except (AttributeError, RuntimeError, NotImplementedError):
                break  # torch was built without it
            settle()
            fastest, end = math.inf, time.perf_counter() + seconds_each
            while time.perf_counter() < end:
                start = time.perf_counter()
                product(a, b)
                fastest = min(fastest, time.perf_counter() - start)
            if 2.0 * size**3 / fastest > best.rate:
                best = Roof(2.0 * size**3 / fastest, f"{name} {size}x{size}x{size}, best of the run")
    return best


def last_level_cache() -> int:
    """Size of the largest cache of the first processor in bytes; 32 MiB if it is unknown."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=2**25)


def best_copy(seconds_each: float = 0.4) -> Roof:
    """The best copy of a block larger than the caches; counts bytes read and bytes written.

    The copy of torch writes through the caches, and memmove of the C library bypasses them; which is faster depends on
    the machine. memmove runs in the number of threads of torch.
    """
    threads = torch.get_num_threads()
    size = min(max(2**28, 4 * last_level_cache()), 2**30)
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    part = size // threads

    def move(i: int) -> None:
        start, end = i * part, size if i == threads - 1 else (i + 1) * part
        ctypes.memmove(target.data_ptr() + start, source.data_ptr() + start, end - start)  # releases the GIL

    best = Roof(0.0, "none")
    with ThreadPoolExecutor(threads) as pool:
        copies: dict[str, Callable[[], object]] = {
            "torch's copy": lambda: target.copy_(source),
            "memmove": lambda: list(pool.map(move, range(threads))),
        }
        for name, copy in copies.items():
            settle()
            fastest, end = math.inf, time.perf_counter() + seconds_each
            while time.perf_counter() < end:
                start = time.perf_counter()
                copy()
                fastest = min(fastest, time.perf_counter() - start)
            if 2.0 * size / fastest > best.rate:
                best = Roof(2.0 * size / fastest, f"{name} of {size >> 20} MiB, best of the run")
    return best


def best_on_cuda(name: str, work: float, step: Callable[[], object], limit_s: float = 0.3) -> Roof:
    contender, fastest, end = Contender(name, step, on_cuda=True), math.inf, time.perf_counter() + limit_s
    while time.perf_counter() < end:
        fastest = min(fastest, sample_on_cuda(contender, 1, warm=fastest == math.inf))
    return Roof(work / fastest, f"{name}, best of the run")


def best_matmul_on_cuda() -> Roof:
    """Uses random numbers, because products of zeros are faster."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return best_on_cuda(f"torch.mm {size}x{size}x{size}, bfloat16", 2.0 * size**3, lambda: torch.mm(a, b))


def best_copy_on_cuda() -> Roof:
    size = 2**32
    source, target = (torch.empty(size, device="cuda", dtype=torch.uint8) for _ in range(2))
    source.random_(0, 256)
    return best_on_cuda("copy of 4096 MiB", 2.0 * size, lambda: target.copy_(source))


Roofs = dict[str, Callable[[], Roof]]
ROOFS: dict[str, Roofs] = {  # by device and unit of work
    "cpu": {"flop": best_matmul, "byte": best_copy},
    "cuda": {"flop": best_matmul_on_cuda, "byte": best_copy_on_cuda},
}


# --- peak memory ---


@dataclass
class MemoryCase:
    """warm: starts threads and loads code with a tiny input. step: a step of the row. Both use preallocated inputs."""

    warm: Callable[[], object]
    step: Callable[[], object]


def _status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def _measure_memory(factory: str, arguments: dict[str, object], threads: int) -> float:
    torch.set_num_threads(threads)
    module, _, function = factory.partition(":")
    case: MemoryCase = getattr(importlib.import_module(module), function)(**arguments)
    case.warm()
    gc.collect()
    level = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM to the current level
    for _ in range(2):  # the second step includes memory kept by the first
        case.step()
    return _status("VmHWM") - level


def peak_memory(factory: str, arguments: dict[str, object], threads: int) -> float:
    """Peak memory of a step in MiB, in addition to its inputs, in a new process.

    `factory` is "module:function", which creates the MemoryCase from `arguments`. The peak is VmHWM, reset after the
    warm-up, so that imports and code loading do not hide it as in ru_maxrss. With a fixed mmap threshold, glibc returns
    each freed tensor to the system, so that the peak counts the tensors that are alive at the same time.
    """
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),  # the same packages
    }
    command = [sys.executable, __file__, factory, json.dumps(arguments), str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory measurement of {factory} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def saved_memory(forward: Callable[[], object], given: Sequence[Tensor]) -> float:
    """Exact MiB that autograd saves in a forward pass, excluding the given tensors."""
    known, kept = {t.untyped_storage().data_ptr() for t in given}, {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        results = forward()  # noqa: F841  (as long as it lives, so does what was kept)
        return sum(size for address, size in kept.items() if address not in known) / 2**20


if __name__ == "__main__":
    print(_measure_memory(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])))
