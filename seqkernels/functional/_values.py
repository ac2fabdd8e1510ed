"""Whether the values of tensors may be read to choose an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

_tracing = torch._C._get_tracing_state


def in_jit_trace() -> bool:
    """Whether torch.jit.trace is recording."""
    return not torch.compiler.is_compiling() and _tracing() is not None


def tracing() -> bool:
    """Whether calls are recorded to run later with other values.

    True inside torch.compile, torch.export, torch.jit.trace, make_fx and fake tensor modes, and under torch.func
    transforms.
    """
    return (
        torch.compiler.is_compiling()
        or _tracing() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def may_read_values(*tensors: Tensor) -> bool:
    """Whether a choice may depend on the values of these tensors.

    False during `tracing`, for fake and meta tensors, which have no values, and for tensor subclasses. The choice may
    affect speed and checks, but not results.
    """
    return not tracing() and all(type(t) in _PLAIN and not t.is_meta for t in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)
