"""Products with packed weights for instruction sets that a processor may lack: their code with emulated intrinsics."""

from __future__ import annotations

import os
import pathlib
import platform
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
X86 = platform.machine() in ("x86_64", "AMD64")
CHECKED = {  # namespace: defines of emulated_avx512.h, lanes of float
    "avx2": ([], 8),
    "avx2_vnni": (["-DEMULATE_VNNI"], 8),
    "avx512": (["-DEMULATE_AVX512"], 16),
    "avx512_vnni": (["-DEMULATE_AVX512", "-DEMULATE_VNNI"], 16),
}
KERNEL = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", f"-I{CSRC}"]


COMPILER = os.environ.get("CXX", "g++")
MAIN = str(HERE / "check_packed_product.cpp")
SOURCE = str(CSRC / "recurrent" / "cpu" / "packed_product.cpp")


def compile_(*options: str, to: pathlib.Path) -> str:
    result = subprocess.run([COMPILER, *KERNEL, *options, "-c", "-o", str(to)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return str(to)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs a C++ compiler to build the check program; {COMPILER} is not installed")
    return compile_("-DSEQKERNELS_ISA=portable", SOURCE, to=tmp_path_factory.mktemp("products") / "portable.o")


@pytest.mark.skipif(not X86, reason="needs an x86 processor: the emulation covers x86 instruction sets")
@pytest.mark.parametrize("isa", CHECKED)
def test_products_are_those_of_portable_code(isa: str, portable: str, tmp_path: pathlib.Path) -> None:
    """All precisions, gates, odd sizes, 1 to 66 rows; int8 bit for bit."""
    if "avx2" not in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("needs AVX2, which the emulation of AVX-512 uses")
    defines, lanes = CHECKED[isa]
    # -O1: the emulated intrinsics take twice as long to compile with -O2, and run as fast.
    emulation = ["-O1", "-include", str(HERE / "emulated_avx512.h")] if defines else []
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    objects = [
        portable,
        compile_(f"-DSEQKERNELS_ISA={isa}", *avx2, *defines, *emulation, SOURCE, to=tmp_path / "checked.o"),
        compile_(f"-DCHECKED={isa}", f"-DCHECKED_LANES={lanes}", MAIN, to=tmp_path / "main.o"),
    ]
    program = tmp_path / "check"
    subprocess.run([COMPILER, *objects, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith("compared ") and result.stdout.strip().endswith("failures 0")
