"""Replaces the recurrent modules of a model by prepared ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from .. import nn as sk
from .._tables import aligned
from ..nn._hooks import overridden
from ._modules import PreparedCell, PreparedRecurrent, _Prepared, family_and_options
from ._ops import PRECISIONS

_LAYERS: tuple[type[nn.Module], ...] = (
    nn.LSTM, nn.GRU, nn.RNN, sk.LSTM, sk.GRU, sk.RNN, sk.DreamerGRU, sk.SLSTM, sk.MGU, sk.NestedLSTM,
)  # fmt: skip
_CELLS: tuple[type[nn.Module], ...] = (
    nn.LSTMCell, nn.GRUCell, nn.RNNCell, sk.LSTMCell, sk.GRUCell, sk.RNNCell, sk.DreamerGRUCell,
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
_DTYPES = torch.float32, torch.bfloat16, torch.float16


@dataclass
class Report:
    """What `prepare` did. Printed as a table.

    Attributes:
        weights: the precision of the prepared weights.
        prepared: name in the model -> (class, bytes of the weights before, bytes after) of the prepared modules.
        left: name -> (class, reason) of the recurrent modules that were left as they are.
    """

    weights: str
    prepared: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    left: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def bytes_before(self) -> int:
        return sum(before for _, before, _ in self.prepared.values())

    @property
    def bytes_after(self) -> int:
        return sum(after for _, _, after in self.prepared.values())

    def __str__(self) -> str:
        rows = [("module", "class", "bytes before", f"bytes as {self.weights}")]
        rows += [(n or "(model)", c, f"{b:,}", f"{a:,}") for n, (c, b, a) in self.prepared.items()]
        if len(self.prepared) > 1:
            rows.append(("total", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}"))
        lines = aligned(rows, right=(2, 3)) if self.prepared else ["No module was prepared."]
        lines += [f"left: {name or '(model)'} ({of}): {reason}" for name, (of, reason) in self.left.items()]
        return "\n".join(lines)


def prepare(model: nn.Module, weights: str = "float32", *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Replaces every recurrent layer and cell of a model by one whose weights are packed once, for inference on a CPU.

    Args:
        model: in eval mode. Layers and cells of torch.nn and seqkernels.nn are replaced, at any depth; a module that
            occurs several times is replaced by one module. Subclasses that override something are left.
        weights: precision of the weight matrices: "float32" keeps the bits; "bfloat16" and "float16" halve the memory
            that a step reads; "int8" quarters it and computes integer products. Gates, biases and states stay float32.
        inplace: whether to change `model` itself, not a copy of it.
    Returns:
        The model, and a Report of what was prepared and what was left, and why.
    Raises:
        ValueError: unknown `weights`, or a recurrent module in training mode.
        TypeError: model is not a torch.nn.Module.
    Deterministic: yes; see PreparedRecurrent.
    Source: symmetric quantization per row: Wu et al., "Integer Quantization for Deep Learning Inference", arXiv
        2004.09602.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: model must be a torch.nn.Module, got {type(model).__name__}")
    if weights not in PRECISIONS:
        raise ValueError(f"prepare: weights must be one of {', '.join(PRECISIONS)}, got {weights!r}")
    training = [name for name, m in model.named_modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase)) and m.training]
    if training:
        raise ValueError(
            f"prepare: model must be in eval mode; call model.eval() first ({training[0] or 'the model'} is in "
            "training mode)"
        )
    if not inplace:
        model = copy.deepcopy(model)
    report, made = Report(weights), dict[nn.Module, nn.Module]()
    found = [
        (name, m)
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, (nn.RNNBase, nn.RNNCellBase, _Prepared))
    ]
    for name, module in found:
        of = f"{type(module).__module__.split('.')[0]}.nn.{type(module).__name__}"
        if isinstance(module, _Prepared):
            report.left[name] = type(module).__name__, "it is already prepared"
            continue
        if module in made:
            model = _replace(model, name, made[module])
            continue
        reason = _obstacle(module)
        if reason:
            report.left[name] = of, reason
            continue
        prepared = _prepared(module, weights)
        made[module] = prepared
        model = _replace(model, name, prepared)
        report.prepared[name] = of, prepared.source_bytes, prepared.prepared_bytes
    return model, report


def _obstacle(module: nn.Module) -> str:
    """Why a recurrent module cannot be prepared; empty if it can."""
    hooks = [type(hook).__module__ for hook in module._forward_pre_hooks.values()]
    if is_parametrized(module) or any(name.startswith("torch.nn.utils.") for name in hooks):
        return "a parametrization, weight norm or pruning computes its weights; remove it first"
    known, of = _LAYERS + _CELLS, type(module)
    inherited = {c for k in known for c in k.__mro__}
    if not isinstance(module, known) or any(overridden(c) for c in of.__mro__ if c not in inherited):
        return "its class is not one of torch.nn or seqkernels.nn, and overrides something"
    tensors = [*module.parameters(), *module.buffers()]
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"its weights must be float32, bfloat16 or float16, got {', '.join(sorted(map(str, dtypes)))}"
    devices = {t.device.type for t in tensors}
    if devices != {"cpu"}:
        return f"its weights must be on the CPU, got {', '.join(sorted(devices))}"
    options = getattr(module, "options", None)
    if options is not None and options.return_all_states:
        return "return_all_states needs the states of all steps, which prepared modules do not return"
    return ""


def _prepared(module: Any, weights: str) -> _Prepared:
    _, options, kind = family_and_options(module)
    of_cell = isinstance(module, nn.RNNCellBase)
    name = getattr(module, "_name", type(module).__name__)
    made: _Prepared = (PreparedCell if of_cell else PreparedRecurrent)(name, module, kind, options, weights)
    for hooks in _HOOKS:
        getattr(made, hooks).update(getattr(module, hooks))
    return made


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
    return model


def calibrate(model: nn.Module, data: Iterable[Any]) -> nn.Module:
    """Collects static ranges for the int8 layers of a prepared model, which then replace the ranges per row and step.

    Runs the model on each element of `data` and records the largest |value| of the input and of h of each layer and
    direction. Values beyond these ranges saturate in later calls. Cells, and inner products of nested or two-stage
    cells, keep a range per row.

    Args:
        model: returned by prepare(..., weights="int8").
        data: batches; a tuple is passed as positional arguments, a mapping as keyword arguments, else as one argument.
    Returns:
        The model.
    Raises:
        ValueError: the model has no int8 layer, or `data` is empty, not finite, or does not reach a layer. The ranges
            are then unchanged.
        TypeError: `data` is a tensor or not iterable.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PreparedRecurrent) and m.weights == "int8"}
    if not layers:
        raise ValueError('calibrate: model must have a layer prepared with weights="int8", got none')
    if isinstance(data, torch.Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"calibrate: data must be an iterable of batches, such as a list, got {type(data).__name__}")
    for layer in layers.values():
        layer._begin_observing()
    count = 0
    try:
        with torch.no_grad():
            for batch in data:
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, tuple) and not isinstance(batch, PackedSequence):
                    model(*batch)
                else:
                    model(batch)
                count += 1
    finally:
        observed = {name: layer._end_observing() for name, layer in layers.items()}
    if not count:
        raise ValueError("calibrate: data must have at least one batch, got none")
    missing = [name or "(model)" for name, found in observed.items() if found is None]
    if missing:
        raise ValueError(f"calibrate: data must reach every int8 layer, got no values for {', '.join(missing)}")
    for name, found in observed.items():
        if found is not None:
            layers[name].get_buffer("ranges").copy_(found)
    return model
