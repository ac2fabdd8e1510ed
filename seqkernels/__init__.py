"""Fused recurrent layers and other sequence kernels for PyTorch."""

from __future__ import annotations

import pathlib as _pathlib
from typing import Any

import torch  # noqa: F401  (its libraries must be loaded before ours)

from . import _binary

_REMEDY = "build it with `pip install --no-build-isolation .` against the torch that is installed"
_reason = _binary.obstacle(_pathlib.Path(__file__).parent)
if _reason is not None:
    raise ImportError(f"seqkernels: the compiled module seqkernels._C is damaged, {_reason}; {_REMEDY}")
try:
    from . import _C
except ImportError as error:
    raise ImportError(f"seqkernels: the compiled module seqkernels._C could not be loaded; {_REMEDY}") from error

if getattr(_C, "schemas", None) != _binary.SCHEMAS:
    raise ImportError(
        "seqkernels: the compiled module seqkernels._C was built from other sources than the Python files (its ops "
        f"have the schemas {getattr(_C, 'schemas', 'unknown')}, not {_binary.SCHEMAS}); {_REMEDY}"
    )

from . import decoding, functional, inference, nn, reference  # noqa: E402
from .accelerate import accelerate, restore  # noqa: E402
from .explain import explain  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "accelerate", "build_info", "decoding", "explain", "functional", "inference", "nn", "reference", "restore",
]  # fmt: skip


def build_info() -> dict[str, Any]:
    """Properties of this build and the instruction set in use.

    Returns:
        version: of seqkernels.
        torch: the release that the build was compiled against; the binary runs with 2.11 and later.
        isa: the instruction set in use. isas: the instruction sets built that this processor supports.
        vnni: whether int8 products use dot product instructions (AVX-VNNI, AVX512-VNNI).
        cuda: whether CUDA kernels were built. cuda_architectures: with CUDA, their compute capabilities, 90 for 9.0.
        compiler: name and version.
    """
    return {"version": __version__, **_C.build_info()}
