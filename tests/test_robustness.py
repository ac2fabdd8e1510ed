"""Threads of Python, workers, interrupts, memory, missing packages and damaged binaries: no harm, and clear errors."""

from __future__ import annotations

import ctypes
import gc
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.multiprocessing

import seqkernels
from seqkernels import _binary, nn
from support import calls
from support.python import output, python

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: mallinfo2, signals, fork, ELF files")


def repeatable() -> dict[str, calls.Call]:
    """Calls whose results do not depend on random numbers or on earlier calls; one of each function."""
    found: dict[str, calls.Call] = {}
    for name, call in calls.calls().items():
        random = any(word in name for word in ("dropout", "zoneout", "lengths", "Fused", "inference.prepare"))
        if not random:
            found.setdefault(re.split(r"[-,]", name)[0], call)
    return found


# ---- concurrency


def test_python_threads_call_all_operators() -> None:
    """Each thread begins with another operator, forward and backward, and changes the number of torch's threads."""
    table = list(repeatable().values())
    expected = [calls.run(call) for call in table]
    failures: list[str] = []

    def work(first: int) -> None:
        for i in range(len(table)):
            at = (first + i) % len(table)
            if i % 10 == 0:
                torch.set_num_threads(1 + (first + i) // 10 % 4)
            got = calls.run(table[at])
            if not all(torch.equal(a, b) or close(a, b) for a, b in zip(got, expected[at], strict=True)):
                failures.append(table[at].name)

    workers = [threading.Thread(target=work, args=(n * len(table) // 6,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Weight gradients and products of torch may differ in the last bits with another number of threads."""
    return torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


class Rows(torch.utils.data.Dataset):
    """Results of operators as items of a dataset."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        torch.manual_seed(i)
        model = nn.LSTM(5, 6)
        model(torch.ones(3, 2, 5))[0].sum().backward()
        bag = nn.EmbeddingBag(9, 4)(torch.tensor([[1, 2, i]]))
        return torch.cat([model.weight_hh_l0.grad.flatten(), bag.detach().flatten()])


@linux
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_workers_of_a_data_loader(method: str) -> None:
    expected = torch.stack([Rows()[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), expected)


@linux
def test_interrupt_ends_a_loop_of_calls() -> None:
    """KeyboardInterrupt arrives at the end of the call in progress; the module works after it."""
    said = output(
        """
        import os, signal, threading, time
        import torch
        from seqkernels import nn

        signal.signal(signal.SIGINT, signal.default_int_handler)
        model, x = nn.LSTM(32, 64), torch.randn(100, 4, 32)
        with torch.no_grad():
            expected = model(x)[0]
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            try:
                begin = time.monotonic()
                while time.monotonic() - begin < 30: model(x)
                print("not interrupted")
            except KeyboardInterrupt:
                print("interrupted", time.monotonic() - begin < 10, torch.equal(model(x)[0], expected))
        """
    )
    assert said == "interrupted True True"


# ---- memory


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def allocated() -> int:
    """Bytes that malloc has handed out, and those of small objects of Python."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd + 64 * sys.getallocatedblocks()


def has_mallinfo2() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


mallinfo = pytest.mark.skipif(not has_mallinfo2(), reason="needs mallinfo2 of glibc 2.33 or later")


def growth(function, times: int) -> int:
    """Bytes that remain allocated per 1000 calls; the least of three measurements, because caches fill up."""
    torch.set_num_threads(1)
    for _ in range(20):
        function()
    gc.freeze()  # so that gc.collect, which removes cycles of objects of the calls, looks at new objects only
    found = []
    for _ in range(3):
        gc.collect()
        before = allocated()
        for _ in range(times):
            function()
        gc.collect()
        found.append((allocated() - before) * 1000 // times)
    gc.unfreeze()
    return min(found)


@mallinfo
def test_growth_is_measured() -> None:
    kept: list[torch.Tensor] = []
    assert growth(lambda: kept.append(torch.zeros(4)), 100) > 30_000


@mallinfo
@pytest.mark.parametrize("name", calls.registered_ops())
def test_ops_do_not_leak(name: str, raw_memory: None) -> None:
    """All calls of all ops are more than 10,000."""
    op = getattr(torch.ops.seqkernels, name).default
    arguments = calls.cloned(calls.calls_of_ops()[name][0])
    assert growth(lambda: op(*arguments), 60) < 30_000


@mallinfo
def test_refused_calls_do_not_leak() -> None:
    x, weights = torch.randn(3, 2, 5), [torch.randn(24, 5), torch.randn(24, 6), torch.randn(24), torch.randn(24)]
    lengths = torch.tensor([3, 9])

    def call() -> None:
        try:
            torch.ops.seqkernels.lstm_forward(x, None, None, weights, None, lengths, False)
        except RuntimeError as error:
            refused.append("lengths" in str(error))

    refused: list[bool] = []
    assert growth(call, 300) < 30_000
    assert refused and all(refused)


# ---- builds


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86-64 processor: sets beside portable"
)
def test_instruction_sets_above_the_processor_are_refused() -> None:
    usable = seqkernels.build_info()["isas"]
    above = [isa for isa in ("avx2", "avx512", "avx10") if isa not in usable]
    result = python("import seqkernels; seqkernels.build_info()", SEQKERNELS_ISA=above[-1])
    assert result.returncode == 1
    text = f"the environment variable SEQKERNELS_ISA must be one of \\[{', '.join(usable)}\\] .*, got '{above[-1]}'"
    assert re.search(text, result.stderr)
    for isa in above:
        with pytest.raises(ValueError, match=f"set_isa: name must be one of .*, got '{isa}'"):
            seqkernels._C.set_isa(isa)


def test_works_without_optional_packages() -> None:
    """Without NumPy, Triton and a GPU: all operators run, and backend="triton" gives the reason."""
    said = output(
        """
        import sys, warnings
        sys.modules |= dict.fromkeys(["numpy", "triton"])  # their import raises ImportError
        warnings.simplefilter("ignore")
        import torch, seqkernels
        assert not torch.cuda.is_available()
        from seqkernels import functional as F
        x = torch.randn(4, 3, 8)
        F.embedding_bag(torch.tensor([[1, 2]]), torch.randn(5, 4))
        F.scaled_dot_product_attention(x, x, x)
        F.crf_viterbi(x, torch.randn(8, 8))
        seqkernels.nn.LSTM(8, 6)(x)
        try: F.embedding_bag(torch.tensor([[1, 2]]), torch.randn(5, 4), backend="triton")
        except NotImplementedError as error: print("refused:", "riton" in str(error))
        """,
        CUDA_VISIBLE_DEVICES="",
    )
    assert said == "refused: True"


def copy_of_package(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the package in `folder`; returns its binary."""
    here = pathlib.Path(seqkernels.__file__).parent
    shutil.copytree(here, folder / "seqkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    binary = folder / "seqkernels" / pathlib.Path(seqkernels._C.__file__).name
    shutil.copy(seqkernels._C.__file__, binary)
    return binary


def imported(folder: pathlib.Path) -> subprocess.CompletedProcess:
    """An import of the copy, without the finders of editable installations, which know other binaries."""
    return python(
        f"""
        import sys
        sys.path.insert(0, {str(folder)!r})
        sys.meta_path = [f for f in sys.meta_path if not str(getattr(f, "__module__", "")).startswith("__editable__")]
        import seqkernels
        print(seqkernels.__file__)
        """
    )


REMEDY = "ImportError: seqkernels: the compiled module seqkernels._C "


@linux
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "not a library", "another version of Python"])
def test_damaged_binaries_give_one_clear_error(damage: str, tmp_path: pathlib.Path) -> None:
    binary = copy_of_package(tmp_path)
    content = binary.read_bytes()
    if damage == "missing":
        binary.unlink()
    elif damage == "empty":
        binary.write_bytes(b"")
    elif damage == "truncated":
        binary.write_bytes(content[: len(content) // 3])
    elif damage == "not a library":
        binary.write_bytes(b"#!/bin/sh\n" * 1000)
    else:
        binary.rename(binary.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    result = imported(tmp_path)
    assert result.returncode == 1, f"exit status {result.returncode}"
    assert result.stderr.count(REMEDY) == 1 and "pip install" in result.stderr.splitlines()[-1]


@linux
@pytest.mark.parametrize(
    "name, other, text",
    [
        (b"aoti_torch_get_sizes\x00", b"aoti_torch_get_sizeZ\x00", "undefined symbol: aoti_torch_get_sizeZ"),
        (b"crf_viterbi(", b"crf_viterbj(", "was built from other sources than the Python files"),
        (b", int paths) ->", b", int piths) ->", rf"schemas [0-9a-f]{{16}}, not {_binary.SCHEMAS}"),
    ],
    ids=["a symbol that torch does not have", "an op that the binary does not have", "an argument of another name"],
)
def test_binary_of_another_torch_or_of_other_sources(
    name: bytes, other: bytes, text: str, tmp_path: pathlib.Path
) -> None:
    binary = copy_of_package(tmp_path)
    content = binary.read_bytes()
    assert name in content
    binary.write_bytes(content.replace(name, other))
    result = imported(tmp_path)
    assert result.returncode == 1 and result.stderr.count(REMEDY) == 1, result.stderr[-2000:]
    assert re.search(text, result.stderr) and "pip install" in result.stderr.splitlines()[-1]


def test_time_of_calls_is_bounded_by_their_sizes() -> None:
    """An upper bound of lengths that is far too large must not be a number of iterations."""
    q = torch.randn(6, 2, 8)
    begin = time.monotonic()
    cu = torch.tensor([0, 4, 6])
    seqkernels.functional.varlen_attention(q, q, q, cu, cu, 2**40, 2**40)
    assert time.monotonic() - begin < 5
