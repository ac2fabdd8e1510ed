"""Modules in torch.fx, TorchScript and torch.ao.quantization: leaves of symbolic traces, and clear refusals."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

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


def refuse_scripting(module: torch.nn.Module) -> NoReturn:
    """`__prepare_scriptable__` of the modules, which torch.jit.script calls first."""
    raise NotImplementedError(
        f"{type(module).__name__}: torch.jit.script, which torch deprecates, is not supported; use torch.export and "
        "AOTInductor, or torch.jit.trace"
    )


def _get_qconfig(module: torch.nn.Module) -> Any:
    try:
        return module.__dict__["qconfig"]
    except KeyError:
        raise AttributeError(f"{type(module).__name__!r} object has no attribute 'qconfig'") from None


def _set_qconfig(module: torch.nn.Module, value: Any) -> None:
    public = (c.__name__ for c in type(module).__mro__ if c.__module__.startswith(__package__) and c.__name__[0] != "_")
    name = next(public, "EmbeddingBagCollection")
    if "Embedding" in name:
        instead = "QuantizedEmbeddingBag"
    elif isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)):
        instead = 'seqkernels.inference.prepare(model, weights="int8")'
    else:
        instead = "torch's module, which has the same state_dict"
    warnings.warn(
        f"seqkernels.nn.{name} keeps its dtype in torch.ao.quantization; to quantize it, use {instead}", stacklevel=3
    )
    module.__dict__["qconfig"] = value


def _delete_qconfig(module: torch.nn.Module) -> None:
    module.__dict__.pop("qconfig", None)


# Set by torch.ao.quantization on all modules, also on those that it does not quantize.
qconfig = property(_get_qconfig, _set_qconfig, _delete_qconfig)
