"""The build: instruction sets, threads, linked libraries, and dependencies of the import."""

from __future__ import annotations

import os
import pathlib
import platform
import runpy
import subprocess
import sys
import textwrap

import pytest
import torch

import seqkernels
from support.python import output, python

ISAS = tuple(seqkernels.build_info()["isas"])


def test_build_info() -> None:
    info = seqkernels.build_info()
    assert {"version", "torch", "isa", "isas", "cuda", "compiler"} <= info.keys()
    assert info["isa"] in info["isas"]
    assert isinstance(info["cuda"], bool)
    assert info["version"] == seqkernels.__version__
    assert info["compiler"] and info["torch"]


def processor_flags() -> set[str]:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no x86-64 processor")
@pytest.mark.skipif(not pathlib.Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_all_instruction_sets_of_the_processor_are_built() -> None:
    flags, isas = processor_flags(), set(ISAS)
    assert "portable" in isas
    assert ("avx2" in isas) == ({"avx2", "fma", "f16c"} <= flags)
    assert not ("avx512" in isas and "avx512f" not in flags)
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        assert "avx512" in isas


def test_best_instruction_set_is_selected() -> None:
    order = ["portable", "avx2", "avx512"]
    chosen = output("import seqkernels; print(seqkernels.build_info()['isa'])", SEQKERNELS_ISA="")
    assert chosen == max(ISAS, key=order.index)


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_of_the_environment(isa: str) -> None:
    assert output("import seqkernels; print(seqkernels.build_info()['isa'])", SEQKERNELS_ISA=isa) == isa


def test_unknown_instruction_set_in_the_environment_raises() -> None:
    result = python("import seqkernels; seqkernels.build_info()", SEQKERNELS_ISA="sse9")
    assert result.returncode == 1
    assert "SEQKERNELS_ISA" in result.stderr and "sse9" in result.stderr and "portable" in result.stderr


def test_set_isa() -> None:
    before = seqkernels.build_info()["isa"]
    try:
        for isa in ISAS:
            assert seqkernels._C.set_isa(isa) == before
            assert seqkernels.build_info()["isa"] == isa
            before = isa
        with pytest.raises(ValueError, match=r"must be one of .*portable.*, got .*sse9"):
            seqkernels._C.set_isa("sse9")
        assert seqkernels.build_info()["isa"] == before
    finally:
        seqkernels._C.set_isa(before)


def binaries() -> list[pathlib.Path]:
    return sorted(pathlib.Path(seqkernels._C.__file__).parent.glob("*.so"))


def test_build_without_cuda_links_no_cuda_libraries() -> None:
    if seqkernels.build_info()["cuda"]:
        pytest.skip("this build has CUDA")
    assert binaries()
    for path in binaries():
        content = path.read_bytes()
        for name in (b"libcuda", b"libc10_cuda", b"libtorch_cuda", b"libcublas", b"libcudnn"):
            assert name not in content, f"{path.name} names {name.decode()}"


def test_binary_has_no_search_paths() -> None:
    """The binary uses the torch libraries that `import torch` has loaded."""
    import shutil

    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    for path in binaries():
        dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        runpaths = [line for line in dynamic.splitlines() if "RPATH" in line or "RUNPATH" in line]
        assert not any(part.startswith("/") for line in runpaths for part in line.split("[")[-1].rstrip("]").split(":"))


cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.skipif(cpus < 2, reason="one processor only")
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="no /proc/self/task")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("B", [1, 32], ids=["units shared out", "rows shared out"])
def test_number_of_threads_matches_torch(threads: int, B: int) -> None:
    """Measures the CPU time of each thread in a process that only runs the ops."""
    seconds = output(
        """
        import os, pathlib, sys, time
        import torch, seqkernels

        threads, B = map(int, sys.argv[1:])
        seqkernels._C.set_always_parallel(True)
        torch.set_num_threads(1)
        T, H = 40, 256
        x, y, weights = torch.ones(T, B, H), torch.ones(T, B, H), list(torch.nn.LSTM(H, H).parameters())
        weights = [w.detach() for w in weights]
        inputs = x, None, None, weights, None, None, False
        forward, backward = torch.ops.seqkernels.lstm_forward, torch.ops.seqkernels.lstm_backward
        torch.set_num_threads(threads)

        def busy():
            ticks = {}
            for stat in pathlib.Path("/proc/self/task").glob("*/stat"):
                fields = stat.read_text().rpartition(")")[2].split()
                ticks[stat.parent.name] = int(fields[11]) + int(fields[12])
            return ticks

        before, start = busy(), time.monotonic()
        while time.monotonic() - start < 1.5:
            out = forward(*inputs)
            backward(y, None, None, *inputs, out[0], out[3], out[4], True, True)
        hertz = os.sysconf("SC_CLK_TCK")
        spent = sorted((t - before.get(n, 0)) / hertz for n, t in busy().items())
        print(" ".join(map(str, spent)))
        """,
        str(threads),
        str(B),
    )
    spent = [float(s) for s in seconds.split()]
    working = [s for s in spent if s > 0.25 * max(spent)]
    assert len(working) == threads, spent


@pytest.mark.parametrize("limit", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true", "OMP_NUM_THREADS=1"])
def test_fewer_threads_than_requested_do_not_deadlock(limit: str) -> None:
    """OpenMP may provide fewer threads than requested; barriers must use the actual number."""
    name, _, value = limit.partition("=")
    said = output(
        """
        import torch, seqkernels
        from seqkernels.nn import LSTM

        torch.set_num_threads(4)
        for T, B, D, H in [(50, 32, 128, 128), (20, 1, 256, 256)]:
            LSTM(D, H)(torch.zeros(T, B, D, requires_grad=True))[0].sum().backward()
        print("fine")
        """,
        **{name: value},
    )
    assert said == "fine"


@pytest.mark.parametrize("arguments", [dict(T=50, B=32, D=128, H=128), dict(T=50, B=1, D=256, H=256)], ids=str)
def test_explain_uses_the_number_of_threads(arguments: dict) -> None:
    answers = []
    for n in (1, 2):
        torch.set_num_threads(n)
        answers.append(seqkernels.explain("lstm", **arguments))
    assert answers[0] != answers[1]


def test_explain_raises_for_an_unknown_operator() -> None:
    with pytest.raises((ValueError, NotImplementedError), match="lstm"):
        seqkernels.explain("no_such_operator", T=1, B=1, D=1, H=1)


def test_torch_is_the_only_dependency() -> None:
    """Blocks all packages except torch, its requirements and the standard library."""
    said = output(
        """
        import sys, warnings

        allowed = {"torch", "torchgen", "functorch", "seqkernels"} | set(sys.stdlib_module_names)
        allowed |= set("typing_extensions sympy mpmath networkx jinja2 markupsafe fsspec filelock nvidia cuda".split())

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] not in allowed:
                    raise ModuleNotFoundError(f"blocked: {name}", name=name)

        sys.meta_path.insert(0, Blocker())
        warnings.simplefilter("ignore")
        import torch
        import seqkernels
        from seqkernels.nn import LSTM

        x = torch.zeros(4, 3, 5, requires_grad=True)
        LSTM(5, 6)(x)[0].sum().backward()
        seqkernels.reference.lstm(x, None, list(LSTM(5, 6).parameters()))
        print("fine")
        """
    )
    assert said.splitlines()[-1] == "fine"


def test_import_starts_no_threads_and_prints_nothing() -> None:
    code = (
        "import torch, threading; n = threading.active_count(); import seqkernels; assert threading.active_count() == n"
    )
    result = python(code)
    assert result.returncode == 0 and not result.stdout
    assert "seqkernels" not in result.stderr


GUARDED = """
    # Places each input directly after, and directly before, a page without access rights.
    import ctypes, mmap, sys
    import torch, seqkernels
    from support.cases import CASES, make_inputs, run

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, kept = mmap.PAGESIZE, []

    def guarded(t, at_end):
        size = t.numel() * t.element_size()
        if not size:
            return t
        inner = -(-size // page) * page
        area = mmap.mmap(-1, inner + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        start = page + (inner - size if at_end else 0)
        copy = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape)
        copy.copy_(t)
        for edge in (base, base + page + inner):
            assert libc.mprotect(edge, page, 0) == 0
        kept.append(area)
        return copy

    seqkernels._C.set_isa(sys.argv[1])
    dtype = getattr(torch, sys.argv[2])
    for case in CASES:
        inputs = make_inputs(case, dtype)
        want = run(seqkernels.functional.lstm, inputs)
        for at_end in (True, False):
            got = run(seqkernels.functional.lstm, inputs.map(lambda t: guarded(t, at_end)))
            assert all(torch.equal(got[n], want[n]) for n in want), case
    print("fine", flush=True)
    import os
    os._exit(0)  # the guarded pages cannot be freed individually
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page protection requires libc of Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", ISAS)
def test_no_reads_outside_of_inputs(isa: str, dtype: str) -> None:
    tests = str(pathlib.Path(__file__).parent)
    result = python(f"import sys; sys.path.insert(0, {tests!r})\n" + textwrap.dedent(GUARDED), isa, dtype)
    assert result.returncode == 0 and result.stdout.strip() == "fine", result.stderr or f"exit {result.returncode}"


CHECKED = """
    import sys
    import torch, seqkernels
    from support.cases import CASES, make_inputs, run

    seqkernels._C.set_isa(sys.argv[1])
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            run(seqkernels.functional.lstm, make_inputs(case, dtype))
    print("fine")
"""
OVERRUN = "import ctypes, torch; t = torch.zeros(1003); ctypes.memset(t.data_ptr() + 4012, 1, 1); del t; print('fine')"


@pytest.mark.parametrize("isa", ISAS)
def test_no_writes_beyond_allocations(isa: str) -> None:
    """The debug allocator of glibc checks the end of each block when it is freed, including those of the kernels."""
    checking = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    if python(OVERRUN, **checking).returncode != -6:
        pytest.skip("libc_malloc_debug.so.0 of glibc is missing or does not intercept allocations of torch")
    tests = str(pathlib.Path(__file__).parent)
    result = python(f"import sys; sys.path.insert(0, {tests!r})\n" + textwrap.dedent(CHECKED), isa, **checking)
    assert result.returncode == 0 and result.stdout.strip() == "fine", result.stderr or f"exit {result.returncode}"


def test_forked_process() -> None:
    """A forked process with one thread, as a worker of a data loader, after the parent has used several threads."""
    said = output(
        """
        import os, signal
        import torch, seqkernels
        from seqkernels.nn import LSTM

        lstm, x = LSTM(64, 64), torch.zeros(20, 16, 64)
        want = lstm(x)[0]
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            torch.set_num_threads(1)
            os._exit(0 if torch.equal(lstm(x)[0], want) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert said == "0"


def test_extension_matches_the_torch_version() -> None:
    """The imported torch has the minor version of the build or a later one."""
    built = tuple(int(p) for p in seqkernels.build_info()["torch"].split("+")[0].split(".")[:2])
    assert built >= (2, 11)
    assert torch.__version__


# ---- python -m seqkernels


def test_report_of_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert runpy.run_module("seqkernels", run_name="seqkernels.__main__")["main"]([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"build: isa       {seqkernels.build_info()['isa']}" in lines
    assert [line.split()[0] for line in lines if line.endswith("passed")] == [
        "LSTM", "GRU", "RNN", "MultiheadAttention", "embedding_bag", "scaled_dot_product_attention",
    ]  # fmt: skip


def test_report_refuses_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("seqkernels", run_name="seqkernels.__main__")["main"](["bogus"])
    assert "unrecognized arguments: bogus" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [2.0, float("nan")])
def test_report_of_a_wrong_build(wrong: float, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    original = seqkernels.functional.embedding_bag
    monkeypatch.setattr(seqkernels.functional, "embedding_bag", lambda *given: wrong * original(*given))
    assert runpy.run_module("seqkernels", run_name="seqkernels.__main__")["main"]([]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")] == [
        "embedding_bag"
    ]
