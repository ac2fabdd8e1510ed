"""Fused recurrent layers and other sequence kernels for PyTorch."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401  (its libraries must be loaded before ours)

try:
    from seqkernels import _C
except ImportError as error:
    raise ImportError(
        "seqkernels: the compiled module seqkernels._C could not be loaded; build it with "
        "`pip install --no-build-isolation .` against the torch that is installed"
    ) from error

from seqkernels import functional, nn, reference
from seqkernels.explain import explain

__version__ = "0.1.0"
__all__ = ["build_info", "explain", "functional", "nn", "reference"]


def build_info() -> dict[str, Any]:
    """What was built and what runs.

    Returns:
        version; torch: the release built against (the binary serves 2.11 and later); isa: the instruction set in use;
        isas: those built that this processor has; cuda: whether CUDA kernels were built; cuda_architectures: where they
        were, the compute capabilities, 90 for 9.0; compiler.
    """
    return {"version": __version__, **_C.build_info()}
