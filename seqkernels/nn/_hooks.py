"""Whether a module may be replaced by its formula."""

from __future__ import annotations

import torch
from torch.nn.modules import module as modules

_GLOBAL = (
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
    modules._global_backward_pre_hooks,
    modules._global_backward_hooks,
)


def runs_forward_of(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether a call of the module runs the forward method of class `kind` alone: no subclass, hook, patched method."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return False
    return not any(_GLOBAL)
