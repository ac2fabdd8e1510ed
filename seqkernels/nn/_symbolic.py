"""torch.fx.symbolic_trace: the modules of seqkernels are leaves, as those of torch.nn are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Proxy


def as_leaf(module: torch.nn.Module, arguments: Mapping[str, Any]) -> Any:
    """Records a call of `module` in the graph being traced; `arguments` has all arguments of its forward by name."""
    parameters = inspect.signature(type(module).forward).parameters
    required = tuple(v for name, v in arguments.items() if parameters[name].default is inspect.Parameter.empty)
    optional = {
        name: v
        for name, v in arguments.items()
        if parameters[name].default is not inspect.Parameter.empty and v is not parameters[name].default
    }
    tracer: Any = next(v for v in arguments.values() if isinstance(v, Proxy)).tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), required, optional)
