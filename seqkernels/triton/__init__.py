"""Triton kernels, for GPUs without CUDA kernels in the build. `import seqkernels` does not import this package."""

from __future__ import annotations

try:
    import triton
except ImportError as error:
    raise ImportError(
        "seqkernels.triton: Triton could not be imported; install it with `pip install triton`, or use another backend"
    ) from error

from . import attention, crf, embedding_bag, recurrent

__all__ = ["attention", "crf", "embedding_bag", "recurrent"]

del triton
