"""Differential privacy with Opacus. Importing this module registers the modules of seqkernels with its validator.

    import seqkernels.integrations.opacus
    model = opacus.validators.ModuleValidator.fix(model)

Opacus looks up modules by their exact class. Without this module, its validator accepts each module of seqkernels, also
those for which training then fails.

| module | validator | per-sample gradients |
|---|---|---|
| Embedding, EmbeddingBag [B, L], LSTMCell, GRUCell, RNNCell | accepted | by torch.func |
| LSTM, GRU, MultiheadAttention | replaced by `fix` | of Opacus' DPLSTM, DPGRU, DPMultiheadAttention |
| TransformerEncoderLayer, TransformerDecoderLayer | attention replaced by `fix` | as above |
| other recurrent layers; options of LSTM and GRU; attention with batch_first | refused | none |
| fused_optimizer, max_norm | refused | none |
"""

from __future__ import annotations

from typing import Any

import torch
from opacus.validators import ModuleValidator, register_module_fixer, register_module_validator
from opacus.validators.errors import NotYetSupportedModuleError, ShouldReplaceModuleError, UnsupportedModuleError

from .. import nn

__all__: list[str] = []

_REPLACED = {
    nn.LSTM: (torch.nn.LSTM, "DPLSTM"),
    nn.GRU: (torch.nn.GRU, "DPGRU"),
    nn.MultiheadAttention: (torch.nn.MultiheadAttention, "DPMultiheadAttention"),
}
_LAYERS = nn.RNN, nn.MGU, nn.SLSTM, nn.NestedLSTM, nn.DreamerGRU
_TABLES = nn.Embedding, nn.EmbeddingBag


def _unsupported(module: Any) -> str | None:
    """The option of a replaced module that its replacement does not support."""
    if isinstance(module, nn.MultiheadAttention):  # Opacus 1.6: DPMultiheadAttention then gives other outputs
        return "batch_first=True" if module.batch_first else None
    options = getattr(module, "options", None)
    if options is not None and not options.plain:
        return f"options of {type(module).__name__}"
    return "proj_size" if getattr(module, "proj_size", 0) else None


@register_module_validator(list(_REPLACED))
def validate_replaced(module: torch.nn.Module) -> list[UnsupportedModuleError]:
    name, by, option = type(module).__name__, _REPLACED[type(module)][1], _unsupported(module)
    if option is not None:
        return [NotYetSupportedModuleError(f"{name}: Opacus has no per-sample gradients with {option}")]
    message = f"{name}: Opacus has no per-sample gradients; ModuleValidator.fix replaces it by {by}"
    return [ShouldReplaceModuleError(message)]


@register_module_fixer(list(_REPLACED))
def fix_replaced(module: torch.nn.Module, **options: Any) -> torch.nn.Module:
    if _unsupported(module) is not None:
        return module
    fixed: torch.nn.Module = ModuleValidator.FIXERS[_REPLACED[type(module)][0]](module, **options)
    return fixed


@register_module_validator(_LAYERS)
def validate_layer(module: torch.nn.Module) -> list[UnsupportedModuleError]:
    name = type(module).__name__
    instead = "opacus.layers.DPRNN" if name == "RNN" else "LSTM or GRU"
    return [NotYetSupportedModuleError(f"{name}: Opacus has no per-sample gradients; use {instead}")]


@register_module_validator(_TABLES)
def validate_table(module: Any) -> list[UnsupportedModuleError]:
    found = []
    for option in ("fused_optimizer", "max_norm"):
        if getattr(module, option) is not None:
            found.append(
                NotYetSupportedModuleError(
                    f"{type(module).__name__}: {option} must be None, it writes into the table without noise"
                )
            )
    return list(found)
