"""Parallel regions: claims of shares, late threads, exceptions, forks, cold calls, the same bits for any threads."""

from __future__ import annotations

import ast
import os
import pathlib
import shutil
import subprocess
import threading

import pytest
import torch

import seqkernels
from seqkernels import nn
from tests.support.python import output

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
linux = pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="no /proc/self/task")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """check_parallel.cpp with ThreadSanitizer."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler to build the check program; {compiler} is not installed")
    built = tmp_path_factory.mktemp("parallel") / "check_parallel"
    sources = [HERE / "check_parallel.cpp", CSRC / "common" / "parallel.cpp"]
    options = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *options, f"-I{HERE / 'fake'}", f"-I{CSRC}", *map(str, sources), "-o", str(built)]
    result = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in result.stderr and "tsan" in result.stderr:
        pytest.skip("needs ThreadSanitizer to detect races; the compiler has no libtsan")
    assert result.returncode == 0, result.stderr
    return built


@pytest.mark.parametrize("check", ["phases", "tasks", "fails", "callers", "fork"])
def test_shares_run_once_and_in_order(program: pathlib.Path, check: str) -> None:
    """1 to 16 threads that start late by up to 0.3 ms; ThreadSanitizer reports a share that runs too early or twice."""
    for _ in range(3):
        result = subprocess.run([str(program), check], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0 and result.stdout.strip() == "passed", result.stderr[-3000:]


MODELS = {
    "units": (lambda: nn.LSTM(96, 160), (9, 1, 96)),
    "rows": (lambda: nn.GRU(32, 48, bidirectional=True), (9, 16, 32)),
    "projection": (lambda: nn.LSTM(96, 160, proj_size=64), (9, 2, 96)),
    "two stages": (lambda: nn.NestedLSTM(96, 160), (9, 1, 96)),
    "norm": (lambda: nn.LSTM(96, 160, layer_norm=True), (9, 1, 96)),
}


@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_threads(name: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(*shape)

    def run() -> list[torch.Tensor]:
        input = x.clone().requires_grad_()
        y = model(input)[0]
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [input, *model.parameters()])]

    for threads in (2, 3, 8, 16):
        torch.set_num_threads(threads)
        seqkernels._C.set_always_parallel(False)
        expected = run()  # one thread: the first call
        seqkernels._C.set_always_parallel(True)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(run(), expected))
    torch.set_num_threads(1)
    assert torch.equal(run()[0], expected[0])


def test_python_threads_call_the_same_module() -> None:
    torch.set_num_threads(2)
    model, x = nn.LSTM(96, 160), torch.randn(30, 2, 96)
    expected, found = model(x)[0].detach(), []

    def call() -> None:
        for _ in range(20):
            found.append(torch.equal(model(x)[0], expected))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 80 and all(found)


def test_table_of_the_documentation() -> None:
    """Groups of sequences times shares of units, and thousands of multiply-adds of a share per step."""
    rows = [
        line
        for line in (HERE.parents[1] / "docs" / "threads.md").read_text().partition("## More threads")[2].splitlines()
        if line.startswith("| (")
    ]
    assert len(rows) == 6
    for row in rows:
        shape, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        T, B, D, H = ast.literal_eval(shape)
        for threads, cell in zip((2, 4, 8, 16, 32, 64), cells, strict=True):
            torch.set_num_threads(threads)
            plan = seqkernels.explain("lstm", T=T, B=B, D=D, H=H)
            groups, shares = plan["row_groups"], plan["unit_groups"]
            assert cell == f"{groups}x{shares}, {4 * H * H * B / (groups * shares) / 1e3:.0f}"


COUNT = """
import os, time
import torch, seqkernels
from seqkernels import nn

torch.set_num_threads(2)
model, x = nn.LSTM(128, 128), torch.randn(1, 1, 128)
count = lambda: len(os.listdir("/proc/self/task"))
torch.set_grad_enabled(False)
before = count()
"""


@linux
def test_rare_small_calls_start_no_threads() -> None:
    """A second thread would arrive after the work is complete, and waking it costs more than the call."""
    said = output(COUNT + "for _ in range(30): time.sleep(0.01); model(x)\nprint(count() - before)")
    assert said == "0"


@linux
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor only")
def test_frequent_calls_and_long_calls_start_threads() -> None:
    assert output(COUNT + "for _ in range(3000): model(x)\nprint(count() > before)") == "True"
    assert output(COUNT + "model(torch.randn(500, 32, 128))\nprint(count() > before)") == "True"


@linux
def test_children_after_fork() -> None:
    """torch's threads do not exist in the child; a parallel region that waited for them would never end."""
    said = output(
        COUNT
        + """
import signal, threading
x = torch.randn(200, 16, 128)
expected = model(x)[1][0]  # small: torch compares it on one thread
table, rows = torch.randn(5000, 16, requires_grad=True), torch.randint(5000, (4000,))
stop = False
def work():
    while not stop: model(x)
other = threading.Thread(target=work)
for busy in (False, True):  # the pool sleeps; another thread is in a call
    if busy: other.start()
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        with torch.enable_grad():
            found = seqkernels.functional.embedding(rows, table)
        found.backward(found)
        os._exit(0 if torch.equal(model(x)[1][0], expected) and found[7].equal(table[rows[7]]) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop = True
other.join()
"""
    )
    assert said.split() == ["0", "0"]


def test_exit_during_a_call() -> None:
    """A daemon thread is in a call that takes ten seconds while the interpreter exits."""
    said = output(
        """
        import threading, time
        import torch, seqkernels

        torch.set_num_threads(2)
        x, weights = torch.randn(2000, 64, 16), [w.detach() for w in torch.nn.LSTM(16, 512).parameters()]
        call = lambda: torch.ops.seqkernels.lstm_forward(x, None, None, weights, None, None, False)
        threading.Thread(target=call, daemon=True).start()
        time.sleep(0.3)
        print("fine")
        """
    )
    assert said == "fine"
