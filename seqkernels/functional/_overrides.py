"""Arguments with __torch_function__, and nested tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

__all__ = ["dispatches", "handle_torch_function", "has_torch_function", "has_torch_function_variadic", "refuse_nested"]


def dispatches(*arguments: Any) -> bool:
    """Whether a function is dispatched to the __torch_function__ of its arguments, as those of torch.nn.functional are.

    Not to those of nested tensors and of CausalBias, which do not have our functions.
    """
    return not any(type(a).__module__.startswith(("torch.nested", "torch.nn.attention")) for a in arguments)


def refuse_nested(caller: str, instead: str, **tensors: Any) -> None:
    """Raises for nested tensors, whose memory an op would not find."""
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.is_nested:
            raise TypeError(f"{caller}: {name} must not be a nested tensor, got one of layout {t.layout}; {instead}")
