"""Runs CMake with Ninja for pip; pyproject.toml has the metadata.

Environment: CMAKE_ARGS is passed to CMake (CMAKE_ARGS="-DSEQKERNELS_CUDA=OFF"), CMAKE_BUILD_PARALLEL_LEVEL limits the
number of jobs.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_TOOLS = ["cmake", "ninja"]


def check_environment() -> None:
    """Checks for torch before pip resolves dependencies, because isolated builds download gigabytes of torch."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "\nseqkernels builds against the installed torch, and this Python finds none "
            "(pip's build isolation also hides it). Install torch, then build without isolation:\n\n"
            f"    pip install torch 'setuptools>=77' {' '.join(BUILD_TOOLS)}\n"
            "    pip install --no-build-isolation .\n"
        )


def find_tool(name: str) -> str:
    """Path of a tool: from its pip package, even if its scripts are not on PATH, otherwise from the system."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which(name, path=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit(f"\nseqkernels: {name} not found: pip install {' '.join(BUILD_TOOLS)}\n")
    return found


class CMakeBuild(build_ext):
    """Builds seqkernels._C. The folder under build/ is kept for incremental builds."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        configure = [
            *(cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (configure, [cmake, "--build", str(build), "--target", "_C"]):
            if subprocess.run(command).returncode != 0:
                raise SystemExit(f"\nseqkernels: the build failed at: {shlex.join(command)}\n")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob("_C.cpython-*.so"):  # of builds before abi3, which Python would prefer
            old.unlink()
        shutil.copy2(build / target.name, target)


check_environment()
setup(
    ext_modules=[
        Extension(
            "seqkernels._C",
            sources=["CMakeLists.txt"],
            py_limited_api=True,
            depends=["cmake/cuda.cmake", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
