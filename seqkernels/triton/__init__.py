"""Operators as Triton kernels, for GPUs that the CUDA build does not cover. `import seqkernels` leaves this alone."""

from __future__ import annotations

try:
    import triton
except ImportError as error:
    raise ImportError(
        "seqkernels.triton: Triton could not be imported; install it with `pip install triton`, or use another backend"
    ) from error

from seqkernels.triton import attention, embedding_bag, recurrent

__all__ = ["attention", "embedding_bag", "recurrent"]

del triton
