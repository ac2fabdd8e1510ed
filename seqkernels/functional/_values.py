"""Whether the values of tensors may be read to choose an implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    return not tracing() and all(type(t) in PLAIN and not t.is_meta for t in tensors)


PLAIN = (Tensor, torch.nn.Parameter)

# Bound once, because each attribute lookup takes time: a call of the smallest shape takes about ten microseconds.
_compiler, _dynamo = torch.compiler, torch.compiler.is_dynamo_compiling
_transforms = torch._C._are_functorch_transforms_active
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_autocast = torch.is_autocast_enabled


def special() -> bool:
    """Whether the call is traced, or a torch.func transform or forward-mode AD is active."""
    return (
        _dynamo()  # the flag of torch.compiler.is_compiling is not set while torch.compile traces this function
        or _compiler._is_compiling_flag
        or _transforms()
        or _tracing() is not None
        or forward_ad._current_level >= 0
    )


def moded() -> bool:
    """Whether the call is `special`, or a mode of __torch_function__ or __torch_dispatch__ is active."""
    return special() or _function_modes() > 0 or _dispatch_modes() > 0


def eager_on_cpu() -> bool:
    """Whether calls with tensors that satisfy `plain_in` run at once and on these tensors alone.

    False during `tracing`, in forward-mode AD, in modes of __torch_function__ or __torch_dispatch__, and in autocast on
    a CPU. The fast paths of operators and modules require it. It takes less than a microsecond.
    """
    return not (moded() or _autocast("cpu"))


def dense_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all that are not None are dense tensors with memory on the CPU, of no subclass other than Parameter."""
    for t in tensors:  # noqa: SIM110  all() takes twice as long
        if t is not None and (type(t) not in PLAIN or not t.is_cpu or t.is_nested):
            return False
    return True


def plain_in(dtype: torch.dtype, *tensors: Any) -> bool:
    """Whether all are dense tensors of a dtype with memory on the CPU, of no subclass other than Parameter."""
    for t in tensors:  # noqa: SIM110
        if type(t) not in PLAIN or t.dtype is not dtype or not t.is_cpu or t.is_nested:
            return False
    return True
