"""A prepared model compiled by AOTInductor: in this process, and in a C++ program without Python (examples/cpp)."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from seqkernels import inference

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cpp"
compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler, which AOTInductor calls"
)


# torch's own, while it exports and compiles
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def plain_memory(raw_memory):
    """Compiled models of torch are not tested for unwritten memory."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layer = nn.GRU(6, 12, num_layers=2, bidirectional=True)
        self.cell = nn.LSTMCell(24, 8)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.layer(self.embed(tokens), lengths=lengths)
        return y, self.cell(y[0])[0] + h.sum()


@compiler
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_compiled_model_has_the_bits_of_the_module(weights: str, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    fast, _ = inference.prepare(Model().eval(), weights)
    tokens, lengths = torch.randint(0, 11, (7, 3)), torch.tensor([7, 2, 0])
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    with torch.no_grad():
        exported = torch.export.export(fast, (tokens, lengths), dynamic_shapes=({0: T, 1: B}, {0: B}))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        other = torch.randint(0, 11, (4, 5)), torch.tensor([4, 1, 3, 0, 2])
        for given in ((tokens, lengths), other):
            want, got = fast(*given), compiled(*given)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1])


def built_with_cmake() -> pathlib.Path | None:
    """The folder in which setup.py built seqkernels._C."""
    found = sorted((ROOT / "build").glob("cmake-*/build.ninja"))
    return found[0].parent if found else None


@compiler
def test_the_example_runs_without_python(tmp_path: pathlib.Path) -> None:
    build = built_with_cmake()
    tools = [shutil.which(name, path=os.pathsep.join((str(pathlib.Path(sys.executable).parent), os.environ["PATH"])))
             for name in ("cmake", "ninja")]  # fmt: skip
    if build is None or None in tools:
        pytest.skip("needs the folder in which CMake built seqkernels, and cmake and ninja")
    cmake, ninja = tools

    def run(*command: str) -> str:
        result = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
        return result.stdout

    steps = run(ninja, "-C", str(build), "-n", "seqkernels_ops").count("Building CXX")
    if steps:
        pytest.skip(f"needs an up-to-date build of seqkernels; {steps} files have changed since")
    run(cmake, "--build", str(build), "--target", "seqkernels_ops")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    made = tmp_path / "tagger"
    run(cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(EXAMPLE), "-B", str(made), prefix)
    run(cmake, "--build", str(made))
    text = "for i in range(10): x = 'a'  # done"
    package = str(tmp_path / "tagger.pt2")
    printed = run(sys.executable, str(EXAMPLE / "export_tagger.py"), package, "--steps", "40", "--text", text)
    want = printed.strip().splitlines()[-1]
    assert len(want.split()) == len(text)
    library = str(build / "libseqkernels_ops.so")
    needed = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert "libpython" not in needed and "libtorch_python" not in needed
    assert run(str(made / "tagger"), library, package, text).strip() == want
    other = run(str(made / "tagger"), library, package, "x = 1").split()
    assert len(other) == 5
    failed = subprocess.run([str(made / "tagger"), "missing.so", package, text], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("tagger: missing.so: cannot open")
