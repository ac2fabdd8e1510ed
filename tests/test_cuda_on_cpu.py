"""The emulation of CUDA kernels: its results, and its detection of faults.

If a GPU is present, the same kernels run on it, to verify that the emulation agrees with the hardware.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import shutil
import subprocess
import time

import cuda_on_cpu
import numpy as np
import pytest
import torch


@functools.cache
def library() -> ctypes.CDLL:
    """The emulation; runs of only the tests marked `cuda` do not require it."""
    return cuda_on_cpu.load("_selftest")


def emulate(name: str, *arrays: np.ndarray, variant: int = 0) -> None:
    cuda_on_cpu.SelfTest(library())(name, *arrays, variant=variant)


ORDERS = [dict(), dict(backward=1), dict(seed=1), dict(seed=2)]


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> cuda_on_cpu.SelfTest:
    """The same kernels on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        pytest.skip("clusters need compute capability 9.0")
    target = tmp_path_factory.mktemp("selftest") / "selftest.so"
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler=-fPIC"]
    source = cuda_on_cpu.FOLDER / "selftest_cuda.cu"
    subprocess.run([nvcc, *flags, "-I", source.parents[2] / "csrc", source, "-o", target], check=True)
    return cuda_on_cpu.SelfTest(ctypes.CDLL(str(target)))


@pytest.fixture(
    params=[*ORDERS, *cuda_on_cpu.SCHEDULES, pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.sanitize])],
    ids=str,
)
def run(request: pytest.FixtureRequest):
    """Runs a kernel. The emulation also checks races, and that the result is independent of the thread order."""
    if request.param == "cuda":
        yield request.getfixturevalue("gpu")
    else:
        with cuda_on_cpu.settings(library(), races=1, unwritten=1, **request.param):
            yield emulate


@pytest.fixture
def checks():
    with cuda_on_cpu.settings(library(), races=1, unwritten=1):
        yield


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32}[x.itemsize])


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds to nearest even and returns uint16, because numpy has no bfloat16."""
    wide = bits(x).astype(np.uint64)
    rounded = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded).astype(np.uint16)


def from_bfloat16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


# ---- results


def test_thread_and_block_indices(run) -> None:
    out = np.zeros((2, 2, 3, 64, 6), np.int32)
    run("indices", out)
    z, y, x, t = np.indices(out.shape[:4])
    want = np.stack([x, y, z, t // 32 * 100 + t % 32, x * 64 + t, np.full_like(x, 192)], axis=-1)
    np.testing.assert_array_equal(out, want)


def test_shuffles_and_votes(run) -> None:
    v = np.random.default_rng(0).integers(-99, 99, 32).astype(np.int32)
    v[3] = v[11]
    out = np.zeros((11, 32), np.int32)
    run("shuffles", v, out)
    lanes = np.arange(32)
    group = lanes // 16 * 16
    wide = v[31 - lanes].astype(np.float64)
    ballot = sum(1 << lane for lane in range(32) if int(np.fmod(v[lane], 3)) == 0)
    mods = v.view(np.uint32) % 4
    want = [
        v[np.full(32, 5)],
        v[(lanes * 7 + 3) % 32],
        v[lanes // 8 * 8 + 2],
        v[lanes ^ 9],
        v[np.where(lanes - 3 >= group, lanes - 3, lanes)],
        v[np.where(lanes + 3 < group + 16, lanes + 3, lanes)],
        np.full(32, ballot, np.uint32).view(np.int32),
        np.array([sum(1 << o for o in range(32) if mods[o] == m) for m in mods], np.uint32).view(np.int32),
        (wide * 0.5 * 10 + wide * 2.0).astype(np.int32),
        np.full(32, 2 + (v == 0).any()),
        np.where(lanes < 16, v[1], v[lanes ^ 1]),
    ]
    np.testing.assert_array_equal(out, np.stack(want))


def test_shared_memory_and_barriers(run) -> None:
    x, y, rounds = np.random.default_rng(0).random((3, 64), np.float32), np.zeros((3, 64), np.float32), 7
    run("reverse", x, y)
    np.testing.assert_array_equal(y, x[:, ::-1])
    out = np.zeros(32, np.int32)
    run("neighbour", out)
    np.testing.assert_array_equal(out, (np.arange(32) + 1) % 32 * 3)
    out = np.zeros((rounds, 32), np.int32)
    run("handover", out)
    np.testing.assert_array_equal(out, 100 * np.arange(rounds)[:, None] + np.arange(32)[::-1])


def test_atomics(run) -> None:
    v = np.random.default_rng(0).integers(5, 2**31, 5000).astype(np.uint32)
    counts, extremes = np.zeros(16, np.uint32), np.array([0, 2**60, 0, -1], np.int64)
    run("histogram", v, counts, extremes)
    np.testing.assert_array_equal(counts, np.bincount(v % 16, minlength=16))
    want = [v.max(), v.min(), np.bitwise_or.reduce(v), np.bitwise_and.reduce(v)]
    np.testing.assert_array_equal(extremes, np.array(want, np.int64))


def test_last_block_reads_the_results_of_all_blocks(run) -> None:
    parts, ticket, total = np.zeros(40, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32)
    run("last_block", parts, ticket, total)
    assert total[0] == 40 * 41 // 2 and ticket[0] == 0


def test_grid_barrier_in_a_cooperative_launch(run) -> None:
    values, flags = np.zeros(7, np.int32), np.zeros(7, np.uint32)
    run("chain", values, flags)
    np.testing.assert_array_equal(values, np.arange(1, 8))
    values, flags = np.zeros(7, np.int32), np.zeros(7, np.uint32)
    run("chain", values, flags, variant=3)
    np.testing.assert_array_equal(values, (np.arange(7) + 1) % 7)
    a, b = np.zeros(320, np.int32), np.zeros(320, np.int32)
    run("rotate", a, b)
    np.testing.assert_array_equal(a, (np.arange(320) + 66) % 320)


def test_asynchronous_copies(run) -> None:
    x = np.random.default_rng(0).random((9, 64), np.float32)
    y = np.zeros_like(x)
    run("ring", x, y)
    np.testing.assert_array_equal(y, x[:, ::-1])
    x, y = np.random.default_rng(0).random(96, np.float32), np.ones(128, np.float32)
    run("small_copies", x, y)
    np.testing.assert_array_equal(y, np.concatenate([x[:92], np.zeros(36)]))
    bits, y = np.arange(1, 321, dtype=np.uint16), np.ones(320, np.uint16)
    run("part_copies", bits, y)
    lane = np.arange(32)[:, None]
    whole = np.where(np.arange(8) < lane % 9, bits[:256].reshape(32, 8), 0)
    small = np.where(np.arange(2) < lane % 3, bits[256:].reshape(32, 2), 0)
    np.testing.assert_array_equal(y, np.concatenate([whole.ravel(), small.ravel()]))


def test_distributed_shared_memory_of_clusters(run) -> None:
    out = np.zeros((8, 32), np.float32)
    run("neighbours", out)
    block = np.arange(8)
    np.testing.assert_array_equal(out, (100 * (block // 4 * 4 + (block + 1) % 4))[:, None] + np.arange(32))
    out = np.zeros(2, np.int32)
    run("pingpong", out)
    np.testing.assert_array_equal(out, [16, 17])
    x = np.random.default_rng(0).random((8, 64), np.float32)
    out = np.zeros((8, 4, 64), np.float32)
    run("bulk", x, out)
    want = (x.reshape(2, 1, 4, 64) + 1000 * np.arange(4, dtype=np.float32)[:, None]).repeat(4, axis=1)
    np.testing.assert_array_equal(out, want.reshape(8, 4, 64))


def exchange(run, steps: int, variant: int = 0) -> tuple[np.ndarray, np.ndarray]:
    out, count = np.zeros((2, 128), np.float32), np.zeros(steps, np.int32)
    run("exchange", out, count, variant=variant)
    state = np.arange(128, dtype=np.float32)
    for _ in range(steps):
        state = np.roll(state, -1) + np.roll(state, -5) + 1
        state = np.where(state > 1000, state - 1000, state)
    return out, np.stack([state, state])


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_recurrence_with_stores_to_all_blocks_of_a_cluster(run, steps: int) -> None:
    np.testing.assert_array_equal(*exchange(run, steps))


def test_mbarriers(run) -> None:
    out = np.zeros(64, np.int32)
    run("arrivals", out)
    np.testing.assert_array_equal(out, np.arange(64)[::-1])


# ---- matrix fragments
# Rows and columns of element i of the fragment of a lane, from the PTX ISA ("Matrix Fragments for mma.m16n8k16 with
# floating point type" and "... mma.m16n8k8", tf32), for A, B and C.


def layout(operand: str, k: int) -> np.ndarray:
    """[32, elements] offsets of fragment elements in the row-major matrix."""
    group, in_group = np.divmod(np.arange(32), 4)
    offsets = []
    for i in range({("a", 16): 8, ("b", 16): 4}.get((operand, k), {"a": 4, "b": 2, "c": 4}[operand])):
        if operand == "c":
            row, column, width = group if i < 2 else group + 8, in_group * 2 + (i & 1), 8
        elif operand == "a" and k == 16:
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            column, width = in_group * 2 + (i & 1) + (0 if i < 4 else 8), 16
        elif operand == "b" and k == 16:
            row, column, width = in_group * 2 + (i & 1) + (0 if i < 2 else 8), group, 8
        elif operand == "a":
            row, column, width = group if i in (0, 2) else group + 8, in_group if i in (0, 1) else in_group + 4, 8
        else:
            row, column, width = in_group if i == 0 else in_group + 4, group, 8
        offsets.append(row * width + column)
    return np.ascontiguousarray(np.stack(offsets, axis=1), np.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32", "tf32 rounded"])
def test_products_of_fragments(run, dtype: str) -> None:
    k = 8 if "tf32" in dtype else 16
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, k)).astype(np.float32), rng.standard_normal((k, 8)).astype(np.float32)
    c, d = rng.standard_normal((16, 8)).astype(np.float32), np.zeros((16, 8), np.float32)
    if dtype == "bfloat16":
        stored = [to_bfloat16(a), to_bfloat16(b)]
        exact = [from_bfloat16(x).astype(np.float64) for x in stored]
    elif dtype == "float16":
        stored = [a.astype(np.float16), b.astype(np.float16)]
        exact = [x.astype(np.float64) for x in stored]
    else:
        stored = [a, b]
        half = 0x1000 if "rounded" in dtype else 0
        exact = [((bits(x) + np.uint32(half)) & np.uint32(0xFFFFE000)).view(np.float32).astype(float) for x in stored]
    tables = [layout("a", k), layout("b", k), layout("c", k)]
    for table, matrix in zip(tables, [a, b, c]):
        assert sorted(table.ravel()) == list(range(matrix.size))
    name = "fragments_" + dtype.split()[0]
    run(name, *stored, c, d, *tables, variant=int("rounded" in dtype))
    np.testing.assert_allclose(d, exact[0] @ exact[1] + c, rtol=1e-5, atol=1e-5)
    run(name, *stored, c, d, np.ascontiguousarray(tables[0][::-1]), *tables[1:])  # detects wrong layouts
    assert not np.allclose(d, exact[0] @ exact[1] + c, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix(run, n: int, transposed: bool) -> None:
    """ldmatrix loads elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 in lane l; transposed, of column l / 4."""
    out = np.zeros((32, n), np.uint32)
    run(f"matrices_{n}" + "_transposed" * transposed, out)
    element = np.arange(64 * n).reshape(n, 8, 8)
    if transposed:
        element = element.transpose(0, 2, 1)
    pairs = element.reshape(n, 32, 2)
    np.testing.assert_array_equal(out, (pairs[..., 0] + (pairs[..., 1] << 16)).T)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrix_product(run, dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((64, 96)).astype(np.float32), rng.standard_normal((32, 96)).astype(np.float32)
    c = np.zeros((64, 32), np.float32)
    if dtype == "bfloat16":
        stored = to_bfloat16(a), to_bfloat16(b)
        a, b = map(from_bfloat16, stored)
    else:
        stored = a.astype(np.float16), b.astype(np.float16)
        a, b = (x.astype(np.float32) for x in stored)
    run(f"product_{dtype}", *stored, c)
    np.testing.assert_allclose(c, a.astype(float) @ b.astype(float).T, rtol=1e-4, atol=1e-4)


def test_conversions(run) -> None:
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 65504.0, 65520.0, 65519.9, 1e-8, 6e-8, 2.98e-8, 3.4e38, 1e-45]
    x = np.concatenate([np.array(special), rng.standard_normal(200), rng.standard_normal(200) * 1e-5])
    x = np.concatenate([x, [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]]).astype(np.float32)
    n = len(x)
    bf16, f16, back = np.zeros(n, np.uint16), np.zeros(n, np.float16), np.zeros((2, n), np.float32)
    tf32, packed = np.zeros(n, np.uint32), np.zeros((2, n), np.uint32)
    run("numbers", x, bf16, f16, back, tf32, packed)
    np.testing.assert_array_equal(bf16, to_bfloat16(x))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(f16, x.astype(np.float16))
    np.testing.assert_array_equal(back[0], from_bfloat16(bf16))
    np.testing.assert_array_equal(back[1], f16.astype(np.float32))
    finite = np.isfinite(x) & (np.abs(x) < 3e38)
    np.testing.assert_array_equal(tf32[finite], (bits(x)[finite] + 0x1000) & 0xFFFFE000)
    real = ~np.isnan(x)
    with np.errstate(over="ignore"):
        negative = np.stack([to_bfloat16(-x), bits((-x).astype(np.float16))])[:, real].astype(np.uint32)
    positive = np.stack([bf16, bits(f16)])[:, real].astype(np.uint32)
    np.testing.assert_array_equal(packed[:, real], positive | negative << 16)


def test_vectors(run) -> None:
    x = np.random.default_rng(0).standard_normal(8 * 300).astype(np.float16)
    y = np.zeros_like(x)
    run("vectors", x, y)
    np.testing.assert_array_equal(y, 2 * x)


# ---- detection of faults


def line_of(text: str, nth: int = 1) -> str:
    """selftest_cuda.cu:LINE of the nth line with the text; reports must name the exact line."""
    lines = (cuda_on_cpu.FOLDER / "selftest_cuda.cu").read_text().splitlines()
    return f"selftest_cuda.cu:{[i + 1 for i, line in enumerate(lines) if text in line][nth - 1]}"


def fails(*parts: str):
    """Expects a failure whose report contains the parts in this order."""
    return pytest.raises(RuntimeError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


X, Y = np.zeros((3, 64), np.float32), np.zeros((3, 64), np.float32)
WRITE, READ = "tile[i] = in[at + i]", "const float v = tile[args.variant == 4"


def test_copy_beyond_its_size(checks) -> None:
    with fails("part of a copy"):
        emulate("part_copies", np.ones(320, np.uint16), np.ones(320, np.uint16), variant=1)


def test_race_in_shared_memory(checks) -> None:
    with fails("race in shared memory", "writes", "wrote", line_of("args.variant == 5"), line_of("args.variant == 5")):
        emulate("reverse", X, Y, variant=5)


def test_missing_block_barrier(checks) -> None:
    with cuda_on_cpu.settings(library(), unwritten=0), fails("race in shared memory", "reverse_kernel"):
        emulate("reverse", X, Y, variant=1)
    with fails("uninitialised shared memory", line_of(READ), "reverse_kernel with grid (3, 1, 1), block 64"):
        emulate("reverse", X, Y, variant=1)


def test_missing_block_barrier_without_checks() -> None:
    x, y = np.ones((3, 64), np.float32), np.zeros((3, 64), np.float32)
    emulate("reverse", x, y, variant=1)
    assert np.isnan(y).any()


def test_missing_warp_barrier(checks) -> None:
    out = np.zeros(32, np.int32)
    with cuda_on_cpu.settings(library(), unwritten=0), fails("race in shared memory", "neighbour_kernel"):
        emulate("neighbour", out, variant=1)


def test_read_of_unwritten_shared_memory(checks) -> None:
    with fails("a read of uninitialised shared memory (thread 3 of block 0)", line_of(READ)):
        emulate("reverse", X, Y, variant=4)


def test_unwritten_shared_memory_is_nan() -> None:
    x, y = np.ones((3, 64), np.float32), np.zeros((3, 64), np.float32)
    emulate("reverse", x, y, variant=4)
    assert np.isnan(y[:, 3]).all() and np.isfinite(np.delete(y, 3, axis=1)).all()


def test_barrier_after_threads_have_exited() -> None:
    with fails(
        "divergent barrier",
        "threads 32-63 have exited",
        "threads 0-31 wait at a block barrier",
        line_of("// the other"),
    ):
        emulate("reverse", X, Y, variant=2)


def test_threads_at_different_barriers() -> None:
    with fails("divergent barrier", line_of("// one place"), line_of("// the other")):
        emulate("reverse", X, Y, variant=3)


@pytest.mark.parametrize("variant", [1, 2])
def test_divergent_warp(variant: int) -> None:
    with fails("divergent barrier"):
        emulate("divergent_warp", np.zeros(32, np.int32), variant=variant)


@pytest.mark.parametrize(
    "variant, memory, element, line",
    [
        (1, "shared", 36, "const float a = tile"),
        (2, "shared", -1, "const float a = tile"),
        (3, "global", 36, "const float b = x["),
        (4, "global", -1, "const float b = x["),
        (5, "shared", 36, "tile[v == 5"),
        (6, "shared", -1, "tile[v == 5"),
        (7, "global", 36, "x[v == 7"),
        (8, "global", -1, "x[v == 7"),
    ],
)
def test_accesses_out_of_bounds(variant: int, memory: str, element: int, line: str) -> None:
    thread = 31 if element > 0 else 0
    text = f"out of bounds: element {element} of an array of 36 elements of 4 bytes in {memory} memory"
    with fails(text, f"thread {thread} of block 0", line_of(line)):
        emulate("bounds", np.zeros(36, np.float32), variant=variant)


def test_vectors_out_of_bounds_or_misaligned() -> None:
    x = np.zeros(40, np.float32)
    x = x[(-x.ctypes.data // 4) % 4 :][:36]  # aligned to 16 bytes
    emulate("bounds", x)
    with fails("out of bounds: element 34 to 37 of an array of 36", line_of("if (v == 9")):
        emulate("bounds", x, variant=9)
    with fails("misaligned: 16 bytes", line_of("if (v == 10")):
        emulate("bounds", x, variant=10)


def test_more_shared_memory_than_requested() -> None:
    with fails("an array of 192 bytes from byte 0 of 144 bytes of dynamic shared memory", "bounds_kernel"):
        emulate("bounds", np.zeros(36, np.float32), variant=11)


def test_array_size_of_a_kernel_exceeds_the_allocation() -> None:
    """The emulation compares the size in the kernel with the size registered by the host."""
    out = np.zeros((3, 64), np.float32)
    with fails("out of bounds", "of an array of 100 elements"):
        emulate("reverse", np.zeros(100, np.float32), out)


def test_named_barrier_without_arrival(checks) -> None:
    with fails("deadlock", "threads 0-31 wait at a named barrier", line_of("named_sync(kEmpty"), "threads 32-63"):
        emulate("handover", np.zeros((2, 32), np.int32), variant=1)


def test_increments_without_atomics(checks) -> None:
    arrays = np.full(4096, 3, np.uint32), np.zeros(16, np.uint32), np.zeros(4, np.int64)
    with fails("race in shared memory", line_of("mine[v % 16] += 1u")):
        emulate("histogram", *arrays, variant=1)


@pytest.mark.parametrize("variant, memory", [(1, "global"), (2, "shared")])
def test_last_block_without_fences_or_barrier(checks, variant: int, memory: str) -> None:
    with cuda_on_cpu.settings(library(), unwritten=0), fails(f"race in {memory} memory", "last_block_kernel"):
        emulate("last_block", np.zeros(40, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32), variant=variant)


def test_flag_without_release_or_acquire(checks) -> None:
    with fails("race in global memory", "reads", "wrote", "chain_kernel"):
        emulate("chain", np.zeros(7, np.int32), np.zeros(7, np.uint32), variant=1)


def rounds(variant: int = 0, run=emulate) -> tuple[np.ndarray, np.ndarray]:
    """The result of rounds_kernel, and what it must be."""
    got, want, values = np.zeros((9, 5), np.int32), np.zeros((9, 5), np.int32), np.arange(5)
    for row in want:
        row[:] = values.sum()
        values = row % 1000 + np.arange(5)
    run("rounds", np.zeros((2, 5), np.int32), np.zeros(5, np.uint32), got, variant=variant)
    return got, want


def test_rounds_through_two_slots(run) -> None:
    np.testing.assert_array_equal(*rounds(run=run))


@pytest.mark.parametrize("schedule", [s for s in cuda_on_cpu.SCHEDULES if s.get("schedule", 1) != 3], ids=str)
def test_wait_for_one_publication_too_few(schedule: dict[str, int]) -> None:
    """Round robin misses it: each block is as far as the others."""
    with cuda_on_cpu.settings(library(), races=1, **schedule), pytest.raises((RuntimeError, AssertionError)) as found:
        np.testing.assert_array_equal(*rounds(variant=1))
    assert "race in global memory" in str(found.value) or "Arrays are not equal" in str(found.value)


def test_wait_for_one_publication_too_few_with_random_priorities() -> None:
    found = 0
    for seed in range(1, 9):
        with cuda_on_cpu.settings(library(), races=1, schedule=3, seed=seed):
            try:
                np.testing.assert_array_equal(*rounds(variant=1))
            except (RuntimeError, AssertionError):
                found += 1
    assert found >= 4


def test_publication_before_the_write(checks) -> None:
    with pytest.raises(RuntimeError, match="race in global memory"):
        rounds(variant=2)


@pytest.mark.parametrize("schedule", [*ORDERS, *cuda_on_cpu.SCHEDULES], ids=str)
def test_flag_that_is_never_set_in_each_schedule(schedule: dict[str, int]) -> None:
    with (
        cuda_on_cpu.settings(library(), **schedule),
        pytest.raises(RuntimeError, match=r"deadlock: no thread can make progress(.|\n)*threads 0 wait at a flag"),
    ):
        emulate("chain", np.zeros(7, np.int32), np.zeros(7, np.uint32), variant=2)


def test_flag_that_is_never_set() -> None:
    with fails("deadlock", "block 3, 4, 5, 6:", "threads 0 wait at a flag", line_of("wait_acquire(flags, b - 1")):
        emulate("chain", np.zeros(7, np.int32), np.zeros(7, np.uint32), variant=2)


def test_missing_grid_barrier(checks) -> None:
    with fails("race in global memory", "rotate_kernel"):
        emulate("rotate", np.zeros(320, np.int32), np.zeros(320, np.int32), variant=1)


def test_race_between_blocks(checks) -> None:
    out = np.zeros(4, np.int32)
    emulate("blocks", out)
    np.testing.assert_array_equal(out, np.arange(4))
    with fails("race in global memory: thread 0 of block 1 writes what thread 0 of block 0 wrote"):
        emulate("blocks", out, variant=1)


def test_invalid_launches() -> None:
    a, b = np.zeros(320, np.int32), np.zeros(320, np.int32)
    with fails("a cooperative grid has at most the 256 blocks", "rotate_kernel with grid (1048576, 1, 1)"):
        emulate("too_many", a, b)
    with fails(
        "a block has at most 232448 bytes of shared memory; in ",
        "rotate_kernel with grid (1, 1, 1), block 64, shared memory 307200 bytes, cluster 1",
    ):
        emulate("too_much_shared", a, b)
    with cuda_on_cpu.settings(library(), major=8), fails("clusters need compute capability 9.0"):
        emulate("pingpong", np.zeros(2, np.int32))
    with (
        cuda_on_cpu.settings(library(), cluster_blocks=1),
        fails("a cluster has 1 to 1 blocks", "pingpong_kernel with grid (2, 1, 1)", "cluster 2"),
    ):
        emulate("pingpong", np.zeros(2, np.int32))


def test_missing_wait_for_asynchronous_copies(checks) -> None:
    x, y = np.random.default_rng(0).random((9, 64), np.float32), np.zeros((9, 64), np.float32)
    with cuda_on_cpu.settings(library(), races=0, unwritten=0):
        emulate("ring", x, y, variant=1)
    assert np.isnan(y).any()
    for variant in (2, 3):
        with cuda_on_cpu.settings(library(), unwritten=0), fails("race in shared memory", "ring_kernel"):
            emulate("ring", x, y, variant=variant)


def test_missing_cluster_barrier(checks) -> None:
    out = np.zeros((8, 32), np.float32)
    with cuda_on_cpu.settings(library(), unwritten=0), fails("race in shared memory", "neighbours_kernel"):
        emulate("neighbours", out, variant=1)


def test_shared_memory_of_an_exited_block() -> None:
    with (
        cuda_on_cpu.settings(library(), backward=1),
        fails("shared memory of block", "which has exited", line_of("load(theirs, lane_index())")),
    ):
        emulate("neighbours", np.zeros((8, 32), np.float32), variant=2)


def test_exchange_without_wait(checks) -> None:
    with fails("exchange_kernel"):
        exchange(emulate, 5, variant=1)


def test_exchange_with_a_single_buffer(checks) -> None:
    with fails("race in shared memory", "exchange_kernel"):
        exchange(emulate, 5, variant=2)


def test_exchange_that_expects_too_many_bytes() -> None:
    with fails("deadlock", "wait at an mbarrier", line_of("if (args.variant != 1) mbarrier_wait(bars, to")):
        exchange(emulate, 5, variant=3)


def test_missing_mbarrier_arrival() -> None:
    with fails("deadlock", "wait at an mbarrier", line_of("mbarrier_wait(bars, 0, (rank")):
        emulate("pingpong", np.zeros(2, np.int32), variant=1)


@pytest.mark.parametrize(
    "variant, parts",
    [
        (1, ["deadlock", "threads 0-63 wait at an mbarrier"]),
        (2, ["more arrivals at an mbarrier than its phase expects"]),
        (3, ["an mbarrier that was not initialised"]),
    ],
)
def test_invalid_mbarrier_arrivals(variant: int, parts: list[str]) -> None:
    with fails(*parts, "arrivals_kernel"):
        emulate("arrivals", np.zeros(64, np.int32), variant=variant)


MUTANTS = json.loads((cuda_on_cpu.FOLDER / "mutants.json").read_text())


def test_the_table_of_mutants_is_of_these_sources() -> None:
    """Each place of mutants.json is a line of the sources, and each mutant is killed or has a reason."""
    for place, mutants in MUTANTS.items():
        for part in place.split(" > csrc/"):
            file, _, line = part.removeprefix("csrc/").partition(": ")
            lines = [text.strip() for text in (cuda_on_cpu.FOLDER.parents[1] / "csrc" / file).read_text().splitlines()]
            assert line.strip() in lines, f"{file}: {line}; run make check-mutants ARGS=--update"
        assert all(mutants.values()), place
    assert len(MUTANTS) > 40


def test_launch_after_a_failure(checks) -> None:
    for _ in range(3):
        with fails("race"):
            emulate("reverse", X, Y, variant=5)
        emulate("reverse", X, Y)


# ---- speed


@pytest.mark.parametrize("name", ["barriers", "barriers_1024"])
def test_time_of_a_fibre_switch(name: str) -> None:
    """A switch takes about 20 ns; the bound of 1 µs allows for a busy machine."""
    emulate(name, variant=10)
    before, start = cuda_on_cpu.counted(library(), "switches"), time.perf_counter()
    emulate(name, variant=1000)
    switches = cuda_on_cpu.counted(library(), "switches") - before
    seconds = time.perf_counter() - start
    print(f"{name}: {switches / seconds / 1e6:.0f} million switches a second")
    assert switches > 200_000 and seconds / switches < 1e-6
