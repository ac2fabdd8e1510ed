"""Whether a call is an ordinary one in eager mode. Such calls take a direct path, with less overhead.

These functions take a fraction of a microsecond: a call of the smallest shape takes about ten.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Bound once, because each attribute lookup takes time.
_compiler, _dynamo = torch.compiler, torch.compiler.is_dynamo_compiling
_transforms, _trace = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_function_modes, _dispatch_modes = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack

PLAIN = (Tensor, torch.nn.Parameter)  # types of tensors without a __torch_function__ or __torch_dispatch__ of their own


def special() -> bool:
    """Whether the call is traced, or a torch.func transform or forward-mode AD is active."""
    return (
        _dynamo()  # the flag of torch.compiler.is_compiling is not set while torch.compile traces this function
        or _compiler._is_compiling_flag
        or _transforms()
        or _trace() is not None
        or forward_ad._current_level >= 0
    )


def moded() -> bool:
    """Whether the call is `special`, or a mode of __torch_function__ or __torch_dispatch__ is active."""
    return (
        _dynamo()  # repeats `special`, whose call would take as long as its tests
        or _compiler._is_compiling_flag
        or _transforms()
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _trace() is not None
        or forward_ad._current_level >= 0
    )
