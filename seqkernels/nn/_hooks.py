"""Whether a module may be replaced: by its formula, or by another module."""

from __future__ import annotations

import torch
from torch.nn.modules import module as modules

_GLOBAL = (
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
    modules._global_backward_pre_hooks,
    modules._global_backward_hooks,
)
# What the dictionary of a class holds that overrides nothing.
_OF_EMPTY_CLASS = {
    "__module__", "__qualname__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__",
    "__parameters__", "__orig_bases__", "__dict__", "__weakref__",
}  # fmt: skip


def overridden(kind: type) -> list[str]:
    """Names that a class adds to its base classes or overrides."""
    return sorted(vars(kind).keys() - _OF_EMPTY_CLASS)


def runs_forward_of(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether a call of the module runs the forward method of class `kind` alone: no subclass, hook, patched method."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return False
    return not any(_GLOBAL)
